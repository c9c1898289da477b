"""GA distillation: what Sato et al. 2026 says of individuals, generations and the result."""

from __future__ import annotations

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from evojax_suite import ga_distillation as ga, networks
from evojax_suite.data import load, normalize
from evojax_suite.networks import NetworkConfig
from evojax_suite.operators import random_examples
from evojax_suite.runtime import loop
from evojax_suite.training import TrainingConfig, evaluate, fit, make_batches

CONFIG = ga.Config(
    population_size=6,
    network=NetworkConfig(width=4, depth=1),
    training=TrainingConfig(num_epochs=4),
)
PARAMS = ga.Params()
SHAPE = (8, 8, 1)


@pytest.fixture(scope="module")
def digits():
    return load("digits")


@pytest.fixture(scope="module")
def data(digits):
    return ga.make_data(digits)


def build(config=CONFIG):
    algorithm = ga.build(config, 10, SHAPE)
    return dataclasses.replace(
        algorithm, init=jax.jit(algorithm.init), step=jax.jit(algorithm.step)
    )


@pytest.mark.parametrize("images_per_class", [1, 3])
def test_individuals_start_as_real_training_images(digits, data, images_per_class):
    config = dataclasses.replace(CONFIG, images_per_class=images_per_class)
    flat = ga.random_individuals(jax.random.key(0), config, 10, data, 20)
    train = normalize(digits.train.images, digits.mean, digits.std).reshape(-1, 64)
    assert flat.shape == (20, 10 * images_per_class * 64)
    assert flat.min() < 0  # normalised and not clipped
    assert flat.max() > 1
    positions = set()
    for individual in np.asarray(flat).reshape(20, 10 * images_per_class, 64):
        chosen = []
        for place, image in enumerate(individual):
            matches = np.flatnonzero(np.abs(train - image).max(1) < 1e-5)
            assert matches.size
            assert digits.train.labels[matches[0]] == place // images_per_class
            chosen.append(matches[0])
        assert len(set(chosen)) == len(chosen)
        positions.update(chosen)
    assert len(positions) > 100 * images_per_class  # not the same images every time


def test_random_selection_is_uniform_within_a_class(data):
    labels = jnp.asarray([0, 1, 0, 1, 0, 1, 1, 1])
    keys = jax.random.split(jax.random.key(0), 6000)
    chosen = jax.vmap(lambda key: random_examples(key, labels, 4, 2))(keys)
    counts = np.bincount(np.asarray(chosen).reshape(-1), minlength=8) / 6000
    expected = np.where(labels == 0, 2 / 3, 2 / 5)
    np.testing.assert_allclose(counts, expected, atol=5 * np.sqrt(0.25 / 6000))


def test_the_score_is_the_accuracy_of_a_network_trained_on_the_individual(digits, data):
    population = ga.random_individuals(jax.random.key(1), CONFIG, 10, data, 3)
    scores = ga.score_population(jax.random.key(2), CONFIG, 10, SHAPE, population, data)
    network = networks.create(CONFIG.network, 10, SHAPE)
    images = normalize(data.fitness_images, data.mean, data.std)
    # fitness images in another order and batch size: the accuracy does not know
    batches = make_batches(images[::-1], data.fitness_labels[::-1], 37)
    keys = jax.random.split(jax.random.split(jax.random.key(2))[0], 3)
    for index in range(3):
        variables = fit(
            keys[index],
            network,
            CONFIG.training,
            population[index].reshape(10, 8, 8, 1),
            jnp.eye(10),
        )
        expected = evaluate(network, variables, batches).accuracy
        np.testing.assert_allclose(scores.fitness[index], expected, atol=2 / 360)


def test_half_survives_and_is_evaluated_anew_and_children_are_clipped(data):
    algorithm = build()
    state = algorithm.init(jax.random.key(0), PARAMS, data)
    first = state.population
    state, _ = algorithm.step(jax.random.key(1), state, PARAMS, data)
    fitness = -np.asarray(state.strategy.fitness)
    best_first = np.argsort(-fitness, kind="stable")[:3]
    np.testing.assert_array_equal(state.population[:3], first[best_first])
    children = np.asarray(state.population[3:])
    assert children.min() >= 0
    assert children.max() <= 1
    assert np.asarray(state.population[:3]).min() < 0
    before = np.sort(fitness)[::-1][:3]
    state, _ = algorithm.step(jax.random.key(2), state, PARAMS, data)
    assert not np.array_equal(-np.asarray(state.strategy.fitness)[:3], before)


def test_image_bounds_are_those_of_normalised_images(digits, data):
    config = dataclasses.replace(CONFIG, clip="image")
    algorithm = build(config)
    state = algorithm.init(jax.random.key(0), PARAMS, data)
    state, _ = algorithm.step(jax.random.key(1), state, PARAMS, data)
    low, high = (-digits.mean[0] / digits.std[0], (1 - digits.mean[0]) / digits.std[0])
    children = np.asarray(state.population[3:])
    np.testing.assert_allclose([children.min(), children.max()], [low, high], atol=1e-5)


def test_the_best_of_the_run_is_kept(data):
    algorithm = build()
    state = algorithm.init(jax.random.key(0), PARAMS, data)
    bests = []
    for generation in range(5):
        state, metrics = algorithm.step(jax.random.key(generation), state, PARAMS, data)
        bests.append(float(metrics.fitness_best))
        assert float(state.best_score) == max(bests)
        assert int(state.best_generation) == np.argmax(bests) + 1
    assert max(bests) > bests[-1]  # else the test would not tell the run's best from the last


def test_a_failed_member_ranks_last_and_is_counted(data):
    algorithm = build()
    state = algorithm.init(jax.random.key(0), PARAMS, data)
    state = state.replace(population=state.population.at[2].set(jnp.nan).at[4].set(jnp.inf))
    state, metrics = algorithm.step(jax.random.key(1), state, PARAMS, data)
    assert int(metrics.num_failed) == 2
    assert all(np.isfinite(value) for value in (metrics.fitness_best, metrics.fitness_mean))
    assert np.isfinite(state.best).all()
    assert np.isfinite(state.population).all()


def test_a_generation_that_fails_whole_does_not_end_the_run(data):
    algorithm = build()
    state = algorithm.init(jax.random.key(0), PARAMS, data)
    good, _ = algorithm.step(jax.random.key(1), state, PARAMS, data)
    broken = good.replace(population=jnp.full_like(good.population, jnp.nan))
    after, metrics = algorithm.step(jax.random.key(2), broken, PARAMS, data)
    assert int(metrics.num_failed) == 6
    np.testing.assert_array_equal(after.best, good.best)
    assert float(after.best_score) == float(good.best_score)


def test_common_random_numbers_give_equal_individuals_equal_scores(data):
    population = jnp.tile(ga.random_individuals(jax.random.key(1), CONFIG, 10, data, 1), (3, 1))
    for common in (True, False):
        config = dataclasses.replace(CONFIG, common_random_numbers=common, fitness="cross_entropy")
        scores = ga.score_population(jax.random.key(2), config, 10, SHAPE, population, data)
        assert (len(set(np.asarray(scores.fitness).tolist())) == 1) is common
        assert (scores.fitness < 0).all()


def test_networks_per_member_averages(data):
    population = ga.random_individuals(jax.random.key(1), CONFIG, 10, data, 2)
    config = dataclasses.replace(CONFIG, networks_per_member=3)
    averaged = ga.score_population(jax.random.key(2), config, 10, SHAPE, population, data)
    repeated = ga.score_population(
        jax.random.key(2), CONFIG, 10, SHAPE, jnp.repeat(population, 3, axis=0), data
    )
    expected = repeated.fitness.reshape(2, 3).mean(1)
    np.testing.assert_allclose(averaged.fitness, expected, atol=1e-6)


def test_the_fitness_subset_is_fresh_in_each_generation(data):
    config = dataclasses.replace(
        CONFIG,
        fitness_subset_size=30,
        fitness="cross_entropy",
        training=TrainingConfig(num_epochs=0),
        common_random_numbers=True,
    )
    population = ga.random_individuals(jax.random.key(1), config, 10, data, 1)
    values = {
        float(ga.score_population(key, config, 10, SHAPE, population, data).fitness[0])
        for key in jax.random.split(jax.random.key(2), 3)
    }
    assert len(values) == 3


def test_held_out_images_are_not_seen_by_the_fitness(data):
    config = dataclasses.replace(CONFIG, holdout_ratio=0.25)
    population = ga.random_individuals(jax.random.key(1), config, 10, data, 1)

    def scores(labels):
        changed = data.replace(fitness_labels=labels)
        return ga.score_population(jax.random.key(2), config, 10, SHAPE, population, changed)

    order = np.asarray(jax.random.permutation(jax.random.key(0), 360))
    before = scores(data.fitness_labels)
    held_out = order[:90]
    wrong = data.fitness_labels.at[held_out].set((data.fitness_labels[held_out] + 1) % 10)
    after = scores(wrong)
    assert float(after.fitness[0]) == float(before.fitness[0])
    assert float(after.holdout[0]) != float(before.holdout[0])


def test_patience_stops_a_run(data, tmp_path):
    config = dataclasses.replace(CONFIG, holdout_ratio=0.25, patience=2)
    outcome = loop.run(build(config), jax.random.key(0), PARAMS, data, 200, tmp_path)
    done = int(outcome.state.generation)
    assert done < 200
    assert done == int(outcome.state.best_generation) + 2
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert len(lines) == done
    assert max(line["holdout_score"] for line in lines) == float(outcome.state.best_score)


def test_chunks_of_generations_give_the_same_run(data, tmp_path):
    one = loop.run(build(), jax.random.key(0), PARAMS, data, 7, tmp_path / "one")
    chunks = loop.run(
        build(), jax.random.key(0), PARAMS, data, 7, tmp_path / "three", steps_per_call=3
    )
    assert int(chunks.state.generation) == 7
    np.testing.assert_allclose(chunks.state.best_score, one.state.best_score, atol=0.03)
    lines = (tmp_path / "three/metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["generation"] for line in lines] == list(range(1, 8))


def test_soft_labels_are_probabilities_and_evolve(data):
    config = dataclasses.replace(CONFIG, evolve_labels=True)
    algorithm = build(config)
    state = algorithm.init(jax.random.key(0), PARAMS, data)
    start = ga.decode(config, 10, SHAPE, state.population[0], data)
    np.testing.assert_array_equal(start.labels, np.eye(10))
    for generation in range(2):
        state, _ = algorithm.step(jax.random.key(generation), state, PARAMS, data)
    labels = ga.decode(config, 10, SHAPE, state.population[-1], data).labels
    np.testing.assert_allclose(labels.sum(1), 1, rtol=1e-5)
    assert labels.min() >= 0
    assert not np.array_equal(labels, np.eye(10))
    zeros = jnp.zeros_like(state.population[0])
    np.testing.assert_allclose(ga.decode(config, 10, SHAPE, zeros, data).labels, 0.1)


def test_the_images_on_the_way_are_kept_twice_a_doubling(data):
    algorithm = build()
    state = algorithm.init(jax.random.key(0), PARAMS, data)
    results = []
    for generation in range(6):
        state, _ = algorithm.step(jax.random.key(generation), state, PARAMS, data)
        results.append(algorithm.result(state, PARAMS, data).images)
    generations, frames = ga.history(CONFIG, 10, state, data)
    assert generations.tolist() == [1, 2, 3, 5, 6]
    np.testing.assert_array_equal(frames.images, np.stack([results[g - 1] for g in generations]))
    key = jax.random.key(0)
    numbers, fitness = ga.reference_fitness(key, CONFIG, 10, state, data)
    assert numbers.tolist() == generations.tolist()
    assert len(set(fitness.tolist())) > 1
    same = state.replace(frames=jnp.broadcast_to(state.best, state.frames.shape))
    _, alike = ga.reference_fitness(key, CONFIG, 10, same, data)
    np.testing.assert_array_equal(alike, fitness[-1])  # the networks are the same for all
    places = np.asarray(ga.frame_of(1.0 + jnp.arange(5000), 24))
    assert np.all(np.diff(places) >= 0)
    assert places.max() == 23


@pytest.mark.parametrize(
    "strategy", ["SimpleGA", "DifferentialEvolution", "PSO", "Open_ES", "PGPE"]
)
def test_evosax_algorithms_run_in_place_of_ours(data, strategy):
    config = dataclasses.replace(CONFIG, strategy=strategy)
    algorithm = build(config)
    state = algorithm.init(jax.random.key(0), PARAMS, data)
    populations = [state.population]
    for generation in range(2):
        state, metrics = algorithm.step(jax.random.key(generation), state, PARAMS, data)
        populations.append(state.population)
    assert int(metrics.num_failed) == 0
    assert not np.array_equal(populations[1], populations[2])
    real = ga.random_individuals(
        jax.random.split(jax.random.key(0), 3)[0], config, 10, data, config.population_size
    )
    if strategy in ("SimpleGA", "DifferentialEvolution", "PSO"):  # start from real images
        np.testing.assert_array_equal(populations[0], real)
    else:  # start around their mean
        spread = np.abs(np.asarray(populations[0].mean(0) - real.mean(0)))
        assert spread.mean() < 1.5


def test_strategy_std_is_the_initial_deviation(data):
    deviations = []
    for std in (0.05, 0.5):
        config = dataclasses.replace(CONFIG, strategy="SNES", strategy_std=std, population_size=40)
        population = build(config).init(jax.random.key(0), PARAMS, data).population
        deviations.append(float(population.std(0).mean()))
    np.testing.assert_allclose(deviations, [0.05, 0.5], rtol=0.1)


def test_params_sweep_in_one_compiled_call(data):
    algorithm = ga.build(CONFIG, 10, SHAPE)
    sweep = ga.Params(
        crossover_rate=jnp.array([0.0, 1.0]),
        laplace_location=jnp.zeros(2),
        laplace_scale=jnp.full(2, 0.5),
        mutation_scale=jnp.zeros(2),
    )

    @jax.jit
    @jax.vmap
    def run(params):
        state = algorithm.init(jax.random.key(0), params, data)
        return algorithm.step(jax.random.key(1), state, params, data)[0].population

    without, with_crossover = run(sweep)
    parents = np.clip(np.asarray(without[:3]), 0, 1)
    for child in np.asarray(without[3:]):  # rate 0 and no noise: a clipped parent
        assert np.abs(parents - child).max(1).min() < 1e-6
    assert not np.array_equal(without[3:], with_crossover[3:])


def test_the_test_part_is_not_in_the_data_of_the_algorithm(digits, data):
    seen = {size for leaf in jax.tree.leaves(data) for size in leaf.shape[:1]}
    assert len(digits.test) not in seen
    assert {len(digits.train), len(digits.validation)} <= seen
