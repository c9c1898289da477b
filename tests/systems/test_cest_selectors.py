"""The selectors that CEST competes with, and the recommended one, against plain computations."""

from __future__ import annotations

import itertools
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.stats import norm

from evojax_suite import cest, networks
from evojax_suite.data import load, normalize, some_images
from evojax_suite.networks import NetworkConfig
from evojax_suite.systems.cest import gradients, online, reference, subsets
from evojax_suite.training import TrainingConfig, batches_of, evaluate, start_fit
from evojax_suite.types import Split

DIGITS = load("digits")
DATASET = replace(DIGITS, train=Split(DIGITS.train.images[:96], DIGITS.train.labels[:96]))
NETWORK = NetworkConfig(width=4, depth=1, normalization="batch", dropout=0.2)
CONFIG = cest.Config(
    network=NETWORK,
    training=TrainingConfig(num_epochs=6, batch_size=16),
    epochs_per_selection=2,
    prey_population=6,
    prey_generations=3,
)
RULES = {
    "reducible_loss": {"selection": "reducible_loss"},
    "selective_backprop": {"selection": "selective_backprop"},
    "infobatch": {"selection": "infobatch"},
    "craig": {"selection": "craig", "balanced": True},
    "grad_match": {"selection": "grad_match"},
    "el2n": {"selection": "top_k", "difficulty": "el2n"},
    "grand": {"selection": "loss_proportional", "difficulty": "grand"},
    "matching": {"matching": True, "difficulty": "reducible"},
    "random": {"selection": "random"},
}


def trained(config, params=None, num_epochs=6, dataset=DATASET, seed=0):
    params = params or cest.Params()
    algorithm = cest.build(config, dataset.num_classes, dataset.image_shape)
    data, step = cest.make_data(config, dataset), jax.jit(algorithm.step)
    state = jax.jit(algorithm.init)(jax.random.key(seed), params, data)
    states, metrics = [state], []
    for epoch in range(num_epochs):
        key = jax.random.fold_in(jax.random.key(100 + seed), epoch)
        state, values = step(key, state, params, data)
        states.append(state)
        metrics.append(jax.device_get(values))
    return states, metrics


@pytest.mark.parametrize("rule", RULES)
def test_gradients_and_steps_are_those_that_were_foretold(rule):
    config = replace(CONFIG, **RULES[rule])
    states, metrics = trained(config)
    counted = [float(m.gradient_examples) for m in metrics]
    assert counted[0] == 96
    most = cest.num_gradient_examples(config, 96)
    if rule == "infobatch":
        assert 96 * 3 < counted[-1] < most == 6 * 96
    else:
        assert counted[-1] == most
        assert set(np.diff(counted)) == {16.0 if config.is_online else 24.0}
        assert int(states[-1].num_steps) == 6 + 5 * (1 if config.is_online else 2)
    for before, after, m in zip(states, states[1:], metrics, strict=False):
        chosen = np.asarray(after.chosen)[: int(after.num_chosen)]
        assert int(m.distinct) == len(np.unique(chosen))
        assert int(after.num_chosen) == counted[int(before.epoch)] - (
            counted[int(before.epoch) - 1] if int(before.epoch) else 0
        )
    assert all(int(m.num_failed) == 0 for m in metrics)
    assert np.isfinite(metrics[-1].loss)


@pytest.mark.parametrize("rule", ["reducible_loss", "infobatch", "random"])
def test_the_cosine_ends_with_the_training(rule):
    recipe = replace(CONFIG.training, schedule="cosine", learning_rate=1e-2)
    states, _ = trained(replace(CONFIG, training=recipe, **RULES[rule]))

    def moved(before, after):
        pairs = zip(
            *map(jax.tree.leaves, (before.fit.parameters, after.fit.parameters)), strict=True
        )
        steps = max(1, int(after.num_steps - before.num_steps))
        return np.sqrt(sum(float(((a - b) ** 2).sum()) for a, b in pairs)) / steps

    lengths = [moved(*pair) for pair in itertools.pairwise(states[1:])]
    assert lengths[-1] < 0.35 * lengths[0]


@pytest.mark.parametrize("size", [7, 60])
def test_predictions_leave_their_example_out(size):
    random = np.random.default_rng(0)
    features, targets = random.normal(size=(40, size)), np.eye(3)[random.integers(0, 3, 40)]
    found = reference.leave_one_out(jnp.asarray(features), jnp.asarray(targets), 0.3)
    centred = features - features.mean(0)
    penalty = np.diag([*[0.3 * np.trace(centred.T @ centred) / size] * size, 0.0])
    with_constant = np.column_stack([features, np.ones(40)])
    for place in range(40):
        rest = np.arange(40) != place
        inputs = with_constant[rest]
        weights = np.linalg.solve(inputs.T @ inputs + penalty, inputs.T @ targets[rest])
        np.testing.assert_allclose(found[place], with_constant[place] @ weights, atol=1e-4)


def test_the_reference_finds_what_cannot_be_learnt():
    dataset = some_images(DIGITS, 600)
    labels = dataset.train.labels.copy()
    wrong = np.arange(600) % 10 == 3
    labels[wrong] = (labels[wrong] + 1 + np.arange(60) % 9) % 10
    images = jnp.asarray(normalize(dataset.train.images, dataset.mean, dataset.std))
    estimate = jax.jit(reference.reference_probabilities, static_argnums=(3, 4))
    found = estimate(jax.random.key(0), images, jnp.asarray(labels), 10, 64)
    np.testing.assert_allclose(found.sum(1), 1.0, rtol=1e-4)
    assert (np.asarray(found).argmax(1) == dataset.train.labels).mean() > 0.95
    losses = np.asarray(reference.irreducible_losses(found, jnp.asarray(labels)))
    assert np.mean(losses[wrong][:, None] > losses[~wrong]) > 0.99


def test_cells_average_every_pixel_once():
    for size in (3, 6, 7, 23):
        cells = np.asarray(reference._cells(size))
        np.testing.assert_allclose(cells.sum(1), 1.0, rtol=1e-6)
        assert ((cells > 0).sum(0) == 1).all()


def test_priorities_are_what_they_say():
    losses, least = jnp.array([3.0, 1.0, 2.0, 0.5]), jnp.array([2.9, 0.0, 0.5, 0.4])
    highest = online.reducible_losses(jax.random.key(0), losses, least, 0.0)
    np.testing.assert_allclose(highest, losses - least, rtol=1e-6)
    keys = jax.random.split(jax.random.key(1), 4000)
    softly = jax.vmap(lambda key: online.reducible_losses(key, losses, least, 0.5).argmax())(keys)
    shares = np.bincount(softly, minlength=4) / 4000
    expected = np.exp((losses - least) / 0.5)
    np.testing.assert_allclose(shares, expected / expected.sum(), atol=0.04)
    ranked = jax.vmap(lambda key: online.loss_ranks(key, losses, 3.0).argmax())(keys)
    expected = np.array([4, 2, 3, 1.0]) ** 3
    shares = np.bincount(ranked, minlength=4) / 4000
    np.testing.assert_allclose(shares, expected / expected.sum(), atol=0.04)


def test_an_epoch_learns_from_the_first_of_each_steps_candidates():
    network = networks.create(NETWORK, 10, (8, 8, 1))
    recipe = TrainingConfig(num_epochs=1, batch_size=8)
    state = start_fit(jax.random.key(0), network, recipe, (8, 8, 1))
    images = jnp.asarray(normalize(DATASET.train.images, DIGITS.mean, DIGITS.std))
    labels = jnp.asarray(DATASET.train.labels)

    def by_place(key, losses, places):
        del key, losses
        return -places.astype(jnp.float32)

    fixed = network, recipe, 3, state, images, labels
    _, seen = online.fit_epoch(jax.random.key(1), *fixed, 24, by_place)
    order = np.asarray(jax.random.permutation(jax.random.split(jax.random.key(1))[0], 96))
    expected = np.concatenate([np.sort(part)[:8] for part in order.reshape(3, 32)])
    np.testing.assert_array_equal(np.flatnonzero(np.isfinite(seen.losses)), np.sort(expected))
    assert online.steps_and_batch(recipe, 27) == (3, 8)
    assert online.steps_and_batch(recipe, 5) == (1, 5)
    assert online.num_candidates(recipe, 100, 27) == 99


@pytest.fixture(scope="module")
def found():
    """The outputs of a network, and the gradients of its last layer by differentiation."""
    network = networks.create(NETWORK, 10, (8, 8, 1))
    variables = network.init(jax.random.key(0), jnp.zeros((1, 8, 8, 1)))
    images = jnp.asarray(normalize(DATASET.train.images, DIGITS.mean, DIGITS.std))
    labels = jnp.asarray(DATASET.train.labels)
    outputs = gradients.outputs(network, variables, images, labels, 10)
    last = max(name for name in variables["params"] if name.startswith("Dense"))

    def loss(layer, image, label):
        parameters = {**variables["params"], last: layer}
        logits = network.apply({**variables, "params": parameters}, image[None])[0]
        return -jax.nn.log_softmax(logits)[label]

    each = jax.vmap(jax.grad(loss), in_axes=(None, 0, 0))(variables["params"][last], images, labels)
    flat = np.concatenate([np.asarray(leaf).reshape(96, -1) for leaf in jax.tree.leaves(each)], 1)
    losses = jax.vmap(loss, in_axes=(None, 0, 0))(variables["params"][last], images, labels)
    return outputs, flat, losses


def test_gradients_of_the_last_layer_are_products(found):
    outputs, flat, losses = found
    np.testing.assert_allclose(outputs.losses, losses, rtol=1e-4)
    np.testing.assert_allclose(gradients.norms(outputs), np.linalg.norm(flat, axis=1), rtol=1e-4)
    products = (outputs.residuals @ outputs.residuals.T) * (outputs.inputs @ outputs.inputs.T)
    np.testing.assert_allclose(products, flat @ flat.T, rtol=1e-3, atol=1e-4)
    keys = jax.random.split(jax.random.key(0), 200)
    sketches = jax.vmap(lambda key: gradients.sketched(key, outputs))(keys)
    means = np.einsum("kia,kja->ij", sketches, sketches) / 200
    scale = np.sqrt(np.outer(np.diag(flat @ flat.T), np.diag(flat @ flat.T)))
    assert np.abs((means - flat @ flat.T) / scale).max() < 0.1


def test_craig_is_greedy_facility_location(found):
    outputs, flat, _ = found
    groups = subsets.make_groups(DATASET.train.labels, 20, 10, balanced=True)
    chosen, weights = gradients.craig(outputs, groups)
    for label in range(10):
        own = np.flatnonzero(DATASET.train.labels == label)
        distances = np.linalg.norm(flat[own][:, None] - flat[own], axis=2)
        picked: list[int] = []
        for _ in range(2):
            totals = [
                np.inf if new in picked else distances[:, [*picked, new]].min(1).sum()
                for new in range(len(own))
            ]
            picked.append(int(np.argmin(totals)))
        mine = np.asarray(chosen)[np.asarray(groups.places) == label]
        assert set(mine) == set(own[picked])
        stands_for = np.bincount(distances[:, picked].argmin(1), minlength=2)
        shares = np.asarray(weights)[np.asarray(groups.places) == label]
        np.testing.assert_allclose(shares, stands_for * 20 / 96, rtol=1e-4)


@pytest.mark.parametrize("balanced", [True, False])
def test_matching_pursuit_comes_nearer_the_gradient_than_chance(found, balanced):
    outputs, flat, _ = found
    groups = subsets.make_groups(DATASET.train.labels, 20, 10, balanced)
    chosen, weights = gradients.grad_match(outputs, groups)
    assert len(np.unique(chosen)) == 20
    assert (np.asarray(weights) >= 0).all()
    np.testing.assert_allclose(np.mean(weights), 1.0, rtol=1e-4)

    def distance(places, weights):
        """Returns the distance of the sum of all from the nearest multiple of the weighted sum."""
        target, found = flat.sum(0), weights @ flat[places]
        return np.linalg.norm(target - found * (found @ target) / (found @ found))

    keys = jax.random.split(jax.random.key(0), 50)
    drawn = [np.asarray(subsets.random_subset(key, groups)) for key in keys]
    chance = np.array([distance(places, np.ones(20)) for places in drawn])
    assert distance(np.asarray(chosen), np.asarray(weights)) < np.quantile(chance, 0.1)


def test_prey_is_fitter_the_nearer_its_gradient():
    random = np.random.default_rng(0)
    difficulty, vectors = random.exponential(size=50), random.normal(size=(50, 4))
    prey = random.integers(0, 50, (200, 10))
    found = cest.prey_fitness(*map(jnp.asarray, (prey, difficulty, vectors)), 0.3)
    hardness = (difficulty[prey].mean(1) - difficulty.mean()) / (difficulty.std() / np.sqrt(10))
    chance = vectors.var(0).sum() / 10
    distance = ((vectors[prey].mean(1) - vectors.mean(0)) ** 2).sum(1) / chance
    np.testing.assert_allclose(found, 0.7 * hardness - 0.3 * distance, rtol=1e-3, atol=1e-3)
    assert abs(distance.mean() - 1) < 0.2  # the unit: what random subsets differ by
    assert abs(hardness.std() - 1) < 0.2


def test_infobatch_leaves_out_easy_examples_and_weighs_the_rest():
    config = replace(CONFIG, selection="infobatch", prune_rate=0.75, whole_at_end=0.3)
    states, _ = trained(config)
    for before, after in itertools.pairwise(states[1:5]):
        values = np.asarray(before.difficulty)
        low = values < values.mean()
        chosen = np.zeros(96, bool)
        chosen[np.asarray(after.chosen)[: int(after.num_chosen)]] = True
        assert chosen[~low].all()
        left = low.sum() - (low & chosen).sum()
        assert abs(left - 0.75 * low.sum()) < norm.ppf(1 - 1e-4) * np.sqrt(low.sum() * 0.1875)
        np.testing.assert_allclose(after.importance, np.where(low, 4.0, 1.0))
    for state in states[5:]:  # of 6 epochs the last 30 % are whole
        assert int(state.num_chosen) == 96
        np.testing.assert_allclose(state.importance, 1.0)


def test_the_recommended_rule_is_ahead_of_random_subsets():
    """It is with 30 % of the labels wrong, for as many gradients. A rule that ignored the
    reference, or preferred what cannot be learnt, would be behind."""
    dataset = some_images(DIGITS, 600)
    labels = dataset.train.labels.copy()
    wrong = np.random.default_rng(0).random(600) < 0.3
    labels[wrong] = (labels + np.random.default_rng(1).integers(1, 10, 600))[wrong] % 10
    dataset = replace(dataset, train=Split(dataset.train.images, labels))
    config = cest.Config(
        network=NetworkConfig(width=8, depth=1),
        training=TrainingConfig(
            num_epochs=25, batch_size=32, learning_rate=5e-3, schedule="cosine"
        ),
    )
    network = networks.create(config.network, 10, dataset.image_shape)
    test = batches_of(dataset, dataset.test, config.engine)
    accuracies = {}
    for selection in ("random", "reducible_loss", "selective_backprop"):
        chosen = replace(config, selection=selection)
        states, _ = trained(chosen, cest.Params(temperature=0.5), 25, dataset)
        accuracies[selection] = float(evaluate(network, states[-1].fit.variables, test).accuracy)
    assert accuracies["reducible_loss"] > accuracies["random"] + 0.03
    assert accuracies["reducible_loss"] > accuracies["selective_backprop"] + 0.03
