"""Progress of a run on the terminal; plain lines now and then where there is none."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Literal

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from evojax_suite.runtime.loop import StepReport
from evojax_suite.runtime.results import to_jsonable

LogFormat = Literal["text", "json"]


class Terminal(Console):
    """Standard error, where a run tells how it goes."""

    log_format: LogFormat = "text"

    def say(self, text: str, **more: object) -> None:
        """A line; as JSON with `more`, what it tells apart."""
        if self.log_format == "json":
            text = json.dumps(to_jsonable({"time": time.time(), "message": text} | more))
        self.print(text, markup=False)


console = Terminal(stderr=True, highlight=False, soft_wrap=True)


SHOWN = {
    "fitness_best": "best",
    "fitness_mean": "mean",
    "loss": "loss",
    "accuracy": "accuracy",
    "validation_accuracy": "validation accuracy",
}
"""Metrics that the progress of any run shows, and how they are called there."""


def _describe(report: StepReport, members_per_step: int, shown: Mapping[str, str]) -> str:
    metrics = report.metrics
    parts = [
        f"{title} {metrics[name]:{'.4f' if isinstance(metrics[name], float) else ','}}"
        for name, title in shown.items()
        if not math.isnan(metrics.get(name, math.nan))
    ]
    if metrics["num_failed"]:
        parts.append(f"failed {metrics['num_failed']}")
    if members_per_step:
        parts.append(f"{members_per_step / report.seconds_per_step:.1f} members/s")
    return ", ".join(parts)


@contextmanager
def progress(
    title: str, num_steps: int, members_per_step: int = 0, shown: Mapping[str, str] = SHOWN
) -> Iterator[Callable[[StepReport], None]]:
    """Give a function for `loop.run(on_report=...)` that shows how a run goes; shown: metrics, and
    how they are called."""
    if not console.is_terminal or console.log_format == "json":
        last, first = 0.0, None

        def line(report: StepReport) -> None:
            nonlocal last, first
            now = time.monotonic()
            first = first or (report.step - 1, now - report.seconds_per_step)
            if now - last >= 15 or report.step == report.num_steps:
                last = now
                pace = (now - first[1]) / (report.step - first[0])
                left = (report.num_steps - report.step) * pace
                console.say(
                    f"{title} {report.step}/{report.num_steps}: "
                    f"{_describe(report, members_per_step, shown)}, {left:.0f} s left",
                    title=title,
                    step=report.step,
                    num_steps=report.num_steps,
                    seconds_left=left,
                    metrics=report.metrics,
                )

        yield line
        return
    columns = (
        TextColumn("{task.description}"),
        BarColumn(bar_width=20),
        MofNCompleteColumn(),
        TextColumn("{task.fields[state]}"),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console) as bar:
        task = bar.add_task(title, total=num_steps, state="compiling")

        def update(report: StepReport) -> None:
            state = _describe(report, members_per_step, shown)
            bar.update(task, completed=report.step, state=state)

        yield update
