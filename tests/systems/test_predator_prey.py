"""Predators and prey as two populations."""

from __future__ import annotations

import itertools
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from evojax_suite import cest, networks
from evojax_suite.data import load, normalize
from evojax_suite.networks import NetworkConfig
from evojax_suite.systems.cest import predator_prey
from evojax_suite.training import EngineConfig, TrainingConfig
from evojax_suite.types import Split

DIGITS = load("digits")
DATASET = replace(DIGITS, train=Split(DIGITS.train.images[:80], DIGITS.train.labels[:80]))
NETWORK = NetworkConfig(width=4, depth=1, normalization="batch")
CONFIG = predator_prey.Config(
    num_predators=4,
    network=NETWORK,
    training=TrainingConfig(num_epochs=1, batch_size=16, shift_pixels=1),
    engine=EngineConfig(members_in_flight=3),
)
PARAMS = predator_prey.Params()
DATA = cest.make_data(cest.Config(network=NETWORK, fraction=0.25), DATASET)
ALGORITHM = predator_prey.build(CONFIG, 10, DATASET.image_shape)
INIT, STEP = jax.jit(ALGORITHM.init), jax.jit(ALGORITHM.step)
REPRODUCE = jax.jit(predator_prey.reproduce, static_argnums=3)


@pytest.fixture(scope="module")
def states():
    found = [(INIT(jax.random.key(0), PARAMS, DATA), None)]
    for generation in range(3):
        key = jax.random.fold_in(jax.random.key(1), generation)
        found.append(STEP(key, found[-1][0], PARAMS, DATA))
    return found


def wrong_of(state):
    """(P, N), network by network."""
    network = networks.create(NETWORK, 10, (8, 8, 1))
    images = jnp.asarray(normalize(DATASET.train.images, DIGITS.mean, DIGITS.std))
    members = [jax.tree.map(lambda leaf, m=m: leaf[m], state.predators.variables) for m in range(4)]
    predictions = [network.apply(variables, images).argmax(1) for variables in members]
    return np.stack(predictions) != DATASET.train.labels


def test_fitness_is_what_predators_catch_and_prey_escape(states):
    for (before, _), (after, metrics) in itertools.pairwise(states):
        wrong = wrong_of(after)
        np.testing.assert_allclose(
            after.fitness, 1 - wrong[:, np.asarray(before.prey)].mean(1), atol=1e-6
        )
        escaped = wrong.sum(0)
        np.testing.assert_allclose(metrics.wrong_mean, escaped.mean(), rtol=1e-5)
        np.testing.assert_allclose(
            metrics.prey_fitness_mean, escaped[np.asarray(after.prey)].mean(), rtol=1e-5
        )
        assert len(np.unique(after.prey)) == 20
        if (escaped > 0).sum() >= 20:  # those that all catch come last
            assert (escaped[np.asarray(after.prey)] > 0).all()
        assert int(metrics.num_failed) == 0


def test_predators_have_their_own_weights_and_statistics(states):
    (start, _), (first, _), *_ = states
    for leaf in jax.tree.leaves(start.predators.parameters):
        assert np.ptp(leaf, axis=0).max() == 0  # a shared start
    for leaf in jax.tree.leaves(first.predators.statistics):
        assert np.ptp(leaf, axis=0).max() > 0


def reproduced(rates, seed=0, fitness=(0.1, 0.7, 0.2, 0.0)):
    """The reproduction of predators whose values are all their number."""
    predators = INIT(jax.random.key(0), PARAMS, DATA).predators

    def numbered(leaf):
        number = jnp.arange(4.0).reshape(-1, *[1] * (leaf.ndim - 1))
        return jnp.broadcast_to(number, leaf.shape).astype(leaf.dtype)

    predators = jax.tree.map(numbered, predators)
    return REPRODUCE(jax.random.key(seed), predators, jnp.array(fitness), CONFIG, rates)


def test_elites_stay_and_children_take_each_layer_whole_from_a_parent():
    rates = replace(PARAMS, crossover_rate=1.0, mutation_rate=0.0)
    firsts, mixed = [], 0
    for seed in range(60):
        after = jax.device_get(reproduced(rates, seed))
        layers = {}
        for kind in (after.parameters, after.statistics["batch_stats"]):
            for layer, parts in kind.items():
                for leaf in parts.values():
                    values = leaf.reshape(4, -1)
                    assert (np.ptp(values, axis=1) == 0).all()
                    layers.setdefault(layer, []).append(values[:, 0])
        for columns in layers.values():  # kernel, bias and statistics together
            assert all(np.array_equal(columns[0], column) for column in columns)
        origins = np.stack([columns[0] for columns in layers.values()])
        assert (origins[:, 0] == 1).all()  # the fittest
        assert (origins < 3).all()  # fitness 0 leaves nothing
        mixed += (np.ptp(origins[:, 1:], axis=0) > 0).sum()
        firsts.extend(np.asarray(jax.tree.leaves(after.optimizer)[0]).reshape(4, -1)[1:, 0])
    assert mixed > 20
    counts = np.bincount(np.asarray(firsts, int), minlength=4) / len(firsts)
    np.testing.assert_allclose(counts, [0.1, 0.7, 0.2, 0.0], atol=0.1)


def test_mutation_is_noise_in_proportion_to_the_layer():
    predators = INIT(jax.random.key(0), PARAMS, DATA).predators
    rates = replace(PARAMS, mutation_rate=1.0, mutation_scale=0.05)
    after = REPRODUCE(jax.random.key(1), predators, jnp.ones(4), CONFIG, rates)
    kernel, changed = (
        predators.parameters["Dense_0"]["kernel"],
        after.parameters["Dense_0"]["kernel"],
    )
    np.testing.assert_array_equal(changed[0], kernel[0])  # the elite
    ratio = np.std(np.asarray(changed[1:] - kernel[1:])) / np.std(np.asarray(kernel[0]))
    assert abs(ratio - 0.05) < 0.01
    jax.tree.map(np.testing.assert_array_equal, after.statistics, predators.statistics)


def test_a_failed_predator_is_counted_and_leaves_no_children():
    state = INIT(jax.random.key(0), PARAMS, DATA)
    broken = jax.tree.map(lambda leaf: leaf.at[2].set(jnp.nan), state.predators.parameters)
    state = replace(state, predators=replace(state.predators, parameters=broken))
    state, metrics = STEP(jax.random.key(1), state, PARAMS, DATA)
    assert int(metrics.num_failed) == 1
    assert float(state.fitness[2]) == 0
    state, metrics = STEP(jax.random.key(2), state, PARAMS, DATA)
    assert int(metrics.num_failed) == 0


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"num_predators": 1}, "num_predators must be >= 2, got 1"),
        ({"num_elites": 8}, r"num_elites must be in 0\.\.7, got 8"),
        ({"num_generations": 0}, "num_generations must be >= 1, got 0"),
    ],
)
def test_settings_out_of_range_get_one_line(options, said):
    with pytest.raises(ValueError, match=said):
        predator_prey.Config(**options)
