"""Feed-forward networks as graphs of layers, and the units of which each can lose some.

A graph is a tuple of nodes in the order in which they are computed. Value 0 is the input; node i
computes value i + 1, the last one the logits. Units that an addition brings together, such as the
channels along the skips of a residual network, are one group: they stay or go together.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal, TypeAlias, cast

import jax
import jax.numpy as jnp
import numpy as np
import safetensors
import safetensors.numpy
from flax import struct
from jaxtyping import Float
from pydantic import NonNegativeInt, PositiveInt

from evojax_suite.configuration import from_json
from evojax_suite.networks.layers import pool
from evojax_suite.runtime.results import write_atomically
from evojax_suite.systems.ecomp import feed_forward
from evojax_suite.systems.ecomp.feed_forward import Network
from evojax_suite.types import Array

Pooling = Literal["none", "average", "max", "global"]
"""What follows a convolution: nothing, a pooling over 2x2 pixels, or the mean over all pixels."""

Values: TypeAlias = list[Array]


@struct.dataclass
class Node:
    """A layer: a convolution of odd size, padded so that a stride of 1 keeps the maps' size, or a
    fully connected one."""

    weight: Float[Array | np.ndarray, "outputs inputs ..."]
    """(outputs, inputs, height, width) of a convolution, (outputs, inputs) or, on the maps of a
    convolution, (outputs, filters, pixels) of a fully connected layer."""
    bias: Float[Array | np.ndarray, "outputs"]
    source: NonNegativeInt = struct.field(pytree_node=False)
    """The value that it takes."""
    add: NonNegativeInt | None = struct.field(pytree_node=False, default=None)
    """The value that is added to its output, before the ReLU."""
    relu: bool = struct.field(pytree_node=False, default=True)
    pooling: Pooling = struct.field(pytree_node=False, default="none")
    stride: PositiveInt = struct.field(pytree_node=False, default=1)

    @property
    def is_convolution(self) -> bool:
        """Whether it is a convolution."""
        return self.weight.ndim == 4

    @property
    def block(self) -> int:
        """How many weights of each output belong to one unit of its input."""
        return math.prod(self.weight.shape[2:])


Graph: TypeAlias = tuple[Node, ...]


def from_network(network: Network, pooling: feed_forward.Pooling = "average") -> Graph:
    """The graph of a chain of layers, ReLU between them, `pooling` after each convolution."""
    return tuple(
        Node(
            weight,
            bias,
            source=index,
            relu=index < len(network) - 1,
            pooling=pooling if weight.ndim == 4 else "none",
        )
        for index, (weight, bias) in enumerate(network)
    )


def as_graph(network: Network | Graph, pooling: feed_forward.Pooling) -> Graph:
    """A parent as a graph; pooling: of a chain, see `from_network`."""
    if isinstance(network[0], Node):
        return cast(Graph, network)
    return from_network(cast(Network, network), pooling)


def groups(graph: Graph) -> tuple[int, ...]:
    """The group of each value's units, numbered from 0, which is that of the input; the last one is
    that of the logits."""
    group = [*range(len(graph) + 1)]
    for index, node in enumerate(graph):
        if node.add is not None:
            old, new = group[index + 1], group[node.add]
            group = [new if each == old else each for each in group]
    names = {one: number for number, one in enumerate(dict.fromkeys(group))}
    return tuple(names[one] for one in group)


def group_sizes(graph: Graph) -> tuple[int, ...]:
    """The units of each group but the logits': of the input, its numbers or channels."""
    sizes = {0: graph[0].weight.shape[1]}
    for node, group in zip(graph, groups(graph)[1:], strict=True):
        sizes[group] = node.bias.shape[0]
    return tuple(sizes[group] for group in sorted(sizes))[:-1]


def preactivation(node: Node, source: Array, added: Array | float = 0.0) -> Array:
    """The output of a node before ReLU and pooling: (N, units), or maps (N, H, W, units)."""
    if node.is_convolution:
        size = node.weight.shape[2]
        padding = [(size // 2, size // 2)] * 2
        kernel, strides = jnp.transpose(node.weight, (2, 3, 1, 0)), (node.stride, node.stride)
        output = jax.lax.conv_general_dilated(
            source, kernel, strides, padding, dimension_numbers=("NHWC", "HWIO", "NHWC")
        )
        return output + node.bias + added
    weight = node.weight
    if weight.ndim == 3:  # pixels of maps, and filters, as one axis
        weight = jnp.swapaxes(weight, 1, 2).reshape(len(weight), -1)
    return source.reshape(source.shape[0], -1) @ weight.T + node.bias + added


def activation(node: Node, output: Array) -> Array:
    """ReLU and pooling of a node's output."""
    values = jnp.maximum(output, 0.0) if node.relu else output
    match node.pooling:
        case "none":
            return values
        case "global":
            return values.mean((1, 2))
        case kind:
            return pool(kind, values)


def forward(graph: Graph, inputs: Float[Array, "images ..."]) -> tuple[Values, Values]:
    """The preactivations of each node, and the values: the input, then that of each node."""
    outputs, values = [], [inputs]
    for node in graph:
        added = 0.0 if node.add is None else values[node.add]
        outputs.append(preactivation(node, values[node.source], added))
        values.append(activation(node, outputs[-1]))
    return outputs, values


def num_parameters(graph: Graph, sizes: Sequence[Any]) -> Any:
    """Weights and biases of the graph with so many units in each group (`group_sizes`), numbers or
    arrays of one shape."""
    return _weights(graph, sizes, [1] * len(graph), biases=1)


def num_multiplications(graph: Graph, sizes: Sequence[Any], image_shape: Sequence[int]) -> Any:
    """Multiplications of one image of `image_shape` (height, width, channels)."""
    outputs = jax.eval_shape(lambda: forward(graph, blank_inputs(graph, image_shape))[0])
    return _weights(graph, sizes, [math.prod(each.shape[1:-1]) for each in outputs], biases=0)


def blank_inputs(graph: Graph, image_shape: Sequence[int], num_images: int = 1) -> Array:
    """Zeros as the graph takes images of `image_shape` (height, width, channels)."""
    flat = (math.prod(image_shape),)
    return jnp.zeros((num_images, *(image_shape if graph[0].is_convolution else flat)))


def _weights(graph: Graph, sizes: Sequence[Any], times: Sequence[int], biases: int) -> Any:
    group, sizes = groups(graph), [*sizes, graph[-1].bias.shape[0]]
    total, second, as_ones = 0, pairs(graph), joins(graph, sizes[:-1])
    for index, (node, often) in enumerate(zip(graph, times, strict=True)):
        inputs = sizes[group[node.source]] * node.block
        units = sizes[group[index + 1]]
        weights = (inputs + biases) * units
        if index in second:  # the two as one where that is no larger
            after = sizes[group[second[index] + 1]]
            one, apart = (inputs + biases) * after, weights + (units + biases) * after
            weights = as_ones[index] * one + (1 - as_ones[index]) * apart
        elif index in second.values():
            continue
        total = total + weights * often
    return total


def joins(graph: Graph, sizes: Sequence[Any]) -> dict[int, Any]:
    """For the first node of each two of `pairs`, whether one layer in their place has no more
    weights, biases left out; 0 or 1. sizes: units of each group, numbers or arrays of one shape."""
    group, sizes, found = groups(graph), [*sizes, graph[-1].bias.shape[0]], {}
    for first, second in pairs(graph).items():
        inputs = sizes[group[graph[first].source]] * graph[first].block
        between, outputs = (sizes[group[node + 1]] for node in (first, second))
        found[first] = 1 * (inputs * outputs <= between * (inputs + outputs))
    return found


def pairs(graph: Graph) -> dict[int, int]:
    """Nodes, without ReLU or pooling, that only one other reads, pixel by pixel, by that other: the
    two are one linear layer, of a rank of at most the units between them (see `decomposed`)."""
    readers: dict[int, list[int]] = {}
    for index, node in enumerate(graph):
        for value in (node.source, node.add):
            readers.setdefault(-1 if value is None else value, []).append(index)

    def follows(index: int) -> bool:
        first, (second, *others) = graph[index], readers[index + 1]
        after = graph[second]
        plain = not first.relu and first.pooling == "none" and first.add is None
        return plain and not others and after.add != index + 1 and after.block == after.stride == 1

    found: dict[int, int] = {}
    for index in range(len(graph) - 1):
        if index not in found.values() and follows(index):
            found[index] = readers[index + 1][0]
    return found


def ranks(graph: Graph, sizes: Sequence[int]) -> list[int | None]:
    """The units between each two of `pairs`, None where they are one layer (`as_one`)."""
    group = groups(graph)
    return [
        None if is_one else sizes[group[index + 1]] for index, is_one in joins(graph, sizes).items()
    ]


def groups_between(graph: Graph) -> frozenset[int]:
    """The groups of the units between each two of `pairs`."""
    group = groups(graph)
    return frozenset(group[index + 1] for index in pairs(graph))


def decomposed(graph: Graph, inputs: Float[Array, "images ..."]) -> Graph:
    """The same network, each layer but the last as two: one that computes the principal components
    of what it adds to its output on some images, the largest variance first, and one that takes
    them back.

    To remove components lowers the rank of a layer, as in Zhang, Zou, He & Sun 2015 ("Accelerating
    Very Deep Convolutional Networks for Classification and Detection", section 3.1).
    """
    _, values = forward(graph, inputs)
    nodes: list[Node] = []
    for node in graph[:-1]:
        rows = preactivation(node, values[node.source])
        rows = rows.reshape(-1, rows.shape[-1])
        mean = rows.mean(0)
        centred = rows - mean
        directions = jnp.linalg.eigh(centred.T @ centred)[1][:, ::-1]
        weight = jnp.tensordot(directions, node.weight, (0, 0))
        bias = directions.T @ (node.bias - mean)
        plain: dict[str, Any] = {"relu": False, "pooling": "none", "add": None}
        nodes.append(replace(node, weight=weight, bias=bias, source=2 * node.source, **plain))
        back = directions[:, :, None, None] if node.is_convolution else directions
        add = None if node.add is None else 2 * node.add
        source = {"source": len(nodes), "add": add, "stride": 1}
        nodes.append(replace(node, weight=back, bias=mean, **source))
    return (*nodes, replace(graph[-1], source=2 * graph[-1].source))


def joined(first: Node, second: Node) -> Node:
    """Two nodes of `pairs` as one; it takes the first one's source."""
    back = jnp.asarray(second.weight).reshape(len(second.weight), -1)
    weight, bias = jnp.tensordot(back, first.weight, 1), second.bias + back @ first.bias
    return replace(second, weight=weight, bias=bias, source=first.source, stride=first.stride)


def as_one(graph: Graph) -> Graph:
    """The same network, each two of `pairs` as one layer where that is no larger."""
    is_one = joins(graph, group_sizes(graph))
    first_of = {after: index for index, after in pairs(graph).items() if is_one[index]}
    value, nodes = {0: 0}, []
    for index, node in enumerate(graph):
        if is_one.get(index):
            continue
        if (first := first_of.get(index)) is not None:
            node = jax.device_get(joined(graph[first], node))
        add = None if node.add is None else value[node.add]
        nodes.append(replace(node, source=value[node.source], add=add))
        value[index + 1] = len(nodes)
    return tuple(nodes)


def part(graph: Graph, kept: Sequence[Array | np.ndarray | slice]) -> Graph:
    """The graph between some units of each group: their places, or a slice."""
    group, everything = groups(graph), [*kept, slice(None)]
    return tuple(
        replace(
            node,
            weight=node.weight[everything[group[index + 1]]][:, everything[group[node.source]]],
            bias=node.bias[everything[group[index + 1]]],
        )
        for index, node in enumerate(graph)
    )


def arrays_of(graph: Graph) -> dict[str, np.ndarray]:
    """Weights and biases as PyTorch has them, `layers.<node>.weight` and `.bias`."""
    return feed_forward.arrays_of((node.weight, node.bias) for node in graph)


def description(graph: Graph) -> list[dict[str, Any]]:
    """What the arrays do not say of each node, as JSON."""
    return [{name: getattr(node, name) for name in _DESCRIBED} for node in graph]


_DESCRIBED = "source", "add", "relu", "pooling", "stride"


def save(path: Path, graph: Graph) -> None:
    """Write a graph as safetensors; its description is the metadatum `nodes`, as JSON."""
    metadata = {"nodes": json.dumps(description(graph))}
    write_atomically(path, safetensors.numpy.save(arrays_of(graph), metadata))


def from_arrays(
    arrays: Mapping[str, np.ndarray], nodes: Sequence[dict[str, Any]], inputs: Sequence[int]
) -> Graph:
    """The graph of which arrays and nodes are those of `arrays_of` and `description`. inputs: the
    shape of an input, (height, width, channels) or (numbers,). Raises ValueError, one line, where
    they do not fit each other."""
    graph: Graph = ()
    values = [jax.ShapeDtypeStruct((1, *inputs), jnp.float32)]
    for index, about in enumerate(nodes):
        try:
            names = (f"layers.{index}.{name}" for name in ("weight", "bias"))
            weight, bias = (feed_forward.finite(name, arrays[name]) for name in names)
            if weight.ndim not in (2, 4) or not weight.size or bias.shape != weight.shape[:1]:
                raise ValueError(f"weights of {weight.shape} and biases of {bias.shape}")
            if not all(size % 2 for size in weight.shape[2:]):
                raise ValueError(f"a kernel of {weight.shape[2:]}, allowed: odd sizes")
            node = Node(weight, bias, **from_json(Node, about, _DESCRIBED))
            source = values[node.source]
            if weight.ndim == 2 and len(source.shape) == 4:  # filter by filter, as PyTorch flattens
                node = replace(node, weight=weight.reshape(len(weight), source.shape[-1], -1))
            output = jax.eval_shape(preactivation, node, source)
            if node.add is not None and output.shape != values[node.add].shape:
                raise ValueError(f"{output.shape[1:]} and {values[node.add].shape[1:]} are added")
            values.append(jax.eval_shape(activation, node, output))
        except KeyError as error:
            raise ValueError(f"node {index}: {error} is missing") from None
        except (IndexError, OverflowError, TypeError, ValueError) as error:
            reason = str(error).splitlines()[0]
            raise ValueError(f"node {index} does not fit the nodes before it: {reason}") from None
        graph = (*graph, node)
    if not graph or len(arrays) != 2 * len(graph) or len(values[-1].shape) != 2:
        raise ValueError(f"{len(graph)} nodes and {len(arrays)} arrays lead to no logits")
    return graph


def load(
    path: Path,
    image_shape: tuple[int, int, int],
    num_classes: int,
    num_inputs: int | None = None,
) -> Graph | None:
    """The graph of a file that `save` wrote; None where it has no `nodes`. image_shape: of what a
    convolution takes; num_inputs: of a fully connected first layer, all pixels by default. Raises
    ValueError or OSError, one line that names the file."""
    if not path.is_file():
        raise FileNotFoundError(f"no file {path}")
    try:
        with safetensors.safe_open(path, "numpy") as file:
            nodes = (file.metadata() or {}).get("nodes")
            arrays = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        if nodes is None:
            return None
        is_convolution = arrays.get("layers.0.weight", np.zeros(())).ndim == 4
        flat = (math.prod(image_shape) if num_inputs is None else num_inputs,)
        graph = from_arrays(arrays, json.loads(nodes), image_shape if is_convolution else flat)
        if len(graph[-1].bias) != num_classes:
            raise ValueError(f"{len(graph[-1].bias)} classes, the dataset has {num_classes}")
        return graph
    except (ValueError, TypeError, RecursionError, safetensors.SafetensorError) as error:
        raise ValueError(f"{path}: {' '.join(str(error).splitlines())}") from None
