"""The engine against plain loops: training, evaluation, members at once, memory, compilation."""

from __future__ import annotations

import dataclasses
import math
import re
from functools import partial

import flax.linen as nn
import jax
import jax.monitoring
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import example, given, settings, strategies as st

from evojax_suite import networks
from evojax_suite.networks import NetworkConfig
from evojax_suite.training import (
    EngineConfig,
    TrainingConfig,
    evaluate,
    extract_features,
    fit,
    fit_and_evaluate_population,
    fit_epochs,
    fit_population,
    make_batches,
    map_members,
    start_fit,
)

SHAPE, NUM_CLASSES = (8, 8, 1), 3
# Without normalisation: behind it the gradients of the biases are round-off, which Adam scales up.
CONVNET = networks.create(NetworkConfig(width=4, depth=1, normalization="none"), NUM_CLASSES, SHAPE)
TRAIN = jax.jit(fit, static_argnums=(1, 2))


class Linear(nn.Module):
    """One dense layer, all weights 0 at first."""

    num_classes: int = NUM_CLASSES

    @nn.compact
    def __call__(self, images, train: bool = False):
        flat = images.reshape(images.shape[0], -1)
        initialize = nn.initializers.zeros
        kernel = self.param("kernel", initialize, (flat.shape[-1], self.num_classes))
        return flat @ kernel


class Recorder(nn.Module):
    """Keeps every batch that it is trained on in the collection `log`."""

    num_steps: int

    @nn.compact
    def __call__(self, images, train: bool = False):
        logits = Linear()(images)
        step = self.variable("log", "step", lambda: jnp.int32(0))
        # The engine initialises with one image: rooms for the largest batch of the tests.
        room = (self.num_steps, 8, *images.shape[1:])
        batches = self.variable("log", "batches", lambda: jnp.full(room, jnp.nan))
        if train:
            batches.value = batches.value.at[step.value, : images.shape[0]].set(images)
            step.value = step.value + 1
        return logits


def images_of(count: int, seed: int = 0, shape: tuple[int, ...] = SHAPE) -> jax.Array:
    return jnp.asarray(np.random.default_rng(seed).normal(size=(count, *shape)), jnp.float32)


def labels_of(count: int) -> jax.Array:
    return jnp.arange(count) % NUM_CLASSES


def one_hot_images(count: int) -> jax.Array:
    """Image i is 1 in pixel i alone, so that row i of a linear layer learns from it alone."""
    return jnp.eye(count).reshape(count, 1, count, 1)


def assert_close(actual, expected, atol=1e-5):
    assert jax.tree.structure(actual) == jax.tree.structure(expected)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=atol), actual, expected)


def differ(first, second) -> bool:
    pairs = zip(jax.tree.leaves(first), jax.tree.leaves(second), strict=True)
    return any(not np.allclose(a, b, atol=1e-6) for a, b in pairs)


def seen_images(network_steps, key, config, images):
    """The batches of each step that the engine trains on: (steps, up to 8, H, W, C)."""
    variables = TRAIN(key, Recorder(network_steps), config, images, labels_of(len(images)))
    assert int(variables["log"]["step"]) == network_steps
    return np.asarray(variables["log"]["batches"])


# --- training against plain loops


def plain_fit(key, network, images, labels, optimizer, num_epochs):
    """A Python loop over full batches; labels are probabilities."""
    variables = network.init(jax.random.split(key)[0], images[:1])
    statistics = {name: value for name, value in variables.items() if name != "params"}
    parameters = variables["params"]
    state = optimizer.init(parameters)

    @jax.jit
    def gradient_and_statistics(parameters, statistics):
        def loss(parameters):
            logits, updated = network.apply(
                {"params": parameters} | statistics, images, train=True, mutable=list(statistics)
            )
            return -(labels * jax.nn.log_softmax(logits)).sum(-1).mean(), updated

        return jax.grad(loss, has_aux=True)(parameters)

    for _ in range(num_epochs):
        gradient, statistics = gradient_and_statistics(parameters, statistics)
        updates, state = optimizer.update(gradient, state, parameters)
        parameters = optax.apply_updates(parameters, updates)
    return {"params": parameters} | statistics


@pytest.mark.parametrize(
    ("options", "optimizer"),
    [
        ({}, optax.adam(1e-3, 0.9, 0.999, 1e-8)),
        ({"optimizer": "sgd", "learning_rate": 0.05}, optax.sgd(0.05, 0.9)),
        ({"optimizer": "sgd", "learning_rate": 0.05, "momentum": 0.0}, optax.sgd(0.05)),
        (
            {"weight_decay": 0.1, "learning_rate": 0.01},
            optax.adamw(0.01, 0.9, 0.999, 1e-8, weight_decay=0.1),
        ),
        ({"batch_size": 9}, optax.adam(1e-3)),  # all of the images too
    ],
    ids=["adam", "sgd", "sgd without momentum", "adamw", "batch_size"],
)
def test_full_batch_training_is_a_plain_loop(options, optimizer):
    images = images_of(6)
    labels = jax.nn.one_hot(labels_of(6), NUM_CLASSES)
    key = jax.random.key(1)
    expected = plain_fit(key, CONVNET, images, labels, optimizer, 5)
    config = TrainingConfig(num_epochs=5, **options)
    actual = TRAIN(key, CONVNET, config, images, labels)
    assert_close(actual, expected)
    fresh = CONVNET.init(jax.random.split(key)[0], images[:1])
    assert differ(actual, fresh)
    none = TRAIN(key, CONVNET, TrainingConfig(num_epochs=0, **options), images, labels)
    assert_close(none, fresh, atol=0)


def test_soft_labels_are_the_cross_entropy_of_probabilities():
    images = images_of(6)
    labels = jax.nn.softmax(2 * jax.random.normal(jax.random.key(0), (6, NUM_CLASSES)))
    key = jax.random.key(1)
    expected = plain_fit(key, CONVNET, images, labels, optax.adam(1e-2), 4)
    config = TrainingConfig(num_epochs=4, learning_rate=1e-2)
    actual = TRAIN(key, CONVNET, config, images, labels)
    assert_close(actual, expected)
    hard = jax.nn.one_hot(labels.argmax(-1), NUM_CLASSES)
    assert differ(actual, TRAIN(key, CONVNET, config, images, hard))


def test_integer_labels_are_one_hot_labels():
    config = TrainingConfig(num_epochs=3, batch_size=4, learning_rate=0.01)
    images, labels = images_of(6), labels_of(6)
    key = jax.random.key(2)
    integers = TRAIN(key, CONVNET, config, images, labels)
    assert_close(
        integers, TRAIN(key, CONVNET, config, images, jax.nn.one_hot(labels, 3)), atol=1e-7
    )
    assert differ(integers, TRAIN(key, CONVNET, config, images, labels[::-1]))


def test_training_is_a_function_of_its_key():
    config = TrainingConfig(num_epochs=3, batch_size=4)
    run = jax.jit(lambda key: fit(key, CONVNET, config, images_of(6), labels_of(6)))
    first, again, other = (run(jax.random.key(seed)) for seed in (0, 0, 1))
    assert_close(first, again, atol=0)
    assert differ(first, other)


@pytest.mark.parametrize("batch_size", [None, 3])
def test_batch_normalisation_updates_its_running_statistics(batch_size):
    network = networks.create(
        NetworkConfig(width=4, depth=1, normalization="batch"), NUM_CLASSES, SHAPE
    )
    images = 2 + 3 * images_of(6)
    labels = jax.nn.one_hot(labels_of(6), NUM_CLASSES)
    key = jax.random.key(3)
    config = TrainingConfig(
        num_epochs=3, batch_size=batch_size, optimizer="sgd", learning_rate=0.05
    )
    actual = TRAIN(key, network, config, images, labels)
    fresh = network.init(jax.random.split(key)[0], images[:1])
    assert differ(actual["batch_stats"], fresh["batch_stats"])
    if batch_size is None:
        expected = plain_fit(key, network, images, labels, optax.sgd(0.05, 0.9), 3)
        assert_close(actual, expected, atol=1e-4)
    # the running statistics approach the map's: 1 - 0.9^n of the way, whatever the training
    config = TrainingConfig(num_epochs=60, batch_size=batch_size, learning_rate=1e-9)
    parameters = TRAIN(key, network, config, images, labels)
    convolution = network.clone(normalization="none")
    layers = {"params": {k: v for k, v in parameters["params"].items() if "Norm" not in k}}
    _, maps = convolution.apply(layers, images, capture_intermediates=True)
    map_ = np.asarray(maps["intermediates"]["Conv_0"]["__call__"][0])
    statistics = parameters["batch_stats"]["BatchNorm_0"]
    mean, variance = map_.mean((0, 1, 2)), map_.var((0, 1, 2))
    np.testing.assert_allclose(statistics["mean"], mean, atol=0.02 * np.abs(map_).max())
    if batch_size is None:
        np.testing.assert_allclose(statistics["var"], variance, rtol=0.02)
    # and evaluation uses them: the batches do not matter
    batches = [make_batches(images, labels_of(6), size) for size in (6, 2)]
    assert_close(*(evaluate(network, parameters, b) for b in batches), atol=1e-5)


# --- minibatches


@pytest.mark.parametrize(("num_images", "batch_size"), [(6, 3), (7, 3), (5, 4), (4, 1)])
def test_an_epoch_sees_every_image_once_in_a_new_order(num_images, batch_size):
    num_batches, num_epochs = -(-num_images // batch_size), 4
    config = TrainingConfig(num_epochs=num_epochs, batch_size=batch_size)
    batches = seen_images(
        num_epochs * num_batches, jax.random.key(0), config, one_hot_images(num_images)
    )
    batches = batches[:, :batch_size].reshape(num_epochs, -1, num_images)
    orders = []
    for epoch in batches:
        np.testing.assert_array_equal(epoch[:num_images].sum(0), 1)  # each pixel once
        orders.append(tuple(epoch[:num_images].argmax(-1)))
        assert np.isfinite(epoch).all()
    assert len(set(orders)) > 1


@pytest.mark.parametrize(("num_images", "batch_size"), [(6, 3), (7, 3), (5, 4), (7, 4)])
def test_each_image_has_its_share_of_its_batch(num_images, batch_size):
    """With a learning rate too small to change the loss, SGD moves row i of a linear layer by the
    gradient of image i, over the number of images in its batch, times the momentum that is still
    to come. So the row says in which batches image i was, and with what weight."""
    num_batches = -(-num_images // batch_size)
    rate = 1e-4
    config = TrainingConfig(
        num_epochs=1, batch_size=batch_size, optimizer="sgd", learning_rate=rate
    )
    images, labels = one_hot_images(num_images), labels_of(num_images)
    kernel = TRAIN(jax.random.key(5), Linear(), config, images, labels)["params"]["kernel"]
    gradient = 1 / NUM_CLASSES - jax.nn.one_hot(labels, NUM_CLASSES)
    moved = np.asarray(kernel / (-rate * gradient))
    np.testing.assert_allclose(moved, moved[:, :1] * np.ones(NUM_CLASSES), rtol=1e-3)
    expected = []
    for batch in range(num_batches):
        size = min(batch_size, num_images - batch * batch_size)
        momentum = sum(0.9**step for step in range(num_batches - batch))
        expected += size * [momentum / size]
    np.testing.assert_allclose(sorted(moved[:, 0]), sorted(expected), rtol=1e-3)


# --- schedules


def scheduled_rates(schedule, rate, num_steps):
    """Written out: half a cosine to 0; a tenth after half of the steps."""
    for step in range(num_steps):
        yield {
            "constant": rate,
            "cosine": rate * (1 + math.cos(math.pi * step / num_steps)) / 2,
            "step": rate if step < num_steps // 2 else rate / 10,
        }[schedule]


@pytest.mark.parametrize("batch_size", [None, 3])
@pytest.mark.parametrize("schedule", ["constant", "cosine", "step"])
def test_schedules_run_over_all_steps(schedule, batch_size):
    """All images are alike, so that batches do not matter and SGD can be written out."""
    num_epochs = 5
    config = TrainingConfig(
        num_epochs=num_epochs,
        batch_size=batch_size,
        optimizer="sgd",
        learning_rate=0.3,
        schedule=schedule,
    )
    image = np.asarray(images_of(1)[0])
    images, labels = jnp.stack([image] * 6), jnp.ones(6, int)
    actual = fit(jax.random.key(0), Linear(), config, images, labels)["params"]["kernel"]

    pixels = image.ravel().astype(np.float64)
    kernel = np.zeros((pixels.size, NUM_CLASSES))
    momentum = np.zeros_like(kernel)
    for rate in scheduled_rates(schedule, 0.3, num_epochs * (1 if batch_size is None else 2)):
        logits = pixels @ kernel
        probabilities = np.exp(logits - logits.max())
        probabilities /= probabilities.sum()
        momentum = 0.9 * momentum + np.outer(pixels, probabilities - np.eye(NUM_CLASSES)[1])
        kernel -= rate * momentum
    np.testing.assert_allclose(actual, kernel, atol=1e-5)


@pytest.mark.parametrize("schedule", ["constant", "cosine", "step"])
@pytest.mark.parametrize("num_epochs", [0, 1])
def test_schedules_of_hardly_any_step(schedule, num_epochs):
    config = TrainingConfig(num_epochs=num_epochs, schedule=schedule, learning_rate=0.1)
    variables = fit(jax.random.key(0), Linear(), config, images_of(3), labels_of(3))
    kernel = np.asarray(variables["params"]["kernel"])
    # the first step of Adam has the size of the learning rate
    np.testing.assert_allclose(np.abs(kernel).max(), 0.1 * num_epochs, atol=1e-4)


class Unused(nn.Module):
    """A parameter of ones that the logits do not depend on."""

    @nn.compact
    def __call__(self, images, train: bool = False):
        self.param("weight", nn.initializers.ones, (2,))
        return jnp.zeros((images.shape[0], NUM_CLASSES))


@pytest.mark.parametrize("optimizer", ["adam", "sgd"])
def test_weight_decay_is_decoupled(optimizer):
    """A weight without gradient shrinks by the factor 1 - learning rate * decay a step."""
    config = TrainingConfig(num_epochs=5, optimizer=optimizer, learning_rate=0.1, weight_decay=0.5)
    variables = fit(jax.random.key(0), Unused(), config, images_of(2), labels_of(2))
    np.testing.assert_allclose(variables["params"]["weight"], (1 - 0.1 * 0.5) ** 5, rtol=1e-5)


# --- augmentation

AUGMENTATIONS = {
    "shift_pixels": {"shift_pixels": 1},
    "flip": {"flip": True},
    "crop_padding": {"crop_padding": 2},
    "siamese": {"siamese": ("color", "flip")},
    "mixup_alpha": {"mixup_alpha": 1.0},
}


@pytest.mark.parametrize("batch_size", [None, 4])
@pytest.mark.parametrize("name", AUGMENTATIONS)
def test_augmentation_changes_training_and_depends_on_the_key(name, batch_size):
    images = images_of(6, shape=(5, 5, 1))

    def batches(key, **options):
        config = TrainingConfig(num_epochs=4, batch_size=batch_size, **options)
        return seen_images(8 if batch_size else 4, jax.random.key(key), config, images)

    augmented = batches(0, **AUGMENTATIONS[name])
    np.testing.assert_array_equal(augmented, batches(0, **AUGMENTATIONS[name]))
    assert not np.array_equal(augmented, batches(1, **AUGMENTATIONS[name]), equal_nan=True)
    assert not np.array_equal(augmented, batches(0), equal_nan=True)
    if batch_size is None:  # the images come in one order: a new draw for each epoch
        epochs = [tuple(epoch[:6].ravel()) for epoch in augmented]
        assert len(set(epochs)) > 1


def test_shifted_and_flipped_images_are_those_of_the_options():
    image = np.asarray(images_of(1, shape=(4, 4, 1)))[0, :, :, 0]
    images = jnp.stack([image] * 6)[..., None]
    canvas = np.pad(image, 1)
    shifts = {canvas[y : y + 4, x : x + 4].tobytes() for y in range(3) for x in range(3)}
    flips = {image.tobytes(), image[:, ::-1].copy().tobytes()}
    for options, allowed in (
        ({"shift_pixels": 1}, shifts),
        ({"crop_padding": 1}, shifts),
        ({"flip": True}, flips),
    ):
        config = TrainingConfig(num_epochs=20, **options)
        batches = seen_images(20, jax.random.key(0), config, images)[:, :6, :, :, 0]
        assert {seen.copy().tobytes() for seen in batches.reshape(-1, 4, 4)} == allowed


def test_mixup_mixes_images_and_labels_alike():
    """Linear weights after one small step are a sum of image times (label - 1/K)."""
    count = NUM_CLASSES
    images, labels = one_hot_images(count), jnp.arange(count)
    config = TrainingConfig(num_epochs=1, optimizer="sgd", learning_rate=1e-3, mixup_alpha=1.0)
    for seed in range(4):
        key = jax.random.key(seed)
        seen = seen_images(1, key, config, images)[0, :count].reshape(count, count)
        np.testing.assert_allclose(seen.sum(1), 1, atol=1e-6)
        # image i is class i, so that the mixed labels are the mixed images
        kernel = TRAIN(key, Linear(), config, images, labels)["params"]["kernel"]
        expected = 1e-3 * seen.T @ (seen - 1 / count) / count
        np.testing.assert_allclose(kernel, expected, atol=1e-8)


# --- evaluation


def test_evaluation_is_that_of_numpy_on_the_whole_set():
    images, labels = images_of(23, seed=7), labels_of(23)
    variables = CONVNET.init(jax.random.key(0), images[:1])
    logits = np.asarray(CONVNET.apply(variables, images), np.float64)
    shifted = logits - logits.max(1, keepdims=True)
    log_probabilities = shifted - np.log(np.exp(shifted).sum(1, keepdims=True))
    cross_entropy = -log_probabilities[np.arange(23), labels].mean()
    accuracy = (logits.argmax(1) == np.asarray(labels)).mean()
    assert 0 < accuracy < 1
    for batch_size in (1, 5, 23, 100):
        actual = evaluate(CONVNET, variables, make_batches(images, labels, batch_size))
        assert actual.accuracy.shape == actual.cross_entropy.shape == ()
        np.testing.assert_allclose(actual.accuracy, accuracy, atol=1e-6)
        np.testing.assert_allclose(actual.cross_entropy, cross_entropy, rtol=1e-5)


@settings(max_examples=15, deadline=None, derandomize=True)
@given(st.integers(1, 20), st.integers(1, 25))
def test_batches_hold_every_image_once(num_images, batch_size):
    images = one_hot_images(num_images) + 1
    batches = make_batches(images, 10 + jnp.arange(num_images), batch_size)
    size = min(batch_size, num_images)
    assert batches.images.shape == (-(-num_images // size), size, 1, num_images, 1)
    assert batches.labels.shape == batches.weights.shape == batches.images.shape[:2]
    kept = np.asarray(batches.weights).ravel() == 1
    assert kept.sum() == np.asarray(batches.weights).sum() == num_images
    flat = np.asarray(batches.images).reshape(-1, *images.shape[1:])
    np.testing.assert_array_equal(flat[kept], images)
    np.testing.assert_array_equal(
        np.asarray(batches.labels).ravel()[kept], 10 + np.arange(num_images)
    )


class Reciprocal(nn.Module):
    """Logits that are infinite for black images."""

    @nn.compact
    def __call__(self, images, train: bool = False):
        return 1 / images.reshape(images.shape[0], -1)


def test_filling_images_do_not_count():
    images = jnp.asarray([[1.0, 0.5], [0.5, 1.0], [0.25, 1.0]]).reshape(3, 1, 2, 1)
    labels = jnp.array([1, 0, 1])
    variables = Reciprocal().init(jax.random.key(0), images)
    whole, filled = (
        evaluate(Reciprocal(), variables, make_batches(images, labels, size)) for size in (3, 2)
    )
    assert_close(filled, whole)
    np.testing.assert_allclose(filled.accuracy, 2 / 3, rtol=1e-6)
    # labels of filling are 0, and so would be counted as right here
    zeros = jnp.zeros(3, int)
    alike = make_batches(images, zeros, 2)
    assert float(evaluate(Linear(2), Linear(2).init(jax.random.key(0), images), alike)[0]) == 1


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_a_network_that_failed_evaluates_to_nan(value):
    images, labels = images_of(5), labels_of(5)
    variables = Linear().init(jax.random.key(0), images)
    broken = jax.tree.map(lambda leaf: leaf.at[0, 0].set(value), variables)
    result = evaluate(Linear(), broken, make_batches(images, labels, 2))
    assert np.isnan(result.accuracy)
    assert np.isnan(result.cross_entropy)


def test_one_member_that_fails_leaves_the_others_alone():
    images = jnp.stack([images_of(3, seed) for seed in range(3)])
    images = images.at[1, 0, 0, 0, 0].set(jnp.nan)
    labels = jnp.stack([labels_of(3)] * 3)
    batches = make_batches(images_of(10, 9), labels_of(10), 4)
    keys = jax.random.split(jax.random.key(0), 3)
    config = TrainingConfig(num_epochs=2)
    (result,) = fit_and_evaluate_population(
        keys, CONVNET, config, images, labels, (batches,), EngineConfig(members_in_flight=3)
    )
    np.testing.assert_array_equal(np.isnan(result.accuracy), [False, True, False])
    np.testing.assert_array_equal(np.isnan(result.cross_entropy), [False, True, False])


# --- populations


@settings(max_examples=20, deadline=None, derandomize=True)
@given(st.integers(1, 9), st.integers(1, 12))
@example(1, 1)
@example(5, 1)
@example(9, 4)
@example(8, 4)
@example(9, 12)
def test_members_are_mapped_whatever_their_number(population_size, members_in_flight):
    numbers = jnp.arange(population_size, dtype=jnp.float32)
    trees = {"a": jnp.arange(2 * population_size).reshape(population_size, 2)}
    keys = jax.random.split(jax.random.key(0), population_size)

    def member(number, tree, key):
        return number**2, {"sum": tree["a"].sum(), "row": tree["a"]}, key

    @jax.jit
    def run(members):
        return map_members(member, members, members_in_flight)

    squares, sums, same = run((numbers, trees, keys))
    np.testing.assert_array_equal(squares, numbers**2)
    np.testing.assert_array_equal(sums["sum"], trees["a"].sum(1))
    np.testing.assert_array_equal(sums["row"], trees["a"])
    np.testing.assert_array_equal(jax.random.key_data(same), jax.random.key_data(keys))


def count_traced_members(population_size, members_in_flight):
    """Shapes that the mapped function sees under vmap and the loops around it."""
    jaxpr = jax.make_jaxpr(
        lambda x: map_members(lambda row: jnp.tanh(row), (x,), members_in_flight)
    )(jnp.zeros((population_size, 3)))
    return set(re.findall(r"f32\[([\d,]+)\] = tanh", str(jaxpr)))


def test_no_more_than_the_allowed_members_run_at_once():
    assert count_traced_members(9, 1) == {"3"}
    assert count_traced_members(9, 4) == {"3,3"}  # three groups, each as small as it can be
    assert count_traced_members(10, 4) == {"4,3"}
    assert count_traced_members(9, 9) == {"9,3"}
    assert count_traced_members(9, 12) == {"9,3"}


@pytest.mark.parametrize(("in_flight", "at_once"), [(1, 1), (4, 1), (4, 2), (4, 4), (7, 3)])
def test_what_follows_is_done_for_some_at_a_time_before_the_next_group(in_flight, at_once):
    numbers = jnp.arange(14.0).reshape(7, 2)

    def run(numbers):
        return map_members(jnp.cumsum, (numbers,), in_flight, lambda row: jnp.tanh(row), at_once)

    np.testing.assert_allclose(run(numbers), jnp.tanh(jnp.cumsum(numbers, 1)), rtol=1e-6)
    groups = -(-7 // in_flight)
    size = -(-7 // groups)
    together = -(-size // -(-size // at_once))
    shape = "2" if together == 1 else f"{together},2"
    assert set(re.findall(r"f32\[([\d,]+)\] = tanh", str(jax.make_jaxpr(run)(numbers)))) == {shape}


@pytest.fixture(scope="module")
def population():
    """Five members: keys, images, labels, two sets to evaluate on, how they train."""
    keys = jax.random.split(jax.random.key(11), 5)
    images = jnp.stack([images_of(4, seed) for seed in range(5)])
    labels = jnp.stack([labels_of(4), *[labels_of(4)[::-1]] * 4])
    batches = make_batches(images_of(17, 99), labels_of(17), 5)
    other = make_batches(images_of(6, 98), labels_of(6), 6)
    config = TrainingConfig(num_epochs=4, batch_size=3, flip=True, learning_rate=0.01)
    return keys, images, labels, (batches, other), config


@pytest.fixture(scope="module")
def one_by_one(population):
    keys, images, labels, evaluations, config = population
    trained = [TRAIN(*member[:1], CONVNET, config, *member[1:]) for member in zip(
        keys, images, labels, strict=True
    )]  # fmt: skip
    return trained, [[evaluate(CONVNET, v, batches) for v in trained] for batches in evaluations]


@pytest.mark.parametrize("members_in_flight", [1, 2, 5])
def test_a_population_is_its_members_one_by_one(population, one_by_one, members_in_flight):
    keys, images, labels, evaluations, config = population
    trained, expected = one_by_one

    @jax.jit
    def run(keys, images, labels):
        engine = EngineConfig(members_in_flight=members_in_flight)
        return (
            fit_population(keys, CONVNET, config, images, labels, engine),
            fit_and_evaluate_population(keys, CONVNET, config, images, labels, evaluations, engine),
        )

    networks_, results = run(keys, images, labels)
    assert_close(networks_, jax.tree.map(lambda *leaves: jnp.stack(leaves), *trained))
    assert len(results) == len(evaluations)
    for result, singles in zip(results, expected, strict=True):
        assert result.accuracy.shape == (5,)
        np.testing.assert_allclose(
            result.cross_entropy, [single.cross_entropy for single in singles], atol=1e-4
        )
        np.testing.assert_allclose(
            result.accuracy, [single.accuracy for single in singles], atol=1e-6
        )
    assert len(set(np.asarray(results[0].cross_entropy).round(4).tolist())) == 5


def test_members_may_have_soft_labels():
    keys = jax.random.split(jax.random.key(0), 3)
    images = jnp.stack([images_of(4)] * 3)
    labels = jax.nn.softmax(jax.random.normal(jax.random.key(1), (3, 4, NUM_CLASSES)))
    config = TrainingConfig(num_epochs=2, learning_rate=0.1)
    engine = EngineConfig(members_in_flight=2)
    trained = fit_population(keys, Linear(), config, images, labels, engine)
    for member in range(3):
        single = TRAIN(keys[member], Linear(), config, images[member], labels[member])
        assert_close(jax.tree.map(lambda leaf, m=member: leaf[m], trained), single)


# --- compilation and memory


class Counted(nn.Module):
    """Counts how often it is traced."""

    calls = 0

    @nn.compact
    def __call__(self, images, train: bool = False):
        type(self).calls += 1
        return Linear()(images)


@pytest.fixture
def compilations():
    """The compilations since the start of the test."""
    events = []

    def listen(event: str, duration: float, **_):
        if event == "/jax/core/compile/backend_compile_duration":
            events.append(duration)

    jax.monitoring.register_event_duration_secs_listener(listen)
    yield events
    jax.monitoring.unregister_event_duration_listener(listen)


@pytest.mark.parametrize("members_in_flight", [1, 2])
def test_later_calls_compile_nothing(compilations, members_in_flight):
    config = TrainingConfig(num_epochs=3, batch_size=2)

    @jax.jit
    def run(keys, images, labels, test_images):
        batches = make_batches(test_images, labels_of(7), 3)
        engine = EngineConfig(members_in_flight=members_in_flight)
        return fit_and_evaluate_population(
            keys, Counted(), config, images, labels, (batches,), engine
        )

    arguments = [
        (
            jax.random.split(jax.random.key(seed), 3),
            jnp.stack([images_of(4, seed)] * 3),
            jnp.stack([labels_of(4)] * 3),
            images_of(7, seed),
        )
        for seed in range(3)
    ]
    jax.block_until_ready(run(*arguments[0]))
    assert len(compilations) > 0
    assert Counted.calls > 0
    compilations.clear()
    Counted.calls = 0
    results = [jax.block_until_ready(run(*these)) for these in arguments[1:]]
    assert compilations == []
    assert Counted.calls == 0
    assert differ(*results)


def test_the_program_does_not_grow_with_the_population_or_the_epochs():
    def count(population_size, num_epochs):
        Counted.calls = 0
        config = TrainingConfig(num_epochs=num_epochs, batch_size=2)
        batches = make_batches(images_of(7), labels_of(7), 3)
        jax.eval_shape(
            lambda *arrays: fit_and_evaluate_population(
                arrays[0], Counted(), config, *arrays[1:], (batches,), EngineConfig(2)
            ),
            jax.random.split(jax.random.key(0), population_size),
            jnp.stack([images_of(4)] * population_size),
            jnp.stack([labels_of(4)] * population_size),
        )
        return Counted.calls

    counts = {count(4, 3), count(8, 3), count(4, 30)}
    assert len(counts) == 1
    assert 0 < counts.pop() < 10


def test_memory_is_bounded_by_the_members_in_flight():
    config = TrainingConfig(num_epochs=2)
    batches = make_batches(images_of(12), labels_of(12), 6)

    def measure(population_size, members_in_flight):
        """Bytes of the program's temporaries, and of its arguments and results."""
        engine = EngineConfig(members_in_flight=members_in_flight)

        @jax.jit
        def run(keys, images, labels):
            return fit_and_evaluate_population(
                keys, CONVNET, config, images, labels, (batches,), engine
            )

        arguments = (
            jax.random.split(jax.random.key(0), population_size),
            jnp.zeros((population_size, 4, *SHAPE)),
            jnp.zeros((population_size, 4), jnp.int32),
        )
        sizes = run.lower(*arguments).compile().memory_analysis()
        return (
            sizes.temp_size_in_bytes,
            sizes.argument_size_in_bytes + sizes.output_size_in_bytes,
        )

    small, small_arrays = measure(8, 2)
    large, large_arrays = measure(64, 2)
    wide, _ = measure(64, 16)
    # Beyond a copy of the members and of their results nothing grows with the population, ...
    assert large - small <= 2 * (large_arrays - small_arrays)
    # ... and a member in flight takes several times such a copy, so that this bound says something.
    per_copy, per_member = (large_arrays - small_arrays) / 56, (wide - large) / 14
    assert per_member > 5 * per_copy


# --- configuration


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_epochs": -1}, "num_epochs must be >= 0, got -1"),
        ({"batch_size": 0}, "batch_size must be >= 1, got 0"),
        ({"batch_size": -3}, "batch_size must be >= 1, got -3"),
        ({"learning_rate": 0.0}, "learning_rate must be > 0, got 0.0"),
        ({"learning_rate": -0.1}, "learning_rate must be > 0, got -0.1"),
        ({"learning_rate": math.nan}, "learning_rate must be > 0, got nan"),
        ({"weight_decay": -1e-4}, "weight_decay must be >= 0, got -0.0001"),
        ({"shift_pixels": -1}, "shift_pixels must be >= 0, got -1"),
        ({"crop_padding": -2}, "crop_padding must be >= 0, got -2"),
        (
            {"siamese": ("blur",)},
            "siamese must name some of color, crop, cutout, flip, scale, rotate, got 'blur'",
        ),
        ({"momentum": 1.0}, r"momentum must be in [0, 1), got 1.0"),
        ({"mixup_alpha": -0.5}, "mixup_alpha must be >= 0, got -0.5"),
        ({"weight_decay": math.nan}, "weight_decay must be >= 0, got nan"),
    ],
)
def test_training_config_refuses(options, message):
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        TrainingConfig(**options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"members_in_flight": 0}, "members_in_flight must be >= 1, got 0"),
        ({"members_in_flight": -1}, "members_in_flight must be >= 1, got -1"),
        ({"evaluation_batch_size": 0}, "evaluation_batch_size must be >= 1, got 0"),
    ],
)
def test_engine_config_refuses(options, message):
    with pytest.raises(ValueError, match=f"^{message}$"):
        EngineConfig(**options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"schedule": "linear"}, "schedule must be one of constant, cosine, step, got 'linear'"),
        ({"optimizer": "rmsprop"}, "optimizer must be one of adam, sgd, got 'rmsprop'"),
    ],
)
def test_training_refuses_unknown_names(options, message):
    with pytest.raises(ValueError, match=f"^{message}$"):
        fit(jax.random.key(0), Linear(), TrainingConfig(**options), images_of(2), labels_of(2))


def test_engine_defaults_are_those_of_the_platform():
    assert EngineConfig().resolved_members_in_flight == 1
    assert EngineConfig().resolved_evaluation_batch_size((32, 32, 3)) == 20
    assert EngineConfig().resolved_evaluation_batch_size((8, 8, 1)) == 320
    assert EngineConfig().resolved_evaluation_batch_size((999, 999, 1)) == 1
    assert EngineConfig(members_in_flight=5).resolved_members_evaluated_at_once(2**30) == 5
    chosen = EngineConfig(members_in_flight=7, evaluation_batch_size=9)
    assert chosen.resolved_members_in_flight == 7
    assert chosen.resolved_evaluation_batch_size((8, 8, 1)) == 9
    chosen = EngineConfig(members_in_flight=7, members_evaluated_at_once=3)
    assert chosen.resolved_members_evaluated_at_once(1) == 3
    assert EngineConfig(members_evaluated_at_once=3).resolved_members_evaluated_at_once(1) == 1


def test_engine_defaults_of_an_accelerator(monkeypatch):
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    engine = EngineConfig()
    assert engine.resolved_members_in_flight == 128
    assert engine.resolved_evaluation_batch_size((32, 32, 3)) == 4000
    assert engine.resolved_evaluation_batch_size((224, 224, 3)) == 81
    assert engine.resolved_members_evaluated_at_once(12_000 * 28 * 28) == 1
    assert engine.resolved_members_evaluated_at_once(359 * 8 * 8) == 128
    # 10,000 images: three batches of 3,334 instead of 4,000, of which the last would be half empty.
    images, labels = jnp.zeros((10_000, 32, 32, 1)), jnp.zeros(10_000, int)
    assert engine.batches(images, labels).labels.shape == (3, 3334)
    asked = EngineConfig(evaluation_batch_size=4000)
    assert asked.batches(images, labels).labels.shape == (3, 4000)


def closed_form_sgd(rate, l2_penalty, num_steps):
    """PyTorch's SGD with momentum 0.9 on the mean cross-entropy of one-pixel images of class 0."""
    weights, buffer = np.zeros(NUM_CLASSES), np.zeros(NUM_CLASSES)
    target = np.eye(NUM_CLASSES)[0]
    for _ in range(num_steps):
        probabilities = np.exp(weights) / np.exp(weights).sum()
        gradient = (probabilities - target) + l2_penalty * weights
        buffer = 0.9 * buffer + gradient
        weights = weights - rate * buffer
    return weights


def test_l2_penalty_is_pytorchs_weight_decay():
    config = TrainingConfig(num_epochs=6, optimizer="sgd", learning_rate=0.2, l2_penalty=0.3)
    images, labels = jnp.ones((2, 1, 1, 1)), jnp.zeros(2, int)
    kernel = fit(jax.random.key(0), Linear(), config, images, labels)["params"]["kernel"]
    np.testing.assert_allclose(kernel[0], closed_form_sgd(0.2, 0.3, 6), atol=1e-6)


@pytest.mark.parametrize("schedule", ["constant", "cosine", "step"])
def test_a_training_in_pieces_is_the_whole_training(schedule):
    """All images are alike, so that their order does not matter."""
    config = TrainingConfig(
        num_epochs=5, batch_size=4, optimizer="sgd", learning_rate=0.1, schedule=schedule
    )
    images = jnp.broadcast_to(images_of(1), (10, *SHAPE))
    labels = jnp.zeros(10, int)
    key = jax.random.key(0)
    expected = TRAIN(key, CONVNET, config, images, labels)
    state = start_fit(jax.random.split(key)[0], CONVNET, config, SHAPE)
    probabilities = jax.nn.one_hot(labels, NUM_CLASSES)
    for piece, epochs in enumerate((2, 1, 2)):
        state, _ = fit_epochs(
            jax.random.key(piece), CONVNET, config, 15, state, images, probabilities, 10, epochs
        )
    jax.tree.map(partial(np.testing.assert_allclose, atol=1e-5), state.variables, expected)


def test_fit_epochs_sees_each_image_once_and_nothing_beyond():
    config = TrainingConfig(batch_size=4, learning_rate=0.1)
    images = images_of(12).at[7:].set(jnp.nan)
    labels = jax.nn.one_hot(labels_of(12), NUM_CLASSES)
    start = start_fit(jax.random.key(1), CONVNET, config, SHAPE)
    logits = CONVNET.apply(start.variables, images[:7])
    still = dataclasses.replace(config, learning_rate=1e-12)
    arguments = (images, labels, 7, 1)
    _, seen = fit_epochs(jax.random.key(2), CONVNET, still, 1, start, *arguments)
    expected = optax.softmax_cross_entropy(logits, labels[:7])
    np.testing.assert_allclose(seen.losses[:7], expected, atol=1e-5)
    np.testing.assert_array_equal(seen.correct[:7], logits.argmax(-1) == labels_of(7))
    assert np.isnan(seen.losses[7:]).all()
    assert not seen.correct[7:].any()
    state, _ = fit_epochs(jax.random.key(2), CONVNET, config, 1, start, *arguments)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(state.parameters))


def test_fit_epochs_repeats_a_set_smaller_than_the_batch():
    """Four copies of two images weigh like the two; augmentation would tell the copies apart."""
    config = TrainingConfig(batch_size=8, optimizer="sgd", learning_rate=0.1)
    images, labels = images_of(12), jax.nn.one_hot(labels_of(12), NUM_CLASSES)
    start = start_fit(jax.random.key(1), CONVNET, config, SHAPE)
    small, _ = fit_epochs(jax.random.key(2), CONVNET, config, 1, start, images, labels, 2, 1)

    def loss(parameters):
        logits = CONVNET.apply({"params": parameters}, images[:2])
        return optax.softmax_cross_entropy(logits, labels[:2]).mean()

    expected = jax.tree.map(
        lambda p, g: p - 0.1 * g, start.parameters, jax.grad(loss)(start.parameters)
    )
    jax.tree.map(partial(np.testing.assert_allclose, atol=1e-5), small.parameters, expected)


def test_features_are_what_the_last_layer_sees():
    network = CONVNET.clone(bottleneck=3)
    images = images_of(7)
    variables = network.init(jax.random.key(0), images[:1])
    features = extract_features(network, variables, images, 5, 2)
    for index in range(5):
        alone = network.apply(variables, images[index : index + 1], features_only=True)
        np.testing.assert_allclose(features[index], alone[0], atol=1e-6)
    np.testing.assert_array_equal(features[5:], 0)

    def of_all(images):  # three batches of seven images: the last two overlap
        return extract_features(network, variables, images, None, 3)

    def directly(images):
        return network.apply(variables, images, features_only=True)

    np.testing.assert_allclose(of_all(images), directly(images), atol=1e-6)
    by_batches, at_once = (
        jax.grad(lambda images, function=function: (function(images) ** 2).sum())(images)
        for function in (of_all, directly)
    )
    np.testing.assert_allclose(by_batches, at_once, atol=1e-4)
    hidden = nn.relu(
        features[:5] @ variables["params"]["bottleneck_layer"]["kernel"]
        + variables["params"]["bottleneck_layer"]["bias"]
    )
    last = variables["params"]["Dense_0"]
    expected = network.apply(variables, images[:5])
    np.testing.assert_allclose(hidden @ last["kernel"] + last["bias"], expected, atol=1e-5)
    mlp = networks.create(NetworkConfig(network="MLP", width=3), NUM_CLASSES, SHAPE)
    with pytest.raises(ValueError, match="features come from the ConvNet alone, got MLP"):
        extract_features(mlp, {}, images, 5, 2)


def test_dropout_drops_in_training_alone():
    network = CONVNET.clone(dropout=0.5)
    images = images_of(3)
    variables = CONVNET.init(jax.random.key(0), images)
    np.testing.assert_array_equal(
        network.apply(variables, images), CONVNET.apply(variables, images)
    )
    keys = jax.random.split(jax.random.key(1), 4000)
    outputs = jax.vmap(
        lambda key: network.apply(variables, images, train=True, rngs={"dropout": key})
    )(keys)
    assert differ(outputs[0], outputs[1])
    expected = CONVNET.apply(variables, images)
    error = np.asarray(outputs.std(0)) / np.sqrt(len(keys))
    assert (np.abs(outputs.mean(0) - expected) < 5 * error + 1e-6).all()
    config = TrainingConfig(num_epochs=2, learning_rate=0.05)
    key, labels = jax.random.key(2), labels_of(3)
    assert differ(
        TRAIN(key, network, config, images, labels), TRAIN(key, CONVNET, config, images, labels)
    )
