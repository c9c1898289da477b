"""Mutants, crossings and likeness of lists of units, and methods of search on them."""

from __future__ import annotations

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from evojax_suite.systems.de_nas import architectures, methods, units
from evojax_suite.systems.de_nas.architectures import CONVOLUTION, END, Space
from evojax_suite.systems.de_nas.methods import History, MethodConfig

SHAPE = (16, 16, 3)
SPACE = Space(
    min_length=3, max_length=8, kernels=(1, 3, 5), min_first_filters=4, max_first_filters=8,
    max_filters=16, filter_step=4, max_features=800, max_weights=6000,
)  # fmt: skip
OPERATORS = units.operators(SPACE, SHAPE, 10)


@pytest.fixture(scope="module")
def networks():
    return jax.jit(jax.vmap(OPERATORS.random))(jax.random.split(jax.random.key(0), 64))


def check_inside(networks):
    """Lists of the space: a convolution first, nothing after the end, no pooling too many."""
    for row in np.asarray(networks):
        kinds, kernels, filters = row
        length = int((kinds != END).sum())
        assert (kinds[:length] != END).all()
        assert length >= 1
        convolutions = kinds == CONVOLUTION
        assert convolutions[0]
        assert set(kernels[convolutions]) <= set(SPACE.kernels)
        assert (filters[convolutions] % SPACE.filter_step == 0).all()
        assert filters[convolutions].min() >= 4
        assert filters.max() <= 16
        assert not kernels[~convolutions].any()
        assert not filters[~convolutions].any()
        assert (kinds > CONVOLUTION).sum() <= architectures.most_poolings(SHAPE)
        genome = units.genome_of(jnp.asarray(row))
        assert int(architectures.num_features(genome, SHAPE)) <= SPACE.max_features
        inputs = [SHAPE[2], *filters[convolutions]]
        sizes = [
            kernel**2 * before * after
            for kernel, before, after in zip(
                kernels[convolutions], inputs, inputs[1:], strict=False
            )
        ]
        np.testing.assert_array_equal(
            architectures.num_weights(genome, SHAPE[2])[convolutions], sizes
        )
        assert sum(sizes) <= SPACE.max_weights


def distance(one, another):
    """The least number of units to insert, delete or replace (Levenshtein 1966)."""
    first, second = (list(zip(*row[:, row[0] != END], strict=True)) for row in (one, another))
    row = list(range(len(second) + 1))
    for i, unit in enumerate(first, 1):
        before, row[0] = row[0], i
        for j, other in enumerate(second, 1):
            least = min(row[j] + 1, row[j - 1] + 1, before + (unit != other))
            before, row[j] = row[j], least
    return row[-1]


def test_random_networks_and_their_mutants_and_crossings_are_of_the_space(networks):
    check_inside(networks)
    keys = jax.random.split(jax.random.key(1), len(networks))
    mutants = jax.jit(jax.vmap(OPERATORS.mutate))(keys, networks)
    check_inside(mutants)
    pairs = zip(np.asarray(networks), np.asarray(mutants), strict=True)
    assert {distance(*pair) for pair in pairs} == {1}
    children = np.asarray(jax.jit(jax.vmap(OPERATORS.cross))(keys, networks, networks[::-1]))
    check_inside(children)
    differ = jax.jit(jax.vmap(lambda key, *three: OPERATORS.differ(key, *three, 0.7)))
    check_inside(differ(keys, networks, networks[::-1], jnp.roll(networks, 1, 0)))
    # A child begins as one parent does and ends as the other.
    for one, another, child in zip(
        *map(np.asarray, (networks, networks[::-1], children)), strict=True
    ):
        assert (child[:, 0] == one[:, 0]).all()
        kept = {tuple(unit) for row in (one, another) for unit in row.T}
        assert {tuple(unit) for unit in child.T} <= kept
    assert np.mean((children != np.asarray(networks)).any((1, 2))) > 0.5


def test_every_kind_of_edit_is_among_the_neighbours(networks):
    found, usable = units._neighbours(networks[0], SPACE, SHAPE)
    found = np.asarray(found)[np.asarray(usable)]
    check_inside(found)
    lengths = (found[:, 0] != END).sum(1) - int((np.asarray(networks[0])[0] != END).sum())
    assert set(lengths) == {-1, 0, 1}
    assert len(np.unique(found, axis=0)) > 10


def test_likeness_is_positive_definite_and_falls_with_edits(networks):
    gram = np.asarray(OPERATORS.kernel(networks, networks), np.float64)
    assert np.linalg.eigvalsh(gram + 1e-4 * np.eye(len(gram))).min() > 0
    np.testing.assert_allclose(np.diag(gram), 1, atol=1e-3)
    keys = jax.random.split(jax.random.key(2), len(networks))
    mutants = jax.vmap(OPERATORS.mutate)(keys, networks)
    likeness = np.diag(OPERATORS.kernel(networks, mutants))
    assert np.median(likeness) > np.quantile(gram, 0.9)


def test_descriptions_count_as_the_host_does(networks):
    for row in networks[:10]:
        genome = units.genome_of(row)
        described = units.numbers_of(row, SHAPE, 10)
        features = architectures.num_features(genome, SHAPE)
        cost = architectures.costs(genome, SHAPE, 10, "linear")
        biases = int(np.asarray(genome.filters).sum())
        head = 10 * (int(architectures.last_filters(genome)) + 1)
        numbers = cost.multiplications - head + 10, cost.parameters - biases - head, 10 * features
        np.testing.assert_allclose(described[-3:], np.log2(1 + np.array(numbers, float)), rtol=1e-4)


def made_up_accuracy(network):
    """High with 3x3 kernels, two poolings and wide last convolutions: nothing that one edit or the
    number of parameters decides."""
    genome = units.genome_of(network)
    is_convolution = genome.kinds == CONVOLUTION
    kernels = jnp.where(is_convolution, genome.kernels == 3, 0).sum() / is_convolution.sum()
    poolings = (genome.kinds > CONVOLUTION).sum()
    width = architectures.last_filters(genome) / SPACE.max_filters
    return kernels + width - 0.5 * abs(poolings - 2)


@pytest.mark.parametrize("method", ["surrogate", "ageing"])
def test_methods_beat_random_search_on_units(method):
    operators = units.operators(replace(SPACE, max_weights=None), SHAPE, 10)

    def best(key, method):
        config = MethodConfig(method, population_size=10, num_children=5, num_proposals=50)
        key_first, key_search = jax.random.split(key)
        first = jax.vmap(operators.random)(jax.random.split(key_first, 10))
        genomes = jnp.zeros((50, *first.shape[1:]), jnp.int32).at[:10].set(first)
        evaluated = jax.vmap(made_up_accuracy)
        fitness = jnp.full(50, -jnp.inf).at[:10].set(evaluated(first))

        def step(carry, key):
            history = History(*carry)
            made, _ = methods.propose(key, config, operators, history, ())
            places = history.number + jnp.arange(5)
            return (
                history.genomes.at[places].set(made),
                history.fitness.at[places].set(evaluated(made)),
                history.number + 5,
            ), None

        start = genomes, fitness, jnp.int32(10)
        return jax.lax.scan(step, start, jax.random.split(key_search, 8))[0][1].max()

    keys = jax.random.split(jax.random.key(3), 10)
    own, random = (
        np.asarray(jax.jit(jax.vmap(lambda key, name=name: best(key, name)))(keys))
        for name in (method, "random")
    )
    assert (own >= random).sum() >= 8
    assert np.mean(own - random) > 0.1
