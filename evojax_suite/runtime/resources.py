"""The cores that a process may use, and a record of the resources that it uses over time."""

from __future__ import annotations

import json
import math
import os
import threading
import time
from collections.abc import Generator
from contextlib import contextmanager, suppress
from pathlib import Path

import psutil

from evojax_suite.runtime.results import read_lines


def _quota(groups: Path, mounts: Path) -> float:
    """The time that control groups, as those of containers, leave this process, in CPUs."""
    least = math.inf
    for line in groups.read_text().splitlines() if groups.exists() else []:
        _, controllers, path = line.split(":", 2)
        if controllers and "cpu" not in controllers.split(","):
            continue
        root = mounts / "cpu" if controllers else mounts  # version 1, and version 2
        files = ("cpu.cfs_quota_us", "cpu.cfs_period_us") if controllers else ("cpu.max",)
        group = root / path.lstrip("/")
        for folder in (group, *group.parents):
            if not folder.is_relative_to(root):
                break
            with suppress(OSError, ValueError):  # no such file; "max" in place of a number
                quota, period = map(int, " ".join((folder / f).read_text() for f in files).split())
                least = min(least, quota / period) if quota > 0 else least
    return least


def cores(groups: Path = Path("/proc/self/cgroup"), mounts: Path = Path("/sys/fs/cgroup")) -> int:
    """Returns how many physical cores this process may use, at least one: those that its affinity
    and its control groups leave it."""
    try:
        allowed = os.sched_getaffinity(0)
    except AttributeError:  # not Linux
        allowed = range(os.cpu_count() or 1)
    topology = "/sys/devices/system/cpu/cpu{}/topology/thread_siblings_list"
    try:
        number = len({Path(topology.format(cpu)).read_text() for cpu in allowed})
    except OSError:
        number = min(psutil.cpu_count(logical=False) or len(allowed), len(allowed))
    return max(1, int(min(number, _quota(groups, mounts))))


def memory_maps_used(
    maps: Path = Path("/proc/self/maps"), most: Path = Path("/proc/sys/vm/max_map_count")
) -> float:
    """Returns the fraction of the memory maps that Linux allows a process which this one has; 0 on
    other systems. Each compiled program has some."""
    try:
        with maps.open("rb") as lines:
            return sum(1 for _ in lines) / int(most.read_text())
    except OSError:
        return 0.0


@contextmanager
def recorded(path: Path, interval: float = 1.0) -> Generator[None]:
    """Appends a JSON line every `interval` seconds: the `seconds` recorded, with those already in
    the file, `cpu_percent` of this process (100 is one core) and the `memory_mib` that it holds."""
    before = read_lines(path)
    start = time.monotonic() - (before[-1]["seconds"] if before else 0.0)
    process, stop = psutil.Process(), threading.Event()
    process.cpu_percent()  # the first call measures nothing

    def sample() -> None:
        with path.open("a") as file:
            while not stop.wait(interval):
                line = {"seconds": time.monotonic() - start, "cpu_percent": process.cpu_percent()}
                line["memory_mib"] = process.memory_info().rss / 2**20
                file.write(json.dumps(line) + "\n")
                file.flush()

    thread = threading.Thread(target=sample, daemon=True)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join()
