"""Drive an algorithm step by step: progress, metrics, checkpoints, resume, stop on a signal.

A run is a function of its key: step g uses `fold_in(run_key, g)` and the state alone, so a run that
was killed and goes on from its last checkpoint writes what it would have written without. Runs that
differ in the key alone may go on in one program; each has its own directory all the same.
"""

from __future__ import annotations

import signal
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import psutil

from evojax_suite.runtime import devices
from evojax_suite.runtime.checkpoint import Checkpoints
from evojax_suite.runtime.results import Lines, read_lines
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


class _TooLarge(Exception):
    """A program of several runs needs more memory than there is."""


class _Files:
    """What a run keeps below its directory, and how far it is."""

    def __init__(self, directory: Path, num_devices: int):
        directory.mkdir(parents=True, exist_ok=True)
        self._directory, self._num_devices = directory, num_devices
        self._checkpoints = Checkpoints(directory / "checkpoints")

    def restored(self, initial: PyTree) -> PyTree:
        """The state to go on from; to be called once, before all else."""
        done, state = devices.from_first(self._checkpoints.newest(initial))
        self.done = self._saved = int(done)
        self._metrics = Lines(self._directory / "metrics.jsonl", self.done)
        self._timing = Lines(self._directory / "timing.jsonl", self.done)
        return state

    def other_devices(self) -> str | None:
        """What a user should know where the steps so far were done on another number of devices."""
        timings = read_lines(self._directory / "timing.jsonl")
        before = timings[-1].get("devices") if timings else None
        if before in (None, self._num_devices):
            return None
        return (
            f"{self._directory} goes on from step {self.done} over another number of devices, "
            f"{self._num_devices} in place of {before}: what follows may differ by rounding"
        )

    def write(self, metrics: dict, count: int, seconds: float, compile_seconds: float) -> list:
        """`count` further steps; metrics: arrays whose leading axis is that of the steps. Returns a
        row for each."""
        # Times are no part of metrics.jsonl, which is deterministic.
        stages = metrics.pop("stage_seconds", {})
        rows = [{name: value[i].item() for name, value in metrics.items()} for i in range(count)]
        self.done += count
        self._metrics.write(rows)
        timing = {"generation": self.done, "steps": count, "seconds": seconds}
        timing["compile_seconds"] = compile_seconds
        timing["devices"] = self._num_devices
        timing["stages"] = {name: float(value[0]) for name, value in stages.items()}
        self._timing.write([timing])
        return rows

    def save(self, state: PyTree) -> None:
        """Lines first: what a checkpoint counts as done must be on disk before it."""
        if self._saved < self.done:
            self._metrics.sync()
            self._timing.sync()
            self._checkpoints.save(self.done, state)
            self._saved = self.done

    def close(self) -> None:
        """Wait until everything is on disk."""
        self._checkpoints.close()
        self._metrics.close()
        self._timing.close()

    def outcome(self, state: PyTree) -> Outcome:
        """Outcome of the run, whose files are closed."""
        timings = read_lines(self._directory / "timing.jsonl")
        stage_seconds: dict[str, float] = {}
        for line in timings:
            for name, value in line.get("stages", {}).items():
                stage_seconds[name] = stage_seconds.get(name, 0.0) + value
        return Outcome(
            state=state,
            seconds=sum(line["seconds"] for line in timings),
            compile_seconds=sum(line["compile_seconds"] for line in timings),
            num_failed=sum(
                line.get("num_failed", 0) for line in read_lines(self._directory / "metrics.jsonl")
            ),
            stage_seconds=stage_seconds,
        )


def _free_bytes() -> float:
    """Memory that a program may take, of the device where it tells."""
    stats = jax.local_devices()[0].memory_stats() or {}
    if "bytes_limit" in stats:
        return stats["bytes_limit"] - stats["bytes_in_use"]
    return psutil.virtual_memory().available


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
    num_devices: devices.Devices = 1,
    on_report: Callable[[Report], None] = lambda report: None,
    on_note: Callable[[str], None] = lambda text: None,
) -> Outcome:
    """Run `algorithm` for `num_steps` steps in `directory`, going on from its last checkpoint.

    `steps_per_call` steps run in one compiled call where the algorithm is scannable; it is not
    where its population is over several devices (`num_devices` of each process). Writes
    metrics.jsonl (deterministic), timing.jsonl and checkpoints/ below `directory`. `on_note` gets
    a sentence where the run goes on with its population over another number of devices. Raises
    Interrupted, after saving, on SIGINT and SIGTERM.
    """
    algorithm = devices.over_devices(algorithm, devices.take(num_devices))
    (outcome,) = _run(
        algorithm,
        key[None],
        params,
        data,
        num_steps,
        [directory],
        steps_per_call,
        checkpoint_seconds,
        lambda reports: on_report(reports[0]),
        on_note,
    )
    return outcome


def run_together(
    algorithm: Algorithm,
    keys: Array,
    params: PyTree,
    data: PyTree,
    num_steps: int,
    directories: Sequence[Path],
    *,
    steps_per_call: int = 1,
    checkpoint_seconds: float = 30.0,
    on_report: Callable[[Mapping[int, Report]], None] = lambda reports: None,
    on_note: Callable[[str], None] = lambda text: None,
) -> list[Outcome]:
    """`run` with each of `keys` (R,) in one of R `directories`, all in one program on one device:
    a run may be begun or gone on with alone as well, and its numbers differ by rounding.

    algorithm: a scannable one. `on_report` gets the reports of the runs that went on, by their
    places. Where the memory does not suffice, one half of the runs follows the other. The seconds
    of a run are its share of the program's.
    """
    settings = (steps_per_call, checkpoint_seconds, on_report, on_note)
    outcomes = None
    try:
        outcomes = _run(algorithm, keys, params, data, num_steps, directories, *settings)
    except _TooLarge:
        pass
    except jax.errors.JaxRuntimeError as error:
        if len(directories) == 1 or "RESOURCE_EXHAUSTED" not in str(error):
            raise
    if outcomes is not None:
        return outcomes
    # Here the arrays of the attempt are gone; what it has saved is not.
    half = len(directories) // 2
    return [
        outcome
        for part in (slice(half), slice(half, None))
        for outcome in run_together(
            algorithm,
            keys[part],
            params,
            data,
            num_steps,
            directories[part],
            steps_per_call=steps_per_call,
            checkpoint_seconds=checkpoint_seconds,
            on_report=lambda reports, first=part.start or 0: on_report(
                {first + place: report for place, report in reports.items()}
            ),
            on_note=on_note,
        )
    ]


def _run(
    algorithm: Algorithm,
    keys: Array,
    params: PyTree,
    data: PyTree,
    num_steps: int,
    directories: Sequence[Path],
    steps_per_call: int,
    checkpoint_seconds: float,
    on_report: Callable[[Mapping[int, Report]], None],
    on_note: Callable[[str], None],
) -> list[Outcome]:
    """The runs of R keys, in arrays with a leading axis where R > 1."""
    several = len(directories) > 1
    init, step, finished = algorithm.init, algorithm.step, algorithm.finished
    fold_in = jax.random.fold_in
    if several:
        init, step = jax.vmap(init, (0, None, None)), jax.vmap(step, (0, 0, None, None))
        finished, fold_in = jax.vmap(finished), jax.vmap(fold_in, (0, None))
        keys = jax.vmap(jax.random.split)(keys)
        key_init, key_steps = keys[:, 0], keys[:, 1]
    else:
        key_init, key_steps = jax.random.split(keys[0])

    def parts(tree: PyTree) -> list[PyTree]:
        """The part of each run in `tree`."""
        if not several:
            return [tree]
        return [jax.tree.map(lambda leaf, i=i: leaf[i], tree) for i in range(len(directories))]

    start = time.perf_counter()
    state = (jax.jit(init) if algorithm.scannable else init)(key_init, params, data)
    state = jax.block_until_ready(state)
    init_seconds = time.perf_counter() - start

    def advance(key_steps, state, first, count, going, params, data):
        """`count` steps, at most `steps_per_call`: traced, so that the last call compiles none.
        going: (R,) bool, where there are several runs: the others stay as they are."""

        def one(state, index):
            after, metrics = step(fold_in(key_steps, index), state, params, data)
            if several:
                after = jax.vmap(lambda g, new, old: jax.tree.map(partial(jnp.where, g), new, old))(
                    going, after, state
                )
            return after, metrics

        def body(i, carry):
            state, metrics = one(carry[0], first + i)
            return state, jax.tree.map(lambda all, new: all.at[i].set(new), carry[1], metrics)

        empty = jax.tree.map(
            lambda leaf: jnp.zeros((steps_per_call, *leaf.shape), leaf.dtype),
            jax.eval_shape(one, state, first)[1],
        )
        return jax.lax.fori_loop(0, count, body, (state, empty))

    compiled = None

    def call(state, first, count, going):
        nonlocal compiled
        if not algorithm.scannable:
            arguments = (jax.random.fold_in(key_steps, first), state, params, data)
            seconds = 0.0
            if compiled is None:
                start = time.perf_counter()
                compiled = algorithm.compiled(*arguments) if algorithm.compiled else step
                seconds = time.perf_counter() - start
            state, metrics = compiled(*arguments)
            return state, jax.tree.map(lambda leaf: np.asarray(leaf)[None], metrics), seconds
        arguments = (key_steps, state, np.int32(first), np.int32(count), going, params, data)
        seconds = 0.0
        if compiled is None:
            start = time.perf_counter()
            lowered = jax.jit(advance, donate_argnums=1).lower(*arguments)
            compiled = lowered.compile(algorithm.compiler_options)
            seconds = time.perf_counter() - start
            memory = compiled.memory_analysis() if several else None
            if memory:
                new = memory.output_size_in_bytes - memory.alias_size_in_bytes
                if memory.temp_size_in_bytes + new > _free_bytes():
                    raise _TooLarge
        return *compiled(*arguments), seconds

    with ExitStack() as stack:
        files = [_Files(directory, algorithm.num_devices) for directory in directories]
        states = parts(state)
        for place, file in enumerate(files):
            states[place] = file.restored(states[place])
            stack.callback(file.close)
            note = file.other_devices() if algorithm.divided and file.done < num_steps else None
            if note:
                on_note(note)
        state = jax.tree.map(lambda *leaves: jnp.stack(leaves), *states) if several else states[0]
        del states
        saved_at = time.perf_counter()
        with _stop_signals() as signals:
            while True:
                ended = np.broadcast_to(np.asarray(finished(state)), len(files))
                left = [
                    file.done
                    for file, end in zip(files, ended, strict=True)
                    if file.done < num_steps and not end
                ]
                if not left:
                    break
                # Those that are behind go on alone until they have caught up.
                first = min(left)
                to = min([num_steps, *(done for done in left if done > first)])
                length = min(steps_per_call, to - first) if algorithm.scannable else 1
                going = np.array([file.done == first for file in files]) & ~ended
                share = 1 / going.sum()
                start = time.perf_counter()
                state, metrics, compile_seconds = call(state, first, length, going)
                metrics = jax.device_get(metrics)
                seconds = (time.perf_counter() - start - compile_seconds) * share
                compile_seconds = (compile_seconds + init_seconds) * share
                init_seconds = 0.0
                reports = {}
                for place in np.flatnonzero(going).tolist():
                    values = metrics._asdict()
                    if several:
                        values = {name: value[:, place] for name, value in values.items()}
                    rows = files[place].write(values, length, seconds, compile_seconds)
                    done = first + length
                    reports[place] = Report(done, num_steps, rows[-1], seconds / length, rows)
                on_report(reports)
                stopped = devices.any_process(bool(signals))
                if stopped or time.perf_counter() - saved_at >= checkpoint_seconds:
                    for file, own in zip(files, parts(state), strict=True):
                        file.save(own)
                    saved_at = time.perf_counter()
                if stopped:
                    number = signals[0] if signals else signal.SIGTERM
                    raise Interrupted(number, first + length)
            states = parts(state)
            for file, own in zip(files, states, strict=True):
                file.save(own)
    return [file.outcome(own) for file, own in zip(files, states, strict=True)]
