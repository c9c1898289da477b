"""The steps of a run, or of several runs that differ in their keys alone, as one program."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import psutil
import yaml
from jax.sharding import NamedSharding, PartitionSpec

from evojax_suite.runtime.resources import memory_maps_used
from evojax_suite.types import AnyAlgorithm, Array, Kept, PRNGKey, PyTree


def compiler_options(**options: str | bool | int) -> dict[str, Any]:
    """The options of XLA with the values that XLA_FLAGS sets, where it sets them."""
    flags = [flag.partition("=") for flag in os.environ.get("XLA_FLAGS", "").split()]
    given = {name: yaml.safe_load(value) for name, _, value in flags}
    return {name: given.get(f"--{name}", value) for name, value in options.items()}


COMPILED_QUICKLY = compiler_options(xla_backend_optimization_level=2)
"""The options of programs that run once, or whose convolutions take the time. On the CPU a program
that draws a network's weights is compiled in a quarter of the time that level 3 takes, and draws
the same bits."""


class ProgramTooLarge(ValueError):
    """A program needs more memory than is free."""


def check_fits(num_bytes: float, what: str) -> None:
    """Raises ProgramTooLarge, one line, if `what` needs more memory than is free."""
    if num_bytes > (free := free_bytes()):
        gib = 2**30
        raise ProgramTooLarge(
            f"{what} needs {num_bytes / gib:,.1f} GiB and {free / gib:,.1f} GiB are free: fewer "
            "members, or fewer members in flight, need less"
        )


def check_compiled(program: jax.stages.Compiled, num_devices: int = 1) -> None:
    """Raises ProgramTooLarge if a call of `program`, on that many devices of this process, needs
    more memory than is free."""
    if memory := program.memory_analysis():
        new = memory.output_size_in_bytes - memory.alias_size_in_bytes
        sharing = num_devices if jax.default_backend() == "cpu" else 1
        check_fits(sharing * (memory.temp_size_in_bytes + new), "a step")


def free_bytes() -> float:
    """Returns the free memory of the device, or of the machine if the device does not tell."""
    stats = jax.local_devices()[0].memory_stats() or {}
    if "bytes_limit" in stats:
        return stats["bytes_limit"] - stats["bytes_in_use"]
    return psutil.virtual_memory().available


def forget_programs(most: float = 0.5) -> None:
    """Empties JAX's caches where this process has more than the fraction `most` of its memory maps:
    without any left the next compilation fails. Call it where no value is traced."""
    if memory_maps_used() > most:
        jax.clear_caches()


def _mapped(function: Callable[..., PyTree], num_runs: int, shared: int) -> Callable[..., PyTree]:
    """Returns `function` of the values of one run as a function of arrays whose leading axis is of
    `num_runs` runs, which returns such arrays; all share the last `shared` arguments."""

    def mapped(*args: PyTree):
        if num_runs > 1:
            in_axes = (0,) * (len(args) - shared) + (None,) * shared
            return jax.vmap(function, in_axes)(*args)
        own = jax.tree.map(lambda leaf: leaf[0], args[:-shared])
        return jax.tree.map(lambda leaf: jnp.asarray(leaf)[None], function(*own, *args[-shared:]))

    return mapped


class _OnOneDevice:
    """Takes runs through a program of tuples that have a value for each: one run as it is, several
    mapped over."""

    def __init__(self, num_runs: int):
        self._num_runs = num_runs

    def map(self, function: Callable[..., PyTree], shared: int) -> Callable[..., PyTree]:
        """Returns `function` of the values of one run as a function of what `join` makes of those
        of all; `split` takes what it returns. All runs share the last `shared` arguments."""
        if self._num_runs == 1:
            return lambda *args: (function(*(one for (one,) in args[:-shared]), *args[-shared:]),)
        mapped = _mapped(function, self._num_runs, shared)

        def of_tuples(*args: PyTree):
            each = [jax.tree.map(lambda *leaves: jnp.stack(leaves), *arg) for arg in args[:-shared]]
            outputs = mapped(*each, *args[-shared:])
            return tuple(
                jax.tree.map(lambda leaf, i=i: leaf[i], outputs) for i in range(self._num_runs)
            )

        return of_tuples

    def join(self, each: Sequence[PyTree]) -> PyTree:
        return tuple(each)

    def split(self, outputs: PyTree) -> list[PyTree]:
        return list(outputs)

    def everywhere(self, shared: PyTree) -> PyTree:
        """Returns what all runs share where the program finds it."""
        return shared

    def gather(self, each: Sequence[PyTree]) -> Sequence[PyTree]:
        """Returns the values of all runs on one device."""
        return each


_AXIS = "runs"


class _OverDevices:
    """Takes runs through a program of arrays whose leading axis is of the runs, and divided over
    some devices: each has as many, and they exchange nothing. Methods are those of `_OnOneDevice`.
    """

    def __init__(self, num_runs: int, num_devices: int):
        self._on_each = num_runs // num_devices
        self._devices = jax.local_devices()[:num_devices]
        self._mesh = jax.make_mesh((num_devices,), (_AXIS,), devices=self._devices)
        self._divided = NamedSharding(self._mesh, PartitionSpec(_AXIS))
        self._replicated = NamedSharding(self._mesh, PartitionSpec())

    def map(self, function: Callable[..., PyTree], shared: int) -> Callable[..., PyTree]:
        mapped = _mapped(function, self._on_each, shared)
        divided, everywhere = self._divided.spec, self._replicated.spec

        def over_devices(*args: PyTree):
            specs = *[divided] * (len(args) - shared), *[everywhere] * shared
            placed = jax.shard_map(
                mapped, mesh=self._mesh, in_specs=specs, out_specs=divided, check_vma=False
            )
            return placed(*args)

        return over_devices

    def join(self, each: Sequence[PyTree]) -> PyTree:
        def join_leaves(*leaves: Any) -> Array:
            parts = []
            for place, device in enumerate(self._devices):
                own = leaves[place * self._on_each : (place + 1) * self._on_each]
                parts.append(jnp.stack(jax.device_put(own, device)))
            shape = (len(leaves), *parts[0].shape[1:])
            return jax.make_array_from_single_device_arrays(shape, self._divided, parts)

        return jax.tree.map(join_leaves, *each)

    def split(self, outputs: PyTree) -> list[PyTree]:
        def split_leaf(leaf: Array) -> list[Array]:
            on = {shard.device: shard.data for shard in leaf.addressable_shards}
            return [one for device in self._devices for one in on[device]]

        leaves, structure = jax.tree.flatten(outputs)
        return [structure.unflatten(own) for own in zip(*map(split_leaf, leaves), strict=True)]

    def everywhere(self, shared: PyTree) -> PyTree:
        return jax.device_put(shared, self._replicated)

    def gather(self, each: Sequence[PyTree]) -> Sequence[PyTree]:
        return jax.device_put(list(each), self._devices[0])


class Program:
    """The steps of R runs of `algorithm`, compiled at the first call of `advance`, on one device or
    divided over several. A scannable one does up to `steps_per_call` steps in a call, whose number
    is traced, so that the last call of a run compiles nothing; the states are donated to it.
    Another does one step of one run."""

    def __init__(
        self,
        algorithm: AnyAlgorithm,
        keys: Sequence[PRNGKey],
        params: PyTree,
        data: PyTree,
        steps_per_call: int = 1,
        num_devices: int = 1,
    ):
        """keys: one for each of the R runs. num_devices: the most over which several runs are
        divided; it is as many as divide R."""
        if len(keys) > 1 and not algorithm.scannable:
            raise ValueError(f"{len(keys)} runs in one program need a scannable algorithm")
        self.algorithm = algorithm
        self.steps_per_call = steps_per_call if algorithm.scannable else 1
        self._num_runs = len(keys)
        self._num_devices = max(n for n in range(1, num_devices + 1) if len(keys) % n == 0)
        divided = self._num_devices > 1
        self._runs = (
            _OverDevices(len(keys), self._num_devices) if divided else _OnOneDevice(len(keys))
        )
        self._params, self._data = self._runs.everywhere((params, data))
        self._keys_init, self._keys_steps = zip(*map(jax.random.split, keys), strict=True)
        self._compiled: Callable[..., Any] | None = None
        self._finished = jax.jit(algorithm.finished) if algorithm.scannable else algorithm.finished

    def initial_states(self) -> list[PyTree]:
        """Returns the initial state of each run. Raises ProgramTooLarge before memory is taken."""
        init = self._runs.map(self.algorithm.init, 2)
        arguments = self._runs.join(self._keys_init), self._params, self._data
        if self.algorithm.scannable or self.algorithm.generation:
            leaves = jax.tree.leaves(jax.eval_shape(init, *arguments))
            sizes = (leaf.size * leaf.dtype.itemsize for leaf in leaves)
            check_fits(sum(sizes), "the population")
            init = jax.jit(init, compiler_options=COMPILED_QUICKLY)
        return self._runs.split(jax.block_until_ready(init(*arguments)))

    def finished(self, states: Sequence[PyTree]) -> np.ndarray:
        """Returns whether further steps would change nothing, (R,)."""
        return np.array([bool(self._finished(state)) for state in states])

    def gathered(self, states: Sequence[PyTree]) -> Sequence[PyTree]:
        """Returns the states on one device, for what follows."""
        return self._runs.gather(states)

    def advance(
        self,
        states: Sequence[PyTree],
        first: int,
        count: int,
        going: np.ndarray,
        kept: Kept | None = None,
    ) -> tuple[list[PyTree], list[dict[str, Any]], float, float]:
        """Do the steps `first` to `first + count` of the runs that are `going` (R,); the states of
        the others stay as they are. Raises ProgramTooLarge before the first call.

        kept: for an algorithm whose step evaluates in groups.

        Returns the state of each run, the metrics of each run, arrays whose leading axis is that of
        the steps, the seconds without compilation and those of compilation.
        """
        start = time.perf_counter()
        if self.algorithm.scannable:
            of_runs = self._keys_steps, states, tuple(going)
            each = *map(self._runs.join, of_runs), np.int32(first), np.int32(count)
        else:
            each = jax.random.fold_in(self._keys_steps[0], first), states[0]
        arguments = *each, self._params, self._data
        compile_seconds = 0.0
        if self._compiled is None:
            compile_start = time.perf_counter()
            forget_programs()
            self._compiled = self._compile(arguments)
            compile_seconds = time.perf_counter() - compile_start
        more = {"kept": kept} if kept and self.algorithm.in_groups else {}
        outputs = self._compiled(*arguments, **more)
        if self.algorithm.scannable:
            outputs = self._runs.split(outputs)
        else:
            state, metrics = outputs
            outputs = [(state, jax.tree.map(lambda leaf: np.asarray(leaf)[None], metrics))]
        new_states, metrics = zip(*outputs, strict=True)
        metrics = [metrics._asdict() for metrics in jax.device_get(metrics)]
        seconds = time.perf_counter() - start - compile_seconds
        return list(new_states), metrics, seconds, compile_seconds

    def _compile(self, arguments: tuple[Any, ...]) -> Callable[..., Any]:
        algorithm = self.algorithm
        if not algorithm.scannable:
            return algorithm.compiled(*arguments) if algorithm.compiled else algorithm.step
        steps = jax.jit(self._runs.map(self._steps, 4), donate_argnums=1)
        compiled = steps.lower(*arguments).compile(algorithm.compiler_options)
        check_compiled(compiled, self._num_devices)
        return compiled

    def _steps(
        self,
        key: PRNGKey,
        state: PyTree,
        going: Array,
        first: Array,
        count: Array,
        params: PyTree,
        data: PyTree,
    ) -> tuple[PyTree, PyTree]:
        """Returns the state of one run after `count` steps, and the metrics of the steps, whose
        leading axis is `steps_per_call`."""

        def one(state: PyTree, index: Array) -> tuple[PyTree, PyTree]:
            step_key = jax.random.fold_in(key, index)
            after, metrics = self.algorithm.step(step_key, state, params, data)
            if self._num_runs > 1:
                after = jax.tree.map(lambda new, old: jnp.where(going, new, old), after, state)
            return after, metrics

        def body(i: Array, carry: PyTree) -> tuple[PyTree, PyTree]:
            state, metrics = one(carry[0], first + i)
            return state, jax.tree.map(lambda all, new: all.at[i].set(new), carry[1], metrics)

        shapes = jax.eval_shape(one, state, first)[1]
        empty = jax.tree.map(lambda m: jnp.zeros((self.steps_per_call, *m.shape), m.dtype), shapes)
        return jax.lax.fori_loop(0, count, body, (state, empty))
