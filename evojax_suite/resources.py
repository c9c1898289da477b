"""What a process takes of its machine, over time."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil

from evojax_suite.results import read_lines


@contextmanager
def recorded(path: Path, interval: float = 1.0) -> Iterator[None]:
    """Append a JSON line each `interval` seconds: `seconds` recorded, those already in the file
    included, `cpu_percent` of this process (100 is one core), `memory_mib` that it holds."""
    before = read_lines(path)
    start = time.monotonic() - (before[-1]["seconds"] if before else 0.0)
    process, stop = psutil.Process(), threading.Event()
    process.cpu_percent()  # the first call measures nothing

    def sample() -> None:
        with path.open("a") as file:
            while not stop.wait(interval):
                line = {
                    "seconds": time.monotonic() - start,
                    "cpu_percent": process.cpu_percent(),
                    "memory_mib": process.memory_info().rss / 2**20,
                }
                file.write(json.dumps(line) + "\n")
                file.flush()

    thread = threading.Thread(target=sample, daemon=True)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join()
