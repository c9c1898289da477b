"""What a sceptic tries before a search: units chosen at once by a simple rule, the network with its
layers fitted anew (`refit.py`) or as it is, and training of what is left by gradients."""

from __future__ import annotations

import bisect
import time
from collections.abc import Callable, Collection

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Bool, Float, Int32

from evojax_suite.systems.ecomp import graph as graphs
from evojax_suite.systems.ecomp.compression import incoming_norms
from evojax_suite.systems.ecomp.graph import Graph
from evojax_suite.types import Array, PRNGKey, PyTree

Scores = tuple[Float[np.ndarray, "_units"], ...]
Mask = tuple[Bool[np.ndarray, "_units"], ...]

_BATCH_SIZE, _LEARNING_RATE = 100, 1e-3  # of the parent's training in the paper


def incoming_l1(graph: Graph) -> Scores:
    """The L1 norm of the weights that lead to each unit of each group; of inputs, of those that
    lead from them."""
    group = graphs.groups(graph)
    scores = [np.zeros(size) for size in graphs.group_sizes(graph)]
    scores[0] += np.abs(graph[0].weight).sum((0, *range(2, graph[0].weight.ndim)))
    for index, node in enumerate(graph[:-1]):
        scores[group[index + 1]] += np.asarray(incoming_norms(node.weight))
    return tuple(scores)


def activity_times_outgoing(graph: Graph, inputs: Float[Array, "images ..."]) -> Scores:
    """The mean magnitude of each unit times the L1 norm of the weights that lead from it."""
    group = graphs.groups(graph)
    _, values = graphs.forward(graph, inputs)
    scores = [np.zeros(size) for size in graphs.group_sizes(graph)]
    for node in graph:
        value = np.abs(np.asarray(values[node.source]))
        outgoing = np.abs(np.asarray(node.weight)).sum((0, *range(2, node.weight.ndim)))
        scores[group[node.source]] += value.reshape(-1, value.shape[-1]).mean(0) * outgoing
    return tuple(scores)


def masks_of(scores: Scores, sizes: tuple[int, ...]) -> Mask:
    """The mask of so many units of the highest scores in each group."""
    return tuple(
        np.argsort(np.argsort(-score, kind="stable"), kind="stable") < size
        for score, size in zip(scores, sizes, strict=True)
    )


def equal_shares(
    whole: tuple[int, ...],
    measure: Callable[[tuple[int, ...]], float],
    most: float,
    untouched: Collection[int] = (),
) -> tuple[int, ...] | None:
    """The largest sizes, the same share of each group but the `untouched` ones, whose `measure`,
    which grows with them, is at most `most`; None where there are none."""

    def sizes_at(step: int):
        return tuple(
            size if group in untouched else max(1, round(size * step / max(whole)))
            for group, size in enumerate(whole)
        )

    steps = range(1, max(whole) + 1)
    count = bisect.bisect_right(steps, most, key=lambda step: measure(sizes_at(step)))
    return sizes_at(count) if count else None


def fine_tuned(
    key: PRNGKey,
    graph: Graph,
    inputs: Float[Array, "images ..."],
    labels: Int32[Array, "images"],
    seconds: float,
) -> tuple[Graph, float]:
    """`graph` trained for some seconds, compilation not counted, by the recipe of the paper's
    parents (Adam 1e-3, batches of 100), and the epochs that it took."""
    optimizer, size = optax.adam(_LEARNING_RATE), min(_BATCH_SIZE, len(labels))
    count = min(20, len(labels) // size)

    @jax.jit
    def steps(key: PRNGKey, network: Graph, state: PyTree, inputs: Array, labels: Array):
        """Does so many steps that a call takes a fraction of a second."""

        def loss(network: Graph, batch: Array):
            logits = graphs.forward(network, inputs[batch])[0][-1]
            return optax.softmax_cross_entropy_with_integer_labels(logits, labels[batch]).mean()

        def step(carry: tuple[PyTree, PyTree], batch: Array) -> tuple[tuple[PyTree, PyTree], None]:
            network, state = carry
            updates, state = optimizer.update(jax.grad(loss)(network, batch), state)
            return (optax.apply_updates(network, updates), state), None

        batches = jax.random.permutation(key, len(labels))[: count * size].reshape(-1, size)
        return jax.lax.scan(step, (network, state), batches)[0]

    network = jax.tree.map(jnp.asarray, graph)
    state, done = optimizer.init(network), 0
    compiled = steps.lower(key, network, state, inputs, labels).compile()
    start = time.perf_counter()
    while time.perf_counter() - start < seconds:
        key_steps = jax.random.fold_in(key, done)
        network, state = compiled(key_steps, network, state, inputs, labels)
        jax.block_until_ready(network)
        done += 1
    return network, done * count * size / len(labels)
