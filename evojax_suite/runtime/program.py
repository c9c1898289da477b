"""The steps of one run, or of several that differ in their keys alone, as one program."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import psutil

from evojax_suite.types import Algorithm, Array, PyTree


class ProgramTooLarge(Exception):
    """A program of several runs needs more memory than there is."""


class Advance(NamedTuple):
    """What a call of a program brought."""

    states: list[PyTree]  # of each run
    metrics: list[dict[str, Any]]  # of each run, arrays whose leading axis is that of the steps
    seconds: float  # without compilation
    compile_seconds: float


def free_bytes() -> float:
    """The memory that a program may take, of the device where it tells."""
    stats = jax.local_devices()[0].memory_stats() or {}
    if "bytes_limit" in stats:
        return stats["bytes_limit"] - stats["bytes_in_use"]
    return psutil.virtual_memory().available


def _of_runs(function: Callable[..., PyTree], num_runs: int, shared: int) -> Callable[..., tuple]:
    """`function` of the values of one run as a function of tuples, a value for each of `num_runs`
    runs, that returns such a tuple; the last `shared` arguments are the same for all."""
    if num_runs == 1:
        return lambda *of: (function(*(one for (one,) in of[:-shared]), *of[-shared:]),)

    def mapped(*of):
        own = [jax.tree.map(lambda *leaves: jnp.stack(leaves), *each) for each in of[:-shared]]
        in_axes = (0,) * len(own) + (None,) * shared
        found = jax.vmap(function, in_axes)(*own, *of[-shared:])
        return tuple(jax.tree.map(lambda leaf, i=i: leaf[i], found) for i in range(num_runs))

    return mapped


class Program:
    """The steps of R runs of `algorithm`, compiled at the first call of `advance`.

    A scannable algorithm does up to `steps_per_call` steps in a call, whose number is traced, so
    that the last call of a run compiles none; the states are donated to it. An algorithm that is
    not scannable does one step of one run.
    """

    def __init__(
        self,
        algorithm: Algorithm,
        keys: Sequence[Array],
        params: PyTree,
        data: PyTree,
        steps_per_call: int = 1,
    ):
        """keys: of the R runs."""
        self.algorithm = algorithm
        self.steps_per_call = steps_per_call if algorithm.scannable else 1
        self._num_runs = len(keys)
        self._params, self._data = params, data
        self._keys_init, self._keys_steps = zip(*map(jax.random.split, keys), strict=True)
        self._compiled: Callable[..., Any] | None = None
        finished = algorithm.finished
        self._finished = jax.jit(finished) if algorithm.scannable else finished
        if self._num_runs > 1 and not algorithm.scannable:
            raise ValueError(f"{self._num_runs} runs in one program need a scannable algorithm")

    def initial_states(self) -> list[PyTree]:
        """The state that each run begins with."""
        init = _of_runs(self.algorithm.init, self._num_runs, 2)
        init = jax.jit(init) if self.algorithm.scannable else init
        return list(jax.block_until_ready(init(self._keys_init, self._params, self._data)))

    def finished(self, states: Sequence[PyTree]) -> np.ndarray:
        """Whether further steps would change nothing, (R,)."""
        return np.array([bool(self._finished(state)) for state in states])

    def advance(
        self, states: Sequence[PyTree], first: int, count: int, going: np.ndarray
    ) -> Advance:
        """Do the steps `first` to `first + count` of the runs that are `going` (R,); the others
        stay as they are. Raises ProgramTooLarge before the first call of several runs."""
        advance = self._scanned if self.algorithm.scannable else self._stepped
        start = time.perf_counter()
        found, compile_seconds = advance(states, first, count, going)
        own = [state for state, _ in found]
        metrics = [metrics._asdict() for metrics in jax.device_get([m for _, m in found])]
        seconds = time.perf_counter() - start - compile_seconds
        return Advance(own, metrics, seconds, compile_seconds)

    def _stepped(self, states, first, count, going):
        del count, going
        key = jax.random.fold_in(self._keys_steps[0], first)
        arguments = (key, states[0], self._params, self._data)
        seconds = 0.0
        if self._compiled is None:
            start = time.perf_counter()
            compiled = self.algorithm.compiled
            self._compiled = compiled(*arguments) if compiled else self.algorithm.step
            seconds = time.perf_counter() - start
        state, metrics = self._compiled(*arguments)
        return [(state, jax.tree.map(lambda leaf: np.asarray(leaf)[None], metrics))], seconds

    def _scanned(self, states, first, count, going):
        own = (self._keys_steps, tuple(states), tuple(going))
        arguments = (*own, np.int32(first), np.int32(count), self._params, self._data)
        seconds = 0.0
        if self._compiled is None:
            start = time.perf_counter()
            steps = jax.jit(_of_runs(self._steps, self._num_runs, 4), donate_argnums=1)
            self._compiled = steps.lower(*arguments).compile(self.algorithm.compiler_options)
            seconds = time.perf_counter() - start
            memory = self._compiled.memory_analysis() if self._num_runs > 1 else None
            if memory:
                new = memory.output_size_in_bytes - memory.alias_size_in_bytes
                if memory.temp_size_in_bytes + new > free_bytes():
                    raise ProgramTooLarge
        return self._compiled(*arguments), seconds

    def _steps(self, key, state, going, first, count, params, data):
        """`count` steps of one run, and their metrics (steps_per_call, ...)."""

        def one(state, index):
            after, metrics = self.algorithm.step(
                jax.random.fold_in(key, index), state, params, data
            )
            if self._num_runs > 1:
                after = jax.tree.map(lambda new, old: jnp.where(going, new, old), after, state)
            return after, metrics

        def body(i, carry):
            state, metrics = one(carry[0], first + i)
            return state, jax.tree.map(lambda all, new: all.at[i].set(new), carry[1], metrics)

        empty = jax.tree.map(
            lambda leaf: jnp.zeros((self.steps_per_call, *leaf.shape), leaf.dtype),
            jax.eval_shape(one, state, first)[1],
        )
        return jax.lax.fori_loop(0, count, body, (state, empty))
