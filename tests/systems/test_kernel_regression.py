"""Kernel regression, encodings and the strategy with credit by block."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.fft
from hypothesis import given, settings, strategies as st
from sklearn.cluster import KMeans
from sklearn.linear_model import Ridge
from sklearn.metrics import brier_score_loss

from evojax_suite import ga_distillation, networks, strategies
from evojax_suite.data import load
from evojax_suite.networks import NetworkConfig
from evojax_suite.operators import encodings
from evojax_suite.strategies.block_es import centred_ranks
from evojax_suite.systems.ga_distillation import kernel_regression, strong_random
from evojax_suite.systems.ga_distillation.kernel_regression import KernelConfig, Regression
from evojax_suite.training import EngineConfig

# --- the regression


@pytest.mark.parametrize("ridge", [1e-3, 0.3])
def test_predictions_are_those_of_ridge_regression(ridge):
    random = np.random.default_rng(0)
    features, new = random.normal(size=(12, 40)), random.normal(size=(30, 40))
    labels, penalty = random.normal(size=(12, 5)), ridge * 40
    kernels = features @ features.T, labels, new @ features.T
    own = kernel_regression.predict(*map(jnp.float32, kernels), jnp.float32(penalty))
    theirs = Ridge(alpha=penalty, fit_intercept=False).fit(features, labels)
    np.testing.assert_allclose(own, theirs.predict(new), rtol=2e-4, atol=2e-4)


def test_the_losses_of_classes_add_up_to_the_brier_score():
    random = np.random.default_rng(0)
    predictions, labels = random.normal(size=(50, 4)).astype(np.float32), np.arange(50) % 4
    losses = kernel_regression.class_losses(jnp.asarray(predictions), jnp.asarray(labels), 3.0)
    probabilities = np.exp(3 * predictions) / np.exp(3 * predictions).sum(1, keepdims=True)
    for label in range(4):
        expected = brier_score_loss(labels == label, probabilities[:, label])
        np.testing.assert_allclose(losses[label], expected, rtol=1e-5)
    squared = kernel_regression.class_losses(jnp.asarray(predictions), jnp.asarray(labels), 0.0)
    np.testing.assert_allclose(squared, ((predictions - np.eye(4)[labels]) ** 2).mean(0), rtol=1e-5)


def test_candidates_are_scored_as_one_by_one():
    """By hand: features of the same two networks, ridge, and what it says of the same images."""
    random = np.random.default_rng(1)
    shape, config = (
        (8, 8, 1),
        Regression(kernel_images=20, ridge=0.01, temperature=4.0, company=3),
    )
    network = networks.create(NetworkConfig(width=4, depth=1), 3, shape)
    images, labels = random.normal(size=(40, *shape)).astype(np.float32), np.arange(40) % 3
    population = jnp.asarray(random.normal(size=(6, 3 * 64)), jnp.float32)
    members = np.array([4, 0, 5])

    def decode(candidate):
        return ga_distillation.Individual(candidate.reshape(3, *shape), jnp.eye(3))

    scores = kernel_regression.score_population(
        jax.random.key(0),
        config,
        network,
        2,
        decode,
        population,
        jnp.asarray(members),
        jnp.asarray(images),
        jnp.asarray(labels),
        lambda images: images,
        EngineConfig(evaluation_batch_size=7),
        jnp.arange(3),
    )
    key_networks, key_images = jax.random.split(jax.random.key(0))
    chosen = np.asarray(jax.random.randint(key_images, (20,), 0, 40))

    def features(images):
        found = []
        for key in jax.random.split(key_networks, 2):
            variables = network.init(key, jnp.zeros((1, *shape)))
            found.append(np.asarray(network.apply(variables, images, features_only=True)))
        return np.concatenate([*found, np.ones((len(images), 1))], 1)

    real = features(images[chosen])

    def losses_of(own, scale):
        penalty = 0.01 * (scale**2).sum() / 3
        theirs = Ridge(alpha=penalty, fit_intercept=False).fit(own, np.eye(3) - 1 / 3)
        said = theirs.predict(real) + 1 / 3
        accuracy = (said.argmax(1) == labels[chosen]).mean()
        return kernel_regression.class_losses(jnp.float32(said), labels[chosen], 4.0), accuracy

    for place, member in enumerate(members):
        own = features(decode(population[member]).images)
        losses, accuracy = losses_of(own, own)
        np.testing.assert_allclose(scores.losses[place], losses, rtol=2e-3, atol=2e-4)
        np.testing.assert_allclose(scores.accuracy[place], accuracy, atol=0.051)
        for image in range(3):  # alone in the company of candidates 0, 2 and 4
            found = []
            for other in (0, 2, 4):
                company = features(decode(population[other]).images)
                mixed = company.copy()
                mixed[image] = own[image]
                found.append(losses_of(mixed, company)[0][image])
            np.testing.assert_allclose(
                scores.credit.own[place, image], np.mean(found), rtol=2e-3, atol=2e-4
            )


@settings(deadline=None, max_examples=15)
@given(
    seed=st.integers(0, 999),
    per_class=st.integers(1, 3),
    candidates=st.integers(1, 5),
    company=st.integers(1, 3),
    temperature=st.sampled_from([0.0, 4.0]),
)
def test_credit_is_that_of_a_regression_with_one_image_exchanged(
    seed, per_class, candidates, company, temperature
):
    """With labels of any kind, against a solve of each combination."""
    random = np.random.default_rng(seed)
    config = Regression(ridge=0.01, temperature=temperature)
    num_images, num_real, classes = 3 * per_class, 20, jnp.arange(3).repeat(per_class)
    real, real_labels = random.normal(size=(num_real, 30)), random.integers(0, 3, num_real)
    real_labels = jnp.asarray(real_labels)

    def drawn(count):
        features = random.normal(size=(count, num_images, 30))
        labels = random.dirichlet(np.ones(3), size=(count, num_images)) - 1 / 3
        kernels = kernel_regression.Kernels(
            own=jnp.float32(features @ features.swapaxes(1, 2)),
            real=jnp.float32(real @ features.swapaxes(1, 2)),
            labels=jnp.float32(labels),
        )
        return features, labels, kernels

    own, own_labels, own_kernels = drawn(candidates)
    others, other_labels, other_kernels = drawn(company)
    between = jnp.float32(np.einsum("pif,rjf->rpij", own, others))
    found = kernel_regression.credit_by_image(
        own_kernels, other_kernels, between, classes, real_labels, config, all_columns=True
    )
    assert found.own.shape == found.all.shape == (candidates, num_images)
    for candidate in range(candidates):
        for image in range(num_images):
            losses = []
            for features, labels in zip(others.copy(), other_labels.copy(), strict=True):
                penalty = 0.01 * (features**2).sum() / num_images
                features[image], labels[image] = own[candidate, image], own_labels[candidate, image]
                weights = np.linalg.solve(
                    features @ features.T + penalty * np.eye(num_images), labels
                )
                said = jnp.float32(real @ features.T @ weights + 1 / 3)
                losses.append(kernel_regression.class_losses(said, real_labels, temperature))
            expected, place = np.mean(losses, 0), (candidate, image)
            np.testing.assert_allclose(found.own[place], expected[classes[image]], 2e-3, 1e-4)
            np.testing.assert_allclose(found.all[place], expected.mean(), 2e-3, 1e-4)
    failed, between = jax.tree.map(  # company whose features are not finite is left out
        lambda leaf: jnp.concatenate([leaf, jnp.full_like(leaf[:1], jnp.nan)]),
        (other_kernels, between),
    )
    again = kernel_regression.credit_by_image(
        own_kernels, failed, between, classes, real_labels, config
    )
    np.testing.assert_allclose(again.own, found.own, rtol=1e-4, atol=1e-6)


def test_solved_labels_are_those_of_least_squares():
    """The predictions of all networks are stacked; two images in order share a label."""
    random, shape = np.random.default_rng(2), (8, 8, 1)
    config, engine = Regression(kernel_images=50, ridge=0.1), EngineConfig()
    network = networks.create(NetworkConfig(width=4, depth=1), 3, shape)
    images = jnp.asarray(random.normal(size=(6, *shape)), jnp.float32)
    real = jnp.asarray(random.normal(size=(60, *shape)), jnp.float32)
    targets = jnp.asarray(random.normal(size=(60, 3)), jnp.float32)
    own = network, 3, images, 2, real, targets, lambda images: 2 * images, engine
    found = kernel_regression.solve_labels(jax.random.key(0), config, *own)
    reaches, drawn = [], []
    for key in jax.random.split(jax.random.key(0), 3):
        key_network, key_images = jax.random.split(key)
        variables = jax.tree.map(lambda v: v[None], network.init(key_network, images[:1]))
        drawn.append(jax.random.choice(key_images, 60, (50,), replace=False))
        few, many = (
            np.asarray(kernel_regression.features_of(network, variables, some, engine), float)
            for some in (images, 2 * real[drawn[-1]])
        )
        penalty = 0.1 * (few**2).sum() / 6
        regressions = [  # what each image alone, labelled 1, predicts
            Ridge(alpha=penalty, fit_intercept=False).fit(few, label).predict(many)
            for label in np.eye(6)
        ]
        reaches.append(np.stack(regressions, 1).reshape(50, 3, 2).sum(2))
    expected = np.linalg.lstsq(np.concatenate(reaches), targets[np.concatenate(drawn)])[0]
    np.testing.assert_allclose(found, expected, rtol=2e-3, atol=2e-3)


@pytest.mark.parametrize(
    ("setting", "said"),
    [
        ({"ridge": 0.0}, "ridge must be > 0, got 0.0"),
        ({"ridge": float("nan")}, "ridge must be > 0, got nan"),
        ({"temperature": -1.0}, "temperature must be >= 0, got -1.0"),
        ({"kernel_width": 0}, "kernel_width must be >= 1, got 0"),
        ({"kernel_images": 0}, "kernel_images must be >= 1, got 0"),
        ({"company": 0}, "company must be >= 1, got 0"),
    ],
)
def test_ranges(setting, said):
    with pytest.raises(ValueError, match=said):
        KernelConfig(**setting)


@pytest.mark.parametrize(
    ("images_per_class", "known"), [(1, 1), (9, 1), (10, 10), (49, 10), (80, 50)]
)
def test_what_is_not_given_suits_the_number_of_images(images_per_class, known):
    suited = {
        1: Regression(1000, 1e-3, 10.0, 8, "own"),
        10: Regression(1000, 0.3, 5.0, 2, "all"),
        50: Regression(1000, 1.0, 5.0, 1, "all"),
    }
    assert KernelConfig().regression(images_per_class) == suited[known]
    given = KernelConfig(ridge=0.2, temperature=0.0, company=3, columns="own", kernel_images=7)
    assert given.regression(images_per_class) == Regression(7, 0.2, 0.0, 3, "own")
    four = dataclasses.replace(CONFIG, images_per_class=images_per_class, factor=2)
    assert four.regression == CONFIG.kernel.regression(4 * images_per_class)


# --- encodings


@pytest.mark.parametrize("size", [1, 2, 7, 28])
def test_the_basis_is_the_orthonormal_cosine_transform(size):
    basis = encodings.cosine_basis(size)
    np.testing.assert_allclose(basis @ basis.T, np.eye(size), atol=1e-6)
    theirs = scipy.fft.dct(np.eye(size), axis=0, norm="ortho")
    np.testing.assert_allclose(basis, theirs, atol=1e-6)


@settings(deadline=None, max_examples=20)
@given(
    height=st.integers(2, 9),
    width=st.integers(2, 9),
    channels=st.sampled_from([1, 3]),
    seed=st.integers(0, 99),
    data=st.data(),
)
def test_encodings_invert(height, width, channels, seed, data):
    shape = height, width, channels
    random = np.random.default_rng(seed)
    images = jnp.asarray(random.normal(size=(2, *shape)), jnp.float32)
    spread = jnp.asarray(random.uniform(0.5, 2, size=shape), jnp.float32)
    count = data.draw(st.integers(1, min(height, width)))
    kinds = [encodings.Pixels(shape), encodings.Cosines(shape, count)]
    if height % 2 == width % 2 == 0:
        kinds += [encodings.create(name, shape, count, 2) for name in ("pixels", "cosines")]
    for encoding in kinds:
        codes = encoding.encode(images, spread)
        assert codes.shape == (2, encoding.num_dims)
        again = encoding.encode(encoding.decode(codes, spread), spread)
        np.testing.assert_allclose(again, codes, atol=2e-4)
        # A projection: what is lost is orthogonal to what is kept.
        kept = encoding.decode(codes, spread)
        assert abs(float(((images - kept) * kept).sum())) < 1e-2
    if height == width == count and len(kinds) == 2:
        np.testing.assert_allclose(kept, images, atol=2e-4)


def test_a_step_of_one_is_a_standard_deviation_of_real_images():
    dataset = load("digits")
    images = (dataset.train.images / np.float32(255)).astype(np.float32)
    encoding = encodings.Cosines(dataset.image_shape, 8)
    codes = encoding.encode(jnp.asarray(images), jnp.asarray(encodings.cosine_spread(images, 0.0)))
    deviations = np.asarray(codes).std(0)
    np.testing.assert_allclose(deviations[deviations > 0], 1, rtol=1e-3)


def test_an_image_holds_smaller_ones_that_networks_see_enlarged():
    """In pixels and in cosines; against PyTorch's bilinear upsampling."""
    torch = pytest.importorskip("torch")
    random = np.random.default_rng(0)
    tiles = random.normal(size=(2, 4, 4, 5, 3)).astype(np.float32)
    images = np.concatenate(
        [
            np.concatenate([tiles[:, 0], tiles[:, 1]], 2),
            np.concatenate([tiles[:, 2], tiles[:, 3]], 2),
        ],
        1,
    )
    large, labels = encodings.unpacked(jnp.asarray(images), jnp.array([3, 7]), 2)
    theirs = torch.nn.functional.interpolate(
        torch.tensor(tiles.reshape(8, 4, 5, 3)).permute(0, 3, 1, 2), size=(8, 10), mode="bilinear"
    )
    np.testing.assert_allclose(large, theirs.permute(0, 2, 3, 1), atol=1e-5)
    assert labels.tolist() == [3, 3, 3, 3, 7, 7, 7, 7]
    same, _ = encodings.unpacked(jnp.asarray(images), jnp.array([3, 7]), 1)
    np.testing.assert_array_equal(same, images)
    # Smooth images come back nearly as they were.
    smooth = jnp.broadcast_to(jnp.linspace(-1, 1, 8)[:, None, None], (8, 8, 10, 3))
    again, _ = encodings.unpacked(encodings.packed(smooth, 2), jnp.arange(2), 2)
    np.testing.assert_allclose(again[:, 2:-2], smooth[:, 2:-2], atol=0.05)


@settings(deadline=None, max_examples=20)
@given(levels=st.integers(2, 256), seed=st.integers(0, 99))
def test_pixels_of_few_levels_are_the_nearest_of_them(levels, seed):
    pixels = np.random.default_rng(seed).normal(0.5, 0.5, 100).astype(np.float32)
    values = np.linspace(0, 1, levels)
    found = np.asarray(encodings.rounded(jnp.asarray(pixels), levels))
    least = np.abs(pixels[:, None] - values).min(1)
    np.testing.assert_allclose(np.abs(found - pixels), least, atol=1e-6)
    np.testing.assert_allclose(np.abs(found[:, None] - values).min(1), 0, atol=1e-6)


def test_images_of_one_bit_are_black_and_white():
    dataset = load("digits")
    config = dataclasses.replace(ga_distillation.RECOMMENDED, levels=2, factor=2)
    data = ga_distillation.make_data(dataset)
    code = ga_distillation.class_means(config, 10, data)
    code += jax.random.normal(jax.random.key(0), code.shape)
    found = ga_distillation.decode(config, 10, dataset.image_shape, code, data)
    pixels = np.asarray(found.images * data.std + data.mean)
    np.testing.assert_allclose(np.unique(pixels.round(5)), [0, 1])


def test_what_is_found_has_the_contrast_of_real_images(digits):
    """Where the regression is blind to contrast, what evolves has any."""
    data, shape = ga_distillation.make_data(digits), digits.image_shape
    pixels = digits.train.images / np.float32(255 if digits.train.images.max() > 1 else 1)
    real = (pixels - np.array(digits.mean)) / np.array(digits.std)
    np.testing.assert_allclose(data.contrast, real.std(), rtol=0.05)
    code = ga_distillation.class_means(CONFIG, 10, data)
    found = ga_distillation.decode(CONFIG, 10, shape, code, data).images
    np.testing.assert_allclose(found.std(), data.contrast, rtol=1e-5)
    again = ga_distillation.decode(CONFIG, 10, shape, 7 * code, data).images
    np.testing.assert_allclose(again, found, atol=1e-4)
    scores = ga_distillation.score_population(
        jax.random.key(0), CONFIG, 10, shape, jnp.stack([code, 7 * code]), data
    )
    np.testing.assert_allclose(scores.fitness[0], scores.fitness[1], rtol=1e-3)

    def normalized(name):
        return dataclasses.replace(
            CONFIG, network=dataclasses.replace(CONFIG.network, normalization=name)
        )

    for seeing in (
        *map(normalized, ("none", "batch", "layer", "group")),
        dataclasses.replace(CONFIG, fitness="cross_entropy"),
    ):
        plain, _ = ga_distillation.images_and_targets(seeing, 10, shape, code, data)
        as_is = ga_distillation.decode(seeing, 10, shape, code, data).images
        np.testing.assert_array_equal(as_is, plain)


def test_images_that_do_not_divide_are_refused():
    with pytest.raises(ValueError, match="factor must be >= 1 and divide 8 x 10, got 4"):
        encodings.create("pixels", (8, 10, 1), 14, 4)


def test_more_cosines_than_pixels_are_refused():
    with pytest.raises(ValueError, match=r"num_cosines must be in 1\.\.8, got 9"):
        encodings.Cosines((8, 10, 1), 9)
    assert encodings.create("cosines", (8, 10, 1), 14).num_dims == 64


# --- the strategy


def quadratics(population, targets):
    """Losses (P, B) of blocks, each of its own block alone."""
    blocks = population.reshape(len(population), *targets.shape)
    return ((blocks - targets) ** 2).sum(-1)


def searched(credit: bool, steps: int = 60):
    """What is left of the sum of the losses after some steps of 16 candidates."""
    targets = jax.random.normal(jax.random.key(0), (10, 8))
    strategy = strategies.create("BlockES", 16, 80, blocks=10)
    params = strategy.default_params.replace(std_init=0.1, learning_rate=1.0)
    state = strategy.init(jax.random.key(1), jnp.zeros(80), params)
    for step in range(steps):
        population, state = strategy.ask(jax.random.key(step), state, params)
        losses = quadratics(population, targets)
        told = losses if credit else losses.sum(1)
        state, _ = strategy.tell(jax.random.key(step), population, told, state, params)
    left = quadratics(strategy.get_mean(state)[None], targets).sum()
    return float(left / (targets**2).sum())


def test_credit_by_block_finds_what_the_sum_hides():
    assert searched(credit=True) < 0.2
    assert searched(credit=False) > 2 * searched(credit=True)


def test_a_step_goes_down_in_each_block():
    """A pair moves the mean towards its better half, by Adam's first step: the learning rate."""
    strategy = strategies.create("BlockES", 2, 6, blocks=2)
    params = strategy.default_params.replace(std_init=0.1, learning_rate=0.3)
    state = strategy.init(jax.random.key(0), jnp.zeros(6), params)
    population, state = strategy.ask(jax.random.key(1), state, params)
    np.testing.assert_allclose(population[0], -population[1], atol=1e-6)
    losses = jnp.array([[1.0, 5.0], [2.0, 3.0]])  # the first is better in the first block alone
    state, _ = strategy.tell(jax.random.key(2), population, losses, state, params)
    expected = 0.03 * np.sign(np.concatenate([population[0, :3], population[1, 3:]]))
    np.testing.assert_allclose(state.mean, expected, rtol=1e-3)
    np.testing.assert_allclose(strategy.get_mean(state), state.mean)


def test_the_average_weighs_late_means_more():
    strategy = strategies.create("BlockES", 4, 3)
    params = strategy.default_params
    state = strategy.init(jax.random.key(0), jnp.zeros(3), params)
    means = []
    for step in range(12):
        population, state = strategy.ask(jax.random.key(step), state, params)
        losses = (population**2).sum(1)
        state, _ = strategy.tell(jax.random.key(step), population, losses, state, params)
        means.append(np.asarray(state.mean))
    weights = np.array([1.0])
    for step in range(2, 13):
        share = 9 / (8 + step)
        weights = np.append(weights * (1 - share), share)
    np.testing.assert_allclose(strategy.get_mean(state), weights @ np.stack(means), rtol=1e-4)
    assert weights[-1] > 4 * weights[3]


def test_ranks_are_centred_and_failures_are_last():
    losses = jnp.array([[3.0, 1.0], [jnp.nan, 2.0], [1.0, jnp.nan]])
    np.testing.assert_allclose(centred_ranks(losses), [[0, -0.5], [0.5, 0], [-0.5, 0.5]])


@pytest.mark.parametrize(
    ("population_size", "blocks", "said"),
    [(3, 1, "population_size must be even"), (4, 5, "blocks must divide the 6 dimensions")],
)
def test_sizes_that_do_not_fit(population_size, blocks, said):
    with pytest.raises(ValueError, match=said):
        strategies.create("BlockES", population_size, 6, blocks=blocks)


# --- distillation

CONFIG = ga_distillation.Config(
    population_size=32,
    strategy="BlockES",
    fitness="kernel_regression",
    encoding="cosines",
    num_cosines=6,
    start="class_means",
    best_of="mean",
    kernel=KernelConfig(kernel_width=16, kernel_images=100),
    network=NetworkConfig(width=16, depth=1),
)


@pytest.fixture(scope="module")
def digits():
    return load("digits")


def test_class_means_are_those_of_numpy(digits):
    data = ga_distillation.make_data(digits)
    config = dataclasses.replace(CONFIG, encoding="pixels", images_per_class=2)
    found = ga_distillation.class_means(config, 10, data).reshape(10, 2, 8, 8, 1)
    images = (digits.train.images / 255 - np.array(digits.mean)) / np.array(digits.std)
    for label in range(10):
        expected = images[digits.train.labels == label].mean(0)
        np.testing.assert_allclose(found[label, 0], expected, atol=1e-4)
        np.testing.assert_allclose(found[label, 1], expected, atol=1e-4)


def test_labels_that_evolve_are_logits_of_their_own_credit(digits):
    """Those of the class to begin with; a block of numbers each, after those of the tiles."""
    config = dataclasses.replace(CONFIG, evolve_labels=True, factor=2, num_cosines=3)
    data, shape = ga_distillation.make_data(digits), digits.image_shape
    codes = ga_distillation.class_means(config, 10, data)
    labels = ga_distillation.decode(config, 10, shape, codes, data).labels
    np.testing.assert_allclose(labels, jax.nn.softmax(10.0 * jnp.eye(10)), rtol=1e-4)
    changed = codes.reshape(10, -1).at[:, -10:].add(1.0)  # of all classes alike
    again = ga_distillation.decode(config, 10, shape, changed.reshape(-1), data).labels
    np.testing.assert_allclose(again, labels, rtol=1e-3)
    population = jnp.stack([codes, codes, codes])
    population = population.at[1].add(jnp.zeros((10, 46)).at[3, -7].set(9.0).reshape(-1))
    scores = ga_distillation.score_population(
        jax.random.key(0), config, 10, shape, population, data
    )
    assert scores.credit.shape == (3, 50)
    changed = np.flatnonzero(scores.credit[1] != scores.credit[0])
    # A label of image 3 moves the columns of its four tiles and its own, and no other's.
    assert set(changed) == {12, 13, 14, 15, 43}
    assert scores.credit[1, 43] > scores.credit[0, 43]
    by_all = dataclasses.replace(config, kernel=dataclasses.replace(config.kernel, columns="all"))
    of_all = ga_distillation.score_population(
        jax.random.key(0), by_all, 10, shape, population, data
    ).credit
    tiles = of_all[:, :40].reshape(3, 10, 4).mean(-1)
    np.testing.assert_allclose(tiles, scores.credit[:, 40:], rtol=1e-5)
    assert (of_all[:, :40] != scores.credit[:, :40]).any()


def test_evolution_improves_on_the_class_means(digits):
    """By the surrogate's own measure on networks and images that the search has not seen."""
    data, params = ga_distillation.make_data(digits), ga_distillation.Params()
    algorithm = ga_distillation.build(CONFIG, 10, digits.image_shape)
    state = algorithm.init(jax.random.key(0), params, data)
    keys = jax.random.split(jax.random.key(1), 200)

    @jax.jit
    def run(state):
        def step(state, key):
            state, metrics = algorithm.step(key, state, params, data)
            return state, metrics.fitness_mean

        return jax.lax.scan(step, state, keys)

    after, _ = run(state)
    both = jnp.stack([ga_distillation.class_means(CONFIG, 10, data), after.best])
    scores = [
        ga_distillation.score_population(
            jax.random.key(100 + n), CONFIG, 10, digits.image_shape, both, data
        )
        for n in range(5)
    ]
    fitness = np.stack([score.fitness for score in scores])
    gain = fitness[:, 1] - fitness[:, 0]
    assert gain.mean() > 0.02


@pytest.mark.parametrize(
    "changes",
    [
        {"strategy": "SNES", "strategy_std": 0.1},
        {"strategy": "LaplaceGA", "start": "real", "best_of": "run", "encoding": "pixels"},
        {"networks_per_member": 2, "images_per_class": 2, "strategy_std": 0.2, "start": "k_means"},
        {"factor": 2, "start": "k_means"},
        {"evolve_labels": True, "factor": 2, "images_per_class": 2},
    ],
)
def test_any_algorithm_of_evosax_and_any_encoding(digits, changes):
    data, params = ga_distillation.make_data(digits), ga_distillation.Params()
    config = dataclasses.replace(CONFIG, population_size=6, **changes)
    algorithm = ga_distillation.build(config, 10, digits.image_shape)
    state = algorithm.init(jax.random.key(0), params, data)
    state, metrics = algorithm.step(jax.random.key(1), state, params, data)
    assert np.isfinite(metrics.fitness_mean)
    found = algorithm.result(state, params, data)
    assert found.images.shape == (10 * config.images_per_class, 8, 8, 1)
    np.testing.assert_allclose(found.labels.sum(1), 1, atol=1e-5)


def test_centres_are_those_of_k_means(digits):
    """Fixed points of Lloyd's algorithm by scikit-learn, as good as its own from random starts."""
    data = ga_distillation.make_data(digits)
    config = dataclasses.replace(CONFIG, encoding="pixels", images_per_class=3)
    flat = ga_distillation.class_centres(jax.random.key(0), config, 10, data)
    found = np.asarray(flat).reshape(10, 3, 64).astype(np.float64)
    images = (digits.train.images / 255 - np.array(digits.mean)) / np.array(digits.std)
    images = images.reshape(len(images), 64)
    for label in range(10):
        points = images[digits.train.labels == label]
        theirs = KMeans(3, init=found[label], n_init=1, max_iter=300).fit(points)
        assert np.abs(theirs.cluster_centers_ - found[label]).max() < 0.5
        inertia = (((points[:, None] - found[label]) ** 2).sum(2).min(1)).sum()
        best = KMeans(3, init="random", n_init=20, random_state=0).fit(points).inertia_
        assert 0.98 * best < inertia < 1.2 * best


def test_strong_random_is_scored_in_the_same_way(digits):
    data, params = ga_distillation.make_data(digits), ga_distillation.Params()
    algorithm = strong_random.build(CONFIG, 1, 10, digits.image_shape)
    state = algorithm.init(jax.random.key(0), params, data)
    state, metrics = algorithm.step(jax.random.key(1), state, params, data)
    assert metrics.fitness_mean < metrics.fitness_best < 0


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"strategy": "LaplaceGA"}, "best_of mean needs an algorithm that searches around a mean"),
        ({"holdout_ratio": 0.1, "best_of": "run"}, "holdout_ratio belongs to a fitness of trained"),
        ({"fitness_subset_size": 10}, "fitness_subset_size belongs to a fitness of trained"),
        (
            {"evolve_labels": True, "kernel": KernelConfig(temperature=0.0)},
            "evolve_labels by kernel_regression needs a temperature > 0, got 0.0",
        ),
        ({"factor": 3}, "factor must be >= 1 and divide 8 x 8, got 3"),
        ({"network": NetworkConfig(network="MLP")}, "features of the ConvNet alone, got MLP"),
        ({"num_cosines": 0}, "num_cosines must be >= 1, got 0"),
        ({"population_size": 5}, "population_size must be even"),
    ],
)
def test_settings_that_do_not_go_together(digits, changes, said):

    def build():
        config = dataclasses.replace(CONFIG, **changes)
        ga_distillation.build(config, 10, digits.image_shape)

    with pytest.raises(ValueError, match=said):
        build()
