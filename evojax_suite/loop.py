"""Drive an algorithm step by step: progress, metrics, checkpoints, resume, stop on a signal.

A run is a function of its key: step g uses `fold_in(run_key, g)` and the state alone, so a run that
was killed and goes on from its last checkpoint writes what it would have written without.
"""

from __future__ import annotations

import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np

from evojax_suite import devices
from evojax_suite.checkpoint import Checkpoints
from evojax_suite.results import Lines, read_lines
from evojax_suite.types import Algorithm, Array, PyTree


class Interrupted(Exception):
    """A signal asked the run to stop; its state is saved."""

    def __init__(self, signal_number: int, step: int):
        super().__init__(f"stopped by {signal.Signals(signal_number).name} after step {step}")
        self.signal_number = signal_number
        self.step = step


@dataclass(frozen=True)
class Report:
    """What the loop tells after each call: the newest metrics and how it goes."""

    step: int
    num_steps: int
    metrics: dict[str, float]
    seconds_per_step: float
    rows: list[dict[str, float]]  # metrics of each step of the call, the newest last


@dataclass(frozen=True)
class Outcome:
    """The end of a run. Seconds add up over all its sessions."""

    state: PyTree
    seconds: float  # in steps, compilation not counted
    compile_seconds: float
    num_failed: int  # evaluations that were NaN or infinite, over all steps
    stage_seconds: dict[str, float]  # where an algorithm times its stages, their share of seconds


@contextmanager
def _stop_signals() -> Iterator[list[int]]:
    """Collect SIGINT and SIGTERM; a second one acts as usual."""
    received: list[int] = []
    before = {}

    def receive(number, frame):
        del frame
        received.append(number)
        signal.signal(number, before[number])

    try:
        for number in (signal.SIGINT, signal.SIGTERM):
            before[number] = signal.signal(number, receive)
    except ValueError:  # not the main thread: a script that brings its own signals
        before.clear()
    try:
        yield received
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def run(
    algorithm: Algorithm,
    key: Array,
    params: PyTree,
    data: PyTree,
    num_steps: int,
    directory: Path,
    *,
    steps_per_call: int = 1,
    checkpoint_seconds: float = 30.0,
    num_devices: int | Literal["all"] = 1,
    on_report: Callable[[Report], None] = lambda report: None,
) -> Outcome:
    """Run `algorithm` for `num_steps` steps in `directory`, going on from its last checkpoint.

    `steps_per_call` steps run in one compiled call where the algorithm is scannable; it is not
    where its population is over several devices (`num_devices` of each process). Writes
    metrics.jsonl (deterministic), timing.jsonl and checkpoints/ below `directory`. Raises
    Interrupted, after saving, on SIGINT and SIGTERM.
    """
    algorithm = devices.over_devices(algorithm, devices.take(num_devices))
    key_init, key_steps = jax.random.split(key)
    directory.mkdir(parents=True, exist_ok=True)
    checkpoints = Checkpoints(directory / "checkpoints")
    start = time.perf_counter()
    init = jax.jit(algorithm.init) if algorithm.scannable else algorithm.init
    state = jax.block_until_ready(init(key_init, params, data))
    compile_seconds = time.perf_counter() - start

    done, state = devices.from_first(checkpoints.newest(state))
    done = int(done)
    metrics_file = Lines(directory / "metrics.jsonl", done)
    timing_file = Lines(directory / "timing.jsonl", done)

    def advance(key_steps, state, first, count, params, data):
        """`count` steps, at most `steps_per_call`: traced, so that the last call compiles none."""

        def one(state, index):
            return algorithm.step(jax.random.fold_in(key_steps, index), state, params, data)

        def body(i, carry):
            state, metrics = one(carry[0], first + i)
            return state, jax.tree.map(lambda all, new: all.at[i].set(new), carry[1], metrics)

        empty = jax.tree.map(
            lambda leaf: jnp.zeros((steps_per_call, *leaf.shape), leaf.dtype),
            jax.eval_shape(one, state, first)[1],
        )
        return jax.lax.fori_loop(0, count, body, (state, empty))

    compiled = None

    def call(state, first, count):
        nonlocal compiled
        if not algorithm.scannable:
            step_key = jax.random.fold_in(key_steps, first)
            state, metrics = algorithm.step(step_key, state, params, data)
            return state, jax.tree.map(lambda leaf: np.asarray(leaf)[None], metrics), 0.0
        arguments = (key_steps, state, np.int32(first), np.int32(count), params, data)
        seconds = 0.0
        if compiled is None:
            start = time.perf_counter()
            lowered = jax.jit(advance, donate_argnums=1).lower(*arguments)
            compiled = lowered.compile(algorithm.compiler_options)
            seconds = time.perf_counter() - start
        return *compiled(*arguments), seconds

    saved, saved_at = done, time.perf_counter()
    last_compile = compile_seconds
    try:
        with _stop_signals() as signals:
            while done < num_steps and not bool(algorithm.finished(state)):
                length = min(steps_per_call, num_steps - done) if algorithm.scannable else 1
                start = time.perf_counter()
                state, metrics, seconds_compiling = call(state, done, length)
                metrics = jax.device_get(metrics)
                seconds = time.perf_counter() - start - seconds_compiling
                values = metrics._asdict()
                # Times are no part of metrics.jsonl, which is deterministic.
                stages = values.pop("stage_seconds", {})
                rows = [
                    {name: value[i].item() for name, value in values.items()} for i in range(length)
                ]
                done += length
                metrics_file.write(rows)
                timing = {"generation": done, "steps": length, "seconds": seconds}
                timing["compile_seconds"] = last_compile + seconds_compiling
                timing |= {"stages": {name: float(value[0]) for name, value in stages.items()}}
                last_compile = 0.0
                timing_file.write([timing])
                on_report(Report(done, num_steps, rows[-1], seconds / length, rows))
                stopped = devices.any_process(bool(signals))
                if stopped or time.perf_counter() - saved_at >= checkpoint_seconds:
                    _save(checkpoints, done, state, metrics_file, timing_file)
                    saved, saved_at = done, time.perf_counter()
                if stopped:
                    raise Interrupted(signals[0] if signals else signal.SIGTERM, done)
            if saved < done:
                _save(checkpoints, done, state, metrics_file, timing_file)
    finally:
        checkpoints.close()
        metrics_file.close()
        timing_file.close()
    timings = read_lines(directory / "timing.jsonl")
    stage_seconds: dict[str, float] = {}
    for line in timings:
        for name, value in line.get("stages", {}).items():
            stage_seconds[name] = stage_seconds.get(name, 0.0) + value
    return Outcome(
        state=state,
        seconds=sum(line["seconds"] for line in timings),
        compile_seconds=sum(line["compile_seconds"] for line in timings),
        num_failed=sum(
            line.get("num_failed", 0) for line in read_lines(directory / "metrics.jsonl")
        ),
        stage_seconds=stage_seconds,
    )


def _save(checkpoints, step, state, *files) -> None:
    """Lines first: what a checkpoint counts as done must be on disk before it."""
    for file in files:
        file.sync()
    checkpoints.save(step, state)
