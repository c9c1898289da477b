"""DEvS: sizes, exact averages, one compilation for all sizes, classes, errors."""

from __future__ import annotations

import dataclasses
import itertools

import jax
import numpy as np
import pytest
from hypothesis import given, settings, strategies as st

from evojax_suite import devs
from evojax_suite.data import load, normalize, with_whole_training_set
from evojax_suite.networks import NetworkConfig
from evojax_suite.systems.devs.algorithm import num_batches
from evojax_suite.training import TrainingConfig, fit_epochs
from evojax_suite.types import training_data

SHAPE = (8, 8, 1)
CONFIG = devs.Config(
    target_sizes=(20, 6),
    reduction_factor=3.0,
    clustering="sklearn",
    bottleneck=4,
    feature_epochs=2,
    min_training_steps=6,
    network=NetworkConfig(width=4, depth=1, initialization="kaiming", dropout=0.2),
    training=TrainingConfig(num_epochs=2, batch_size=32, optimizer="sgd", mixup_alpha=0.4),
)


@pytest.fixture(scope="module")
def data():
    return training_data(with_whole_training_set(load("digits"), 130))


def states_of(config, data, seed=0):
    """The state after each reduction, the first one included, and all metrics."""
    algorithm = devs.build(config, 10, SHAPE)
    state = algorithm.init(jax.random.key(seed), None, data)
    states, lines = [state], []
    for step in range(devs.num_steps(config, len(data.labels))):
        key = jax.random.fold_in(jax.random.key(seed + 1), step)
        state, metrics = algorithm.step(key, state, None, data)
        lines.append(metrics)
        if state.reduction > states[-1].reduction:
            states.append(state)
    assert bool(algorithm.finished(state))
    return algorithm, states, lines


@pytest.fixture(scope="module")
def finished(data):
    return states_of(CONFIG, data)


def test_each_set_is_the_averages_of_clusters_of_the_one_before(finished, data):
    """Recomputed sample by sample; image and label mass are conserved on the way."""
    algorithm, states, _ = finished
    images = np.asarray(normalize(data.images, data.mean, data.std), np.float64)
    labels = np.eye(10)[np.asarray(data.labels)]
    sizes = devs.size_sequence(CONFIG, len(images))
    for (before, after), size in zip(itertools.pairwise(states), sizes, strict=True):
        pairs = set(
            zip(
                np.asarray(before.assignments).tolist(),
                np.asarray(after.assignments).tolist(),
                strict=True,
            )
        )
        assert len(pairs) == len(images)  # a sample goes into one cluster
        clusters = np.array([cluster for _, cluster in sorted(pairs)])
        assert set(clusters.tolist()) == set(range(size))
        counts = np.bincount(clusters)
        mass = images.sum(0), labels.sum(0)
        images, labels = (
            np.stack([values[clusters == c].mean(0) for c in range(size)])
            for values in (images, labels)
        )
        for values, total in zip((images, labels), mass, strict=True):
            np.testing.assert_allclose(np.tensordot(counts, values, 1), total, atol=1e-9)
        if size in CONFIG.target_sizes:
            place = CONFIG.target_sizes.index(size)
            reached = algorithm.result(states[-1], None, data)[place]
            np.testing.assert_allclose(reached.images, images, atol=1e-5)
            np.testing.assert_allclose(reached.labels, labels, atol=1e-6)
            np.testing.assert_allclose(reached.labels.sum(1), 1, atol=1e-5)


def test_what_a_run_reports(finished):
    _, _, lines = finished
    assert [int(line.generation) for line in lines] == list(range(1, len(lines) + 1))
    samples = [int(line.num_samples) for line in lines]
    assert samples[-1] == 6
    assert samples == sorted(samples, reverse=True)
    reduced = [line for line in lines if np.isfinite(line.inertia)]
    assert [int(line.num_samples) for line in reduced] == [51, 20, 11, 6]
    assert [int(line.reduction) for line in reduced] == [1, 2, 3, 4]
    assert all(0 <= line.label_entropy <= np.log(10) for line in lines)
    assert {"training", "features", "clustering", "averaging"} == set(reduced[0].stage_seconds)


def test_all_sizes_share_one_compiled_training(data):
    config = dataclasses.replace(CONFIG, bottleneck=5)
    before = fit_epochs._cache_size()
    states_of(config, data)
    assert fit_epochs._cache_size() == before + 1


def test_label_weight_keeps_classes_apart(data):
    config = dataclasses.replace(CONFIG, label_weight=100.0, target_sizes=(20,))
    algorithm, states, _ = states_of(config, data)
    (reached,) = algorithm.result(states[-1], None, data)
    np.testing.assert_allclose(reached.labels.max(1), 1, atol=1e-5)


@pytest.mark.parametrize("kind", ["retrained", "continued", "first"])
def test_feature_networks(kind, data):
    config = dataclasses.replace(CONFIG, feature_network=kind)
    _, states, lines = states_of(config, data)
    epochs = [int(line.epoch) for line in lines if np.isfinite(line.inertia)]
    assert epochs == ([2, 0, 0, 0] if kind == "first" else [2, 3, 6, 6])
    before, after = (jax.tree.leaves(state.fit.parameters) for state in (states[-2], states[-1]))
    kept = all(np.array_equal(a, b) for a, b in zip(before, after, strict=True))
    assert kept == (kind == "first")


values = st.integers(0, 2**31 - 1)


@settings(max_examples=30, deadline=None, derandomize=True)
@given(values, st.sampled_from(["samples", "originals"]))
def test_merging_keeps_mass(seed, kind):
    generator = np.random.default_rng(seed)
    assignments, weights = np.arange(30), np.ones(30, np.float32)
    originals = generator.normal(size=(30, 2, 2, 1)).astype(np.float32)
    samples = originals
    for size in (12, 5, 2):
        clusters = generator.permutation(np.arange(len(samples)) % size)
        assignments, weights = devs.merge(assignments, weights, clusters, kind)
        merged = np.asarray(devs.average(assignments, weights, originals, size))
        groups = clusters if kind == "samples" else assignments
        source = samples if kind == "samples" else originals
        expected = np.stack([source[groups == cluster].mean(0) for cluster in range(size)])
        np.testing.assert_allclose(merged, expected, atol=1e-5)
        np.testing.assert_allclose(np.bincount(assignments, weights), 1, atol=1e-5)
        samples = merged


def test_clusters_of_one_change_nothing():
    assignments, weights = np.array([0, 1, 1, 2]), np.array([1, 0.5, 0.5, 1], np.float32)
    clusters = np.array([2, 0, 1])
    merged, merged_weights = devs.merge(assignments, weights, clusters, "samples")
    np.testing.assert_array_equal(merged, [2, 0, 0, 1])
    np.testing.assert_array_equal(merged_weights, weights)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    st.lists(st.integers(1, 500), min_size=1, max_size=4, unique=True),
    st.integers(501, 60_000),
    st.sampled_from([1.2, 2.0, 4.0, float("inf")]),
)
def test_sizes_fall_geometrically_through_the_targets(targets, num_images, factor):
    targets = tuple(sorted(targets, reverse=True))
    config = devs.Config(target_sizes=targets, reduction_factor=factor)
    sizes = devs.size_sequence(config, num_images)
    assert set(targets) <= set(sizes)
    assert sizes[-1] == targets[-1]
    if factor == float("inf"):
        assert sizes == targets
    for before, after in itertools.pairwise((num_images, *sizes)):
        assert after < before
        assert after >= np.floor(before / factor - 1)  # up to rounding
    assert devs.num_steps(config, num_images) >= len(sizes)


def test_sizes_by_default_and_by_halving():
    assert devs.size_sequence(devs.Config(), 50_000) == (5_000, 500, 100, 10)
    sizes = devs.size_sequence(devs.Config(reduction_factor=2), 50_000)
    assert sizes == (25_897, 13_413, 6_947, 3_598, 1_864, 965, 500, 292, 171, 100, 56, 32, 18, 10)
    assert devs.size_sequence(devs.Config(target_sizes=(1,), reduction_factor=2), 8) == (4, 2, 1)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"target_sizes": ()}, "target_sizes must name at least one, got"),
        ({"target_sizes": (10, 10)}, "target_sizes must fall, got 10 after 10"),
        ({"target_sizes": (10, 0)}, "target_sizes must be >= 1, got 0"),
        ({"sizes": (50, 60, 10), "target_sizes": (10,)}, "sizes must fall, got 60 after 50"),
        (
            {"sizes": (50, 5), "target_sizes": (10, 5)},
            "must contain the target_sizes, 10 is missing",
        ),
        (
            {"sizes": (50, 10, 5), "target_sizes": (10,)},
            "must end with the last of target_sizes, 10",
        ),
        ({"reduction_factor": 1.0}, "reduction_factor must be > 1, got 1.0"),
        ({"kmeans_tolerance": float("nan")}, "kmeans_tolerance must be >= 0, got nan"),
        ({"network": NetworkConfig(network="MLP")}, "ConvNet alone, got MLP"),
    ],
)
def test_wrong_options_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        devs.Config(**options)


@pytest.mark.parametrize(
    "options", [{"target_sizes": (130,)}, {"sizes": (200, 6), "target_sizes": (6,)}]
)
def test_a_set_that_is_not_smaller_is_refused(options, data):
    config = dataclasses.replace(CONFIG, **options)
    with pytest.raises(ValueError, match="must be below the number of training images, 130"):
        devs.build(config, 10, SHAPE).init(jax.random.key(0), None, data)


def test_the_whole_training_set_and_stratified_parts():
    digits = load("digits")
    whole = with_whole_training_set(digits)
    assert len(whole.train) == len(digits.train) + len(digits.validation)
    assert len(whole.validation) == 0
    part = with_whole_training_set(digits, 200)
    counts, all_counts = (np.bincount(one.train.labels) for one in (part, whole))
    assert np.abs(counts - all_counts * 200 / len(whole.train)).max() <= 1
    again = with_whole_training_set(digits, 200)
    np.testing.assert_array_equal(part.train.images, again.train.images)
    with pytest.raises(ValueError, match="1438 training images, got num_images 1439"):
        with_whole_training_set(digits, 1439)


def test_batches_are_those_of_the_trainings():
    training = dataclasses.replace(CONFIG.training, batch_size=16)
    changes = {"target_sizes": (20, 10), "reduction_factor": 10.0, "training": training}
    changes |= {"feature_epochs": 3, "min_training_steps": 30}
    config = dataclasses.replace(CONFIG, **changes)
    # 200 > 20 > 10: 13 batches for 3 epochs, and 2 for 15.
    assert num_batches(config, 200) == 3 * 13 + 15 * 2
    first = dataclasses.replace(config, feature_network="first")
    assert num_batches(first, 200) == 3 * 13
