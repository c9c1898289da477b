"""What a run would take: its first steps done for real, in a folder that is deleted."""

from __future__ import annotations

import contextlib
import json
import tempfile
from dataclasses import dataclass, field, replace
from pathlib import Path

import jax
import numpy as np
import psutil
import yaml

from evojax_suite.runtime import devices
from evojax_suite.runtime.results import read_lines


class Planned(Exception):
    """A dry run has come to its end."""


@dataclass
class Plan:
    """What a dry run finds."""

    most_steps: int = 3
    """Largest number of steps of each loop that are done for real."""
    members: float = 1.0
    """How many times as many members a step of the run has."""
    loops: list[dict] = field(default_factory=list)

    def add(self, title: str, num_steps: int, directory: Path) -> None:
        """Add a loop, with the time of its first steps; that of the very first counts only where
        there is no other, as it may compile."""
        lines = read_lines(directory / "timing.jsonl")
        seconds = [line["seconds"] / line["steps"] for line in lines]
        a_step = self.members * float(np.mean(seconds[1:] or seconds))
        compiling = sum(line["compile_seconds"] for line in lines) + max(0.0, seconds[0] - a_step)
        self.loops.append(
            {
                "title": title,
                "num_steps": num_steps,
                "seconds_per_step": a_step,
                "compile_seconds": compiling,
                "seconds": compiling + num_steps * a_step,
            }
        )


def _in_words(seconds: float) -> str:
    for unit, size in (("days", 86400), ("h", 3600), ("min", 60)):
        if seconds >= 2 * size:
            return f"{seconds / size:.1f} {unit}"
    return f"{seconds:.1f} s" if seconds >= 0.1 else f"{1000 * seconds:.1f} ms"


def _memory() -> str:
    """The most that was in use: of a device where it tells, of the process else."""
    stats = [device.memory_stats() or {} for device in jax.local_devices()]
    peaks = [one["peak_bytes_in_use"] for one in stats if "peak_bytes_in_use" in one]
    if peaks:
        return f"{max(peaks) / 2**30:.1f} GiB on a device"
    return f"{psutil.Process().memory_info().rss / 2**30:.1f} GiB"


def show(command, options) -> None:
    """Do the first steps of the command, print its settings, times and memory."""
    plan = Plan()
    seeds = options.each()
    with tempfile.TemporaryDirectory(prefix="evojax-suite-") as folder:
        here = {"runs_dir": Path(folder), "name": "run", "resume": False, "loggers": ()}
        one = replace(seeds[0], plan=plan, **here).here()
        with contextlib.suppress(Planned):
            command.run(one)
        settings = json.loads((one.runs_dir / "run/config.json").read_text())
    if not devices.is_first():
        return
    print(yaml.safe_dump(settings, sort_keys=False, allow_unicode=True).rstrip())
    print(f"\nmemory: {_memory()}")
    for one in plan.loops:
        print(
            f"{one['title']}: {_in_words(one['seconds'])}, {one['num_steps']:,} steps of "
            f"{_in_words(one['seconds_per_step'])} and {_in_words(one['compile_seconds'])} of "
            "compilation"
        )
    if not plan.loops:
        print("no steps to time: what selects and judges is not predicted")
        return
    total = len(seeds) * sum(one["seconds"] for one in plan.loops)
    of_seeds = f", {len(seeds)} seeds" if len(seeds) > 1 else ""
    print(
        f"in all {_in_words(total)}{of_seeds}, if the other steps are like the first "
        f"{plan.most_steps}; what judges at the end is not in it"
    )
