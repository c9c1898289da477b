"""The closed form of a pruned network: each layer, one after the other, is fitted by least squares
to what its parent's layer computes on the same images, from the activations that are left.

This is the reconstruction of layers of channel pruning (He, Zhang & Sun 2017, "Channel Pruning for
Accelerating Very Deep Neural Networks", section 3.1), of all layers, the first included where its
inputs are pruned. What is added to it here:

- The ridge draws the weights to the parent's, not to 0: a layer that lost nothing stays as it is.
- The logits may be fitted to labels from there (`label_rounds`): each round minimises the quadratic
  upper bound of the cross-entropy at the present logits (Böhning 1992, "Multinomial logistic
  regression algorithm"), which one more solution with the same factor does.
- `priorities` orders the units of each group: the one is removed next without which the layers that
  read it are fitted least badly. All that changes from one removal to the next is of low rank.

Nothing here computes a gradient. Units are removed from padded networks by masks, so that members
of a population differ in size within one program.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import Any, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
from flax import struct
from jaxtyping import Bool, Float, Int32

from evojax_suite.systems.ecomp import graph as graphs
from evojax_suite.systems.ecomp.graph import Graph, Node
from evojax_suite.types import Array, PRNGKey, Probabilities, Scalar

Rows: TypeAlias = Float[Array, "rows block units"]


class Kept(NamedTuple):
    """The units that are left of a group, padded."""

    places: Int32[Array, "width"]
    inside: Bool[Array, "width"]  # False for padding, whose places do not count


@struct.dataclass
class Fit:
    """Images on which layers are fitted, and what the parent computes there."""

    inputs: Float[Array, "..."]  # see `taken`
    targets: Probabilities  # of the labels, one-hot
    # For each node, its outputs in the parent, of a convolution at `positions`.
    outputs: tuple[Float[Array, "_rows _units"], ...]
    # For each convolution, the row and column of some pixels of each image; None for other nodes.
    positions: tuple[Int32[Array, "images positions 2"] | None, ...]
    # Where a fully connected layer takes the inputs, its products: members gather their own.
    first: Products | None


class Products(NamedTuple):
    """What least squares need of a layer's inputs, with 1 as the last of them."""

    gram: Float[Array, "coefficients coefficients"]  # of inputs with inputs
    cross: Float[Array, "coefficients outputs"]  # of inputs with outputs


def arranged(graph: Graph, inputs: Float[Array, "images ..."]) -> Float[Array, "..."]:
    """Inputs as `taken` wants them: (units, images), or maps as they are."""
    return inputs if graph[0].is_convolution else inputs.T


def taken(inputs: Float[Array, "..."], kept: Kept) -> Float[Array, "images ..."]:
    """The inputs of the kept units. Whole rows of `arranged` ones are gathered eight times as fast
    as columns would be; what padding holds does not count, as its weights are 0."""
    return inputs[kept.places].T if inputs.ndim == 2 else inputs[..., kept.places]


@partial(jax.jit, static_argnames="num_positions")
def make_fit(
    key: PRNGKey, graph: Graph, inputs: Array, targets: Probabilities, num_positions: int = 10
) -> Fit:
    """The data of fits of `graph` pruned. num_positions: the pixels of each image, drawn at random,
    at which the outputs of a convolution are compared, as in the cited work."""
    outputs, _ = graphs.forward(graph, inputs)
    rows, positions = [], []
    for index, (node, output) in enumerate(zip(graph, outputs, strict=True)):
        if not node.is_convolution:
            positions.append(None)
            rows.append(output)
            continue
        images, height, width, units = output.shape
        shape, bounds = (images, num_positions, 2), jnp.array([height, width])
        drawn = jax.random.randint(jax.random.fold_in(key, index), shape, 0, bounds)
        positions.append(drawn)
        rows.append(_at(output, drawn).reshape(-1, units))
    first = None
    if not graph[0].is_convolution:
        first = Products(_gram(inputs), _times(inputs, rows[0]))
    return Fit(arranged(graph, inputs), targets, tuple(rows), tuple(positions), first)


def _gram(features: Float[Array, "rows features"]) -> Float[Array, "coefficients coefficients"]:
    """Products of the features, and 1, with one another."""
    ones = jnp.ones((len(features), 1))
    column = _times(features, ones)
    return jnp.concatenate([jnp.concatenate([features.T @ features, column[:-1].T]), column], 1)


def _times(
    features: Float[Array, "rows features"], outputs: Float[Array, "rows outputs"]
) -> Float[Array, "coefficients outputs"]:
    """Products of the features, and 1, with outputs."""
    return jnp.concatenate([features.T @ outputs, outputs.sum(0)[None]])


def _at(maps: Float[Array, "images height width units"], positions: Array) -> Array:
    """The maps (images, positions, units) at some pixels of each image."""
    each = jnp.arange(len(maps))[:, None]
    return maps[each, positions[..., 0], positions[..., 1]]


def rows_of(node: Node, source: Array, positions: Array | None) -> Rows:
    """What each output of a node is computed from: a row for each image or position, with `block`
    numbers of each unit of its source."""
    if positions is None:
        return source.reshape(len(source), node.block, -1)
    size = node.weight.shape[2]
    half, channels = size // 2, source.shape[-1]
    padded = jnp.pad(source, ((0, 0), (half, half), (half, half), (0, 0)))

    def window(image: Array, corner: Array):
        start = (corner[0], corner[1], 0)
        return jax.lax.dynamic_slice(image, start, (size, size, channels))

    windows = jax.vmap(jax.vmap(window, (None, 0)))(padded, positions * node.stride)
    return windows.reshape(-1, size * size, channels)


def _coefficients(node: Node) -> Float[Array, "coefficients outputs"]:
    """Weights and biases as a node's rows and 1 are multiplied with them."""
    weight = node.weight.reshape(*node.weight.shape[:2], -1)
    weight = jnp.transpose(weight, (2, 1, 0)).reshape(-1, len(weight))
    return jnp.concatenate([weight, node.bias[None]])


def _with_coefficients(node: Node, coefficients: Float[Array, "coefficients outputs"]) -> Node:
    weight = coefficients[:-1].reshape(node.block, -1, coefficients.shape[1])
    weight = jnp.transpose(weight, (2, 1, 0))
    shape = (*weight.shape[:2], *node.weight.shape[2:])
    return replace(node, weight=weight.reshape(shape), bias=coefficients[-1])


class _LeastSquares(NamedTuple):
    """The fit of one layer; coefficients are those of the features, then the bias."""

    features: Float[Array, "rows features"]
    inside: Bool[Array, "coefficients"]  # False for padding
    added: Float[Array, "rows outputs"] | float  # by other nodes
    gram: Float[Array, "coefficients coefficients"]
    factor: Float[Array, "coefficients coefficients"]  # Cholesky's, of `gram` with a ridge

    def output(self, coefficients: Array) -> Float[Array, "rows outputs"]:
        """What the layer computes."""
        return self.features @ coefficients[:-1] + coefficients[-1] + self.added

    def cross(self, wanted: Array) -> Float[Array, "coefficients outputs"]:
        """The products of the features with what is wanted of the layer itself."""
        return _times(self.features, wanted - self.added)

    def nearest(self, cross: Array, coefficients: Array) -> Float[Array, "coefficients outputs"]:
        """The best coefficients for some `cross`, the ridge drawing them to `coefficients`."""
        right = jnp.where(self.inside[:, None], cross - self.gram @ coefficients, 0.0)
        return coefficients + jax.scipy.linalg.cho_solve((self.factor, True), right)


def _factor(gram: Array, inside: Array, ridge: float | Scalar) -> Array:
    """The Cholesky factor of a Gram matrix with a ridge, of the identity in padding."""
    diagonal = jnp.diagonal(gram)
    mean = jnp.sum(diagonal, where=inside) / inside.sum()
    gram = jnp.where(inside[:, None] & inside, gram, 0.0)
    return jnp.linalg.cholesky(gram + jnp.diag(jnp.where(inside, ridge * mean, 1.0)))


def _between(node: Node, before: Kept, after: Kept) -> Node:
    """A node between the kept units, 0 in padding."""
    weight = node.weight[after.places][:, before.places]
    inside = after.inside[:, None] & before.inside
    inside = inside.reshape(*inside.shape, *[1] * (weight.ndim - 2))
    bias = jnp.where(after.inside, node.bias[after.places], 0.0)
    return replace(node, weight=jnp.where(inside, weight, 0.0), bias=bias)


def refit(
    graph: Graph,
    kept: Sequence[Kept],
    fit: Fit,
    ridge: float | Scalar,
    relu_rounds: int = 0,
    label_rounds: int = 0,
) -> Graph:
    """The graph between the kept units, its layers fitted; padding has weights and biases of 0.

    kept: for each group but that of the logits. ridge: > 0, the penalty of the distance from the
    parent's weights, in units of the mean square of what they are multiplied with. relu_rounds:
    times that targets below 0 are replaced by the output where that is below 0, too, since a ReLU
    makes them equal (Zhang et al. 2015). label_rounds: see the module; 0 uses no label.
    """
    group, kept = graphs.groups(graph), _with_logits(graph, kept)
    values, nodes = [taken(fit.inputs, kept[0])], []
    for index, node in enumerate(graph):
        before, after = kept[group[node.source]], kept[group[index + 1]]
        node, source = _between(node, before, after), values[node.source]
        added = 0.0 if node.add is None else values[node.add]
        wanted = jnp.where(after.inside, fit.outputs[index][:, after.places], 0.0)
        problem = _problem(node, index, source, added, before, fit, ridge)
        if node.source == 0 and fit.first is not None:
            cross = fit.first.cross[jnp.append(before.places, -1)][:, after.places]
            cross = jnp.where(after.inside, cross, 0.0)
        else:
            cross = problem.cross(wanted)
        parents = _coefficients(node)
        coefficients = problem.nearest(cross, parents)
        for _ in range(relu_rounds if node.relu else 0):
            output = problem.output(coefficients)
            below = jnp.where(wanted < 0, jnp.minimum(output, 0.0), wanted)
            coefficients = problem.nearest(problem.cross(below), parents)
        if label_rounds and index == len(graph) - 1:
            coefficients = _towards_labels(problem, coefficients, fit.targets, label_rounds)
        node = _with_coefficients(node, coefficients)
        if node.is_convolution:
            output = graphs.preactivation(node, source, added)
        else:
            output = problem.output(coefficients)
        nodes.append(node)
        values.append(graphs.activation(node, output))
    return tuple(nodes)


def _with_logits(graph: Graph, kept: Sequence[Kept]) -> list[Kept]:
    classes = len(graph[-1].bias)
    return [*kept, Kept(jnp.arange(classes, dtype=jnp.int32), jnp.ones(classes, bool))]


def _towards_labels(
    problem: _LeastSquares, coefficients: Array, targets: Probabilities, rounds: int
) -> Float[Array, "features classes"]:
    """The coefficients of logits after some rounds of the fit to labels."""

    def round_of(_: Array, coefficients: Array):
        residual = 2 * (targets - jax.nn.softmax(problem.output(coefficients)))
        right = jnp.where(problem.inside[:, None], _times(problem.features, residual), 0.0)
        return coefficients + jax.scipy.linalg.cho_solve((problem.factor, True), right)

    return jax.lax.fori_loop(0, rounds, round_of, coefficients)


def _problem(
    node: Node,
    index: int,
    source: Array,
    added: Array | float,
    before: Kept,
    fit: Fit,
    ridge: float | Scalar,
) -> _LeastSquares:
    """The fit of node `index`, cut to the kept units, from the activations that are left."""
    positions = fit.positions[index]
    rows = rows_of(node, source, positions)
    features = rows.reshape(len(rows), -1)
    inside = jnp.append(jnp.tile(before.inside, node.block), True)
    if positions is not None and node.add is not None:
        added = _at(jnp.asarray(added), positions).reshape(len(rows), -1)
    if node.source == 0 and fit.first is not None:
        places = jnp.append(before.places, -1)
        gram = fit.first.gram[places][:, places]
    else:
        gram = _gram(features)
    return _LeastSquares(features, inside, added, gram, _factor(gram, inside, ridge))


def priorities(graph: Graph, fit: Fit, ridge: float | Scalar) -> tuple[Float[Array, "_units"], ...]:
    """How long each unit of each group should stay, the parent's other groups being whole: minus
    the logarithm of its place, from 1, in the order of backward elimination.

    A unit's cost is the increase of the squared error of the layers that read it when they are
    fitted without it, relative to the variance of what they compute and summed over them.
    """
    group = graphs.groups(graph)
    inputs = fit.inputs.T if fit.inputs.ndim == 2 else fit.inputs
    _, values = graphs.forward(graph, inputs)
    readers: dict[int, list[tuple[Array, Array]]] = {}
    for index, node in enumerate(graph):
        rows = rows_of(node, values[node.source], fit.positions[index])
        outputs = fit.outputs[index]
        if node.add is not None:  # what the node itself contributes
            coefficients = _coefficients(node)
            outputs = rows.reshape(len(rows), -1) @ coefficients[:-1] + coefficients[-1]
        readers.setdefault(group[node.source], []).append(_covariances(rows, outputs, ridge))
    orders = (_elimination(readers[each]) for each in range(len(graphs.group_sizes(graph))))
    return tuple(
        jnp.zeros(len(order)).at[order].set(-jnp.log1p(jnp.arange(len(order))[::-1]))
        for order in orders
    )


def _covariances(
    rows: Rows, outputs: Float[Array, "rows outputs"], ridge: float | Scalar
) -> tuple[Float[Array, "units block units block"], Float[Array, "units block outputs"]]:
    """The inverse covariance of a layer's inputs, with a ridge, and the weights that are fitted to
    outputs of variance 1 in all."""
    count, block, units = rows.shape
    features = jnp.swapaxes(rows, 1, 2).reshape(count, -1)
    features, outputs = features - features.mean(0), outputs - outputs.mean(0)
    outputs = outputs / jnp.sqrt(jnp.square(outputs).sum())
    gram = features.T @ features
    mean = jnp.square(rows).sum() / features.shape[1]
    inverse = jnp.linalg.inv(gram + ridge * mean * jnp.eye(len(gram)))
    weights = (inverse @ (features.T @ outputs)).reshape(units, block, -1)
    return inverse.reshape(units, block, units, block), weights


def _elimination(readers: Sequence[tuple[Array, Array]]) -> Int32[Array, "units"]:
    """The units, the first to go first."""
    units = jnp.arange(readers[0][0].shape[0])

    def remove(step: Array, carry: Any):
        left, order, readers = carry
        costs = [
            jnp.sum(weights * jnp.linalg.solve(inverse[units, :, units], weights), (1, 2))
            for inverse, weights in readers
        ]
        unit = jnp.where(left, sum(costs), jnp.inf).argmin()
        readers = [_without(unit, *reader) for reader in readers]
        return left.at[unit].set(False), order.at[step].set(unit), readers

    start = jnp.ones(len(units), bool), jnp.zeros(len(units), jnp.int32), [*readers]
    return jax.lax.fori_loop(0, len(units), remove, start)[1]


def _without(unit: Array, inverse: Array, weights: Array) -> tuple[Array, Array]:
    """The inverse covariance and the weights of the inputs but those of one unit. Both change by
    multiples of the unit's own rows, which become those of the identity and 0."""
    block, own = inverse.shape[1], inverse[unit]  # (block, units, block)
    factor = jnp.linalg.solve(own[:, unit], own.reshape(block, -1)).reshape(own.shape)
    weights = weights - jnp.einsum("aub,ao->ubo", factor, weights[unit])
    inverse = inverse - jnp.einsum("aub,avc->ubvc", factor, own)
    inverse = inverse.at[unit].set(0.0).at[:, :, unit].set(0.0)
    return inverse.at[unit, :, unit].set(jnp.eye(block)), weights.at[unit].set(0.0)
