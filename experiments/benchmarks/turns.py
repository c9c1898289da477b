"""Two programs that do the same work in turns, so that a machine's moods meet both."""

from __future__ import annotations

import datetime
import os
import platform
import resource
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import jax
import numpy as np
import psutil


def processor() -> str:
    """Name of the processor, where the system tells."""
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor()


def machine() -> dict[str, Any]:
    """What figures were measured on, and when."""
    return {
        "date": datetime.date.today().isoformat(),
        "device": jax.devices()[0].device_kind,
        "processor": processor(),
        "cores": os.cpu_count(),
        "jax": jax.__version__,
        "torch": version("torch"),
    }


def peak_megabytes() -> float:
    """Most memory so far: of the device where it tells, else of this process."""
    statistics = jax.devices()[0].memory_stats()
    if statistics and "peak_bytes_in_use" in statistics:
        return statistics["peak_bytes_in_use"] / 1e6
    kilobytes = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return kilobytes * 1024 / 1e6


def seconds_of(run: Callable[[], Any]) -> float:
    start = time.perf_counter()
    jax.block_until_ready(run())
    return time.perf_counter() - start


def compared(
    ours: Callable[[], Any],
    theirs: Callable[[], Any],
    units: float,
    their_units: float,
    repeats: int,
) -> dict[str, float]:
    """Units a second of both and their ratio, turn by turn.

    ours: does `units` of work a call; its first call compiles. theirs: does `their_units`. Memory
    is what our first call added to the process, or the device's peak.
    """
    on_device = jax.default_backend() != "cpu"
    before = 0.0 if on_device else psutil.Process().memory_info().rss / 1e6
    first = seconds_of(ours)
    memory = peak_megabytes() - before
    theirs()
    turns = np.array([(seconds_of(ours), seconds_of(theirs)) for _ in range(repeats)])
    each = turns / [units, their_units]
    ratios = each[:, 1] / each[:, 0]
    own, other = np.median(each, 0)
    return {
        "units_per_second": 1 / own,
        "torch_units_per_second": 1 / other,
        "ratio_median": float(np.median(ratios)),
        "ratio_min": ratios.min(),
        "ratio_max": ratios.max(),
        "compile_seconds": max(0.0, first - float(np.median(turns[:, 0]))),
        "peak_megabytes": memory,
    }
