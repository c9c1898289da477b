"""A population of feed-forward networks of different sizes, and what evolves it.

Source: van den Beemt et al. 2021, EComp, sections 3.1.1, 3.1.4 and 3.1.5.

All members are padded to the same widths; the units of a layer come first, and what the padding
after them holds never counts, be it NaN. Crossover mixes an upper left block of each layer, and the
first layer has far more inputs than a block can have rows: beyond that reach its weights pass whole
from one parent to the child. They are kept once for all that share them (`tails`), copied only when
a mutation changes them, and multiplied with the images once. What a member computes is not changed
by this, only how often: populations soon descend from few lines.
"""

from __future__ import annotations

from dataclasses import replace
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jaxtyping import Bool, Float, Int, Int32, Num

from evojax_suite.systems.ecomp.feed_forward import Layer, Network, hidden_sizes
from evojax_suite.types import Array, IntScalar, PRNGKey, Scalar

_TAILS_AT_ONCE = 4


@struct.dataclass
class Population:
    """Networks, padded; the reach is the first layer's width, at most its inputs, which are the
    channels of images that a convolution takes.

    There is room for at least as many tails as members.
    """

    # Leading axis that of members; the first layer's weights from the first `reach` inputs alone.
    layers: Network
    # Weights from the other inputs, of the lines alive.
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


def _kept_first(importance: Num[Array, "units"], size: int | IntScalar) -> Int[Array, "units"]:
    """An order of the units in which the `size` most important come first, as they stood;
    of equals the later counts as more important."""
    rank = jnp.argsort(jnp.argsort(importance, stable=True))  # 0 is the least important
    return jnp.argsort(rank < rank.shape[0] - size, stable=True)


def pruned(
    network: Network,
    importance: tuple[Num[Array, "_units"], ...],
    sizes: Int[Array, "members hidden_layers"],
    widths: tuple[int, ...],
) -> Population:
    """Copies of `network` that keep the most important units of each hidden layer, in their order.

    importance: for each hidden layer; of equals the later unit counts as more important. sizes:
    units that each copy keeps. widths: of the hidden layers, no smaller
    than any size.
    """
    bounds = [network[0].weight.shape[1], *widths, network[-1].bias.shape[0]]

    def one(size):
        orders = [_kept_first(scores, size[i]) for i, scores in enumerate(importance)]
        orders = [jnp.arange(bounds[0]), *orders, jnp.arange(bounds[-1])]
        inside = [jnp.arange(bound) < bound for bound in bounds]
        inside[1:-1] = [jnp.arange(width) < size[i] for i, width in enumerate(widths)]
        layers = []
        for index, (weight, bias) in enumerate(network):
            rows, columns = orders[index + 1][: bounds[index + 1]], orders[index][: bounds[index]]
            kept = _expanded(inside[index + 1][:, None] & inside[index], weight.ndim)
            weight = jnp.where(kept, weight[rows][:, columns], 0.0)
            layers.append(Layer(weight, jnp.where(inside[index + 1], bias[rows], 0.0)))
        units = tuple(o[:w].astype(jnp.int32) for o, w in zip(orders[1:-1], widths, strict=True))
        return tuple(layers), units

    (first, *rest), units = jax.lax.map(one, jnp.asarray(sizes))
    reach = min(bounds[0], bounds[1])
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
    bounds = [network[0].weight.shape[1], *(int(s) for s in sizes), network[-1].bias.shape[0]]
    return tuple(
        Layer(np.asarray(layer.weight)[:after, :before], np.asarray(layer.bias)[:after])
        for layer, before, after in zip(network, bounds[:-1], bounds[1:], strict=True)
    )


def cut(network: Network, sizes: Int[Array, "hidden_layers"], widths: tuple[int, ...]) -> Network:
    """One padded network cut to `widths`, no smaller than the sizes; what is no
    unit's is 0, so that the padding's activations are 0."""
    bounds = [network[0].weight.shape[1], *widths, network[-1].bias.shape[0]]
    counts = [bounds[0], *sizes, bounds[-1]]
    inside = [jnp.arange(bound) < count for bound, count in zip(bounds, counts, strict=True)]
    layers = []
    for index, (weight, bias) in enumerate(network):
        kept = _expanded(inside[index + 1][:, None] & inside[index], weight.ndim)
        weight = jnp.where(kept, weight[: bounds[index + 1], : bounds[index]], 0.0)
        layers.append(Layer(weight, jnp.where(inside[index + 1], bias[: bounds[index + 1]], 0.0)))
    return tuple(layers)


def first_activations(
    population: Population, inputs: Float[Array, "images inputs"]
) -> Float[Array, "images members width"]:
    """What a fully connected first layer gives before ReLU, padding included."""
    weight, bias = population.layers[0]
    members, width, reach = weight.shape
    near, far = inputs[:, :reach], inputs[:, reach:]
    heads = (near @ weight.reshape(members * width, reach).T).reshape(-1, members, width) + bias
    if not far.shape[1]:
        return heads
    # The tails of lines that are alive, a few at a time.
    room = len(population.tails)
    alive = jnp.zeros(room, bool).at[population.tail_of].set(True)
    order = jnp.argsort(~alive, stable=True)
    size = min(_TAILS_AT_ONCE, room)

    def some(start, tails):
        start = jnp.minimum(start * size, room - size)
        places = jax.lax.dynamic_slice_in_dim(order, start, size)
        chosen = _taken(population.tails, places).reshape(size * width, -1)
        return tails.at[:, places].set((far @ chosen.T).reshape(-1, size, width))

    empty = jnp.zeros((len(inputs), room, width))
    tails = jax.lax.fori_loop(0, -(-alive.sum() // size), some, empty)
    return heads + tails.at[:, population.tail_of].get(mode="promise_in_bounds")


def hidden_and_logits(
    first: Float[Array, "images width"],
    rest: Network,
    sizes: Int[Array, "hidden_layers"],
    widths: tuple[int, ...],
) -> list[Float[Array, "images _units"]]:
    """Hidden activations of each layer, then logits, of one member.

    first: before ReLU. rest: the layers after the first. widths: of the layers, no smaller than the
    sizes; the activations of padding are 0.
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
    key: PRNGKey,
    ends: tuple[int, int],
    first: Int[Array, "hidden_layers"],
    second: Int[Array, "hidden_layers"],
) -> Int[Array, "hidden_layers+1"]:
    """A cut-off for each layer of a pair of sizes, uniform in 1..the least size
    that both have on either side of the layer. ends: inputs and classes."""
    both = jnp.minimum(first, second)
    bounds = jnp.concatenate([jnp.array(ends[:1]), both, jnp.array(ends[1:])])
    most = jnp.minimum(bounds[:-1], bounds[1:])
    return jax.random.randint(key, most.shape, 1, most + 1)


def _draw_cut_offs(
    key: PRNGKey, population: Population, first: Int[Array, "pairs"], second: Int[Array, "pairs"]
) -> Int[Array, "2*pairs layers"]:
    """Cut-offs of both children of each pair."""
    ends = population.layers[0].weight.shape[2], population.layers[-1].bias.shape[-1]
    keys = jax.random.split(key, first.shape[0])
    draw = jax.vmap(lambda key, a, b: _cut_offs(key, ends, a, b))
    cuts = draw(keys, population.sizes[first], population.sizes[second])
    return jnp.concatenate([cuts, cuts])


def _children(population: Population, outer: Array, mixed) -> Population:
    """What goes with the second parents, and `mixed(array, layer)` of all else."""
    return Population(
        layers=tuple(
            Layer(mixed(layer.weight, index), mixed(layer.bias, index))
            for index, layer in enumerate(population.layers)
        ),
        tails=population.tails,
        tail_of=population.tail_of[outer],
        sizes=population.sizes[outer],
        units=tuple(mixed(units, index) for index, units in enumerate(population.units)),
        num_mutations=population.num_mutations[outer],
    )


def cut_off_crossover(
    key: PRNGKey, population: Population, first: Int[Array, "pairs"], second: Int[Array, "pairs"]
) -> Population:
    """Children of pairs of members; section 3.1.4, Fig. 1.

    first, second: half as many as members. Child i < pairs keeps, of each layer, the
    upper left c x c weights and the first c biases of its first parent and has all the rest, and so
    its shape, from its second; child i + pairs is its mirror image. c is drawn for each layer and
    pair, uniform in 1..the least size that both parents have on either side of the layer.
    """
    cuts = _draw_cut_offs(key, population, first, second)
    inner = jnp.concatenate([first, second])
    outer = jnp.concatenate([second, first])

    def mixed(array, layer):
        inside = jnp.ones((), bool)
        for axis in range(1, min(array.ndim, 3)):
            places = jax.lax.broadcasted_iota(jnp.int32, array.shape, axis)
            inside &= places < cuts[:, layer].reshape(-1, *[1] * (array.ndim - 1))
        return jnp.where(inside, _taken(array, inner), _taken(array, outer))

    return _children(population, outer, mixed)


def matched_units(
    first: Float[Array, "images width"],
    second: Float[Array, "images width"],
    size_first: int | IntScalar,
    size_second: int | IntScalar,
) -> Int32[Array, "width"]:
    """The partner of each unit of one layer in another, -1 where it has none.

    first, second: activations of the same images; sizes: the units among them. The
    pair with the highest correlation is matched, then the highest of what is left, and so on; a
    constant unit correlates with none. Returned are the partners in `first` of units of `second`.
    """

    def standardised(values):
        centred = values - values.mean(0)
        norm = jnp.sqrt((centred * centred).sum(0))
        return centred / jnp.where(norm > 0, norm, 1.0)

    width = second.shape[1]
    correlation = standardised(first).T @ standardised(second)
    units = (jnp.arange(width) < size_first)[:, None] & (jnp.arange(width) < size_second)
    correlation = jnp.where(units, correlation, -jnp.inf)

    def match(carry):
        """All pairs that are each other's best: they are the next ones of the greedy order."""
        left, partners = carry
        best_first, best_second = left.argmax(0), left.argmax(1)
        mutual = best_second[best_first] == jnp.arange(width)
        mutual &= jnp.isfinite(left.max(0))
        partners = jnp.where(mutual, best_first, partners)
        gone = (
            jnp.zeros(width, bool).at[jnp.where(mutual, best_first, width)].set(True, mode="drop")
        )
        return jnp.where(gone[:, None] | mutual, -jnp.inf, left), partners

    start = correlation, jnp.full(width, -1, jnp.int32)
    return jax.lax.while_loop(lambda carry: jnp.isfinite(carry[0]).any(), match, start)[1]


def aligned_crossover(
    key: PRNGKey,
    population: Population,
    first: Int[Array, "pairs"],
    second: Int[Array, "pairs"],
    hidden: list[Float[Array, "members images ... _width"]],
) -> Population:
    """`cut_off_crossover` in which a block holds, for units of the second parent, the weights
    between those units of the first that fire most alike; beyond the paper.

    hidden: activations of each hidden layer. Units without a partner
    (`matched_units`) stay the second parent's.
    """
    cuts = _draw_cut_offs(key, population, first, second)
    inner = jnp.concatenate([first, second])
    outer = jnp.concatenate([second, first])

    def partners_of(layer):
        sizes = population.sizes[:, layer]

        def match(pair):
            a, b = pair
            width = hidden[layer].shape[-1]
            one, other = (hidden[layer][place].reshape(-1, width) for place in pair)
            found = matched_units(one, other, sizes[a], sizes[b])
            places = jnp.where(found >= 0, found, width)
            mirrored = jnp.full(width, -1, jnp.int32)
            return found, mirrored.at[places].set(jnp.arange(width, dtype=jnp.int32), mode="drop")

        return jnp.concatenate(jax.lax.map(match, (first, second)))

    reach, classes = population.layers[0].weight.shape[2], population.layers[-1].bias.shape[1]
    ends = [
        jnp.broadcast_to(jnp.arange(size, dtype=jnp.int32), (len(inner), size))
        for size in (reach, classes)
    ]
    partners = [ends[0], *(partners_of(layer) for layer in range(len(hidden))), ends[1]]

    def mixed(array, layer):
        cut = cuts[:, layer, None]

        def side(places):
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
    """Both populations as one; `second` descends from `first` without changes, so that the tails
    are the same. There must be room for as many tails as members."""
    both = jax.tree.map(lambda a, b: jnp.concatenate([a, b]), first, second)
    return replace(both, tails=second.tails)


def selected(population: Population, places: Int[Array, "chosen"]) -> Population:
    """The members at `places`; the tails of others are free to be overwritten."""
    some = jax.tree.map(lambda leaf: _taken(leaf, places), replace(population, tails=None))
    return replace(some, tails=population.tails)


class _Individual(NamedTuple):
    network: Network
    sizes: Int[Array, "hidden_layers"]
    units: tuple[Int[Array, "_width"], ...]


def _change_each(population: Population, chosen: Bool[Array, "members"], change) -> Population:
    """Apply `change(index, individual) -> individual` to each member that is chosen;
    costs as much as there are. A tail that others share is copied before it changes."""
    order = jnp.argsort(~chosen, stable=True)

    def body(i, population):
        index = order[i]
        tail_of = population.tail_of
        counts = jnp.zeros(len(population.tails), jnp.int32).at[tail_of].add(1)
        own = tail_of[index]
        place = jnp.where(counts[own] > 1, counts.argmin(), own)  # an unused one, if shared
        before = _Individual(
            member(population, index),
            population.sizes[index],
            tuple(units[index] for units in population.units),
        )
        after = change(index, before)
        first, *rest = after.network
        reach = population.layers[0].weight.shape[2]
        layers = (first._replace(weight=first.weight[:, :reach]), *rest)

        def put(leaf, value):
            return leaf.at[index].set(value)

        return replace(
            population,
            layers=jax.tree.map(put, population.layers, layers),
            tails=population.tails.at[place].set(first.weight[:, reach:]),
            tail_of=put(tail_of, place),
            sizes=put(population.sizes, after.sizes),
            units=jax.tree.map(put, population.units, after.units),
            num_mutations=population.num_mutations.at[index].add(1),
        )

    return jax.lax.fori_loop(0, chosen.sum(), body, population)


def scaling_mutation(
    key: PRNGKey,
    population: Population,
    chosen: Bool[Array, "members"],
    span: float | Scalar,
    hidden_only: bool,
) -> Population:
    """Multiply each weight of the chosen members by its own factor, uniform in 1 - span..1 + span;
    section 3.1.5.

    Biases stay, with `hidden_only` the last layer's weights too.
    """

    def change(index, individual):
        network = individual.network
        keys = jax.random.split(jax.random.fold_in(key, index), len(network))
        scaled = tuple(
            layer
            if hidden_only and layer is network[-1]
            else layer._replace(
                weight=layer.weight
                * jax.random.uniform(key, layer.weight.shape, minval=1 - span, maxval=1 + span)
            )
            for key, layer in zip(keys, network, strict=True)
        )
        return individual._replace(network=scaled)

    return _change_each(population, chosen, change)


def shrinking_mutation(
    key: PRNGKey,
    population: Population,
    chosen: Bool[Array, "members"],
    span: float | Scalar,
    balanced: bool,
) -> Population:
    """Remove units of the chosen members, least important first; beyond the paper.

    A layer loses a part of its units that is uniform in 0..span, rounded up, and keeps one at
    least; `balanced`, all layers lose equally many. A unit counts by the L1 norm of its incoming
    weights times that of its outgoing ones. span: in [0, 1].
    """

    def change(index, individual):
        network, sizes, units = individual
        parts = jax.random.uniform(jax.random.fold_in(key, index), sizes.shape, maxval=span)
        parts = jnp.where(balanced, parts[0], parts)
        left = jnp.maximum(sizes - jnp.ceil(parts * sizes).astype(sizes.dtype), 1)
        bounds = [network[0].weight.shape[1], *sizes, network[-1].bias.shape[0]]
        inside = [
            jnp.arange(width) < size
            for width, size in zip(
                [bounds[0], *hidden_sizes(network), bounds[-1]], bounds, strict=True
            )
        ]
        clean = [
            jnp.where(
                _expanded(inside[i + 1][:, None] & inside[i], layer.weight.ndim),
                jnp.abs(layer.weight),
                0.0,
            )
            for i, layer in enumerate(network)
        ]
        layers, new_units = list(network), []
        for i in range(len(sizes)):
            incoming, outgoing = clean[i], clean[i + 1]
            importance = incoming.reshape(len(incoming), -1).sum(1) * outgoing.sum(
                (0, *range(2, outgoing.ndim))
            )
            importance = jnp.where(inside[i + 1], importance, -1.0)
            order = _kept_first(importance, left[i])
            weight, bias = layers[i]
            layers[i] = Layer(weight[order], bias[order])
            layers[i + 1] = layers[i + 1]._replace(weight=layers[i + 1].weight[:, order])
            new_units.append(units[i][order])
        return _Individual(tuple(layers), left, tuple(new_units))

    return _change_each(population, chosen, change)
