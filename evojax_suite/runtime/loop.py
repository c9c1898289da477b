"""Drive an algorithm step by step: metrics, checkpoints, resume, stop on a signal.

A run is a function of its key: step g uses `fold_in(run_key, g)` and the state alone, so a run that
was killed and goes on from its last checkpoint writes the same bytes. Runs that differ in the key
alone may share a program; each has a directory all the same.
"""

from __future__ import annotations

import signal
import time
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import FrameType

import jax
import numpy as np
from jaxtyping import Key

from evojax_suite.runtime import devices
from evojax_suite.runtime.program import Program, ProgramTooLarge
from evojax_suite.runtime.run_files import LoopResult, RunFiles
from evojax_suite.types import AnyAlgorithm, Array, PRNGKey, PyTree

__all__ = ["Interrupted", "LoopResult", "PartReport", "StepReport", "run", "run_together"]


class Interrupted(Exception):
    """A signal asked the run to stop; its state is saved."""

    def __init__(
        self,
        signal_number: int,
        step: int,
        how: str = "the same command with --resume goes on",
        num_members: int = 0,
    ):
        """num_members: how many members of the next step are evaluated."""
        within = f" and {num_members:,} members of the next" if num_members else ""
        super().__init__(
            f"stopped by {signal.Signals(signal_number).name} after step {step}{within}; {how}"
        )
        self.signal_number, self.step, self.num_members = signal_number, step, num_members


@dataclass(frozen=True)
class StepReport:
    """The progress of a run, with its newest metrics, after each call."""

    step: int
    num_steps: int
    metrics: dict[str, float]
    seconds_per_step: float
    rows: list[dict[str, float]]  # metrics of each step of the call, the newest last


@dataclass(frozen=True)
class PartReport:
    """The progress of a run within a step, whose members are evaluated in groups."""

    step: int  # those that are done
    num_steps: int
    num_members: int  # of the population, evaluated in the step that is under way
    population_size: int
    seconds_per_member: float  # of the newest group

    @property
    def seconds_left(self) -> float:
        """The seconds that the rest of the run takes at the pace of the newest group."""
        members = self.population_size * (self.num_steps - self.step) - self.num_members
        return members * self.seconds_per_member


@contextmanager
def _stop_signals() -> Generator[list[int]]:
    """Collects SIGINT and SIGTERM; a second one acts as usual."""
    received: list[int] = []
    before = {}

    def receive(number: int, frame: FrameType | None):
        del frame
        received.append(number)
        signal.signal(number, before[number])

    try:
        for number in (signal.SIGINT, signal.SIGTERM):
            before[number] = signal.signal(number, receive)
    except ValueError:  # not the main thread, as in a script, which handles signals itself
        before.clear()
    try:
        yield received
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _next_call(
    program: Program, files: Sequence[RunFiles], states: Sequence[PyTree], num_steps: int
) -> tuple[int, int, np.ndarray] | None:
    """Returns the first step of the next call, the number of its steps and which runs do them (R,),
    or None if nothing is left to do. Runs that are behind go on alone until they have caught up."""
    done = np.array([file.done for file in files])
    left = (done < num_steps) & ~program.finished(states)
    if not left.any():
        return None
    first = int(done[left].min())
    until = min([num_steps, *done[left & (done > first)].tolist()])
    return first, min(program.steps_per_call, until - first), left & (done == first)


def run(
    algorithm: AnyAlgorithm,
    key: PRNGKey,
    params: PyTree,
    data: PyTree,
    num_steps: int,
    directory: Path,
    *,
    steps_per_call: int = 1,
    checkpoint_seconds: float = 30.0,
    num_devices: devices.Devices = 1,
    on_report: Callable[[StepReport], None] = lambda report: None,
    on_part: Callable[[PartReport], None] = lambda report: None,
    on_note: Callable[[str], None] = lambda text: None,
) -> LoopResult:
    """Run `algorithm` for `num_steps` steps in `directory`, going on from its last checkpoint.

    Writes metrics.jsonl (deterministic), timing.jsonl and checkpoints/ there. Raises Interrupted,
    after saving, on SIGINT and SIGTERM. A step that takes long is evaluated in groups of members,
    where the algorithm can tell; what they gave is written to unfinished/, and a run that was
    stopped or killed within the step goes on there.

    steps_per_call: steps in one compiled call, if the algorithm is scannable, which it is not over
    several devices. checkpoint_seconds: the least time between checkpoints. num_devices: devices of
    each process. on_report: called after each call. on_part: called after each group of members.
    on_note: called with a sentence if the run goes on over another number of devices, or not from
    its last checkpoint, which is damaged.
    """
    algorithm = devices.over_devices(algorithm, devices.take(num_devices), data)
    program = Program(algorithm, [key], params, data, steps_per_call)

    def report(reports: Mapping[int, StepReport]) -> None:
        on_report(reports[0])

    return _drive(program, [directory], num_steps, checkpoint_seconds, report, on_note, on_part)[0]


def run_together(
    algorithm: AnyAlgorithm,
    keys: Sequence[PRNGKey] | Key[Array, "runs"],
    params: PyTree,
    data: PyTree,
    num_steps: int,
    directories: Sequence[Path],
    *,
    steps_per_call: int = 1,
    checkpoint_seconds: float = 30.0,
    num_devices: devices.Devices = 1,
    on_report: Callable[[Mapping[int, StepReport]], None] = lambda reports: None,
    on_note: Callable[[str], None] = lambda text: None,
) -> list[LoopResult]:
    """`run` of a scannable algorithm with each of `keys` in one of `directories`, all in a program
    on one device, or with as many runs on each of `num_devices` devices of this process. A run may
    be started or continued alone as well; its numbers then differ by rounding. If the memory does
    not suffice, one half of the runs follows the other. The seconds of a run are its share of those
    of the program.

    on_report: called with the reports of the runs that went on, by their indices.
    """
    keys, results, waiting = list(keys), [], [(0, len(keys))]
    settings = steps_per_call, devices.take(num_devices)
    while waiting:
        first, last = waiting.pop()

        def report(reports: Mapping[int, StepReport], first: int = first) -> None:
            on_report({first + index: report for index, report in reports.items()})

        folders = directories[first:last]
        try:
            program = Program(algorithm, keys[first:last], params, data, *settings)
            results += _drive(program, folders, num_steps, checkpoint_seconds, report, on_note)
            continue
        except ProgramTooLarge:
            if last - first == 1:
                raise
        except jax.errors.JaxRuntimeError as error:
            if last - first == 1 or "RESOURCE_EXHAUSTED" not in str(error):
                raise
        # Here the arrays of the attempt are gone; what it has saved is not.
        middle = (first + last) // 2
        waiting += [(middle, last), (first, middle)]
    return results


def _drive(
    program: Program,
    directories: Sequence[Path],
    num_steps: int,
    checkpoint_seconds: float,
    on_report: Callable[[Mapping[int, StepReport]], None],
    on_note: Callable[[str], None],
    on_part: Callable[[PartReport], None] = lambda report: None,
) -> list[LoopResult]:
    """Do the steps of the runs of `program`, each with its files in one of `directories`."""
    start = time.perf_counter()
    states = program.initial_states()
    init_seconds = time.perf_counter() - start
    has_population = program.algorithm.generation is not None
    with ExitStack() as stack:
        files = [RunFiles(folder, program.algorithm.num_devices) for folder in directories]
        for index, file in enumerate(files):
            states[index] = file.restore(states[index], on_note)
            stack.callback(file.close)
            note = file.other_devices() if has_population and file.done < num_steps else None
            if note:
                on_note(note)

        def save() -> None:
            for file, state in zip(files, states, strict=True):
                file.save(state)

        def on_group(num_members: int, seconds_per_member: float) -> None:
            """After a group of members, in a step of the only run."""
            generation = program.algorithm.generation
            assert generation is not None
            size = generation.population_size
            on_part(PartReport(files[0].done, num_steps, num_members, size, seconds_per_member))
            if num_members < size and devices.any_process(bool(signals)):
                save()
                number = signals[0] if signals else signal.SIGTERM
                raise Interrupted(number, files[0].done, num_members=num_members)

        saved_at = time.perf_counter()
        with _stop_signals() as signals:
            while call := _next_call(program, files, states, num_steps):
                kept = files[0].unfinished(on_group)
                states, metrics, seconds, compile_seconds = program.advance(states, *call, kept)
                first, count, going = call
                share, seconds = 1 / going.sum(), seconds + kept.seconds_before
                seconds, compile_seconds = seconds * share, (compile_seconds + init_seconds) * share
                init_seconds = 0.0
                step, reports = first + count, {}
                for index in np.flatnonzero(going).tolist():
                    rows = files[index].write(metrics[index], count, seconds, compile_seconds)
                    reports[index] = StepReport(step, num_steps, rows[-1], seconds / count, rows)
                on_report(reports)
                stopped = devices.any_process(bool(signals))
                if stopped or time.perf_counter() - saved_at >= checkpoint_seconds:
                    save()
                    saved_at = time.perf_counter()
                if stopped:
                    raise Interrupted(signals[0] if signals else signal.SIGTERM, step)
            save()
    gathered = program.gathered(states)
    return [file.result(state) for file, state in zip(files, gathered, strict=True)]
