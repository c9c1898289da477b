"""A population over several devices, of one process or of many.

The evaluation of the members is divided: each device evaluates some of them in a program without
collectives, and the evaluations are gathered on the host. The rest of a step is the same small
program in every process. So no device waits for another inside a program, which can deadlock on
virtual CPU devices, and the number of devices changes results only by the order of sums.

A population whose evaluation takes longer than some seconds is evaluated in groups, between which
a run may stop and after which it goes on. Their size follows from the work and the kind of device
alone, so that a run that was stopped has the same groups.
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

from evojax_suite.runtime.program import check_compiled
from evojax_suite.runtime.resources import cores
from evojax_suite.types import AnyAlgorithm, AnyGeneration, Array, Kept, PRNGKey, PyTree

Devices: TypeAlias = PositiveInt | Literal["auto", "all"]
"""A number of devices of this process. all: every accelerator, or as many as a CPU has cores for
this process. auto: all, but only one of a CPU that other processes of the run may share."""

_AXIS = "population"
_FIRST = np.int32(0)
_HEARTBEAT_SECONDS = 20
_MOST_ON_A_CPU = 8  # devices that a CPU with fewer cores is made, to try what more would do
# A device does so many, roughly: a core 3e9 of a ConvNet-1 of width 4, 4e10 of a wide one.
_OPERATIONS_A_SECOND = {"cpu": 1e10}
_OF_AN_ACCELERATOR = 5e13
_GROUP_SECONDS = 3
HOW_TO_GO_ON = "the same commands with --resume go on, with any number of processes"


class ProcessLost(Exception):
    """Another process of the run is gone or does not answer."""


def join(coordinator: str | None, num_processes: int | None, process_id: int | None) -> None:
    """Make this process one of those of a run, before anything is computed, as the arguments say
    (coordinator: host:port of process 0) or as SLURM, Open MPI or Kubernetes tell JAX. Raises
    ValueError if neither does, and ProcessLost if the other processes do not come."""
    try:
        jax.distributed.initialize(
            coordinator, num_processes, process_id, heartbeat_timeout_seconds=_HEARTBEAT_SECONDS
        )
    except ValueError as error:
        needed = "coordinator, num_processes and process_id"
        message = f"distributed needs {needed} where no cluster tells them: {error}"
        raise ValueError(message) from None
    except jax.errors.JaxRuntimeError as error:
        raise ProcessLost(str(error).splitlines()[0]) from None


def is_first() -> bool:
    """Returns whether this process is the one that writes."""
    return jax.process_index() == 0


@contextlib.contextmanager
def _together():
    try:
        yield
    except (jax.errors.JaxRuntimeError, ValueError) as error:  # JAX raises either
        raise ProcessLost(str(error).splitlines()[0]) from None


def gathered(tree: PyTree) -> PyTree:
    """Returns the arrays of all processes on the host, with a leading axis for the process."""
    with _together():
        return multihost_utils.process_allgather(tree)


def any_process(flag: bool) -> bool:
    """Returns whether `flag` is true in any process."""
    return bool(gathered(np.array([flag])).any()) if jax.process_count() > 1 else flag


def from_first(tree: PyTree) -> PyTree:
    """Returns the arrays of process 0, in every process."""
    if jax.process_count() == 1:
        return tree
    with _together():
        return jax.tree.map(jnp.asarray, multihost_utils.broadcast_one_to_all(tree))


def take(devices: Devices) -> int:
    """Returns how many devices of this process to use, if `devices` are asked for. A CPU is made
    that many devices, if nothing was computed before; auto and all leave it the number that
    JAX_NUM_CPU_DEVICES or XLA_FLAGS set. Raises ValueError if there are fewer."""
    if isinstance(devices, int):
        wanted = devices
    else:
        alone = devices == "all" or not jax.distributed.is_initialized()
        is_set = "xla_force_host_platform_device_count" in os.environ.get("XLA_FLAGS", "")
        is_set |= jax.config.values["jax_num_cpu_devices"] >= 0
        wanted = cores() if alone and not is_set else 1
    most_on_a_cpu = max(_MOST_ON_A_CPU, os.cpu_count() or 1)
    if 1 < wanted <= most_on_a_cpu:
        with contextlib.suppress(RuntimeError):  # JAX has started: the number of devices is fixed
            jax.config.update("jax_num_cpu_devices", wanted)
    present = jax.local_device_count()
    if isinstance(devices, str):
        return present
    if not 1 <= devices <= present:
        most = most_on_a_cpu if wanted > most_on_a_cpu and present == 1 else present
        raise ValueError(f"devices must be in 1..{most} here, all or auto, got {devices}")
    return devices


def _shares(size: int, num_devices: int) -> tuple[int, int]:
    """Returns how many of `size` members a device evaluates, and how many of the `num_devices` of
    each process evaluate any."""
    num_processes = jax.process_count()
    count = -(-size // (num_devices * num_processes))
    return count, -(-size // (count * num_processes))


def group_size(generation: AnyGeneration, num_devices: int, data: PyTree) -> int:
    """Returns how many members to evaluate at a time on `num_devices` devices of each process: all
    if that is a matter of seconds, or `data` are None, else as many as take some three."""
    if generation.work is None or data is None:
        return generation.population_size
    total = num_devices * jax.process_count()
    speed = total * _OPERATIONS_A_SECOND.get(jax.default_backend(), _OF_AN_ACCELERATOR)
    affordable = _GROUP_SECONDS * speed / generation.work(data)
    if generation.population_size <= 4 * affordable:
        return generation.population_size
    together = generation.members_at_once * total
    return min(generation.population_size, max(1, int(affordable) // together) * together)


class _NothingKept:
    """A step without anything to go on from."""

    def get(self, first: int, end: int, like: PyTree) -> None:
        return None

    def add(self, first: int, end: int, evaluations: PyTree) -> None:
        pass


_NOTHING = _NothingKept()


class _Evaluation(NamedTuple):
    """The evaluation of a population, or of a group of its members, in three parts.

    place: the arguments of `Generation.evaluate` with the first member in place of `members` ->
        those of `program`.
    program: a jitted function, or its compiled form.
    collect: the outputs of `program` -> arrays on the host.
    """

    place: Callable[..., tuple[Any, ...]]
    program: Any
    collect: Callable[[PyTree], PyTree]

    def __call__(self, *arguments: PyTree) -> PyTree:
        return self.collect(self.program(*self.place(*arguments)))


def evaluator(
    evaluate: Callable[..., PyTree],
    population_size: int,
    num_devices: int,
    group_size: int | None = None,
) -> _Evaluation:
    """Returns `evaluate`, as that of `Generation`, of `group_size` members, by default all, on
    `num_devices` devices of each process. Its last argument is the first of these members; past the
    last of the population come the first again. Its results are on the host."""
    num_processes, process = jax.process_count(), jax.process_index()
    size = group_size or population_size
    count, num_devices = _shares(size, num_devices)
    if num_devices * num_processes == 1:

        def alone(key: PyTree, candidates: PyTree, params: PyTree, data: PyTree, first: Array):
            members = (first + jnp.arange(size)) % population_size
            return evaluate(key, candidates, params, data, members)

        return _Evaluation(lambda *arguments: arguments, jax.jit(alone), jax.device_get)
    mesh = jax.make_mesh((num_devices,), (_AXIS,), devices=jax.local_devices()[:num_devices])
    everywhere, divided = PartitionSpec(), PartitionSpec(_AXIS)
    replicated = NamedSharding(mesh, everywhere)

    def on_one_device(key: PyTree, candidates: PyTree, params: PyTree, data: PyTree, first: Array):
        place = process * num_devices + jax.lax.axis_index(_AXIS)
        # Places beyond the group are cut off below.
        members = (first + place * count + jnp.arange(count)) % population_size
        return evaluate(key, candidates, params, data, members)

    mapped = jax.shard_map(
        on_one_device, mesh=mesh, in_specs=everywhere, out_specs=divided, check_vma=False
    )
    placed: list[Any] = [None, None]  # the newest data, and its copy on the devices

    def place(
        key: PyTree, candidates: PyTree, params: PyTree, data: PyTree, first: Array
    ) -> tuple[Any, ...]:
        if placed[0] is not data:
            placed[:] = data, jax.device_put(data, replicated)
        key, candidates, params, first = jax.device_put(
            (key, candidates, params, first), replicated
        )
        return key, candidates, params, placed[1], first

    def collect(outputs: PyTree) -> PyTree:
        outputs = jax.device_get(outputs)
        if num_processes > 1:
            outputs = gathered(outputs)
            outputs = jax.tree.map(lambda leaf: leaf.reshape(-1, *leaf.shape[2:]), outputs)
        return jax.tree.map(lambda leaf: leaf[:size], outputs)

    return _Evaluation(place, jax.jit(mapped), collect)


MemberFunction: TypeAlias = Callable[[PyTree, PyTree], PyTree]
"""members and data -> outputs, arrays whose leading axis is that of the members."""


@functools.lru_cache(maxsize=16)
def _mapped(function: MemberFunction, population_size: int, num_devices: int) -> _Evaluation:
    def evaluate(key: None, candidates: PyTree, params: None, data: PyTree, members: Array):
        del key, params
        return function(jax.tree.map(lambda leaf: leaf[members], candidates), data)

    return evaluator(evaluate, population_size, num_devices)


def map_population(
    function: MemberFunction, members: PyTree, data: PyTree, num_devices: Devices = 1
) -> PyTree:
    """Returns `function(members, data)`, arrays (P, ...) on the host, with the members, arrays
    (P, ...), divided over `num_devices` devices of each process. `function` is pure, of any number
    of members, and compiled once for each shape as long as it is the same object."""
    population_size = jax.tree.leaves(members)[0].shape[0]
    return _mapped(function, population_size, take(num_devices))(None, members, None, data, _FIRST)


def over_devices(algorithm: AnyAlgorithm, num_devices: int, data: PyTree = None) -> AnyAlgorithm:
    """Returns `algorithm` with its population evaluated on `num_devices` devices of each process,
    without devices that would have no members, and in groups where that takes long with `data`; a
    step is then no longer scannable. In one group on one device, or without a population, it is
    `algorithm` itself. A step in groups takes `kept`, a `Kept`, beside its other arguments."""
    generation = algorithm.generation
    if generation is None:
        return algorithm
    population_size = generation.population_size
    size = group_size(generation, num_devices, data)
    _, num_devices = _shares(size, num_devices)
    total, in_groups = num_devices * jax.process_count(), size < population_size
    everyone = np.arange(population_size)
    if total == 1 and not in_groups:
        return algorithm

    @jax.jit
    def ask(key: PRNGKey, state: PyTree, params: PyTree, data: PyTree):
        keys = generation.split_key(key)
        return keys, generation.ask(keys.ask, state, params, data)

    def step_of(
        ask: Callable[..., PyTree],
        evaluate: Callable[..., PyTree],
        tell: Callable[..., PyTree],
        shapes: PyTree = None,
    ):
        def whole(key: PRNGKey, state: PyTree, params: PyTree, data: PyTree):
            keys, candidates = ask(key, state, params, data)
            evaluations = evaluate(keys.evaluate, candidates, params, data, _FIRST)
            return tell(keys.tell, state, candidates, evaluations, params, data)

        def by_groups(
            key: PRNGKey, state: PyTree, params: PyTree, data: PyTree, kept: Kept = _NOTHING
        ):
            keys, candidates = ask(key, state, params, data)
            arguments, groups = (keys.evaluate, candidates, params, data), []
            like = shapes or jax.eval_shape(generation.evaluate, *arguments, everyone)
            for first in range(0, population_size, size):
                end = min(first + size, population_size)
                if (group := kept.get(first, end, like)) is None:
                    group = evaluate(*arguments, np.int32(first))
                    group = jax.tree.map(lambda leaf, n=end - first: leaf[:n], group)
                    kept.add(first, end, group)
                groups.append(group)
            evaluations = jax.tree.map(lambda *leaves: np.concatenate(leaves), *groups)
            return tell(keys.tell, state, candidates, evaluations, params, data)

        return by_groups if in_groups else whole

    evaluate = evaluator(generation.evaluate, population_size, num_devices, size)
    tell = jax.jit(generation.tell)

    def compiled(key: PRNGKey, state: PyTree, params: PyTree, data: PyTree):
        compiled_ask = ask.lower(key, state, params, data).compile()
        keys, candidates = compiled_ask(key, state, params, data)
        arguments = keys.evaluate, candidates, params, data
        program = evaluate.program.lower(*evaluate.place(*arguments, _FIRST)).compile()
        check_compiled(program, num_devices)
        shapes = jax.eval_shape(generation.evaluate, *arguments, everyone)
        compiled_tell = tell.lower(keys.tell, state, candidates, shapes, params, data).compile()
        return step_of(compiled_ask, evaluate._replace(program=program), compiled_tell, shapes)

    init, step = jax.jit(algorithm.init), step_of(ask, evaluate, tell)
    return replace(
        algorithm,
        init=init,
        step=step,
        compiled=compiled,
        scannable=False,
        num_devices=total,
        in_groups=in_groups,
    )
