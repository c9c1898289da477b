"""Operators: distributions against inspyred, scipy and the papers' equations; edge cases."""

from __future__ import annotations

import random
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats
from hypothesis import given, settings, strategies as st
from hypothesis.extra import numpy as hnp
from inspyred.ec.variators import laplace_crossover as inspyred_laplace_crossover

from evojax_suite.operators import (
    crowding_distances,
    laplace_crossover,
    non_dominated_ranks,
    truncation,
    uniform_parents,
)

NUM_SAMPLES = 20_000
ALPHA = 1e-3
SIGNS = ("independent", "shared")


def betas(seed: int = 0, **options) -> np.ndarray:
    """Parents 0 and 1 in every element: child 1 is beta."""
    zeros, ones = jnp.zeros(NUM_SAMPLES), jnp.ones(NUM_SAMPLES)
    child, other = laplace_crossover(jax.random.key(seed), zeros, ones, **options)
    np.testing.assert_allclose(other, 1 + child, atol=1e-5)
    return np.asarray(child)


def literal_betas(location: float, scale: float) -> np.ndarray:
    """Eq. 4 element by element: one u decides on the branch and the size."""
    generator = np.random.default_rng(1)
    samples = []
    for u in 1 - generator.random(NUM_SAMPLES):
        if u <= 0.5:
            samples.append(location - scale * np.log(u))
        else:
            samples.append(location + scale * np.log(u))
    return np.array(samples)


# --- Laplace crossover: the distribution


@pytest.mark.parametrize(("location", "scale"), [(0.0, 0.5), (0.25, 0.2)])
def test_independent_betas_are_distributed_as_those_of_inspyred(location, scale):
    arguments = {
        "crossover_rate": 1.0,
        "lx_location": location,
        "lx_scale": scale,
        "_ec": SimpleNamespace(bounder=lambda candidate, arguments: candidate),
    }
    child, _ = inspyred_laplace_crossover.single_crossover(
        random.Random(2), [0.0] * NUM_SAMPLES, [1.0] * NUM_SAMPLES, arguments
    )
    ours = betas(location=location, scale=scale, sign="independent")
    assert scipy.stats.ks_2samp(ours, child).pvalue > ALPHA


@pytest.mark.parametrize(("location", "scale"), [(0.0, 0.5), (-0.4, 1.5)])
def test_independent_betas_are_laplace_distributed(location, scale):
    ours = betas(location=location, scale=scale)  # independent is the default
    law = scipy.stats.laplace(location, scale)
    assert scipy.stats.kstest(ours, law.cdf).pvalue > ALPHA


@pytest.mark.parametrize(("location", "scale"), [(0.0, 0.5), (0.3, 1.2)])
def test_shared_betas_are_those_of_the_equation(location, scale):
    ours = betas(location=location, scale=scale, sign="shared")
    assert scipy.stats.ks_2samp(ours, literal_betas(location, scale)).pvalue > ALPHA
    centred, gap = ours - location, scale * np.log(2)
    positive = centred > 0
    assert centred[positive].min() >= gap - 1e-6
    assert centred[~positive].min() >= -gap - 1e-6
    assert scipy.stats.binomtest(int(positive.sum()), NUM_SAMPLES, 0.5).pvalue > ALPHA


def test_the_two_signs_differ():
    independent, shared = betas(sign="independent"), betas(sign="shared")
    assert scipy.stats.ks_2samp(independent, shared).pvalue < 1e-9


def test_defaults_are_location_0_scale_one_half_rate_1():
    np.testing.assert_array_equal(betas(), betas(location=0.0, scale=0.5, rate=1.0))


@pytest.mark.parametrize("sign", SIGNS)
def test_elements_have_betas_of_their_own(sign):
    """Neighbours are uncorrelated, in sign and in size."""
    ours = betas(sign=sign)
    for values in (np.sign(ours), np.abs(ours)):
        assert scipy.stats.pearsonr(values[:-1], values[1:]).pvalue > ALPHA
    assert len(np.unique(ours)) > 0.99 * NUM_SAMPLES


@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize("rate", [0.1, 0.3, 0.9])
def test_crossover_happens_at_its_rate_and_to_whole_pairs(rate, seed):
    num_pairs = 4000
    first, second = jnp.zeros((num_pairs, 5)), jnp.ones((num_pairs, 5))
    keys = jax.random.split(jax.random.key(seed), num_pairs)
    children = jax.vmap(lambda *pair: laplace_crossover(*pair, rate=rate)[0])(keys, first, second)
    changed = np.asarray(children != first)
    np.testing.assert_array_equal(changed.any(1), changed.all(1))
    count = int(changed.any(1).sum())
    assert scipy.stats.binomtest(count, num_pairs, rate).pvalue > ALPHA


def test_rate_and_betas_are_independent():
    """Where only some pairs cross over, those that do have the same distribution."""
    keys = jax.random.split(jax.random.key(3), NUM_SAMPLES)
    zero, one = jnp.zeros(1), jnp.ones(1)
    crossed = jax.vmap(lambda key: laplace_crossover(key, zero, one, rate=0.4)[0])(keys)
    crossed = np.asarray(crossed)[:, 0]
    law = scipy.stats.laplace(0, 0.5)
    assert scipy.stats.kstest(crossed[crossed != 0], law.cdf).pvalue > ALPHA


# --- Laplace crossover: properties

elements = st.floats(-100, 100, width=32, allow_subnormal=False)
vectors = st.integers(1, 8).flatmap(
    lambda size: st.tuples(*[hnp.arrays(np.float32, size, elements=elements)] * 2)
)
seeds = st.integers(0, 2**31 - 1)
relaxed = settings(max_examples=25, deadline=None, derandomize=True)


@relaxed
@given(seeds, vectors, st.sampled_from(SIGNS))
def test_rate_0_returns_the_parents(seed, parents, sign):
    children = laplace_crossover(jax.random.key(seed), *parents, rate=0.0, sign=sign)
    for child, parent in zip(children, parents, strict=True):
        np.testing.assert_array_equal(child, parent)


@relaxed
@given(seeds, vectors, st.sampled_from(SIGNS))
def test_equal_parents_have_equal_children(seed, parents, sign):
    parent, _ = parents
    for child in laplace_crossover(jax.random.key(seed), parent, parent, sign=sign):
        np.testing.assert_array_equal(child, parent)


@relaxed
@given(seeds, vectors, st.sampled_from(SIGNS))
def test_both_children_have_one_beta_times_the_distance(seed, parents, sign):
    first, second = parents
    child_1, child_2 = laplace_crossover(jax.random.key(seed), first, second, sign=sign)
    assert child_1.shape == child_2.shape == first.shape
    assert child_1.dtype == child_2.dtype == jnp.float32
    np.testing.assert_allclose(child_1 - first, child_2 - second, atol=1e-3)
    # beta depends on the key alone, and the distance has no sign
    unit = laplace_crossover(jax.random.key(seed), 0 * first, 0 * first + 1, sign=sign)[0]
    np.testing.assert_allclose(child_1, first + unit * np.abs(first - second), atol=1e-3)
    swapped = laplace_crossover(jax.random.key(seed), second, first, sign=sign)
    np.testing.assert_allclose(swapped[1], child_1, atol=1e-3)


def test_options_may_be_traced_and_mapped():
    zeros, ones = jnp.zeros(500), jnp.ones(500)
    run = jax.jit(
        jax.vmap(
            lambda location, scale, rate: laplace_crossover(
                jax.random.key(0), zeros, ones, location=location, scale=scale, rate=rate
            )[0]
        )
    )
    children = run(jnp.array([0.0, 3.0, 0.0]), jnp.array([0.5, 1.0, 0.5]), jnp.array([1.0, 1, 0]))
    np.testing.assert_allclose(children[1], 3 + 2 * children[0], atol=1e-5)
    np.testing.assert_array_equal(children[2], 0)


def test_an_unknown_sign_is_refused():
    with pytest.raises(ValueError, match="sign must be independent or shared, got 'either'"):
        laplace_crossover(jax.random.key(0), jnp.zeros(2), jnp.ones(2), sign="either")


# --- selection

fitness_values = hnp.arrays(
    np.float32,
    st.integers(1, 12),
    elements=st.one_of(
        st.floats(width=32, allow_subnormal=False), st.sampled_from([0.0, 1.0, np.nan, np.inf])
    ),
)


@settings(max_examples=100, deadline=None, derandomize=True)
@given(fitness_values, st.data())
def test_truncation_takes_the_lowest_fitness_in_order(fitness, data):
    count = data.draw(st.integers(0, len(fitness)))
    indices = np.asarray(truncation(jnp.asarray(fitness), count))
    assert indices.shape == (count,)
    assert len(set(indices.tolist())) == count
    assert set(indices.tolist()) <= set(range(len(fitness)))
    worst = np.where(np.isnan(fitness), np.inf, fitness)
    np.testing.assert_array_equal(worst[indices], np.sort(worst)[:count])


def test_truncation_takes_nan_last():
    fitness = jnp.array([jnp.nan, 3.0, jnp.nan, -1.0, 2.0])
    np.testing.assert_array_equal(truncation(fitness, 3), [3, 4, 1])
    assert set(truncation(fitness, 4)[3:].tolist()) <= {0, 2}
    np.testing.assert_array_equal(jnp.sort(truncation(jnp.full(3, jnp.nan), 3)), [0, 1, 2])


@pytest.mark.parametrize("num_parents", [1, 2, 7])
def test_parents_are_uniform_and_drawn_with_replacement(num_parents):
    first, second = uniform_parents(jax.random.key(4), num_parents, NUM_SAMPLES)
    assert first.shape == second.shape == (NUM_SAMPLES,)
    pairs = np.zeros((num_parents, num_parents))
    np.add.at(pairs, (np.asarray(first), np.asarray(second)), 1)
    assert pairs.sum() == NUM_SAMPLES
    if num_parents == 1:
        return
    for counts in (pairs.sum(0), pairs.sum(1), pairs.ravel()):
        assert scipy.stats.chisquare(counts).pvalue > ALPHA
    same = int((first == second).sum())
    assert scipy.stats.binomtest(same, NUM_SAMPLES, 1 / num_parents).pvalue > ALPHA


def plain_fronts(objectives: np.ndarray) -> np.ndarray:
    """By the definition, front after front."""
    ranks, left, front = np.full(len(objectives), -1), set(range(len(objectives))), 0
    while left:
        best = {
            i
            for i in left
            if not any(
                (objectives[j] <= objectives[i]).all() and (objectives[j] < objectives[i]).any()
                for j in left
            )
        }
        ranks[list(best)] = front
        left, front = left - best, front + 1
    return ranks


@given(
    objectives=hnp.arrays(
        np.float32, st.tuples(st.just(15), st.just(3)), elements=st.integers(0, 4).map(float)
    )
)
@settings(max_examples=50, deadline=None)
def test_fronts_are_those_of_the_definition(objectives):
    np.testing.assert_array_equal(non_dominated_ranks(objectives), plain_fronts(objectives))


def test_failed_members_are_in_the_last_front():
    objectives = jnp.array([[1.0, 2.0], [jnp.nan, 0.0], [3.0, 3.0], [2.0, 1.0], [jnp.inf, 1.0]])
    np.testing.assert_array_equal(non_dominated_ranks(objectives), [0, 2, 1, 0, 2])


def test_crowding_by_hand():
    """A front of four and one of three; the range of both objectives is 0 to 10."""
    objectives = jnp.array(
        [[0.0, 8.0], [1.0, 5.0], [4.0, 2.0], [8.0, 0.0], [2.0, 10.0], [6.0, 7.0], [10.0, 6.0]]
    )
    ranks = jnp.array([0, 0, 0, 0, 1, 1, 1])
    found = crowding_distances(objectives, ranks)
    inf = np.inf
    np.testing.assert_allclose(found, [inf, 1.0, 1.2, inf, inf, 1.2, inf], rtol=1e-6)
    constant = crowding_distances(jnp.ones((3, 2)), jnp.zeros(3, int))
    assert not np.isnan(constant).any()
