"""Mini-batch k-means against scikit-learn, brute force and hand-made cases."""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings, strategies as st
from sklearn.cluster import MiniBatchKMeans

from evojax_suite.systems.devs import clustering
from evojax_suite.systems.devs.clustering import cluster, mini_batch_k_means, refill_empty

KEY = jax.random.key(0)


def blobs(num_points, num_features, num_blobs, seed=0):
    generator = np.random.default_rng(seed)
    centers = generator.normal(size=(num_blobs, num_features)) * 2
    noise = generator.normal(size=(num_points, num_features))
    return (centers[generator.integers(0, num_blobs, num_points)] + noise).astype(np.float32)


def inertia_of(points, centers):
    return ((points[:, None] - centers[None]) ** 2).sum(-1).min(1).sum()


@pytest.mark.parametrize(
    ("num_points", "num_features", "num_clusters"), [(2000, 16, 12), (1200, 8, 600), (3000, 4, 100)]
)
def test_inertia_is_that_of_scikit_learn(num_points, num_features, num_clusters):
    points = blobs(num_points, num_features, 30)
    seeds = range(8)
    ours = [
        float(mini_batch_k_means(jax.random.key(seed), points, num_clusters, batch_size=256)[2])
        for seed in seeds
    ]
    theirs = [
        MiniBatchKMeans(
            num_clusters, n_init=1, batch_size=256, max_iter=200, tol=1e-4, random_state=s
        )
        .fit(points)
        .inertia_
        for s in seeds
    ]
    assert abs(np.mean(ours) - np.mean(theirs)) < 0.02 * np.mean(theirs)


@pytest.mark.parametrize("method", ["jax", "sklearn", "auto"])
@pytest.mark.parametrize("num_clusters", [1, 5, 59])
def test_a_clustering_is_of_the_size_that_was_asked_for(method, num_clusters):
    points = blobs(60, 3, 4)
    found = cluster(KEY, points, num_clusters, method)
    assert found.assignments.dtype == np.int32
    assert set(found.assignments.tolist()) == set(range(num_clusters))
    assert found.inertia > 0
    again = cluster(KEY, points, num_clusters, method)
    np.testing.assert_array_equal(found.assignments, again.assignments)
    if num_clusters > 1:
        other = cluster(jax.random.key(1), points, num_clusters, method)
        assert not np.array_equal(found.assignments, other.assignments)


@pytest.mark.parametrize("method", ["jax", "sklearn"])
@pytest.mark.filterwarnings("ignore::sklearn.exceptions.ConvergenceWarning")
def test_equal_points_fill_all_clusters(method):
    points = np.ones((20, 3), np.float32)
    found = cluster(KEY, points, 6, method)
    assert found.num_empty == 5
    assert sorted(np.bincount(found.assignments, minlength=6)) == [1, 1, 1, 1, 1, 15]


def test_what_it_returns_belongs_together():
    points = blobs(700, 5, 9)
    centers, assignments, inertia, steps = mini_batch_k_means(KEY, points, 9, batch_size=100)
    distances = ((points[:, None] - np.asarray(centers)[None]) ** 2).sum(-1)
    np.testing.assert_array_equal(assignments, distances.argmin(1))
    np.testing.assert_allclose(inertia, distances.min(1).sum(), rtol=1e-4)
    assert 1 <= steps <= 200 * 7
    one = mini_batch_k_means(KEY, points, 9, batch_size=100, max_iterations=1, tolerance=0.0)
    assert one[3] <= 7
    moved = mini_batch_k_means(KEY, points + 1000, 9, batch_size=100)
    np.testing.assert_allclose(moved[2], inertia, rtol=0.05)  # far from zero nothing cancels


def test_the_nearest_centre_is_found_block_by_block(monkeypatch):
    points, centers = blobs(103, 4, 5), blobs(7, 4, 5, seed=1)
    expected = ((points[:, None] - centers[None]) ** 2).sum(-1)
    for most in (7, 7 * 10, 7 * 103, 10**6):
        monkeypatch.setattr(clustering, "_MAX_DISTANCES", most)
        labels, distances = clustering._nearest(jnp.asarray(points), jnp.asarray(centers))
        np.testing.assert_array_equal(labels, expected.argmin(1))
        np.testing.assert_allclose(distances, expected.min(1), rtol=1e-4, atol=1e-4)


def test_the_distances_are_never_whole_in_memory():
    num_points, num_clusters = 40_000, 20_000
    points = jax.ShapeDtypeStruct((num_points, 4), jnp.float32)
    compiled = mini_batch_k_means.lower(KEY, points, num_clusters).compile()
    analysis = compiled.memory_analysis()
    assert analysis is not None
    assert analysis.temp_size_in_bytes < 0.2 * 4 * num_points * num_clusters


@pytest.mark.parametrize(("num_clusters", "batch_size"), [(4, 30), (50, 20)])
def test_centres_are_the_means_of_all_they_have_seen(num_clusters, batch_size):
    generator = np.random.default_rng(0)
    centers = generator.normal(size=(num_clusters, 3)).astype(np.float32)
    counts = generator.integers(0, 9, num_clusters).astype(np.float32)
    batch = generator.normal(size=(batch_size, 3)).astype(np.float32)
    labels = generator.integers(0, num_clusters, batch_size)
    found, found_counts = clustering._move_centers(
        jnp.asarray(centers), jnp.asarray(counts), jnp.asarray(batch), jnp.asarray(labels)
    )
    for point, label in zip(batch, labels, strict=True):
        counts[label] += 1
        centers[label] += (point - centers[label]) / counts[label]
    np.testing.assert_allclose(found, centers, atol=1e-5)
    np.testing.assert_array_equal(found_counts, counts)


def test_centres_that_saw_little_become_points_of_the_batch():
    centers, counts = jnp.zeros((4, 2)), jnp.array([1000.0, 9.0, 11.0, 0.0])
    batch = jnp.arange(1.0, 21).reshape(10, 2)
    moved, moved_counts = clustering._reassign(KEY, centers, counts, batch)
    np.testing.assert_array_equal(moved_counts, [1000, 11, 11, 11])
    np.testing.assert_array_equal(moved[jnp.array([0, 2])], 0)
    chosen = {tuple(row) for row in np.asarray(moved)[[1, 3]].tolist()}
    assert len(chosen) == 2
    assert chosen <= {tuple(row) for row in batch.tolist()}


def test_k_means_starts_in_proportion_to_squared_distances():
    points = jnp.array([[0.0], [1.0], [3.0]])
    start = jax.jit(partial(clustering.k_means_plus_plus, num_clusters=2, num_trials=1))
    pairs = np.asarray(jax.vmap(lambda key: start(key, points))(jax.random.split(KEY, 6000)))
    expected = {(0, 1): 1 / 10, (0, 2): 9 / 10, (1, 0): 1 / 5, (1, 2): 4 / 5, (2, 0): 9 / 13}
    for (first, second), probability in expected.items():
        started = pairs[pairs[:, 0] == first]
        assert 1800 < len(started) < 2200
        np.testing.assert_allclose((started[:, 1] == second).mean(), probability, atol=0.04)


def test_k_means_starts_from_distinct_points():
    points = jnp.asarray(blobs(80, 3, 2))
    chosen = np.asarray(clustering.k_means_plus_plus(KEY, points, 79))
    assert len(set(chosen.tolist())) == 79


def test_more_trials_start_better():
    points = jnp.asarray(blobs(300, 2, 20))

    def mean_inertia(num_trials):
        start = jax.jit(
            partial(clustering.k_means_plus_plus, num_clusters=20, num_trials=num_trials)
        )
        return np.mean(
            [inertia_of(points, points[start(jax.random.key(s), points)]) for s in range(30)]
        )

    assert mean_inertia(None) < 0.9 * mean_inertia(1)


def test_an_empty_cluster_takes_the_farthest_point_that_can_go():
    assignments, distances = np.array([0, 0, 0, 2, 2, 4]), np.array([1.0, 5.0, 2.0, 4.0, 3.0, 9.0])
    np.testing.assert_array_equal(refill_empty(assignments, distances, 5), [0, 1, 0, 3, 2, 4])
    np.testing.assert_array_equal(assignments, [0, 0, 0, 2, 2, 4])


@settings(max_examples=50, deadline=None, derandomize=True)
@given(st.integers(1, 30), st.integers(0, 30), st.integers(0, 2**31 - 1))
def test_refilling_moves_as_few_points_as_it_must(num_clusters, more, seed):
    generator = np.random.default_rng(seed)
    num_points = num_clusters + more
    assignments = generator.integers(0, generator.integers(1, num_clusters + 1), num_points)
    refilled = refill_empty(assignments, generator.random(num_points), num_clusters)
    assert set(refilled.tolist()) == set(range(num_clusters))
    num_empty = num_clusters - len(set(assignments.tolist()))
    assert (refilled != assignments).sum() == num_empty


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_clusters": 0}, "num_clusters must be >= 1 and < 9 points, got 0"),
        ({"num_clusters": 9}, "num_clusters must be >= 1 and < 9 points, got 9"),
        ({"points": np.ones(9)}, "points must have 2 dimensions, got 1"),
        (
            {"points": np.full((9, 2), np.nan)},
            "points must be finite, got 18 elements that are not",
        ),
        ({"method": "scipy"}, "method must be auto, jax or sklearn, got 'scipy'"),
        ({"batch_size": 0}, "batch_size must be >= 1, got 0"),
        ({"max_iterations": 0}, "max_iterations must be >= 1, got 0"),
        ({"tolerance": float("nan")}, "tolerance must be >= 0, got nan"),
    ],
)
def test_wrong_input_is_refused(options, message):
    arguments = {"points": np.ones((9, 2), np.float32), "num_clusters": 3} | options
    with pytest.raises(ValueError, match=message):
        cluster(KEY, **arguments)


def test_refilling_more_clusters_than_points_is_refused():
    with pytest.raises(ValueError, match="num_clusters must be <= 2 points, got 3"):
        refill_empty(np.zeros(2, int), np.zeros(2), 3)
