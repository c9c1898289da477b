"""Gradient matching against a plain program, direct distances and finite differences."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from evojax_suite import networks
from evojax_suite.data import load, normalize
from evojax_suite.networks import NetworkConfig
from evojax_suite.systems.coresets import gradient_matching

SHAPE = (8, 8, 1)
CONFIG = gradient_matching.Config(
    real_batch_size=6, network=NetworkConfig(width=3, depth=1, activation="tanh")
)


@pytest.fixture(scope="module")
def data():
    return gradient_matching.make_data(load("digits"))


@pytest.fixture(scope="module")
def one_image_a_class():
    """Whatever is drawn of a class is its only image."""
    digits = load("digits")
    places = [np.flatnonzero(digits.train.labels == c)[0] for c in range(10)]
    train = dataclasses.replace(
        digits.train, images=digits.train.images[places], labels=digits.train.labels[places]
    )
    return gradient_matching.make_data(dataclasses.replace(digits, train=train))


def started(config, data, seed=0):
    algorithm = gradient_matching.build(config, 10, SHAPE)
    return jax.jit(algorithm.step), algorithm.init(jax.random.key(seed), None, data), algorithm


def direct_distance(real, synthetic):
    """One minus the cosine, an output channel at a time."""
    total = 0.0
    for layer, gradients in real.items():
        first = np.asarray(gradients["kernel"], np.float64)
        second = np.asarray(synthetic[layer]["kernel"], np.float64)
        for channel in range(first.shape[-1]):
            a, b = first[..., channel].ravel(), second[..., channel].ravel()
            total += 1 - a @ b / (np.sqrt(a @ a) * np.sqrt(b @ b) + 1e-6)
    return total


def random_gradients(seed):
    generator = np.random.default_rng(seed)
    return {
        "Conv_0": {
            "kernel": generator.normal(size=(3, 3, 2, 4)).astype(np.float32),
            "bias": generator.normal(size=4).astype(np.float32),
        },
        "Dense_0": {"kernel": generator.normal(size=(7, 10)).astype(np.float32)},
    }


def test_the_distance_is_that_of_each_output_channel():
    real, synthetic = random_gradients(0), random_gradients(1)
    found = gradient_matching.matching_distance(real, synthetic)
    np.testing.assert_allclose(found, direct_distance(real, synthetic), rtol=1e-5)
    np.testing.assert_allclose(gradient_matching.matching_distance(real, real), 0, atol=1e-4)
    opposite = jax.tree.map(jnp.negative, real)
    np.testing.assert_allclose(
        gradient_matching.matching_distance(real, opposite), 2 * (4 + 10), rtol=1e-5
    )
    longer = jax.tree.map(lambda gradient: 7 * gradient, synthetic)
    np.testing.assert_allclose(gradient_matching.matching_distance(real, longer), found, rtol=1e-5)


def test_a_channel_without_gradient_is_one_away_and_breaks_nothing():
    real, synthetic = random_gradients(0), random_gradients(1)
    synthetic["Dense_0"]["kernel"][:, 3] = 0
    distance, gradient = jax.value_and_grad(gradient_matching.matching_distance, argnums=1)(
        real, synthetic
    )
    np.testing.assert_allclose(distance, direct_distance(real, synthetic), rtol=1e-5)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(gradient))


def test_the_gradient_of_images_is_that_of_finite_differences(data):
    """The first step moves the images by the learning rate times the gradient."""
    step, state, _ = started(dataclasses.replace(CONFIG, initialization="noise"), data)
    after, _ = step(jax.random.key(3), state, None, data)
    gradient = np.asarray(state.images - after.images, np.float64) / CONFIG.image_learning_rate

    def distance(images):  # the metric is the mean over classes of what is differentiated
        _, metrics = step(jax.random.key(3), state.replace(images=images), None, data)
        return 10 * float(metrics.matching_loss)

    for seed in range(4):
        direction = jax.random.normal(jax.random.key(seed), state.images.shape)
        width = 1e-2
        difference = (
            distance(state.images + width * direction) - distance(state.images - width * direction)
        ) / (2 * width)
        np.testing.assert_allclose(difference, (gradient * direction).sum(), rtol=0.02, atol=0.02)


def plain_iteration(config, key, images, momentum, data):
    """One iteration of Algorithm 1, written out; the real images of a class are its only one."""
    network = networks.create(config.network, 10, SHAPE)
    keys = jax.random.split(jax.random.split(key)[0], config.networks_per_iteration)
    members = [network.init(key, jnp.zeros((1, *SHAPE))) for key in keys]

    def loss(parameters, images, labels):
        logits = network.apply(parameters, images)
        return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()

    gradient = jax.jit(jax.grad(loss))
    count = images.shape[1]

    @jax.jit
    @jax.grad
    def image_gradient(synthetic, parameters, target, label):
        own = jax.grad(loss)(parameters, synthetic, jnp.full(count, label))
        total = 0
        for a, b in zip(jax.tree.leaves(target), jax.tree.leaves(own), strict=True):
            if a.ndim > 1:
                a, b = a.reshape(-1, a.shape[-1]), b.reshape(-1, b.shape[-1])
                lengths = jnp.linalg.norm(a, axis=0) * jnp.linalg.norm(b, axis=0)
                total += (1 - (a * b).sum(0) / (lengths + 1e-6)).sum()
        return total

    outer_loops, inner_loops = config.loops
    labels = jnp.repeat(jnp.arange(10), count)
    for outer in range(outer_loops):
        gradients = []
        for label in range(10):
            real = normalize(data.images[data.places[label, :1]], data.mean, data.std)
            of_members = [
                image_gradient(
                    images[label], member, gradient(member, real, jnp.array([label])), label
                )
                for member in members
            ]
            gradients.append(sum(of_members) / len(of_members))
        momentum = 0.5 * momentum + jnp.stack(gradients)
        images = images - config.image_learning_rate * momentum
        for _ in range(inner_loops if outer < outer_loops - 1 else 0):
            members = [
                jax.tree.map(
                    lambda p, g: p - config.network_learning_rate * g,
                    member,
                    gradient(member, images.reshape(-1, *SHAPE), labels),
                )
                for member in members
            ]
    return images, momentum


def test_two_iterations_are_those_of_a_plain_program(one_image_a_class):
    data = one_image_a_class
    config = dataclasses.replace(
        CONFIG,
        images_per_class=2,
        outer_loops=3,
        inner_loops=2,
        network_learning_rate=0.5,
        initialization="noise",
        networks_per_iteration=2,
    )
    step, state, _ = started(config, data)
    images, momentum = state.images, state.momentum
    for seed in (5, 6):
        images, momentum = plain_iteration(config, jax.random.key(seed), images, momentum, data)
        state, _ = step(jax.random.key(seed), state, None, data)
    np.testing.assert_allclose(state.images, images, atol=2e-4)
    np.testing.assert_allclose(state.momentum, momentum, atol=2e-3)


@pytest.mark.parametrize("names", [(), ("crop", "flip", "color")])
def test_images_learn_to_match(data, names):
    config = dataclasses.replace(CONFIG, initialization="noise", siamese=names)
    algorithm = gradient_matching.build(config, 10, SHAPE)

    @jax.jit
    def run(key):
        state = algorithm.init(key, None, data)
        keys = jax.random.split(key, 200)
        return jax.lax.scan(lambda s, k: algorithm.step(k, s, None, data), state, keys)[1]

    losses = run(jax.random.key(0)).matching_loss
    assert losses[-20:].mean() < 0.8 * losses[:20].mean()


def test_a_step_that_is_not_finite_changes_nothing_and_is_counted(data):
    step, state, _ = started(CONFIG, data)
    broken = data.replace(mean=jnp.full(1, jnp.nan))
    after, metrics = step(jax.random.key(0), state, None, broken)
    np.testing.assert_array_equal(after.images, state.images)
    np.testing.assert_array_equal(after.momentum, state.momentum)
    assert metrics.num_failed == 1


def test_it_starts_from_distinct_real_images_of_each_class(data):
    config = dataclasses.replace(CONFIG, images_per_class=7)
    _, state, algorithm = started(config, data)
    made = algorithm.result(state, None, data)
    assert made.images.shape == (70, *SHAPE)
    np.testing.assert_array_equal(made.labels.argmax(1), np.repeat(np.arange(10), 7))
    real = np.asarray(normalize(data.images, data.mean, data.std))
    labels = load("digits").train.labels
    chosen = [np.flatnonzero((real == image).all((1, 2, 3))) for image in np.asarray(made.images)]
    assert all(len(places) for places in chosen)
    assert len({int(places[0]) for places in chosen}) == 70
    assert [int(labels[places[0]]) for places in chosen] == np.repeat(np.arange(10), 7).tolist()
    other = started(config, data, seed=1)[1]
    assert not np.array_equal(other.images, state.images)


def test_noise_is_standard_normal(data):
    config = dataclasses.replace(CONFIG, images_per_class=50, initialization="noise")
    images = np.asarray(started(config, data)[1].images)
    assert abs(images.mean()) < 0.03
    assert abs(images.std() - 1) < 0.03


@pytest.mark.parametrize(
    ("images", "loops"), [(1, (1, 1)), (5, (1, 1)), (10, (10, 50)), (50, (50, 10)), (99, (50, 10))]
)
def test_loops_are_the_published_ones(images, loops):
    assert gradient_matching.Config(images_per_class=images).loops == loops
    assert gradient_matching.Config(images_per_class=images, inner_loops=0).loops == (loops[0], 0)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"images_per_class": 0}, "images_per_class must be >= 1, got 0"),
        ({"outer_loops": 0}, "outer_loops must be >= 1, got 0"),
        ({"inner_loops": -1}, "inner_loops must be >= 0, got -1"),
        ({"image_learning_rate": float("nan")}, "image_learning_rate must be > 0, got nan"),
        ({"siamese": ("colour",)}, "color, crop, cutout, flip, scale, rotate, got 'colour'"),
        ({"network": NetworkConfig(dropout=0.5)}, "dropout has no place in matching, got 0.5"),
        ({"network": NetworkConfig(normalization="batch")}, "normalization batch mixes images"),
        ({"network": NetworkConfig(convolution="fused")}, "fused is differentiable once"),
    ],
)
def test_wrong_options_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        gradient_matching.Config(**options)


def test_a_class_without_images_is_refused():
    digits = load("digits")
    kept = digits.train.labels != 4
    train = dataclasses.replace(
        digits.train, images=digits.train.images[kept], labels=digits.train.labels[kept]
    )
    with pytest.raises(ValueError, match="class '4' of digits has no training images"):
        gradient_matching.make_data(dataclasses.replace(digits, train=train))
