"""Runs of several seeds in processes side by side, each with its part of a machine.

The process that a user starts computes nothing: it starts the others, each with a shard of the
seeds, and begins those anew, from their checkpoints, that are lost.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from evojax_suite.cli import config_file
from evojax_suite.runtime import devices

if TYPE_CHECKING:
    from evojax_suite.running.options import RunOptions
    from evojax_suite.running.system import System

_MOST_LOSSES = 3  # of a process, until it is given up
_PATIENCE = 6.0  # seconds that processes have to end in order: fewer than this one has itself


def wanted(arguments: Sequence[str]) -> bool:
    """Whether this process is to start others. If so it keeps off accelerators."""
    number = config_file.value_of("--seed-processes", [*arguments]) or "1"
    if number == "1" or config_file.value_of("--shard", [*arguments]):
        return False
    import jax

    jax.config.update("jax_platforms", "cpu")
    return True


def run(system: System, options: RunOptions) -> list[Path]:
    """Run the seeds of `options`; returns their directories. Raises ValueError if one is not
    finished in the end, and KeyboardInterrupt, when all processes have ended."""
    from evojax_suite.data import load
    from evojax_suite.reporting.progress import console

    where, cache = (options.dataset, options.data_dir), options.cache_data
    dataset = load(*where, cache=cache, image_size=options.image_size)
    each, began = options.each(), time.time()
    directories = [one.directory(system.name, dataset.name) for one in each]
    cards, cores = _parts(options.seed_processes)
    number = min(options.seed_processes, len(each))

    def start(index: int, *more: str) -> subprocess.Popen[bytes]:
        own = ["--quiet", "--seed-processes", "1", "--shard", f"{index}/{number}"]
        command = [sys.executable, "-m", "evojax_suite", *options.typed, *own, *more]
        with _on(cores[index]):
            return subprocess.Popen(command, env={**os.environ, **cards[index]})

    done: set[Path] = set()
    losses, failed = Counter[int](), list[str]()
    processes = {index: start(index) for index in range(number)}
    console.say(f"{len(each)} seeds in {number} processes; the runs are in {options.runs_dir}")
    try:
        while processes:
            time.sleep(0.2)
            for index, process in [*processes.items()]:
                if (code := process.poll()) is None:
                    continue
                del processes[index]
                if code < 0 and losses[index] < _MOST_LOSSES:  # a signal ended it
                    losses[index] += 1
                    console.say(f"process {index} is lost and goes on from what it saved")
                    processes[index] = start(index, "--no-restart", "--resume")
                elif code:
                    failed.append(f"{index} with exit code {code}")
            for path in directories:
                if path not in done and _is_finished_since(began, path):
                    done.add(path)
                    console.say(f"{path.name} is done, {len(done)} of {len(each)}")
    finally:
        _end([*processes.values()])
    if failed:
        raise ValueError(
            f"{len(failed)} of {number} processes failed: {', '.join(failed)}; --resume goes on"
        )
    return directories


def _is_finished_since(began: float, run: Path) -> bool:
    with contextlib.suppress(OSError):
        return (run / "summary.json").stat().st_mtime >= began
    return False


def _parts(number: int) -> tuple[list[dict[str, str]], list[list[int]]]:
    """The environment that gives each of `number` processes its cards, and its cores, none where
    they cannot be told apart. Raises ValueError where there are fewer."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    cards = sorted(_cards()) if visible is None else [name for name in visible.split(",") if name]
    for present, what in ((len(cards) or number, "cards"), (devices.cores(), "cores")):
        if number > present:
            raise ValueError(f"seed_processes must be <= {present}, the {what} here, got {number}")
    places = [slice(index, None, number) for index in range(number)]
    named = [{"CUDA_VISIBLE_DEVICES": ",".join(cards[own])} if cards else {} for own in places]
    cores = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else []
    return named, [cores[own] for own in places]


@contextlib.contextmanager
def _on(cores: list[int]):
    """Lets this thread, and the processes that it starts, run on these cores alone."""
    if not cores:
        yield
        return
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, cores)
    try:
        yield
    finally:
        os.sched_setaffinity(0, before)


def _cards() -> list[str]:
    """Numbers of NVIDIA's cards."""
    names = (path.name.removeprefix("nvidia") for path in Path("/dev").glob("nvidia*"))
    return [name for name in names if name.isdecimal()]


def _end(processes: Sequence[subprocess.Popen[bytes]]) -> None:
    for process in processes:
        with contextlib.suppress(ProcessLookupError):
            process.send_signal(signal.SIGTERM)
    end = time.monotonic() + _PATIENCE
    for process in processes:
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(max(0.0, end - time.monotonic()))
        process.kill()
        process.wait()


def page_of(runs: Sequence[Path], options: RunOptions) -> list[Path] | None:
    """The runs of all seeds, of which a shard did `runs`; None while some are not finished."""
    if options.shard is None or not runs:
        return [*runs] or None
    stem = runs[0].name.rpartition("-seed")[0]
    seeds = [one.seed for one in replace(options, shard=None).each()]
    every = [runs[0].parent / f"{stem}-seed{seed}" for seed in seeds]
    return every if all((path / "summary.json").exists() for path in every) else None
