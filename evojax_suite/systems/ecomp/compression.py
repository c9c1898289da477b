"""A population of feed-forward networks of different sizes, and the operators that evolve it.

Source: van den Beemt et al. 2021, EComp, sections 3.1.1, 3.1.4 and 3.1.5.

All members are padded to the same widths; the units of a layer come first, and what the padding
after them holds never counts, be it NaN. Crossover mixes an upper left block of each layer, and the
first layer has far more inputs than a block can have rows: beyond that reach its weights pass whole
from one parent to the child. They are kept once for all members that share them (`tails`), copied
only when a mutation changes them, and multiplied with the images once. This changes nothing in what
a member computes, only how often it is computed: populations soon descend from few lines.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import pairwise
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jaxtyping import Bool, Float, Int, Int32, Num

from evojax_suite.systems.ecomp.feed_forward import Layer, Network, hidden_sizes, layer_sizes
from evojax_suite.types import Array, IntScalar, PRNGKey, PyTree, Scalar

Size: TypeAlias = int | IntScalar
Sizes: TypeAlias = Int[Array, "hidden_layers"]
Pairs: TypeAlias = Int[Array, "pairs"]
Activations: TypeAlias = Float[Array, "images width"]
Chosen: TypeAlias = Bool[Array, "members"]

_TAILS_AT_ONCE = 4


@struct.dataclass
class Population:
    """Padded networks.

    The reach is the first layer's width, at most its inputs (of a convolution, the channels of the
    images). There is room for at least as many tails as members.
    """

    # The layers have a leading axis of members; the first one has weights from `reach` inputs only.
    layers: Network
    # The tails are the first layer's weights from the other inputs, for each line that is alive.
    tails: Float[Array, "room width beyond_reach ..."]
    tail_of: Int32[Array, "members"]  # each member's place in `tails`
    sizes: Int32[Array, "members hidden_layers"]  # units
    # For each hidden layer the parent's unit that a bias comes from.
    units: tuple[Int32[Array, "members _width"], ...]
    num_mutations: Int32[Array, "members"]  # in the line from which a member has its tail


def _taken(array: Array, places: Array) -> Array:
    """array[places], without the check of places that would keep it from being fused."""
    return array.at[places].get(mode="promise_in_bounds")


def _expanded(mask: Array, ndim: int) -> Array:
    """`mask` with axes of length 1 at the end, so that it has `ndim`."""
    return mask.reshape(*mask.shape, *[1] * (ndim - mask.ndim))


def _kept_first(importance: Num[Array, "units"], size: Size) -> Int[Array, "units"]:
    """An order of the units in which the `size` most important come first, as they stood; of equals
    the later counts as more important."""
    rank = jnp.argsort(jnp.argsort(importance, stable=True))  # 0 is the least important
    return jnp.argsort(rank < rank.shape[0] - size, stable=True)


def part(network: Network, places: Sequence[Any]) -> Network:
    """The network between some of the units.

    places: slices or indices of the inputs, of the units of each hidden layer and of the outputs.
    """
    return tuple(
        Layer(weight[after][:, before], bias[after])
        for (weight, bias), (before, after) in zip(network, pairwise(places), strict=True)
    )


def _masked(network: Network, sizes: Sizes) -> Network:
    """One padded network with 0 for the weights and biases of its padding."""
    widths, counts = layer_sizes(network, hidden_sizes(network)), layer_sizes(network, sizes)
    inside = [jnp.arange(width) < count for width, count in zip(widths, counts, strict=True)]
    layers = []
    for (weight, bias), (before, after) in zip(network, pairwise(inside), strict=True):
        kept = _expanded(after[:, None] & before, weight.ndim)
        layers.append(Layer(jnp.where(kept, weight, 0.0), jnp.where(after, bias, 0.0)))
    return tuple(layers)


def incoming_norms(weight: Float[Array | np.ndarray, "units inputs ..."]) -> Float[Array, "units"]:
    """The L1 norm of each unit's incoming weights."""
    return jnp.abs(weight).reshape(len(weight), -1).sum(1)


def pruned(
    network: Network,
    importance: tuple[Num[Array, "_units"], ...],
    sizes: Int[Array, "members hidden_layers"],
    widths: tuple[int, ...],
) -> Population:
    """Copies of `network` that keep the most important units of each hidden layer, in their order.

    importance: of the units of each hidden layer; of equals the later counts as more important.
    sizes: units that each copy keeps. widths: of the hidden layers, no smaller than any size.
    """

    def one(sizes: Array):
        units = [
            _kept_first(scores, size)[:width]
            for scores, size, width in zip(importance, sizes, widths, strict=True)
        ]
        kept = part(network, [slice(None), *units, slice(None)])
        return _masked(kept, sizes), tuple(places.astype(jnp.int32) for places in units)

    (first, *rest), units = jax.lax.map(one, jnp.asarray(sizes))
    reach = min(first.weight.shape[1:3])
    return Population(
        layers=(first._replace(weight=first.weight[:, :, :reach]), *rest),
        tails=first.weight[:, :, reach:],
        tail_of=jnp.arange(len(sizes), dtype=jnp.int32),
        sizes=jnp.asarray(sizes, jnp.int32),
        units=units,
        num_mutations=jnp.zeros(len(sizes), jnp.int32),
    )


def member(population: Population, index: IntScalar | np.integer | int) -> Network:
    """One network, still padded."""
    first, *rest = jax.tree.map(lambda leaf: leaf[index], population.layers)
    tail = population.tails[population.tail_of[index]]
    return (first._replace(weight=jnp.concatenate([first.weight, tail], 1)), *rest)


def trimmed(network: Network, sizes: Int[Array | np.ndarray, "hidden_layers"]) -> Network:
    """One network without its padding, as NumPy arrays."""
    return part(jax.device_get(network), [slice(size) for size in layer_sizes(network, sizes)])


def cut(network: Network, sizes: Sizes, widths: tuple[int, ...]) -> Network:
    """One padded network cut to `widths`, no smaller than its sizes; the weights and biases of
    padding are 0, and so are its activations."""
    narrow = part(network, [slice(width) for width in layer_sizes(network, widths)])
    return _masked(narrow, sizes)


def first_activations(
    population: Population, inputs: Float[Array, "images inputs"]
) -> Float[Array, "images members width"]:
    """Activations of a fully connected first layer before ReLU, padding included."""
    weight, bias = population.layers[0]
    members, width, reach = weight.shape
    near, far = inputs[:, :reach], inputs[:, reach:]
    heads = (near @ weight.reshape(members * width, reach).T).reshape(-1, members, width) + bias
    if not far.shape[1]:
        return heads
    # The tails of the lines that are alive, a few at a time.
    room = len(population.tails)
    alive = jnp.zeros(room, bool).at[population.tail_of].set(True)
    order = jnp.argsort(~alive, stable=True)
    size = min(_TAILS_AT_ONCE, room)

    def some(start: Array, tails: Array):
        start = jnp.minimum(start * size, room - size)
        places = jax.lax.dynamic_slice_in_dim(order, start, size)
        chosen = _taken(population.tails, places).reshape(size * width, -1)
        return tails.at[:, places].set((far @ chosen.T).reshape(-1, size, width))

    tails = jnp.zeros((len(inputs), room, width))
    tails = jax.lax.fori_loop(0, -(-alive.sum() // size), some, tails)
    return heads + tails.at[:, population.tail_of].get(mode="promise_in_bounds")


def hidden_and_logits(
    first: Activations, rest: Network, sizes: Sizes, widths: tuple[int, ...]
) -> list[Float[Array, "images _units"]]:
    """One member's activations of each hidden layer, 0 in the padding, then its logits.

    first: activations of the first layer before ReLU. rest: the layers after it. sizes: units of
    the hidden layers. widths: of the hidden layers in the result, no smaller than the sizes.
    """
    inside = jnp.arange(widths[0]) < sizes[0]
    outputs = [jnp.where(inside, jnp.maximum(first[:, : widths[0]], 0.0), 0.0)]
    for index, (weight, bias) in enumerate(rest, 1):
        outer = widths[index] if index < len(rest) else bias.shape[0]
        weight = jnp.where(inside, weight[:outer, : widths[index - 1]], 0.0)
        values = outputs[-1] @ weight.T + bias[:outer]
        if index < len(rest):
            inside = jnp.arange(outer) < sizes[index]
            values = jnp.where(inside, jnp.maximum(values, 0.0), 0.0)
        outputs.append(values)
    return outputs


def _cut_offs(
    key: PRNGKey, ends: tuple[int, int], first: Sizes, second: Sizes
) -> Int[Array, "hidden_layers+1"]:
    """A cut-off for each layer of a pair of members, uniform in 1..the least size that both have on
    either side of the layer. ends: number of inputs and of classes."""
    both = jnp.minimum(first, second)
    bounds = jnp.concatenate([jnp.array(ends[:1]), both, jnp.array(ends[1:])])
    most = jnp.minimum(bounds[:-1], bounds[1:])
    return jax.random.randint(key, most.shape, 1, most + 1)


def _draw_cut_offs(
    key: PRNGKey, population: Population, first: Pairs, second: Pairs
) -> tuple[Int[Array, "2*pairs layers"], Int[Array, "2*pairs"], Int[Array, "2*pairs"]]:
    """Cut-offs of both children of each pair, the parents of their blocks and those of all else."""
    ends = population.layers[0].weight.shape[2], population.layers[-1].bias.shape[-1]
    keys = jax.random.split(key, first.shape[0])
    draw = jax.vmap(lambda key, a, b: _cut_offs(key, ends, a, b))
    cuts = draw(keys, population.sizes[first], population.sizes[second])
    inner, outer = jnp.concatenate([first, second]), jnp.concatenate([second, first])
    return jnp.concatenate([cuts, cuts]), inner, outer


def _children(
    population: Population, outer: Array, mixed: Callable[[Any, int], Array]
) -> Population:
    """Children whose layers and units are `mixed(array, layer)`; all else is that of their parents
    `outer`."""
    return replace(
        population,
        layers=tuple(
            Layer(mixed(weight, index), mixed(bias, index))
            for index, (weight, bias) in enumerate(population.layers)
        ),
        units=tuple(mixed(units, index) for index, units in enumerate(population.units)),
        tail_of=population.tail_of[outer],
        sizes=population.sizes[outer],
        num_mutations=population.num_mutations[outer],
    )


def cut_off_crossover(
    key: PRNGKey, population: Population, first: Pairs, second: Pairs
) -> Population:
    """Children of pairs of members; section 3.1.4, Fig. 1.

    There are half as many pairs as members. Child i < pairs keeps, of each layer, the upper left
    c x c weights and the first c biases of its first parent and has all the rest, and so its shape,
    from its second; child i + pairs is its mirror image. c is drawn for each layer and pair,
    uniform in 1..the least size that both parents have on either side of the layer.
    """
    cuts, inner, outer = _draw_cut_offs(key, population, first, second)

    def mixed(array: Array, layer: int) -> Array:
        inside = jnp.ones((), bool)
        for axis in range(1, min(array.ndim, 3)):
            places = jax.lax.broadcasted_iota(jnp.int32, array.shape, axis)
            inside &= places < _expanded(cuts[:, layer], array.ndim)
        return jnp.where(inside, _taken(array, inner), _taken(array, outer))

    return _children(population, outer, mixed)


def matched_units(
    first: Activations, second: Activations, size_first: Size, size_second: Size
) -> Int32[Array, "width"]:
    """The partner in `first` of each unit of `second`, -1 where it has none.

    first, second: activations of two layers on the same images; sizes: their numbers of units. The
    pair with the highest correlation is matched, then the highest of what is left, and so on; a
    constant unit correlates with none.
    """

    def standardised(values: Array):
        centred = values - values.mean(0)
        norm = jnp.sqrt((centred * centred).sum(0))
        return centred / jnp.where(norm > 0, norm, 1.0)

    width = second.shape[1]
    correlation = standardised(first).T @ standardised(second)
    units = (jnp.arange(width) < size_first)[:, None] & (jnp.arange(width) < size_second)
    correlation = jnp.where(units, correlation, -jnp.inf)

    def match(carry: PyTree):
        """Match all pairs that are each other's best: the next ones of the greedy order."""
        left, partners = carry
        best_first, best_second = left.argmax(0), left.argmax(1)
        mutual = (best_second[best_first] == jnp.arange(width)) & jnp.isfinite(left.max(0))
        places = jnp.where(mutual, best_first, width)
        gone = jnp.zeros(width, bool).at[places].set(True, mode="drop")
        left = jnp.where(gone[:, None] | mutual, -jnp.inf, left)
        return left, jnp.where(mutual, best_first, partners)

    start = correlation, jnp.full(width, -1, jnp.int32)
    return jax.lax.while_loop(lambda carry: jnp.isfinite(carry[0]).any(), match, start)[1]


def aligned_crossover(
    key: PRNGKey,
    population: Population,
    first: Pairs,
    second: Pairs,
    hidden: list[Float[Array, "members images ... _width"]],
) -> Population:
    """`cut_off_crossover` in which a block holds, for units of the second parent, the weights
    between those units of the first that fire most alike; beyond the paper.

    hidden: activations of each hidden layer. Units without a partner (`matched_units`) stay the
    second parent's.
    """
    cuts, inner, outer = _draw_cut_offs(key, population, first, second)

    def partners_of(layer: int, activations: Array):
        width = activations.shape[-1]
        units = jnp.arange(width, dtype=jnp.int32)

        def match(pair: PyTree):
            each = [activations[place].reshape(-1, width) for place in pair]
            partners = matched_units(*each, *(population.sizes[place, layer] for place in pair))
            places = jnp.where(partners >= 0, partners, width)
            return partners, jnp.full(width, -1, jnp.int32).at[places].set(units, mode="drop")

        return jnp.concatenate(jax.lax.map(match, (first, second)))

    reach, classes = population.layers[0].weight.shape[2], population.layers[-1].bias.shape[1]
    inputs, outputs = (
        jnp.broadcast_to(jnp.arange(size, dtype=jnp.int32), (len(inner), size))
        for size in (reach, classes)
    )
    partners = [inputs, *(partners_of(i, one) for i, one in enumerate(hidden)), outputs]

    def mixed(array: Array, layer: int) -> Array:
        cut = cuts[:, layer, None]

        def side(places: Array):
            return jnp.maximum(places, 0), (places >= 0) & (jnp.arange(places.shape[1]) < cut)

        rows, row_inside = side(partners[layer + 1])
        if array.ndim == 2:
            return jnp.where(row_inside, array[inner[:, None], rows], array[outer])
        columns, column_inside = side(partners[layer])
        block = array[inner[:, None, None], rows[:, :, None], columns[:, None, :]]
        inside = row_inside[:, :, None] & column_inside[:, None, :]
        return jnp.where(_expanded(inside, array.ndim), block, array[outer])

    return _children(population, outer, mixed)


def joined(first: Population, second: Population) -> Population:
    """Both populations as one; `second` descends from `first` by crossover alone, so that they have
    the same tails. There must be room for as many tails as members."""
    both = jax.tree.map(lambda a, b: jnp.concatenate([a, b]), first, second)
    return replace(both, tails=second.tails)


def selected(population: Population, places: Int[Array, "chosen"]) -> Population:
    """The members at `places`; the tails of others are free to be overwritten."""
    some = jax.tree.map(lambda leaf: _taken(leaf, places), replace(population, tails=None))
    return replace(some, tails=population.tails)


_Change: TypeAlias = Callable[
    [Array, Network, Array, tuple[Array, ...]], tuple[Sequence[Layer], Array, tuple[Array, ...]]
]


def _change_each(population: Population, chosen: Chosen, change: _Change) -> Population:
    """`population` with the network, sizes and units of each chosen member replaced by
    `change(index, network, sizes, units)`. The cost is proportional to the number chosen. A tail
    that others share is copied before it changes."""
    order = jnp.argsort(~chosen, stable=True)

    def body(i: Array, population: Population):
        index = order[i]
        tail_of = population.tail_of
        counts = jnp.zeros(len(population.tails), jnp.int32).at[tail_of].add(1)
        place = tail_of[index]
        place = jnp.where(counts[place] > 1, counts.argmin(), place)  # an unused one, if shared
        about = jax.tree.map(lambda leaf: leaf[index], (population.sizes, population.units))
        (first, *rest), sizes, units = change(index, member(population, index), *about)
        reach = population.layers[0].weight.shape[2]
        layers = (first._replace(weight=first.weight[:, :reach]), *rest)

        def put(leaf: Array, value: Array):
            return leaf.at[index].set(value)

        return replace(
            population,
            layers=jax.tree.map(put, population.layers, layers),
            tails=population.tails.at[place].set(first.weight[:, reach:]),
            tail_of=put(tail_of, place),
            sizes=put(population.sizes, sizes),
            units=jax.tree.map(put, population.units, units),
            num_mutations=population.num_mutations.at[index].add(1),
        )

    return jax.lax.fori_loop(0, chosen.sum(), body, population)


def scaling_mutation(
    key: PRNGKey, population: Population, chosen: Chosen, span: float | Scalar, hidden_only: bool
) -> Population:
    """Multiply each weight of the chosen members by an independent factor, uniform in 1 - span..1 +
    span; section 3.1.5. Biases stay, with `hidden_only` the last layer's weights too."""

    def change(index: Array, network: Network, sizes: Array, units: tuple[Array, ...]):
        keys = jax.random.split(jax.random.fold_in(key, index), len(network))
        layers = list(network)
        for i, (weight, bias) in enumerate(network[:-1] if hidden_only else network):
            factors = jax.random.uniform(keys[i], weight.shape, minval=1 - span, maxval=1 + span)
            layers[i] = Layer(weight * factors, bias)
        return layers, sizes, units

    return _change_each(population, chosen, change)


def shrinking_mutation(
    key: PRNGKey, population: Population, chosen: Chosen, span: float | Scalar, balanced: bool
) -> Population:
    """Remove units of the chosen members, least important first; beyond the paper.

    A layer loses a part of its units that is uniform in 0..span (span in [0, 1]), rounded up, and
    keeps at least one; if `balanced`, all layers lose equally many. The importance of a unit is the
    L1 norm of its incoming weights times that of its outgoing ones.
    """

    def change(index: Array, network: Network, sizes: Array, units: tuple[Array, ...]):
        parts = jax.random.uniform(jax.random.fold_in(key, index), sizes.shape, maxval=span)
        parts = jnp.where(balanced, parts[0], parts)
        left = jnp.maximum(sizes - jnp.ceil(parts * sizes).astype(sizes.dtype), 1)
        orders, weights = [], [layer.weight for layer in _masked(network, sizes)]
        layers = zip(sizes, left, pairwise(weights), strict=True)
        for size, new_size, (incoming, outgoing) in layers:
            outgoing = jnp.abs(outgoing).sum((0, *range(2, outgoing.ndim)))
            importance = incoming_norms(incoming) * outgoing
            importance = jnp.where(jnp.arange(len(importance)) < size, importance, -1.0)
            orders.append(_kept_first(importance, new_size))
        changed = part(network, [slice(None), *orders, slice(None)])
        return changed, left, tuple(kept[order] for kept, order in zip(units, orders, strict=True))

    return _change_each(population, chosen, change)
