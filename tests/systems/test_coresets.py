"""Random, herding, k-center and forgetting against brute force and hand-made cases."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings, strategies as st

from evojax_suite import proxy_network
from evojax_suite.operators import check_shares, class_shares, highest_scores, random_examples
from evojax_suite.systems.coresets import forgetting, herding, k_center

KEY = jax.random.key(0)


def points_of(seed, num_points, num_features, num_classes):
    generator = np.random.default_rng(seed)
    labels = generator.permutation(np.arange(num_points) % num_classes).astype(np.int32)
    return generator.normal(size=(num_points, num_features)) + labels[:, None], labels


def groups_of(labels, num_samples, num_classes, balanced):
    """The positions that are chosen among, and how many."""
    if not balanced:
        return [(np.arange(len(labels)), num_samples)]
    shares = class_shares(num_samples, num_classes)
    return [(np.flatnonzero(labels == label), share) for label, share in enumerate(shares)]


def herd(points, num_samples):
    """Every candidate's mean in full, one choice after the other."""
    chosen = []
    for _ in range(num_samples):
        free = [i for i in range(len(points)) if i not in chosen]
        misses = [
            np.linalg.norm(points.mean(0) - points[[*chosen, candidate]].mean(0))
            for candidate in free
        ]
        chosen.append(free[int(np.argmin(misses))])
    return chosen


def cover(points, num_samples):
    """Every distance to every centre, one choice after the other."""
    chosen = [int(np.argmin(np.linalg.norm(points - points.mean(0), axis=1)))]
    while len(chosen) < num_samples:
        distances = np.linalg.norm(points[:, None] - points[None, chosen], axis=-1).min(1)
        chosen.append(int(np.argmax(distances)))
    return chosen


@pytest.mark.parametrize("balanced", [True, False])
@pytest.mark.parametrize(("method", "reference"), [(herding, herd), (k_center, cover)])
@pytest.mark.parametrize("seed", range(3))
def test_greedy_methods_choose_what_brute_force_chooses(method, reference, balanced, seed):
    points, labels = points_of(seed, 60, 5, 3)
    num_samples = 11
    actual = method.select(KEY, points, jnp.asarray(labels), num_samples, 3, balanced)
    expected = [
        group[i]
        for group, share in groups_of(labels, num_samples, 3, balanced)
        for i in reference(points[group], share)
    ]
    np.testing.assert_array_equal(actual, expected)


def test_herding_comes_nearer_to_the_mean_than_chance():
    points, labels = points_of(5, 400, 8, 1)
    labels = jnp.asarray(labels)

    def miss(indices):
        return np.linalg.norm(points[np.asarray(indices)].mean(0) - points.mean(0))

    by_chance = [miss(random_examples(jax.random.key(i), labels, 20, 1)) for i in range(50)]
    assert miss(herding.select(KEY, points, labels, 20, 1)) < min(by_chance) / 3


def test_k_center_leaves_nothing_far_away():
    corners = np.array([[0, 0], [0, 9], [9, 0], [9, 9]], float)
    points = np.repeat(corners, 25, 0) + np.random.default_rng(0).uniform(-1, 1, (100, 2))
    chosen = k_center.select(KEY, points, jnp.zeros(100, jnp.int32), 4, 1)
    assert sorted(np.asarray(chosen) // 25) == [0, 1, 2, 3]


def test_a_point_is_chosen_once_even_among_equal_points():
    points, labels = np.ones((6, 3)), jnp.asarray([0, 1] * 3)
    for method in (herding, k_center):
        for balanced in (True, False):
            chosen = np.asarray(method.select(KEY, points, labels, 5, 2, balanced))
            assert len(set(chosen)) == 5, (method, balanced)


SHOWN = np.array(  # (shows, examples): always right, never, forgotten once, twice, late, learned
    [
        [1, 0, 1, 1, 0, 0],
        [1, 0, 0, 0, 0, 1],
        [1, 0, 1, 1, 1, 1],
        [1, 0, 1, 0, 0, 1],
        [1, 0, 1, 1, 0, 1],
    ],
    bool,
)


def test_forgetting_counts_changes_from_right_to_wrong():
    history = proxy_network.no_forgetting(6)
    for correct in SHOWN:
        history = proxy_network.with_epoch(history, jnp.asarray(correct))
    np.testing.assert_array_equal(history.num_forgotten, [0, 0, 1, 2, 1, 0])
    scores = proxy_network.forgetting_scores(history)
    np.testing.assert_array_equal(scores, [0, 3, 1, 2, 1, 0])
    chosen = forgetting.select(KEY, scores, jnp.zeros(6, jnp.int32), 2, 1)
    np.testing.assert_array_equal(chosen, [1, 3])


def test_forgetting_breaks_ties_by_key():
    scores, labels = jnp.asarray([1, 2, 2, 2, 0, 3]), jnp.zeros(6, jnp.int32)
    keys = jax.random.split(jax.random.key(1), 3000)
    chosen = jax.vmap(lambda key: forgetting.select(key, scores, labels, 2, 1))(keys)
    assert (chosen[:, 0] == 5).all()
    counts = np.bincount(np.asarray(chosen[:, 1]), minlength=6) / 3000
    np.testing.assert_allclose(counts, [0, 1 / 3, 1 / 3, 1 / 3, 0, 0], atol=0.045)


@settings(max_examples=20, deadline=None, derandomize=True)
@given(st.integers(1, 40), st.integers(1, 7))
def test_shares_are_equal_up_to_one(num_samples, num_classes):
    shares = class_shares(num_samples, num_classes)
    assert sum(shares) == num_samples
    assert max(shares) - min(shares) <= 1
    assert list(shares) == sorted(shares, reverse=True)


def test_balanced_selection_gives_each_class_its_share():
    _, labels = points_of(1, 50, 2, 4)
    scores = jnp.asarray(np.random.default_rng(2).normal(size=50))
    chosen = np.asarray(highest_scores(scores, jnp.asarray(labels), 10, 4))
    expected = []
    for group, share in groups_of(labels, 10, 4, True):
        expected += list(group[np.argsort(-scores[group])][:share])
    np.testing.assert_array_equal(chosen, expected)
    everything = np.argsort(-scores)[:10]
    np.testing.assert_array_equal(
        highest_scores(scores, jnp.asarray(labels), 10, 4, balanced=False), everything
    )


def test_unbalanced_random_selection_is_uniform_over_all():
    labels = jnp.asarray([0] * 9 + [1])
    keys = jax.random.split(jax.random.key(3), 4000)
    chosen = jax.vmap(lambda key: random_examples(key, labels, 3, 2, balanced=False))(keys)
    counts = np.bincount(np.asarray(chosen).reshape(-1), minlength=10) / 4000
    np.testing.assert_allclose(counts, 0.3, atol=5 * np.sqrt(0.21 / 4000))


@pytest.mark.parametrize(
    ("num_samples", "balanced", "message"),
    [
        (0, True, r"num_samples must be in 1\.\.9, got 0"),
        (10, False, r"num_samples must be in 1\.\.9, got 10"),
        (4, True, "class 1 has only 1 samples"),
    ],
)
def test_what_cannot_be_chosen_is_refused(num_samples, balanced, message):
    labels = np.array([0] * 9 + [1])
    with pytest.raises(ValueError, match=message):
        check_shares(labels, num_samples, 2, balanced)
    check_shares(labels, 4, 2, balanced=False)
