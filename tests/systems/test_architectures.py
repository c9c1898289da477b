"""Genomes of networks: validity, differences and sums, sizes in closed form."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings, strategies as st

from evojax_suite.systems.de_nas import architectures
from evojax_suite.systems.de_nas.architectures import (
    AVERAGE_POOLING,
    CONVOLUTION,
    END,
    KEEP,
    MAX_POOLING,
    Genome,
    Space,
    Unit,
)
from evojax_suite.systems.de_nas.networks import SequenceNetwork, layers

CIFAR = (32, 32, 3)


def c(kernel, filters):
    return Unit("convolution", kernel, filters)


M, A = Unit("max"), Unit("average")
MODEL_1 = (c(3, 7), c(5, 195), c(7, 207), c(7, 235), A, c(7, 241), M, M)  # Fig. 8
MODEL_2 = (c(3, 7), c(5, 195), M, M, c(5, 219), c(5, 188), A)  # Fig. 10


@st.composite
def spaces(draw):
    least = draw(st.integers(1, 4))
    first = draw(st.integers(least, 8))
    return Space(
        min_length=(shortest := draw(st.integers(1, 6))),
        max_length=draw(st.integers(max(shortest, 5), 9)),
        kernels=tuple(draw(st.sets(st.sampled_from((1, 3, 5, 7)), min_size=1))),
        min_first_filters=least,
        max_first_filters=first,
        max_filters=draw(st.integers(first, 12)),
        growing=draw(st.booleans()),
        convolution_rate=draw(st.floats(0, 1)),
        max_features=draw(st.sampled_from((1200, 32_768))),
    )


shapes = st.tuples(st.integers(4, 36), st.integers(4, 36), st.sampled_from((1, 3)))


def is_valid(genome: Genome, space: Space, image_shape) -> bool:
    kinds, kernels, filters = map(np.asarray, genome)
    length = int((kinds != END).sum())
    is_convolution = kinds == CONVOLUTION
    return bool(
        kinds[0] == CONVOLUTION
        and (kinds[:length] != END).all()
        and set(kinds) <= {END, CONVOLUTION, MAX_POOLING, AVERAGE_POOLING}
        and (kinds > CONVOLUTION).sum() <= architectures.most_poolings(image_shape)
        and set(kernels[is_convolution]) <= set(space.kernels)
        and (filters[is_convolution] >= 1).all()
        and (filters <= space.max_filters).all()
        and (kernels[~is_convolution] == 0).all()
        and (filters[~is_convolution] == 0).all()
    )


@settings(max_examples=8, deadline=None)
@given(space=spaces(), image_shape=shapes, seed=st.integers(0, 2**31))
def test_every_genome_that_is_made_is_valid(space, image_shape, seed):
    space = replace(space, max_features=10**6)

    @jax.jit
    def made(key):
        key_first, key_children = jax.random.split(key)
        make = jax.vmap(lambda key: architectures.random_genome(key, space, image_shape))
        population = make(jax.random.split(key_first, 30))
        order = jnp.arange(30)
        return population, architectures.offspring(
            key_children, population, order, 20, 3, space, image_shape
        )

    population, children = jax.device_get(made(jax.random.key(seed)))
    for index in range(30):
        genome = architectures.member(population, index)
        assert is_valid(genome, space, image_shape)
        filters = genome.filters[genome.kinds == CONVOLUTION]
        assert space.min_first_filters <= filters[0] <= space.max_first_filters
        if space.growing:
            assert (np.diff(filters) >= 0).all()
        assert space.min_length <= (genome.kinds != END).sum() <= space.max_length
    for index in range(20):
        assert is_valid(architectures.member(children, index), space, image_shape)


DECODED = Space(min_length=3, max_length=6, max_filters=40)


@jax.jit
def decode(numbers):
    return architectures.decode(numbers, DECODED, CIFAR)


@settings(max_examples=100, deadline=None)
@given(st.lists(st.floats(0, 1, width=32), min_size=28, max_size=28))
def test_all_numbers_from_0_to_1_decode_to_a_valid_network(numbers):
    genome = jax.device_get(decode(jnp.asarray(numbers, jnp.float32).reshape(7, 4)))
    assert is_valid(genome, DECODED, CIFAR)
    assert 3 <= (genome.kinds != END).sum() <= 6


def test_decoding_by_hand():
    rows = [[0.9, 0, 0.30, 0.0], [0.6, 0.7, 0, 0], [0.4, 0, 1.0, 1.0], [0.6, 0.9, 0, 0]]
    numbers = jnp.array([*rows, [0.0] * 4, [0.0] * 4, [0.49, 0, 0, 0]])
    # 0.49 of 3..6 units is 4; the second convolution has the most of 5..40 filters.
    assert architectures.to_units(decode(numbers)) == (c(3, 5), M, c(7, 40), A)
    lowest, highest = (architectures.to_units(decode(jnp.full((7, 4), end))) for end in (0.0, 1.0))
    assert lowest == (c(1, 5),) * 3
    assert highest == (c(7, 12), A, A, A, A, c(7, 40))


@pytest.mark.parametrize(
    ("units", "parameters"), [(MODEL_1, 16_477_306), (MODEL_2, 7_796_674)], ids=["1", "2"]
)
def test_the_papers_models_have_its_sizes(units, parameters):
    genome = architectures.from_units(units, 15)
    assert architectures.to_units(genome) == units
    assert architectures.costs(genome, CIFAR, 10).parameters == parameters
    rows = layers(units, CIFAR, 10)
    assert sum(row.parameters for row in rows) == parameters


def test_the_layer_table_is_that_of_figure_8():
    rows = layers(MODEL_1, CIFAR, 10)
    assert len(rows) == 21
    assert rows[0] == ("convolution 3x3", (32, 32, 7), 196)
    assert rows[6] == ("convolution 7x7", (32, 32, 235), 2_383_840)
    assert rows[8] == ("average pooling", (16, 16, 235), 0)
    assert rows[15] == ("dense", (1928,), 7_436_296)
    assert rows[20] == ("dense", (10,), 9_650)


@st.composite
def built(draw):
    """Units that fit the images of a shape, and the shape."""
    image_shape = draw(shapes)
    units = [
        draw(convolutions),
        *draw(st.lists(convolutions | st.sampled_from((M, A)), max_size=9)),
    ]
    poolings = architectures.most_poolings(image_shape)
    while sum(unit.kind != "convolution" for unit in units) > poolings:
        units.remove(next(unit for unit in units if unit.kind != "convolution"))
    return tuple(units), image_shape


convolutions = st.builds(c, st.sampled_from((1, 3, 5, 7)), st.integers(1, 20))


@settings(max_examples=40, deadline=None)
@given(drawn=built(), num_classes=st.integers(2, 11))
def test_sizes_are_those_of_the_built_network(drawn, num_classes):
    units, image_shape = drawn
    genome = architectures.from_units(units, 10)
    network = SequenceNetwork(num_classes, units)
    variables = jax.eval_shape(
        network.init, jax.random.key(0), jax.ShapeDtypeStruct((1, *image_shape), jnp.float32)
    )
    sizes = sum(np.prod(leaf.shape) for leaf in jax.tree.leaves(variables))
    assert architectures.costs(genome, image_shape, num_classes).parameters == sizes
    dense = next(leaf for leaf in jax.tree.leaves(variables) if len(leaf.shape) == 2)
    assert dense.shape[0] == architectures.num_features(genome, image_shape)


def test_multiplications_are_those_that_xla_counts():
    genome = architectures.from_units((c(3, 4), M, c(1, 6), A), 5)
    # conv 8x8x4x9, conv 4x4x4x6, dense 24-12-10-3
    expected = 8 * 8 * 9 * 1 * 4 + 4 * 4 * 4 * 6 + 24 * 12 + 12 * 10 + 10 * 3
    assert architectures.costs(genome, (8, 8, 1), 3).multiplications == expected


def test_sizes_of_a_population_and_of_very_large_networks():
    population = jax.tree.map(
        lambda *leaves: jnp.stack(leaves),
        *(architectures.from_units(units, 15) for units in (MODEL_1, MODEL_2, (c(3, 256),) * 9)),
    )
    sizes = architectures.costs(population, CIFAR, 10).parameters
    assert sizes[:2].tolist() == [16_477_306, 7_796_674]
    assert sizes[2] > 40 * 10**9  # beyond 32 bits


def genome_of(*units, length=6):
    return architectures.from_units(units, length)


def kinds_of(genome):
    return np.asarray(genome.kinds).tolist()


def test_difference_by_hand():
    first = genome_of(c(3, 8), M, c(5, 16), c(7, 20))
    second = genome_of(c(1, 9), c(3, 12), c(5, 16), A, M)
    found = architectures.difference(first, second)
    assert kinds_of(found) == [KEEP, MAX_POOLING, KEEP, CONVOLUTION, MAX_POOLING, END]
    assert np.asarray(found.kernels).tolist() == [0, 0, 0, 7, 0, 0]
    assert np.asarray(found.filters).tolist() == [0, 0, 0, 20, 0, 0]
    back = architectures.difference(second, first)
    assert kinds_of(back) == [KEEP, CONVOLUTION, KEEP, AVERAGE_POOLING, MAX_POOLING, END]
    by_unit = architectures.difference(first, second, "unit")
    assert kinds_of(by_unit) == [CONVOLUTION, MAX_POOLING, KEEP, CONVOLUTION, MAX_POOLING, END]
    assert np.asarray(by_unit.filters).tolist() == [8, 0, 0, 20, 0, 0]


def test_sum_by_hand():
    change = architectures.difference(
        genome_of(c(3, 8), M, c(5, 16), c(7, 20)), genome_of(c(1, 9), c(3, 12), c(5, 16), A, M)
    )
    base = genome_of(c(5, 6), c(1, 30), A)
    # Keep, the change's maximum, keep, and what lies beyond the base's end.
    child = architectures.add(base, change, (32, 32, 1))
    assert architectures.to_units(child) == (c(5, 6), M, A, c(7, 20), M)
    # Only two poolings fit 8x8 images: the third is dropped, and the gap closed.
    child = architectures.add(base, change, (8, 8, 1))
    assert architectures.to_units(child) == (c(5, 6), M, A, c(7, 20))
    # A base longer than the difference keeps its own end.
    longer = genome_of(c(5, 6), M, c(1, 7), c(1, 8), c(1, 9), c(1, 10))
    child = architectures.add(longer, change, (32, 32, 1))
    assert architectures.to_units(child) == (c(5, 6), M, c(1, 7), c(7, 20), M, c(1, 10))
    # KEEP beyond the base's end leaves no gap.
    both = architectures.difference(
        genome_of(c(3, 8), c(3, 8), c(3, 8), M), genome_of(c(3, 8), c(3, 8), c(3, 8), A)
    )
    child = architectures.add(genome_of(c(1, 5)), both, (32, 32, 1))
    assert architectures.to_units(child) == (c(1, 5), M)


def test_a_network_and_itself_differ_in_nothing():
    genome = genome_of(c(3, 8), M, c(5, 16), A)
    nothing = architectures.difference(genome, genome, "unit")
    base = genome_of(c(1, 5), c(7, 9))
    assert architectures.to_units(architectures.add(base, nothing, CIFAR)) == (c(1, 5), c(7, 9))


def test_a_weight_keeps_that_share_of_the_units():
    change = genome_of(*[c(3, 8)] * 5, length=6)
    keys = jax.random.split(jax.random.key(0), 2000)
    found = jax.vmap(lambda key: architectures.weakened(key, change, 0.3))(keys)
    kinds = np.asarray(found.kinds)
    assert abs((kinds[:, :5] == CONVOLUTION).mean() - 0.3) < 0.02
    assert (kinds[:, 5] == END).all()
    assert ((kinds == KEEP) == (np.asarray(found.filters) == 0))[:, :5].all()


def test_random_networks_have_the_papers_probabilities():
    space = Space(max_features=10**6)
    keys = jax.random.split(jax.random.key(0), 4000)
    make = jax.vmap(lambda key: architectures.random_genome(key, space, CIFAR))
    population = jax.tree.map(np.asarray, jax.jit(make)(keys))
    lengths = (population.kinds != END).sum(1)
    assert np.bincount(lengths, minlength=16)[7:].min() > 4000 / 9 * 0.8
    second = population.kinds[:, 1]  # poolings are free there
    assert abs((second == CONVOLUTION).mean() - 0.5) < 0.03
    poolings = population.kinds[population.kinds > CONVOLUTION]
    assert abs((poolings == MAX_POOLING).mean() - 0.8) < 0.02
    kernels = population.kernels[population.kinds == CONVOLUTION]
    assert np.ptp(np.bincount(kernels)[[1, 3, 5, 7]]) < 0.1 * len(kernels) / 4
    assert set(population.filters[:, 0]) == set(range(5, 13))


def test_parents_are_distinct_and_the_base_is_one_of_the_best():
    # Genomes that tell where each unit comes from: member i has filters 10 + i.
    members = [
        genome_of(c(3, 10 + i), *([M] if i % 2 else [c(3, 10 + i)]), c(3, 10 + i)) for i in range(6)
    ]
    population = jax.tree.map(lambda *leaves: jnp.stack(leaves), *members)
    order = jnp.array([4, 2, 0, 1, 3, 5])
    make = jax.jit(
        partial(
            architectures.offspring, num_children=1, num_best=2, space=Space(max_filters=20),
            image_shape=CIFAR,
        )
    )  # fmt: skip
    bases, changed = set(), 0
    for seed in range(60):
        child = architectures.member(make(jax.random.key(seed), population, order), 0)
        bases.add(int(child.filters[0]) - 10)
        changed += int(child.kinds[1]) == MAX_POOLING
    assert bases == {4, 2}
    # Of two distinct others of a base without pooling, the first has it and the second not.
    assert 8 < changed < 32


def test_children_of_a_generation_differ_where_they_can():
    keys = jax.random.split(jax.random.key(0), 6)
    space = Space(max_filters=32)
    population = jax.vmap(lambda key: architectures.random_genome(key, space, CIFAR))(keys)
    children = architectures.offspring(
        jax.random.key(1), population, jnp.arange(6), 20, 5, space, CIFAR
    )
    made = {architectures.to_units(architectures.member(children, index)) for index in range(20)}
    assert len(made) == 20
    same = jax.tree.map(lambda leaf: jnp.stack([leaf[0]] * 6), population)
    children = architectures.offspring(jax.random.key(1), same, jnp.arange(6), 3, 5, space, CIFAR)
    assert np.asarray(children.kinds).tolist() == [np.asarray(population.kinds[0]).tolist()] * 3


def test_features_stay_within_their_bound():
    space = Space(max_filters=16, max_features=300)
    keys = jax.random.split(jax.random.key(0), 30)
    make = jax.jit(jax.vmap(lambda key: architectures.random_genome(key, space, (16, 16, 1))))
    population = make(keys)
    assert int(architectures.num_features(population, (16, 16, 1)).max()) <= 300
    children = architectures.offspring(
        jax.random.key(1), population, jnp.arange(30), 30, 5, space, (16, 16, 1)
    )
    assert int(architectures.num_features(children, (16, 16, 1)).max()) <= 300


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"min_length": 0}, "min_length must be >= 1, got 0"),
        ({"max_length": 3}, "max_length must be >= 7, got 3"),
        ({"kernels": (3, 4)}, "kernels must be odd and >= 1, got 4"),
        ({"kernels": ()}, "kernels must name at least one, got"),
        ({"max_filters": 4}, "max_first_filters must be <= max_filters = 4, got 12"),
        ({"max_pooling_rate": 1.2}, r"max_pooling_rate must be in \[0, 1\], got 1.2"),
    ],
)
def test_a_wrong_space_is_refused(changes, says):
    with pytest.raises(ValueError, match=says):
        Space(**changes)


def test_a_space_that_images_leave_empty_is_refused():
    with pytest.raises(ValueError, match="max_features must be >= 1024 for images of"):
        Space(max_features=1000).check(CIFAR)
    with pytest.raises(ValueError, match="max_length must be > 4"):
        Space(min_length=2, max_length=4).check(CIFAR)
    assert [architectures.most_poolings((side, side, 1)) for side in (3, 4, 8, 28, 32, 64)] == [
        0, 1, 2, 3, 4, 5,
    ]  # fmt: skip
