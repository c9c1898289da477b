"""The seconds of a pruned network, from measurements of its layers, as a size to search for.

Each layer of the parent is timed with some numbers of inputs and outputs, and what lies between is
interpolated: the look-up tables of NetAdapt (Yang et al. 2018, "Fast Resource Consumption
Estimation"). Layers of equal shape are timed once.
"""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jax.experimental import multihost_utils
from jaxtyping import Float, Num

from evojax_suite.runtime.results import write_json
from evojax_suite.systems.ecomp import graph as graphs
from evojax_suite.systems.ecomp.graph import Graph, Node
from evojax_suite.types import Array

_SHARES = 1 / 16, 1 / 8, 1 / 4, 1 / 2, 3 / 4, 1
"""Shares of a layer's inputs and outputs at which it is timed."""
_LEAST_SECONDS, _LEAST_CALLS = 0.02, 5  # of a measurement, whose fastest call counts


@struct.dataclass
class Table:
    """The seconds of a layer by its numbers of inputs and outputs."""

    inputs: Float[Array, "inputs"]
    outputs: Float[Array, "outputs"]
    seconds: Float[Array, "inputs outputs"]


def timed(function: Any, *arguments: Any) -> float:
    """The seconds of the fastest of some calls, compilation not counted."""
    compiled, fastest = jax.jit(function).lower(*arguments).compile(), np.inf
    start, calls = time.perf_counter(), 0
    while calls < _LEAST_CALLS or time.perf_counter() - start < _LEAST_SECONDS:
        before = time.perf_counter()
        jax.block_until_ready(compiled(*arguments))
        fastest = min(fastest, time.perf_counter() - before)
        calls += 1
    return fastest


def measured_whole(graph: Graph, image_shape: Sequence[int], num_images: int) -> float:
    """Returns the seconds of a whole network for a batch of `num_images`, of `image_shape` (height,
    width, channels) where it begins with a convolution."""
    flat = (graph[0].weight.shape[1],)  # the inputs that are left
    shape = image_shape if graph[0].is_convolution else flat
    inputs = graphs.blank_inputs(graph, shape, num_images)
    network = jax.tree.map(jnp.asarray, graph)
    return timed(lambda *arguments: graphs.forward(*arguments)[0][-1], network, inputs)


def measured(
    graph: Graph, image_shape: Sequence[int], num_images: int, path: Path | None = None
) -> tuple[Table, ...]:
    """A table for each node, then for each two of `graph.pairs` as one, of batches of `num_images`.

    image_shape: (height, width, channels). path: the file of the seconds, which is read where it
    exists and written elsewhere, so that a run that goes on has the numbers of its start.
    """
    outputs, values = jax.eval_shape(
        lambda: graphs.forward(graph, graphs.blank_inputs(graph, image_shape, num_images))
    )
    stored = json.loads(path.read_text()) if path and path.exists() else None
    known: dict[Any, np.ndarray] = {}
    tables = []
    nodes = [*zip(graph, outputs, strict=True)]
    nodes += [
        (graphs.joined(graph[first], graph[second]), outputs[second])
        for first, second in graphs.pairs(graph).items()
    ]
    for index, (node, output) in enumerate(nodes):
        source, added = values[node.source], node.add is not None
        # The first node keeps the channels of the images, the last one the classes.
        fixed = node.source == 0 and node.is_convolution, index == len(graph) - 1
        counts = [
            _counts(size, whole)
            for size, whole in zip((node.weight.shape[1], len(node.bias)), fixed, strict=True)
        ]
        like = source.shape, node.weight.shape, added, node.relu, node.pooling, node.stride
        if stored is not None:
            seconds = np.array(stored[index], np.float32)
        else:
            if like not in known:
                known[like] = _seconds(node, source.shape, output.shape, counts, added)
            seconds = multihost_utils.broadcast_one_to_all(known[like])
        tables.append(Table(*(jnp.asarray(each, jnp.float32) for each in (*counts, seconds))))
    if path and stored is None and jax.process_index() == 0:
        write_json(path, [np.asarray(table.seconds).tolist() for table in tables])
    return tuple(tables)


def _counts(size: int, fixed: bool) -> list[int]:
    return [size] if fixed else sorted({max(1, round(share * size)) for share in _SHARES})


def _seconds(
    node: Node,
    source: tuple[int, ...],
    output: tuple[int, ...],
    counts: Sequence[Sequence[int]],
    added: bool,
) -> Float[np.ndarray, "inputs outputs"]:
    """The seconds of a node, which grow with its inputs and outputs whatever the noise."""

    def layer(node: Node, source: Array, other: Array) -> Array:
        return graphs.activation(node, graphs.preactivation(node, source, other))

    seconds = np.zeros([len(each) for each in counts], np.float32)
    for row, inputs in enumerate(counts[0]):
        for column, outputs in enumerate(counts[1]):
            weight = jnp.asarray(node.weight)[:outputs, :inputs]
            part = replace(node, weight=weight, bias=jnp.asarray(node.bias)[:outputs])
            arguments = jnp.ones((*source[:-1], inputs)), jnp.zeros((*output[:-1], outputs))
            seconds[row, column] = timed(layer, part, arguments[0], arguments[1] if added else 0.0)
    return np.maximum.accumulate(np.maximum.accumulate(seconds, 0), 1)


def seconds_of(
    graph: Graph, tables: Sequence[Table], sizes: Sequence[Any]
) -> Float[Array, "*members"]:
    """The seconds of networks with so many units in each group (`graph.group_sizes`), numbers or
    arrays of members; two layers of `graph.pairs` are one where that is smaller."""
    group, sizes = graphs.groups(graph), [*sizes, len(graph[-1].bias)]

    def between(size: Num[Array, "*members"], grid: Float[Array, "counts"]) -> Array:
        """The weight of each count for sizes, (counts, members)."""
        return jax.vmap(lambda own: jnp.interp(size, grid, own))(jnp.eye(len(grid)))

    def seconds(first: int, last: int, table: Table) -> Array:
        """Those of a layer from the source of node `first` to the units of node `last`."""
        ends = sizes[group[graph[first].source]], sizes[group[last + 1]]
        before, after = (jnp.asarray(end, jnp.float32) for end in ends)
        weights = between(before, table.inputs), between(after, table.outputs)
        return jnp.einsum("i...,o...,io->...", *weights, table.seconds)

    each = [seconds(index, index, table) for index, table in enumerate(tables[: len(graph)])]
    pairs, joins = graphs.pairs(graph).items(), graphs.joins(graph, sizes[:-1])
    for (first, second), table in zip(pairs, tables[len(graph) :], strict=True):
        one = seconds(first, second, table)
        each[first] = joins[first] * one + (1 - joins[first]) * (each[first] + each[second])
        each[second] = jnp.zeros_like(one)
    return sum(each, jnp.float32(0.0))
