"""What a run keeps below its directory, and how far it has come."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from evojax_suite.runtime import devices
from evojax_suite.runtime.checkpoint import Checkpoints
from evojax_suite.runtime.results import Lines, read_lines
from evojax_suite.types import PyTree


@dataclass(frozen=True)
class LoopResult:
    """The end of a run. Seconds add up over all its sessions."""

    state: PyTree
    seconds: float  # in steps, compilation not counted
    compile_seconds: float
    num_failed: int  # evaluations that were NaN or infinite, over all steps
    stage_seconds: dict[str, float]  # where an algorithm times its stages, their share of seconds


class RunFiles:
    """metrics.jsonl (deterministic), timing.jsonl and checkpoints/ of one run.

    done: the number of steps that are done.
    """

    def __init__(self, directory: Path, num_devices: int):
        directory.mkdir(parents=True, exist_ok=True)
        self._directory, self._num_devices = directory, num_devices
        self._checkpoints = Checkpoints(directory / "checkpoints")
        self.done = 0

    def restore(self, initial: PyTree) -> PyTree:
        """Return the state to go on from; to be called once, before all else."""
        done, state = devices.from_first(self._checkpoints.newest(initial))
        self.done = self._saved = int(done)
        self._metrics = Lines(self._directory / "metrics.jsonl", self.done)
        self._timing = Lines(self._directory / "timing.jsonl", self.done)
        return state

    def other_devices(self) -> str | None:
        """Return what a user should know where the steps so far were done on another number of
        devices."""
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
        """Write `count` further steps and return a row for each; metrics: arrays whose leading axis
        is that of the steps."""
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
        """Save a checkpoint, after the lines: what it counts as done must be on disk before it."""
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

    def result(self, state: PyTree) -> LoopResult:
        """Return the result of the run, whose files are closed."""
        timings = read_lines(self._directory / "timing.jsonl")
        metrics = read_lines(self._directory / "metrics.jsonl")
        stage_seconds: dict[str, float] = {}
        for line in timings:
            for name, value in line.get("stages", {}).items():
                stage_seconds[name] = stage_seconds.get(name, 0.0) + value
        return LoopResult(
            state=state,
            seconds=sum(line["seconds"] for line in timings),
            compile_seconds=sum(line["compile_seconds"] for line in timings),
            num_failed=sum(line.get("num_failed", 0) for line in metrics),
            stage_seconds=stage_seconds,
        )
