"""Kernel inducing points: the gradient against finite differences, the average, what it reaches."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from evojax_suite import ga_distillation, networks
from evojax_suite.data import load, normalize
from evojax_suite.networks import NetworkConfig
from evojax_suite.systems.coresets import kernel_inducing_points
from evojax_suite.systems.ga_distillation import kernel_regression
from evojax_suite.systems.ga_distillation.kernel_regression import KernelConfig

SHAPE = (8, 8, 1)
CONFIG = kernel_inducing_points.Config(
    learning_rate=0.1,
    num_networks=2,
    num_cosines=5,
    start="class_means",
    kernel=KernelConfig(kernel_width=8, kernel_images=200),
    network=NetworkConfig(width=16, depth=1),
)


@pytest.fixture(scope="module")
def data():
    return kernel_inducing_points.make_data(load("digits"))


def started(config, data):
    algorithm = kernel_inducing_points.build(config, 10, SHAPE)
    return algorithm, jax.jit(algorithm.step), algorithm.init(jax.random.key(0), None, data)


def test_the_gradient_is_that_of_finite_differences(data):
    _, step, state = started(CONFIG, data)
    key, search = jax.random.key(7), CONFIG.search()
    network = networks.create(NetworkConfig(width=8, depth=1), 10, SHAPE)

    @jax.jit
    def loss(code):
        scores = kernel_regression.score_population(
            key,
            search.regression,
            network,
            CONFIG.num_networks,
            lambda code: ga_distillation.Individual(
                *ga_distillation.images_and_targets(search, 10, SHAPE, code, data)
            ),
            code[None],
            jnp.arange(1),
            data.train_images,
            data.train_labels,
            lambda images: normalize(images, data.mean, data.std),
            CONFIG.engine,
        )
        return scores.losses.sum()

    new, metrics = step(key, state, None, data)
    np.testing.assert_allclose(metrics.regression_loss, loss(state.code), rtol=1e-5)
    gradient = new.opt_state[0].mu / 0.1  # after the first step, the rest of it is Adam's decay
    for seed in range(5):
        direction = jax.random.normal(jax.random.key(seed), state.code.shape)
        there, back = (loss(state.code + sign * 0.01 * direction) for sign in (1, -1))
        np.testing.assert_allclose((there - back) / 0.02, gradient @ direction, rtol=0.1, atol=0.02)
    assert not np.array_equal(new.code, state.code)


def test_it_returns_the_average_with_the_contrast_of_real_images(data):
    algorithm, step, state = started(CONFIG, data)
    codes = []
    for number in range(4):
        state, metrics = step(jax.random.key(number), state, None, data)
        codes.append(np.asarray(state.code, np.float64))
        assert metrics.generation == number + 1
    average = codes[0]
    for number, code in enumerate(codes[1:], 2):
        share = 9 / (8 + number)
        average = (1 - share) * average + share * code
    np.testing.assert_allclose(state.average, average, rtol=1e-4, atol=1e-5)
    found = algorithm.result(state, None, data)
    plain, targets = ga_distillation.images_and_targets(
        CONFIG.search(), 10, SHAPE, state.average, data
    )
    np.testing.assert_allclose(found.images / found.images.std(), plain / plain.std(), atol=1e-4)
    real = normalize(load("digits").train.images, data.mean, data.std)
    np.testing.assert_allclose(found.images.std(), real.std(), rtol=0.05)
    np.testing.assert_array_equal(found.labels, targets)


def test_two_hundred_steps_halve_what_the_start_gets_wrong(data):
    config = dataclasses.replace(CONFIG, images_per_class=2, start="k_means")
    _, step, state = started(config, data)
    accuracies = []
    for number in range(200):
        state, metrics = step(jax.random.key(number), state, None, data)
        accuracies.append(float(metrics.regression_accuracy))
    assert 1 - np.mean(accuracies[-20:]) < (1 - np.mean(accuracies[:3])) / 2
    assert np.mean(accuracies[-20:]) > 0.93


def test_a_step_without_a_finite_gradient_is_left_out(data):
    _, step, state = started(CONFIG, data)
    broken = data.replace(train_images=jnp.full(data.train_images.shape, jnp.nan))
    new, metrics = step(jax.random.key(0), state, None, broken)
    assert metrics.num_failed == 1
    assert new.iteration == 1
    jax.tree.map(np.testing.assert_array_equal, new.replace(iteration=state.iteration), state)


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"learning_rate": 0.0}, "learning_rate must be > 0, got 0.0"),
        ({"learning_rate": float("nan")}, "learning_rate must be > 0, got nan"),
        ({"num_networks": 0}, "num_networks must be >= 1, got 0"),
        ({"images_per_class": 0}, "images_per_class must be >= 1, got 0"),
        ({"num_cosines": 0}, "num_cosines must be >= 1, got 0"),
        ({"network": NetworkConfig(network="MLP")}, "features of the ConvNet alone, got MLP"),
    ],
)
def test_settings_that_are_none(changed, said):
    with pytest.raises(ValueError, match=said):
        dataclasses.replace(CONFIG, **changed)
