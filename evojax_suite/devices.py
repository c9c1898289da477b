"""A population over several devices, of one process or of many.

The evaluation of members is divided: each device works on its own members in a program without
collectives, and what it found is gathered on the host. The rest of a step is the same small program
in every process. So no device waits for another inside a program, which on virtual CPU devices can
deadlock, and a device more or less changes no result but by the order of sums.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from dataclasses import replace
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import NamedSharding, PartitionSpec

from evojax_suite.types import Algorithm, Array, Divided, PyTree

_AXIS = "population"
_HEARTBEAT_SECONDS = 20
HOW_TO_GO_ON = "the same commands with --resume go on, with any number of processes"


class ProcessLost(Exception):
    """Another process of a run is gone, or does not answer."""


def join(coordinator: str | None, num_processes: int | None, process_id: int | None) -> None:
    """Become one of the processes of a run, before anything is computed: as the arguments say
    (coordinator: host:port of process 0), or as SLURM, Open MPI or Kubernetes tell JAX.

    Raises ValueError where nothing tells, ProcessLost where the others do not come.
    """
    try:
        jax.distributed.initialize(
            coordinator, num_processes, process_id, heartbeat_timeout_seconds=_HEARTBEAT_SECONDS
        )
    except ValueError as error:
        raise ValueError(
            "distributed needs coordinator, num_processes and process_id where no cluster tells "
            f"them: {error}"
        ) from None
    except jax.errors.JaxRuntimeError as error:
        raise ProcessLost(str(error).splitlines()[0]) from None


def is_first() -> bool:
    """Whether this process is the one that writes."""
    return jax.process_index() == 0


@contextlib.contextmanager
def _together():
    try:
        yield
    except (jax.errors.JaxRuntimeError, ValueError) as error:  # JAX raises either
        raise ProcessLost(str(error).splitlines()[0]) from None


def gathered(tree: PyTree) -> PyTree:
    """The arrays of all processes on the host, with a leading axis for the process."""
    with _together():
        return multihost_utils.process_allgather(tree)


def any_process(flag: bool) -> bool:
    """Whether `flag` is true in any process."""
    return bool(gathered(np.array([flag])).any()) if jax.process_count() > 1 else flag


def from_first(tree: PyTree) -> PyTree:
    """The arrays of process 0, in every process."""
    if jax.process_count() == 1:
        return tree
    with _together():
        return jax.tree.map(jnp.asarray, multihost_utils.broadcast_one_to_all(tree))


def take(devices: int | Literal["all"]) -> int:
    """How many of this process's devices to use, of those that are asked for. On a CPU so many are
    made of it, if nothing was computed before.

    Raises ValueError where there are fewer.
    """
    if devices != "all" and devices > 1:
        with contextlib.suppress(RuntimeError):  # too late: there are as many as there are
            jax.config.update("jax_num_cpu_devices", devices)
    present = jax.local_device_count()
    if devices == "all":
        return present
    if not 1 <= devices <= present:
        raise ValueError(f"devices must be in 1..{present} here, or all, got {devices}")
    return devices


def evaluator(divided: Divided, num_devices: int) -> Callable[..., PyTree]:
    """`divided.evaluate` of the whole population, without its `members`, on `num_devices` devices
    of each process; returns arrays on the host."""
    num_processes, process = jax.process_count(), jax.process_index()
    size = divided.population_size
    if num_devices * num_processes == 1:
        everyone = jnp.arange(size)
        alone = jax.jit(lambda *arguments: divided.evaluate(*arguments, everyone))
        return lambda *arguments: jax.device_get(alone(*arguments))
    mesh = jax.make_mesh((num_devices,), (_AXIS,), devices=jax.local_devices()[:num_devices])
    everywhere = NamedSharding(mesh, PartitionSpec())
    count = -(-size // (num_devices * num_processes))  # members of a device

    def of_one_device(keys, state, params, data):
        place = process * num_devices + jax.lax.axis_index(_AXIS)
        # Those beyond the population are its first ones again, and cut off below.
        members = (place * count + jnp.arange(count)) % size
        return divided.evaluate(keys, state, params, data, members)

    compiled = jax.jit(
        jax.shard_map(
            of_one_device,
            mesh=mesh,
            in_specs=PartitionSpec(),
            out_specs=PartitionSpec(_AXIS),
            check_vma=False,
        )
    )
    placed: list[Any] = [None, None]  # the data that was sent to the devices, and as it is there

    def evaluate(keys: PyTree, state: PyTree, params: PyTree, data: PyTree) -> PyTree:
        if placed[0] is not data:
            placed[:] = data, jax.device_put(data, everywhere)
        arguments = jax.device_put((keys, state, params), everywhere)
        found = jax.device_get(compiled(*arguments, placed[1]))
        if num_processes > 1:
            found = gathered(found)
            found = jax.tree.map(lambda leaf: leaf.reshape(-1, *leaf.shape[2:]), found)
        return jax.tree.map(lambda leaf: leaf[:size], found)

    return evaluate


def over_devices(algorithm: Algorithm, num_devices: int) -> Algorithm:
    """`algorithm` with its population over `num_devices` devices of each process; itself where
    there is one of one, or where its steps have no population to divide.

    A step is then no longer scannable.
    """
    divided = algorithm.divided
    if num_devices * jax.process_count() == 1 or divided is None:
        return algorithm
    evaluate, advance = evaluator(divided, num_devices), jax.jit(divided.advance)
    keys_of = jax.jit(divided.keys)

    def step(key: Array, state: PyTree, params: PyTree, data: PyTree):
        keys_evaluate, keys_advance = keys_of(key)
        found = evaluate(keys_evaluate, state, params, data)
        return advance(keys_advance, state, found, params, data)

    return replace(algorithm, init=jax.jit(algorithm.init), step=step, scannable=False)
