"""A population over several devices, of one process or of many.

The evaluation of members is divided: each device works on its own members in a program without
collectives, and what it found is gathered on the host. The rest of a step is the same small program
in every process. So no device waits for another inside a program, which on virtual CPU devices can
deadlock, and a device more or less changes no result but by the order of sums.
"""

from __future__ import annotations

import contextlib
import functools
import os
from collections.abc import Callable
from dataclasses import replace
from typing import Any, Literal, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import NamedSharding, PartitionSpec
from pydantic import PositiveInt

from evojax_suite.runtime.resources import cores
from evojax_suite.types import Algorithm, Array, PyTree

Devices: TypeAlias = PositiveInt | Literal["auto", "all"]
"""Number of devices of this process. all: every accelerator, or as many as a CPU has cores for this
process; auto: all, but one of a CPU that other processes of the run may share."""

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


def take(devices: Devices) -> int:
    """How many of this process's devices to use, of those that are asked for. On a CPU so many are
    made of it, if nothing was computed before; auto and all leave it at what JAX_NUM_CPU_DEVICES or
    XLA_FLAGS say.

    Raises ValueError where there are fewer.
    """
    if isinstance(devices, int):
        wanted = devices
    else:
        alone = devices == "all" or not jax.distributed.is_initialized()
        said = "xla_force_host_platform_device_count" in os.environ.get("XLA_FLAGS", "")
        said |= jax.config.values["jax_num_cpu_devices"] >= 0
        wanted = cores() if alone and not said else 1
    if wanted > 1:
        with contextlib.suppress(RuntimeError):  # too late: there are as many as there are
            jax.config.update("jax_num_cpu_devices", wanted)
    present = jax.local_device_count()
    if isinstance(devices, str):
        return present
    if not 1 <= devices <= present:
        raise ValueError(f"devices must be in 1..{present} here, all or auto, got {devices}")
    return devices


def _shares(size: int, num_devices: int) -> tuple[int, int]:
    """How many of `size` members a device has, and how many of the devices of each process have
    any."""
    num_processes = jax.process_count()
    count = -(-size // (num_devices * num_processes))
    return count, -(-size // (count * num_processes))


class _Evaluation(NamedTuple):
    """The evaluation of a whole population, in three parts."""

    place: Callable[..., tuple]
    """The arguments of `Generation.evaluate` without `members` -> those of `program`."""
    program: Any
    """A jitted function, or what is compiled of it."""
    collect: Callable[[PyTree], PyTree]
    """What `program` returned -> arrays on the host."""

    def __call__(self, *arguments: PyTree) -> PyTree:
        return self.collect(self.program(*self.place(*arguments)))


def evaluator(
    evaluate: Callable[..., PyTree], population_size: int, num_devices: int
) -> _Evaluation:
    """`evaluate`, as that of `Generation`, of all `population_size` members, without its argument
    `members`, on `num_devices` devices of each process; it returns arrays on the host."""
    num_processes, process = jax.process_count(), jax.process_index()
    count, num_devices = _shares(population_size, num_devices)
    if num_devices * num_processes == 1:
        everyone = jnp.arange(population_size)
        alone = jax.jit(lambda *arguments: evaluate(*arguments, everyone))
        return _Evaluation(lambda *arguments: arguments, alone, jax.device_get)
    mesh = jax.make_mesh((num_devices,), (_AXIS,), devices=jax.local_devices()[:num_devices])
    everywhere = NamedSharding(mesh, PartitionSpec())

    def of_one_device(key, candidates, params, data):
        place = process * num_devices + jax.lax.axis_index(_AXIS)
        # Those beyond the population are its first ones again, and cut off below.
        members = (place * count + jnp.arange(count)) % population_size
        return evaluate(key, candidates, params, data, members)

    program = jax.jit(
        jax.shard_map(
            of_one_device,
            mesh=mesh,
            in_specs=PartitionSpec(),
            out_specs=PartitionSpec(_AXIS),
            check_vma=False,
        )
    )
    placed: list[Any] = [None, None]  # the data that was sent to the devices, and as it is there

    def place(key: PyTree, candidates: PyTree, params: PyTree, data: PyTree) -> tuple:
        if placed[0] is not data:
            placed[:] = data, jax.device_put(data, everywhere)
        return *jax.device_put((key, candidates, params), everywhere), placed[1]

    def collect(found: PyTree) -> PyTree:
        found = jax.device_get(found)
        if num_processes > 1:
            found = gathered(found)
            found = jax.tree.map(lambda leaf: leaf.reshape(-1, *leaf.shape[2:]), found)
        return jax.tree.map(lambda leaf: leaf[:population_size], found)

    return _Evaluation(place, program, collect)


@functools.lru_cache(maxsize=16)
def _mapped(
    function: Callable[[PyTree, PyTree], PyTree], population_size: int, num_devices: int
) -> Callable[..., PyTree]:
    def evaluate(key: None, candidates: PyTree, params: None, data: PyTree, members: Array):
        del key, params
        return function(jax.tree.map(lambda leaf: leaf[members], candidates), data)

    return evaluator(evaluate, population_size, num_devices)


def map_population(
    function: Callable[[PyTree, PyTree], PyTree],
    members: PyTree,
    data: PyTree,
    num_devices: Devices = 1,
) -> PyTree:
    """`function(some of members, data)` with the members, arrays (P, ...), divided over
    `num_devices` devices of each process. Returns arrays (P, ...) on the host.

    function: pure; what it returns has the leading axis of its members. It is compiled once for
    each shape as long as it is the same object.
    """
    population_size = jax.tree.leaves(members)[0].shape[0]
    return _mapped(function, population_size, take(num_devices))(None, members, None, data)


def over_devices(algorithm: Algorithm, num_devices: int) -> Algorithm:
    """`algorithm` with its population evaluated on `num_devices` devices of each process; itself
    where there is one of one, or where its steps have no population. Devices that would have no
    members are left out.

    A step is then no longer scannable.
    """
    generation = algorithm.generation
    if generation is None:
        return algorithm
    _, num_devices = _shares(generation.population_size, num_devices)
    in_all = num_devices * jax.process_count()
    if in_all == 1:
        return algorithm

    @jax.jit
    def ask(key: Array, state: PyTree, params: PyTree, data: PyTree):
        keys = generation.split_key(key)
        return keys, generation.ask(keys.ask, state, params, data)

    def made_of(ask, evaluate, tell):
        def step(key: Array, state: PyTree, params: PyTree, data: PyTree):
            keys, candidates = ask(key, state, params, data)
            evaluations = evaluate(keys.evaluate, candidates, params, data)
            return tell(keys.tell, state, candidates, evaluations, params, data)

        return step

    evaluate = evaluator(generation.evaluate, generation.population_size, num_devices)
    tell = jax.jit(generation.tell)

    def compiled(key: Array, state: PyTree, params: PyTree, data: PyTree):
        asking = ask.lower(key, state, params, data).compile()
        keys, candidates = asking(key, state, params, data)
        evaluating = evaluate.program.lower(
            *evaluate.place(keys.evaluate, candidates, params, data)
        )
        everyone = jnp.arange(generation.population_size)
        evaluations = jax.eval_shape(
            generation.evaluate, keys.evaluate, candidates, params, data, everyone
        )
        telling = tell.lower(keys.tell, state, candidates, evaluations, params, data)
        evaluation = evaluate._replace(program=evaluating.compile())
        return made_of(asking, evaluation, telling.compile())

    return replace(
        algorithm,
        init=jax.jit(algorithm.init),
        step=made_of(ask, evaluate, tell),
        scannable=False,
        compiled=compiled,
        num_devices=in_all,
    )
