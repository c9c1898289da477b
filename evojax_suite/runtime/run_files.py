"""The files of a run that its loop writes, and the steps that they say are done."""

from __future__ import annotations

import contextlib
import shutil
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from evojax_suite.runtime import devices
from evojax_suite.runtime.checkpoint import Checkpoints
from evojax_suite.runtime.results import Lines, read_lines
from evojax_suite.runtime.unfinished import Unfinished
from evojax_suite.types import PyTree


@dataclass(frozen=True)
class LoopResult:
    """The final state of a run and its costs, summed over all sessions of the run."""

    state: PyTree
    seconds: float  # of all steps, without compilation
    compile_seconds: float
    num_failed: int  # evaluations that were NaN or infinite, over all steps
    stage_seconds: dict[str, float]  # of each stage, where an algorithm times its stages


class RunFiles:
    """metrics.jsonl (deterministic), timing.jsonl, checkpoints/ and unfinished/ of a run after
    `done` steps."""

    def __init__(self, directory: Path, num_devices: int):
        directory.mkdir(parents=True, exist_ok=True)
        self._directory, self._num_devices = directory, num_devices
        self._checkpoints = Checkpoints(directory / "checkpoints")
        self._unfinished = directory / "unfinished"
        self.done = 0

    def restore(self, initial: PyTree, on_note: Callable[[str], None]) -> PyTree:
        """Returns the state to go on from; `on_note` is called with a sentence about a checkpoint
        that is damaged. To be called once, before any other method."""
        done, state = devices.from_first(self._checkpoints.newest(initial, on_note))
        self.done = self._saved = int(done)
        self._metrics = Lines(self._directory / "metrics.jsonl", self.done)
        self._timing = Lines(self._directory / "timing.jsonl", self.done)
        return state

    def other_devices(self) -> str | None:
        """Returns a warning if the steps so far were done over another number of devices."""
        timings = read_lines(self._directory / "timing.jsonl")
        before = timings[-1].get("devices") if timings else None
        if before in (None, self._num_devices):
            return None
        return (
            f"{self._directory} goes on from step {self.done} over another number of devices, "
            f"{self._num_devices} in place of {before}: what follows may differ by rounding"
        )

    def write(
        self, metrics: dict[str, Any], count: int, seconds: float, compile_seconds: float
    ) -> list[dict[str, float]]:
        """Write `count` further steps and return a row for each; the leading axis of each array in
        `metrics` is that of the steps."""
        stages = metrics.pop("stage_seconds", {})  # metrics.jsonl is deterministic, without times
        rows = [{name: value[i].item() for name, value in metrics.items()} for i in range(count)]
        self.done += count
        self._metrics.write(rows)
        timing: dict[str, Any] = {"generation": self.done, "steps": count, "seconds": seconds}
        timing |= {"compile_seconds": compile_seconds, "devices": self._num_devices}
        timing["stages"] = {name: float(value[0]) for name, value in stages.items()}
        self._timing.write([timing])
        return rows

    def unfinished(self, on_group: Callable[[int, float], None]) -> Unfinished:
        """Returns what the next step has evaluated so far."""
        return Unfinished(self._unfinished / str(self.done + 1), on_group)

    def _forget_finished(self) -> None:
        """Remove what the steps have left of which a checkpoint is on disk."""
        if devices.is_first() and self._unfinished.exists():
            for folder in self._unfinished.iterdir():
                if folder.name.isdecimal() and int(folder.name) <= self._saved:
                    shutil.rmtree(folder, ignore_errors=True)
            with contextlib.suppress(OSError):
                self._unfinished.rmdir()  # where nothing is left

    def save(self, state: PyTree) -> None:
        """Save a checkpoint, after the lines of the steps that it counts as done."""
        if self._saved < self.done:
            self._metrics.sync()
            self._timing.sync()
            self._checkpoints.save(self.done, state)  # waits until the one before has ended
            self._forget_finished()
            self._saved = self.done

    def close(self) -> None:
        """Wait until everything is on disk."""
        self._checkpoints.close()
        self._forget_finished()
        self._metrics.close()
        self._timing.close()

    def result(self, state: PyTree) -> LoopResult:
        """Returns the result of the run. To be called once its files are closed."""
        timings = read_lines(self._directory / "timing.jsonl")
        metrics = read_lines(self._directory / "metrics.jsonl")
        stage_seconds = Counter()
        for line in timings:
            stage_seconds.update(line.get("stages", {}))
        seconds = sum(line["seconds"] for line in timings)
        compile_seconds = sum(line["compile_seconds"] for line in timings)
        num_failed = sum(line.get("num_failed", 0) for line in metrics)
        return LoopResult(state, seconds, compile_seconds, num_failed, dict(stage_seconds))
