"""Compare several finished runs on one page."""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated

import tyro

from evojax_suite.configuration import configuration
from evojax_suite.reporting import comparison
from evojax_suite.reporting.comparison import Columns
from evojax_suite.reporting.progress import console
from evojax_suite.running.options import Command

EXAMPLE = "compare runs/one runs/other"


@configuration
class Options(Command):
    """Compare finished runs: mean ± standard deviation over seeds, curves and sizes on one page.

    Runs that differ in nothing but the seed are one row; rows are named by what differs.
    """

    runs: Annotated[tuple[Path, ...], tyro.conf.Positional]
    """Folders of runs, two or more."""
    output: Path = Path("comparison")
    """Folder for report.html and comparison.json."""

    def __post_init__(self):
        if len(self.runs) < 2:
            raise ValueError(f"runs must be two folders or more, got {len(self.runs)}")


def run(options: Options, columns: Mapping[str, Columns]) -> None:
    """Write the page, print the table. Raises ValueError or OSError with a message of one line."""
    runs = [run for run in options.runs if not (run / "comparison.json").exists()]
    for left_out in sorted({*options.runs} - {*runs}):
        console.say(f"{left_out} is a comparison itself, and left out")
    repeat = shlex.join(["evojax-suite", *options.typed])
    print(comparison.write(runs, options.output, [repeat], columns))
    print(f"report: {options.output / 'report.html'}")
