"""Drive an algorithm step by step: metrics, checkpoints, resume, stop on a signal.

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
from pathlib import Path
from typing import NamedTuple

import jax
import numpy as np

from evojax_suite.runtime import devices
from evojax_suite.runtime.program import Program, ProgramTooLarge
from evojax_suite.runtime.run_files import LoopResult, RunFiles
from evojax_suite.types import Algorithm, Array, PyTree

__all__ = ["Interrupted", "LoopResult", "StepReport", "run", "run_together"]


class Interrupted(Exception):
    """A signal asked the run to stop; its state is saved."""

    def __init__(self, signal_number: int, step: int):
        super().__init__(f"stopped by {signal.Signals(signal_number).name} after step {step}")
        self.signal_number = signal_number
        self.step = step


@dataclass(frozen=True)
class StepReport:
    """What the loop tells after each call: the newest metrics and how it goes."""

    step: int
    num_steps: int
    metrics: dict[str, float]
    seconds_per_step: float
    rows: list[dict[str, float]]  # metrics of each step of the call, the newest last


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


class _Turn(NamedTuple):
    """Steps that are done in one call, from `first` on, of the runs that are `going`."""

    first: int
    num_steps: int
    going: np.ndarray  # (R,) bool


def _next_turn(
    done: Sequence[int], finished: np.ndarray, num_steps: int, steps_per_call: int
) -> _Turn | None:
    """The next call for runs that have `done` so many steps, None where nothing is left. Those that
    are behind go on alone until they have caught up."""
    steps = np.array(done)
    left = (steps < num_steps) & ~finished
    if not left.any():
        return None
    first = int(steps[left].min())
    ahead = steps[left & (steps > first)]
    until = min([num_steps, *ahead.tolist()])
    return _Turn(first, min(steps_per_call, until - first), left & (steps == first))


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
    on_report: Callable[[StepReport], None] = lambda report: None,
    on_note: Callable[[str], None] = lambda text: None,
) -> LoopResult:
    """Run `algorithm` for `num_steps` steps in `directory`, going on from its last checkpoint.

    `steps_per_call` steps run in one compiled call where the algorithm is scannable; it is not
    where its population is over several devices (`num_devices` of each process). Writes
    metrics.jsonl (deterministic), timing.jsonl and checkpoints/ below `directory`. `on_note` gets
    a sentence where the run goes on with its population over another number of devices. Raises
    Interrupted, after saving, on SIGINT and SIGTERM.
    """
    algorithm = devices.over_devices(algorithm, devices.take(num_devices))
    program = Program(algorithm, [key], params, data, steps_per_call)
    (result,) = _drive(
        program,
        [directory],
        num_steps,
        checkpoint_seconds,
        lambda reports: on_report(reports[0]),
        on_note,
    )
    return result


def run_together(
    algorithm: Algorithm,
    keys: Sequence[Array] | Array,
    params: PyTree,
    data: PyTree,
    num_steps: int,
    directories: Sequence[Path],
    *,
    steps_per_call: int = 1,
    checkpoint_seconds: float = 30.0,
    on_report: Callable[[Mapping[int, StepReport]], None] = lambda reports: None,
    on_note: Callable[[str], None] = lambda text: None,
) -> list[LoopResult]:
    """`run` with each of `keys` (R,) in one of R `directories`, all in one program on one device:
    a run may be begun or gone on with alone as well, and its numbers differ by rounding.

    algorithm: a scannable one. `on_report` gets the reports of the runs that went on, by their
    places. Where the memory does not suffice, one half of the runs follows the other. The seconds
    of a run are its share of the program's.
    """
    keys = list(keys)
    results = None
    try:
        program = Program(algorithm, keys, params, data, steps_per_call)
        results = _drive(program, directories, num_steps, checkpoint_seconds, on_report, on_note)
    except ProgramTooLarge:
        pass
    except jax.errors.JaxRuntimeError as error:
        if len(keys) == 1 or "RESOURCE_EXHAUSTED" not in str(error):
            raise
    if results is not None:
        return results
    # Here the arrays of the attempt are gone; what it has saved is not.
    half = len(keys) // 2
    return [
        result
        for part in (slice(half), slice(half, None))
        for result in run_together(
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


def _drive(
    program: Program,
    directories: Sequence[Path],
    num_steps: int,
    checkpoint_seconds: float,
    on_report: Callable[[Mapping[int, StepReport]], None],
    on_note: Callable[[str], None],
) -> list[LoopResult]:
    """Do the steps of the runs of `program`, each with its files in one of `directories`."""
    algorithm = program.algorithm
    start = time.perf_counter()
    states = program.initial_states()
    init_seconds = time.perf_counter() - start
    with ExitStack() as stack:
        files = [RunFiles(directory, algorithm.num_devices) for directory in directories]
        for place, file in enumerate(files):
            states[place] = file.restore(states[place])
            stack.callback(file.close)
            note = file.other_devices() if algorithm.generation and file.done < num_steps else None
            if note:
                on_note(note)

        def save() -> None:
            for file, state in zip(files, states, strict=True):
                file.save(state)

        saved_at = time.perf_counter()
        with _stop_signals() as signals:
            while turn := _next_turn(
                [file.done for file in files],
                program.finished(states),
                num_steps,
                program.steps_per_call,
            ):
                states, metrics, seconds, compile_seconds = program.advance(states, *turn)
                share = 1 / turn.going.sum()
                compile_seconds += init_seconds
                init_seconds = 0.0
                reports = {}
                for place in np.flatnonzero(turn.going).tolist():
                    rows = files[place].write(
                        metrics[place], turn.num_steps, seconds * share, compile_seconds * share
                    )
                    reports[place] = StepReport(
                        turn.first + turn.num_steps,
                        num_steps,
                        rows[-1],
                        seconds * share / turn.num_steps,
                        rows,
                    )
                on_report(reports)
                stopped = devices.any_process(bool(signals))
                if stopped or time.perf_counter() - saved_at >= checkpoint_seconds:
                    save()
                    saved_at = time.perf_counter()
                if stopped:
                    number = signals[0] if signals else signal.SIGTERM
                    raise Interrupted(number, turn.first + turn.num_steps)
            save()
    return [file.result(state) for file, state in zip(files, states, strict=True)]
