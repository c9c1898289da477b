"""Programs that do the same work in turns, so that a machine's moods meet all."""

from __future__ import annotations

import contextlib
import datetime
import os
import platform
import resource
import time
from collections.abc import Callable, Mapping
from importlib.metadata import PackageNotFoundError, version
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
    about = {
        "date": datetime.date.today().isoformat(),
        "device": jax.devices()[0].device_kind,
        "processor": processor(),
        "cores": os.cpu_count(),
        "jax": jax.__version__,
    }
    with contextlib.suppress(PackageNotFoundError):
        about["torch"] = version("torch")
    return about


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


PLAIN = "plain loop"


def compared(
    ours: Callable[[], Any],
    theirs: Callable[[], Any] | Mapping[str, Callable[[], Any]],
    units: float,
    their_units: float,
    repeats: int,
) -> dict[str, Any]:
    """Units a second of all and our ratio to each of theirs, turn by turn.

    ours: does `units` of work a call; its first call compiles. theirs: each does `their_units`, the
    first call apart; by name, or the plain loop alone. Memory is what our first call added to the
    process, or the device's peak. `torch` holds every variant of theirs, `torch_best` the name of
    the fastest; what stands beside them is of the first one, the plain loop.
    """
    variants = dict(theirs) if isinstance(theirs, Mapping) else {PLAIN: theirs}
    on_device = jax.default_backend() != "cpu"
    before = 0.0 if on_device else psutil.Process().memory_info().rss / 1e6
    first = seconds_of(ours)
    memory = peak_megabytes() - before
    for run in variants.values():
        run()
    turns = [[seconds_of(run) for run in (ours, *variants.values())] for _ in range(repeats)]
    own, *others = (np.array(turns) / [units, *[their_units] * len(variants)]).T
    found = {
        name: {
            "torch_units_per_second": 1 / float(np.median(other)),
            "ratio_median": float(np.median(other / own)),
            "ratio_min": float(np.min(other / own)),
            "ratio_max": float(np.max(other / own)),
        }
        for name, other in zip(variants, others, strict=True)
    }
    return {
        "units_per_second": 1 / float(np.median(own)),
        **next(iter(found.values())),
        "torch": found,
        "torch_best": max(found, key=lambda name: found[name]["torch_units_per_second"]),
        "compile_seconds": max(0.0, first - float(np.median(own)) * units),
        "peak_megabytes": memory,
    }


def table_of_variants(titles: list[str], rows: list[dict[str, Any]]) -> str:
    """How fast each variant of theirs is, in units of a row, and our ratio to it; below one they
    are ahead."""
    lines = ["| | PyTorch | units/s | ours to it, median (min-max) | |", "|---" * 5 + "|"]
    for title, row in zip(titles, rows, strict=True):
        for name, one in row["torch"].items():
            ratios = [f"{one[f'ratio_{which}']:.2f}" for which in ("median", "min", "max")]
            notes = ["the fastest PyTorch"] if name == row["torch_best"] else []
            notes += ["PyTorch is ahead"] if one["ratio_median"] < 1 else []
            lines.append(
                f"| {title} | {name} | {one['torch_units_per_second']:.2f} | "
                f"{ratios[0]} ({ratios[1]}-{ratios[2]}) | {'; '.join(notes)} |"
            )
    return "\n".join(lines)
