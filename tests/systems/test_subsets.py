"""Subsets of a training set: drawn, ranked, and varied as DEAP does."""

from __future__ import annotations

import random

import deap.tools
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings, strategies as st
from scipy import stats

from evojax_suite.operators import tournament
from evojax_suite.systems.cest import subsets

LABELS = np.random.default_rng(0).permutation(np.repeat(np.arange(4), (9, 14, 30, 47)))
draw = jax.jit(subsets.drawn, static_argnums=2)
mutate = jax.jit(subsets.uniform_mutation)
cross = jax.jit(subsets.two_point_crossover)
repair = jax.jit(subsets.repaired)
sample = jax.jit(subsets.sampled)
rank = jax.jit(subsets.ranked)


def groups_of(size=30, balanced=False):
    return subsets.make_groups(LABELS, size, 4, balanced)


def shares(subset):
    return np.bincount(LABELS[np.asarray(subset)], minlength=4).tolist()


@given(seed=st.integers(0, 10**6), kind=st.sampled_from([(1, False), (36, True)]))
@settings(max_examples=20, deadline=None)
def test_indices_stay_in_range_and_in_their_class(seed, kind):
    size, balanced = kind
    groups = groups_of(size, balanced)
    keys = jax.random.split(jax.random.key(seed), 6)
    prey = draw(keys[0], groups, 6)
    weights = jax.random.uniform(keys[1], (100,))
    first, second = cross(keys[2], prey[:3], prey[3:], 1.0)
    mutants = mutate(keys[3], jnp.concatenate([first, second]), groups, 1.0, 0.5)
    whole = [repair(keys[4], mutants[0], groups), sample(keys[5], weights, groups)]
    whole += [rank(weights, groups), subsets.random_subset(keys[5], groups)]
    prey, first, mutants, whole = jax.device_get((prey, first, mutants, whole))
    for one in [*prey, *first, *mutants, *whole]:
        assert one.shape == (size,)
        assert one.dtype == np.int32
        assert (one >= 0).all()
        assert (one < 100).all()
        if balanced:
            assert np.ptp(shares(one)) <= 1
    for one in whole:
        assert len(np.unique(one)) == size


@pytest.mark.parametrize("balanced", [False, True])
def test_repair_replaces_repetitions_alone_by_any_unused_example(balanced):
    groups = groups_of(30, balanced)
    subset = draw(jax.random.key(0), groups, 1)[0]
    repeated = np.array([index in subset[:place] for place, index in enumerate(subset.tolist())])
    assert repeated.sum() >= 2
    found = np.stack([repair(jax.random.key(i), subset, groups) for i in range(300)])
    np.testing.assert_array_equal(found[:, ~repeated], np.tile(subset, (300, 1))[:, ~repeated])
    fresh = found[:, repeated]
    unused = np.setdiff1d(np.arange(100), subset)
    assert np.isin(fresh, unused).all()
    for label in range(4):
        own = unused[LABELS[unused] == label]
        counts = np.array([(fresh == index).sum() for index in own])
        if balanced and counts.sum() == 0:
            continue
        assert stats.chisquare(counts).pvalue > 1e-3


def test_a_whole_class_can_be_repaired():
    groups = subsets.make_groups(LABELS, 36, 4, balanced=True)  # all nine of the first class
    prey = draw(jax.random.key(0), groups, 1)[0]
    assert shares(repair(jax.random.key(1), prey, groups)) == [9, 9, 9, 9]


def test_the_hardest_are_ranked_within_their_class():
    scores = np.random.default_rng(1).normal(size=100)
    np.testing.assert_array_equal(
        np.sort(rank(jnp.asarray(scores), groups_of(30))), np.sort(np.argsort(-scores)[:30])
    )
    chosen = np.asarray(rank(jnp.asarray(scores), groups_of(30, balanced=True)))
    assert shares(chosen) == [8, 8, 7, 7]
    for label, share in enumerate(shares(chosen)):
        own = np.flatnonzero(label == LABELS)
        expected = own[np.argsort(-scores[own])[:share]]
        np.testing.assert_array_equal(np.sort(chosen[LABELS[chosen] == label]), np.sort(expected))


def test_a_sample_is_in_proportion_to_the_weights():
    weights = np.zeros(100)
    weights[:4] = [1, 2, 3, 4]
    groups = subsets.make_groups(LABELS, 1, 4, balanced=False)
    keys = jax.random.split(jax.random.key(0), 4000)
    found = jax.vmap(lambda key: subsets.sampled(key, jnp.asarray(weights), groups))(keys)
    counts = np.bincount(found[:, 0], minlength=4)
    assert len(counts) == 4
    assert stats.chisquare(counts, 400 * weights[:4]).pvalue > 1e-3
    three = sample(
        jax.random.key(1), jnp.asarray(weights), subsets.make_groups(LABELS, 6, 4, False)
    )
    assert set(np.asarray(three)[:4]) == {0, 1, 2, 3}  # weight 0 comes last


def test_tournaments_are_deaps():
    """The rank of a winner: against DEAP's selTournament and against the formula."""
    fitness = np.random.default_rng(0).permutation(10).astype(np.float32)
    chosen = tournament(jax.random.key(0), jnp.asarray(fitness), 6000, 3)
    ours = np.bincount(fitness[np.asarray(chosen)].astype(int), minlength=10)

    class One:
        def __init__(self, value):
            self.fitness = value

    random.seed(0)
    theirs = deap.tools.selTournament([One(f) for f in fitness], 6000, tournsize=3)
    theirs = np.bincount([int(one.fitness) for one in theirs], minlength=10)
    cube = np.arange(11) ** 3 / 1000
    assert stats.chisquare(ours, 6000 * np.diff(cube)).pvalue > 1e-3
    assert stats.chi2_contingency([ours, theirs]).pvalue > 1e-3


def cuts_of(child, first):
    changed = np.flatnonzero(np.asarray(child) != np.asarray(first))
    assert changed.size
    assert (np.diff(changed) == 1).all()  # one piece
    return changed[0], changed[-1] + 1


def test_two_point_crossover_cuts_as_deap_does():
    size, count = 6, 3000
    first = jnp.tile(jnp.arange(size), (count, 1))
    a, b = cross(jax.random.key(0), first, first + 100, 1.0)
    np.testing.assert_array_equal(a % 100, first)
    np.testing.assert_array_equal(a + b, 2 * first + 100)  # what one gives the other takes
    ours = np.zeros((size + 1, size + 1))
    for child in np.asarray(a):
        ours[cuts_of(child, first[0])] += 1
    random.seed(0)
    theirs = np.zeros((size + 1, size + 1))
    for _ in range(count):
        pair = list(range(size)), list(range(100, 100 + size))
        theirs[cuts_of(deap.tools.cxTwoPoint(*pair)[0], range(size))] += 1
    seen = (ours + theirs) > 0
    assert stats.chi2_contingency([ours[seen], theirs[seen]]).pvalue > 1e-3
    kept, _ = cross(jax.random.key(1), first, first + 100, 0.3)
    assert abs((np.asarray(kept) != np.asarray(first)).any(1).mean() - 0.3) < 0.04


def test_mutation_draws_places_anew_at_its_rates():
    groups = subsets.make_groups(np.zeros(1000, int), 50, 1, False)
    prey = jnp.full((2000, 50), -1)  # so that every new draw shows
    changed = np.asarray(mutate(jax.random.key(0), prey, groups, 0.2, 0.1)) != -1
    who = changed.any(1)
    assert abs(who.mean() - 0.2 * (1 - 0.9**50)) < 0.03
    assert abs(changed[who].mean() - 0.1 / (1 - 0.9**50)) < 0.01
    values = np.asarray(mutate(jax.random.key(1), prey, groups, 1.0, 1.0)).ravel()
    assert stats.kstest(values / 1000, "uniform").pvalue > 1e-3


@pytest.mark.parametrize(
    ("size", "balanced", "said"),
    [(0, False, "1..100 examples, got 0"), (101, False, "got 101"),
     (60, True, "class 0 has 9 examples, its share of a subset is 15")],
)  # fmt: skip
def test_subsets_that_cannot_be_get_one_line(size, balanced, said):
    with pytest.raises(ValueError, match=said):
        groups_of(size, balanced)
