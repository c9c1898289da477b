"""Genomes of convolutional networks, and differential evolution on them (Pei et al. 2022).

A genome is the list of units before the dense layers (the paper's part 1): convolutions with their
kernel and filters, and 2x2 poolings. It is held in arrays of one fixed length, so that a population
is a genome with a leading axis and every operator maps over it. The poolings leave maps of at least
2x2 pixels (`most_poolings`), the first unit is a convolution, and nothing follows the end.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Annotated, Any, Literal, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from annotated_types import MinLen
from jax.typing import ArrayLike
from jaxtyping import Bool, Float, Int, Int32, Int64
from pydantic import PositiveInt

from evojax_suite.configuration import Share, configuration
from evojax_suite.types import Array, PRNGKey, PyTree, Scalar

KEEP, END, CONVOLUTION, MAX_POOLING, AVERAGE_POOLING = -1, 0, 1, 2, 3

MOST_ATTEMPTS = 200
"""Largest number of attempts to draw a network that has few enough features."""


class Genome(NamedTuple):
    """Units by position, of one network or, with leading axes, of many. A kind is CONVOLUTION,
    MAX_POOLING, AVERAGE_POOLING, or END after the last."""

    kinds: Int32[Array, "*genomes length"]
    kernels: Int32[Array, "*genomes length"]  # 0 but for convolutions
    filters: Int32[Array, "*genomes length"]  # 0 but for convolutions


def member(genomes: Genome, index: ArrayLike) -> Genome:
    """The network, or networks, at `index` of a genome with a leading axis."""
    return Genome(*(leaf[index] for leaf in genomes))


_Kind = Literal["convolution", "max", "average"]


class Unit(NamedTuple):
    """A unit in a form that can be hashed and printed."""

    kind: _Kind
    kernel: int = 0
    filters: int = 0


_NAMES: tuple[_Kind, ...] = "convolution", "max", "average"  # of the kinds from CONVOLUTION on


@configuration
class Space:
    """The networks that a search considers; defaults are the paper's (Table 1), and its program's
    for filters."""

    min_length: PositiveInt = 7
    """Least units of a random network."""
    max_length: int = 15
    """Most units."""
    kernels: Annotated[tuple[int, ...], MinLen(1)] = (1, 3, 5, 7)
    """Sizes of convolutions, odd."""
    min_first_filters: PositiveInt = 5
    """Least filters of a random network's first convolution."""
    max_first_filters: int = 12
    """Most filters of a random network's first convolution."""
    max_filters: int = 256
    """Most filters of any other."""
    filter_step: PositiveInt = 1
    """Filters are multiples of this: layers of different networks then share their programs."""
    growing: bool = True
    """A random network's later convolutions have at least as many filters as the one before; if
    not, at least min_first_filters."""
    convolution_rate: Share = 0.5
    """Probability that a unit after the first is a convolution, while it could be a pooling."""
    max_pooling_rate: Share = 0.8
    """Probability that a pooling takes the maximum; the average otherwise."""
    max_features: int = 32_768
    """Most inputs of the first dense layer, which has half as many units: a network without pooling
    on 32x32 images could have 262,144, and 43 billion parameters."""
    max_weights: PositiveInt | None = None
    """Most weights of the convolutions together; None is no limit."""

    def __post_init__(self):
        if self.max_length < self.min_length:
            raise ValueError(f"max_length must be >= {self.min_length}, got {self.max_length}")
        for kernel in self.kernels:
            if kernel < 1 or kernel % 2 == 0:
                raise ValueError(f"kernels must be odd and >= 1, got {kernel}")
        names = "min_first_filters", "max_first_filters", "max_filters"
        for name, above in itertools.pairwise(names):
            value, most = getattr(self, name), getattr(self, above)
            if value > most:
                raise ValueError(f"{name} must be <= {above} = {most}, got {value}")
        if self.least_filters > self.max_first_filters:
            raise ValueError(
                f"max_first_filters must be >= {self.least_filters}, a multiple of filter_step "
                f"{self.filter_step}, got {self.max_first_filters}"
            )

    @property
    def least_filters(self) -> int:
        """The smallest multiple of `filter_step` that is at least `min_first_filters`."""
        return -(-self.min_first_filters // self.filter_step) * self.filter_step

    def check(self, image_shape: tuple[int, int, int]) -> None:
        """Raise ValueError where a random network for these images need not exist."""
        poolings = most_poolings(image_shape)
        least = num_features_after(image_shape, poolings) * self.max_filters
        if self.max_features < least:
            raise ValueError(
                f"max_features must be >= {least} for images of {image_shape} and max_filters "
                f"{self.max_filters}, got {self.max_features}"
            )
        if self.max_length <= poolings:
            raise ValueError(
                f"max_length must be > {poolings}, the poolings that images of {image_shape} take, "
                f"got {self.max_length}"
            )


def most_poolings(image_shape: tuple[int, ...]) -> int:
    """The number of 2x2 poolings that leave at least 2x2 pixels of images (H, W, C): four for
    32x32."""
    return max(0, min(image_shape[:2]).bit_length() - 2)


def num_features_after(image_shape: tuple[int, ...], poolings: Any) -> Any:
    """The pixels of a map after a number of poolings (an integer, or an array of them)."""
    return (image_shape[0] >> poolings) * (image_shape[1] >> poolings)


def shape_after(unit: Unit, shape: tuple[int, int, int]) -> tuple[int, int, int]:
    """The height, width and channels of an image's maps after a unit."""
    height, width, channels = shape
    if unit.kind == "convolution":
        return height, width, unit.filters
    return height // 2, width // 2, channels


def num_features(genome: Genome, image_shape: tuple[int, ...]) -> Int32[Array, "*genomes"]:
    """The number of inputs of the first dense layer."""
    poolings = (genome.kinds > CONVOLUTION).sum(-1)
    return num_features_after(image_shape, poolings) * last_filters(genome)


def inputs_of(genome: Genome, channels: int) -> Int32[Array, "*genomes length"]:
    """The maps that each unit takes, for images of so many channels."""
    places = jnp.arange(genome.kinds.shape[-1])
    places = jnp.where(genome.kinds == CONVOLUTION, places, 0)
    last = jax.lax.cummax(places, places.ndim - 1)
    filters = jnp.take_along_axis(genome.filters, last, -1)
    return jnp.roll(filters, 1, -1).at[..., 0].set(channels)


def num_weights(genome: Genome, channels: int) -> Int32[Array, "*genomes length"]:
    """The weights of each convolution, for images of so many channels; 0 of other units."""
    weights = genome.kernels**2 * inputs_of(genome, channels) * genome.filters
    return jnp.where(genome.kinds == CONVOLUTION, weights, 0)


def fits(genome: Genome, space: Space, image_shape: tuple[int, ...]) -> Bool[Array, "*genomes"]:
    """Whether a network is within the limits of a space: of features and of weights."""
    few = num_features(genome, image_shape) <= space.max_features
    if space.max_weights is None:
        return few
    return few & (num_weights(genome, image_shape[2]).sum(-1) <= space.max_weights)


def last_filters(genome: Genome) -> Int32[Array, "*genomes"]:
    """The filters of the last convolution."""
    last = jnp.where(genome.kinds == CONVOLUTION, jnp.arange(genome.kinds.shape[-1]), 0).max(-1)
    return jnp.take_along_axis(genome.filters, last[..., None], -1)[..., 0]


Made = TypeVar("Made")


def _until(
    key: PRNGKey, make: Callable[[PRNGKey, Array], Made], accept: Callable[[Made], Array]
) -> Made:
    """The first result of `make(key, last)`, with new keys, that `accept` takes; else the last."""

    def again(carry: tuple[Array, Made]) -> Array:
        return (carry[0] < MOST_ATTEMPTS) & ~accept(carry[1])

    def attempt(number: Array) -> tuple[Array, Made]:
        return number + 1, make(jax.random.fold_in(key, number), number == MOST_ATTEMPTS - 1)

    return jax.lax.while_loop(again, lambda carry: attempt(carry[0]), attempt(jnp.int32(0)))[1]


def decode(
    numbers: Float[Array, "{space.max_length}+1 4"], space: Space, image_shape: tuple[int, ...]
) -> Genome:
    """The network that `numbers` in [0, 1] encode: a continuous encoding of the space, in which
    uniform numbers are a random network ("Initialization").

    A row is a unit (convolution or pooling, which pooling, kernel, filters), the first number of
    the last row the length. The network may have more than `max_features` (`num_features`).
    """

    def between(number: Array, least: int | Array, most: int | Array):
        return least + jnp.minimum(number * (most + 1 - least), most - least).astype(jnp.int32)

    length = between(numbers[-1, 0], space.min_length, space.max_length)

    def unit(carry: PyTree, inputs: PyTree):
        before, left = carry
        place, (kind_number, pooling_number, kernel_number, filters_number) = inputs
        first, ended = place == 0, place >= length
        is_convolution = first | (left == 0) | (kind_number < space.convolution_rate)
        step = space.filter_step
        later = before if space.growing else space.least_filters
        least = jnp.where(first, space.least_filters, later) // step
        most = jnp.where(first, space.max_first_filters, space.max_filters) // step
        filters = step * between(filters_number, least, most)
        kernels = jnp.array(space.kernels, jnp.int32)
        kernel = kernels[between(kernel_number, 0, len(kernels) - 1)]
        takes_maximum = pooling_number < space.max_pooling_rate
        pooling = jnp.where(takes_maximum, MAX_POOLING, AVERAGE_POOLING)
        kind = jnp.where(ended, END, jnp.where(is_convolution, CONVOLUTION, pooling))
        is_convolution = kind == CONVOLUTION
        carry = jnp.where(is_convolution, filters, before), left - (kind > CONVOLUTION)
        kernel, filters = (jnp.where(is_convolution, value, 0) for value in (kernel, filters))
        return carry, (kind.astype(jnp.int32), kernel, filters)

    start = jnp.int32(0), jnp.int32(most_poolings(image_shape))
    places = jnp.arange(space.max_length)
    return Genome(*jax.lax.scan(unit, start, (places, tuple(numbers[:-1].T)))[1])


def random_genome(key: PRNGKey, space: Space, image_shape: tuple[int, ...]) -> Genome:
    """A random network, drawn anew while it is beyond the limits. The attempts are limited, so a
    caller checks whether it `fits`."""
    return _random(key, space, image_shape)[1]


def random_numbers(
    key: PRNGKey, space: Space, image_shape: tuple[int, ...]
) -> Float[Array, "{space.max_length}+1 4"]:
    """The uniform numbers that `random_genome` decodes with the same key."""
    return _random(key, space, image_shape)[0]


def _random(key: PRNGKey, space: Space, image_shape: tuple[int, ...]) -> tuple[Array, Genome]:
    def make(key: PRNGKey, last: Array):
        del last
        # One draw for all units: random bits take long to compile.
        numbers = jax.random.uniform(key, (space.max_length + 1, 4))
        return numbers, decode(numbers, space, image_shape)

    return _until(key, make, lambda made: fits(made[1], space, image_shape))


def difference(first: Genome, second: Genome, compare: Literal["kind", "unit"] = "kind") -> Genome:
    """`first` - `second` position by position ("Mutation", Fig. 3): KEEP where they are alike in
    kind, or in the whole unit; the unit of `first` where not, of the other where one has ended."""
    same = first.kinds == second.kinds
    if compare == "unit":
        same &= (first.kernels == second.kernels) & (first.filters == second.filters)
    ended = first.kinds == END
    taken = jax.tree.map(lambda one, other: jnp.where(ended, other, one), first, second)
    return _kept(same & ~ended, taken)


def _kept(where: Bool[Array, "*genomes length"], change: Genome) -> Genome:
    """A difference with KEEP at some positions."""
    pairs = zip((KEEP, 0, 0), change, strict=True)
    return Genome(*(jnp.where(where, value, leaf) for value, leaf in pairs))


def add(base: Genome, change: Genome, image_shape: tuple[int, ...]) -> Genome:
    """`base` + a difference (Fig. 4): the difference's unit where it has one, the base's where it
    is KEEP or has ended. Poolings beyond `most_poolings` are dropped, and gaps closed."""
    kept = change.kinds <= END
    pairs = zip(base, change, strict=True)
    return closed(Genome(*(jnp.where(kept, before, new) for before, new in pairs)), image_shape)


def closed(genome: Genome, image_shape: tuple[int, ...]) -> Genome:
    """Units with gaps (END) between them as a genome: without the gaps, and without the poolings
    beyond `most_poolings`."""
    is_pooling = genome.kinds > CONVOLUTION
    excess = is_pooling & (jnp.cumsum(is_pooling, -1) > most_poolings(image_shape))
    ended = excess | (genome.kinds == END)
    order = jnp.argsort(ended, axis=-1, stable=True)
    arrays = (jnp.where(ended, 0, array) for array in genome)
    return Genome(*(jnp.take_along_axis(array, order, -1) for array in arrays))


def weakened(key: PRNGKey, change: Genome, weight: float | Scalar) -> Genome:
    """A difference of which each unit stays with probability `weight`, and is KEEP otherwise: the
    factor F of differential evolution, for units (1 in the paper)."""
    stays = (change.kinds <= END) | (jax.random.uniform(key, change.kinds.shape) < weight)
    return _kept(~stays, change)


def same_as_any(genome: Genome, others: Genome) -> Bool[Array, ""]:
    """Whether a genome is one of `others`, in all units."""
    equal = [jnp.all(one == all, -1) for one, all in zip(genome, others, strict=True)]
    return (equal[0] & equal[1] & equal[2]).any()


def offspring(
    key: PRNGKey,
    population: Genome,
    order: Int[Array, "population"],
    num_children: int,
    num_best: int,
    space: Space,
    image_shape: tuple[int, ...],
    compare: Literal["kind", "unit"] = "kind",
    weight: float | Scalar = 1.0,
) -> Genome:
    """Returns `num_children` new genomes: one of the best + (one - another), "Mutation", Fig. 2.

    population: at least 3 genomes. order: its indices from the best to the worst; the base of a
    child is one of the first `num_best`, the others are any two more. compare: see `difference`.
    weight: see `weakened`. A child that was already made in this call, or is beyond the limits of
    `space`, is made anew from other parents; after many attempts it is its base.
    """

    def child(key: PRNGKey, last: Array):
        key_base, key_others, key_weight = jax.random.split(key, 3)
        base = order[jax.random.randint(key_base, (), 0, num_best)]
        lots = jax.random.uniform(key_others, order.shape).at[base].set(-1.0)
        others = jax.lax.top_k(lots, 2)[1]
        first, second = (member(population, index) for index in others)
        change = difference(first, second, compare)
        change = weakened(key_weight, change, jnp.where(last, 0.0, weight))
        return add(member(population, base), change, image_shape)

    def one(made: PyTree, inputs: PyTree):
        place, key = inputs

        def accept(genome: Genome):
            return fits(genome, space, image_shape) & ~same_as_any(genome, made)

        genome = _until(key, child, accept)
        return jax.tree.map(lambda all, new: all.at[place].set(new), made, genome), None

    shape = num_children, population.kinds.shape[1]
    nothing = jax.tree.map(lambda leaf: jnp.full(shape, -1, leaf.dtype), population)
    keys = jax.random.split(key, num_children)
    return jax.lax.scan(one, nothing, (jnp.arange(num_children), keys))[0]


class Costs(NamedTuple):
    """The sizes of networks, on the host."""

    parameters: Int64[np.ndarray, "*genomes"]
    multiplications: Int64[np.ndarray, "*genomes"]  # of one image, forward


Head = Literal["dense", "linear"]
"""What follows the units: the paper's three dense layers, or the mean over the pixels and one."""


def dense_units(features: Any, num_classes: int, head: Head = "dense") -> list[Any]:
    """The inputs of the dense layers and the outputs of the last (part 2): half, then a quarter of
    the features, at least 10, in whole numbers. features: an integer or an array of them."""
    if head == "linear":
        return [features, num_classes]
    if isinstance(features, int):
        return [features, max(10, features // 2), max(10, features // 4), num_classes]
    numbers = jnp if isinstance(features, jax.Array) else np
    halves = [numbers.maximum(10, features // part) for part in (2, 4)]
    return [features, *halves, num_classes]


def costs(
    genome: Genome,
    image_shape: tuple[int, int, int],
    num_classes: int,
    head: Head = "dense",
    normalized: bool = False,
) -> Costs:
    """Parameters and multiplications of genomes, without building the networks. normalized: whether
    each filter has a scale and a shift.

    The smaller network of Pei et al. 2022 (Fig. 10):

    >>> units = [Unit("convolution", 3, 7), Unit("convolution", 5, 195), Unit("max"), Unit("max")]
    >>> units += [Unit("convolution", 5, 219), Unit("convolution", 5, 188), Unit("average")]
    >>> int(costs(from_units(tuple(units), 15), (32, 32, 3), 10).parameters)
    7796674
    """
    arrays = [np.moveaxis(np.asarray(array, np.int64), -1, 0) for array in genome]
    parameters, multiplications, poolings = (np.zeros_like(arrays[0][0]) for _ in range(3))
    inputs = parameters + image_shape[2]
    for kind, kernel, filters in zip(*arrays, strict=True):
        weights = kernel**2 * inputs * filters
        parameters += weights + filters * (3 if normalized else 1)
        multiplications += weights * num_features_after(image_shape, poolings)
        inputs = np.where(kind == CONVOLUTION, filters, inputs)
        poolings += kind > CONVOLUTION
    pixels = num_features_after(image_shape, poolings) if head == "dense" else 1
    units = dense_units(pixels * inputs, num_classes, head)
    for before, after in itertools.pairwise(units):
        parameters += (before + 1) * after
        multiplications += before * after
    return Costs(parameters, multiplications)


def to_units(genome: Genome) -> tuple[Unit, ...]:
    """The units of one genome."""
    return tuple(
        Unit(_NAMES[kind - CONVOLUTION], int(kernel), int(filters))
        for kind, kernel, filters in zip(*map(np.asarray, genome), strict=True)
        if kind > END
    )


def from_units(units: tuple[Unit, ...], length: int) -> Genome:
    """The genome of a list of units, in arrays of this length."""
    if len(units) > length:
        raise ValueError(f"a genome has at most {length} units, got {len(units)}")
    rows = [(CONVOLUTION + _NAMES.index(unit.kind), unit.kernel, unit.filters) for unit in units]
    rows += [(END, 0, 0)] * (length - len(rows))
    return Genome(*(jnp.array(column, jnp.int32) for column in zip(*rows, strict=True)))
