"""What the methods of search (`methods`) need of lists of units: mutants, neighbours, crossings,
and how alike two networks are. A network is an array here, the rows of its genome.

A neighbour is one edit away: another kernel, a quarter more or fewer filters, a convolution in
place of a pooling or the other way round, a unit less, or a convolution twice. None has more
poolings, units, filters or features than the space allows.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Bool, Float, Int, Int32

from evojax_suite.systems.de_nas import architectures
from evojax_suite.systems.de_nas.architectures import (
    AVERAGE_POOLING,
    CONVOLUTION,
    END,
    MAX_POOLING,
    Genome,
    Space,
)
from evojax_suite.systems.de_nas.methods import Operators
from evojax_suite.types import Array, IntScalar, PRNGKey

_FEWER, _MORE, _LESS, _TWICE = -1, -2, -3, -4  # edits beside kernels and poolings
_LENGTH_SCALE = 2.5  # root mean square of the differences, for a factor of e


def rows(genome: Genome) -> Int32[Array, "*genomes 3 length"]:
    """The arrays of genomes in one."""
    return jnp.stack(genome, axis=-2)


def genome_of(rows: Int32[Array, "*genomes 3 length"]) -> Genome:
    """The genomes of such an array."""
    return Genome(*jnp.moveaxis(rows, -2, 0))


def _edited(
    genome: Genome, space: Space, place: IntScalar, edit: IntScalar, kernel: IntScalar
) -> Genome:
    """The genome after an edit of the unit at a place; one that is not possible may change nothing,
    or leave the space. edit: an edit, or the unit's new kind. kernel: its new one."""
    places, step = jnp.arange(space.max_length), space.filter_step
    kind, old_kernel, filters = (leaf[place] for leaf in genome)
    change = step * jnp.maximum(filters // 4 // step, 1)
    last = jnp.where((places < place) & (genome.kinds == CONVOLUTION), places, 0).max()
    convolved = jnp.where(kind == CONVOLUTION, filters, genome.filters[last])
    kinds = jnp.where(edit > END, edit, kind)
    kernels = jnp.where(edit > END, kernel, old_kernel)
    numbers = jnp.where(edit == CONVOLUTION, convolved, jnp.where(edit > CONVOLUTION, 0, filters))
    is_convolution = kind == CONVOLUTION
    numbers += jnp.where(is_convolution & (edit == _MORE), change, 0)
    numbers -= jnp.where(is_convolution & (edit == _FEWER), change, 0)
    unit = Genome(kinds, kernels, numbers)
    changed = Genome(*(leaf.at[place].set(own) for leaf, own in zip(genome, unit, strict=True)))
    # A unit less, or a convolution twice: what follows moves.
    less, twice = edit == _LESS, is_convolution & (edit == _TWICE)
    source = places + jnp.where(less & (places >= place), 1, 0)
    source -= jnp.where(twice & (places > place), 1, 0)
    ended = source >= space.max_length
    source = jnp.clip(source, 0, space.max_length - 1)
    return Genome(*(jnp.where(ended, 0, leaf[source]) for leaf in changed))


def _is_inside(genome: Genome, space: Space, shape: tuple[int, ...]) -> Bool[Array, ""]:
    is_convolution = genome.kinds == CONVOLUTION
    least, most = space.least_filters, space.max_filters
    fit = (genome.filters >= least) & (genome.filters <= most)
    poolings = (genome.kinds > CONVOLUTION).sum()
    return (
        is_convolution[0]
        & (fit | ~is_convolution).all()
        & (poolings <= architectures.most_poolings(shape))
        & architectures.fits(genome, space, shape)
    )


def _neighbours(
    network: Int[Array, "3 length"], space: Space, shape: tuple[int, ...]
) -> tuple[Int32[Array, "neighbours 3 length"], Bool[Array, "neighbours"]]:
    """All edits of a network, and whether each is another network of the space."""
    edits = [(CONVOLUTION, size) for size in space.kernels]
    edits += [(kind, 0) for kind in (MAX_POOLING, AVERAGE_POOLING, _FEWER, _MORE, _LESS, _TWICE)]
    kinds, kernels = np.array(edits, np.int32).T
    genome, length = genome_of(network), space.max_length
    places = np.repeat(np.arange(length, dtype=np.int32), len(edits))
    tiled = places, np.tile(kinds, length), np.tile(kernels, length)
    arguments = tuple(jnp.asarray(array) for array in tiled)
    all_edited = jax.vmap(partial(_edited, genome, space))(*arguments)
    inside = jax.vmap(lambda one: _is_inside(one, space, shape))(all_edited)
    # A list as long as the space allows would lose its last unit.
    whole = genome.kinds[-1] == END
    found = rows(all_edited)
    usable = inside & (genome.kinds[places] != END) & (found != network).any((1, 2))
    return found, usable & (whole | (arguments[1] != _TWICE))


def _mutate(key: PRNGKey, network: Array, space: Space, shape: tuple[int, ...]) -> Array:
    found, usable = _neighbours(network, space, shape)
    lots = jnp.where(usable, jax.random.uniform(key, usable.shape), -1.0)
    return jnp.where(usable.any(), found[lots.argmax()], network)


def _cross(key: PRNGKey, one: Array, another: Array, space: Space, shape: tuple[int, ...]) -> Array:
    """The first part of a list and the last of another, cut at the same share of their lengths."""
    lengths = [(network[0] != END).sum() for network in (one, another)]
    share = jax.random.uniform(key)
    cut = jnp.maximum(jnp.round(share * lengths[0]), 1).astype(jnp.int32)
    begin = jnp.round(share * lengths[1]).astype(jnp.int32)
    places = jnp.arange(space.max_length)
    source = jnp.minimum(places - cut + begin, space.max_length - 1)
    ended = places - cut + begin >= lengths[1]
    tail = jnp.where(ended, 0, another[:, source])
    child = architectures.closed(genome_of(jnp.where(places < cut, one, tail)), shape)
    return jnp.where(_is_inside(child, space, shape), rows(child), one)


def _differ(
    key: PRNGKey,
    base: Array,
    one: Array,
    another: Array,
    weight: Any,
    space: Space,
    shape: tuple[int, ...],
) -> Array:
    change = architectures.difference(genome_of(one), genome_of(another))
    change = architectures.weakened(key, change, weight)
    child = architectures.add(genome_of(base), change, shape)
    return jnp.where(_is_inside(child, space, shape), rows(child), base)


def numbers_of(
    network: Int[Array, "3 length"], shape: tuple[int, ...], num_classes: int
) -> Float[Array, "numbers"]:
    """What makes networks alike: of each resolution the convolutions, their mean kernel and filters
    (logarithm); the poolings that average; the logarithms of the multiplications, and of the
    parameters, of convolutions and of a layer from the last features."""
    genome, levels = genome_of(network), architectures.most_poolings(shape) + 1
    is_convolution, is_pooling = genome.kinds == CONVOLUTION, genome.kinds > CONVOLUTION
    before = jnp.cumsum(is_pooling)
    weights = architectures.num_weights(genome, shape[2]).astype(jnp.float32)
    pixels = architectures.num_features_after(shape, before)
    filters = jnp.log2(jnp.maximum(genome.filters, 1).astype(jnp.float32))
    numbers = []
    for level in range(levels):
        here = is_convolution & (before == level)
        count = here.sum()
        sums = [jnp.where(here, values, 0).sum() for values in (genome.kernels, filters)]
        numbers += [count, *(total / jnp.maximum(count, 1) for total in sums)]
    features = architectures.num_features(genome, shape).astype(jnp.float32)
    sizes = (weights * pixels).sum(), weights.sum(), features * num_classes
    logarithms = [jnp.log2(1 + size) for size in sizes]
    averages = (genome.kinds == AVERAGE_POOLING).sum()
    return jnp.stack([jnp.float32(number) for number in (*numbers, averages, *logarithms)])


def operators(space: Space, shape: tuple[int, int, int], num_classes: int) -> Operators:
    """The functions of a space of units, for images of a shape (height, width, channels)."""

    def random(key: PRNGKey) -> Array:
        return rows(architectures.random_genome(key, space, shape))

    def decode(vector: Array) -> Array:
        numbers = jax.scipy.stats.norm.cdf(vector).reshape(-1, 4)
        return rows(architectures.decode(numbers, space, shape))

    def describe(networks: Array) -> Array:
        return jax.vmap(lambda one: numbers_of(one, shape, num_classes))(networks)

    def kernel(one: Array, another: Array) -> Array:
        first, second = describe(one), describe(another)
        squares = ((first[:, None] - second) ** 2).mean(2)
        return jnp.exp(-jnp.sqrt(squares + 1e-9) / _LENGTH_SCALE)

    def neighbours(network: Array) -> Array:
        return _neighbours(network, space, shape)[0]

    return Operators(
        random=random,
        differ=partial(_differ, space=space, shape=shape),
        mutate=partial(_mutate, space=space, shape=shape),
        neighbours=neighbours,
        cross=partial(_cross, space=space, shape=shape),
        decode=decode,
        num_numbers=4 * (space.max_length + 1),
        kernel=kernel,
    )
