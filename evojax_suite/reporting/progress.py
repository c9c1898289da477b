"""The progress of a run as a bar on the terminal, or as occasional lines where there is none."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Generator, Mapping
from contextlib import contextmanager
from typing import Literal

from rich import progress as bars
from rich.console import Console

from evojax_suite.runtime.loop import StepReport
from evojax_suite.runtime.results import to_jsonable

LogFormat = Literal["text", "json"]


class Terminal(Console):
    """Standard error, where a run reports its progress; its results go to standard output."""

    log_format: LogFormat = "text"

    def say(self, text: str, **more: object) -> None:
        """Print a line; if the format is JSON with `more`, its values as fields."""
        self.print(self.formatted(text, **more), markup=False)

    def result(self, text: str) -> None:
        """Print a line to standard output, unless nothing is to be said."""
        if not self.quiet:
            print(self.formatted(text), flush=True)

    def formatted(self, text: str, **more: object) -> str:
        """A line in the format that was chosen."""
        if self.log_format == "text":
            return text
        return json.dumps(to_jsonable({"time": time.time(), "message": text} | more))


console = Terminal(stderr=True, highlight=False, soft_wrap=True)

SHOWN = {
    "fitness_best": "best",
    "fitness_mean": "mean",
    "loss": "loss",
    "accuracy": "accuracy",
    "validation_accuracy": "validation accuracy",
}
"""The metrics that the progress of any run shows, with their titles."""


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
) -> Generator[Callable[[StepReport], None]]:
    """Yields a function for `loop.run(on_report=...)`, which shows the metrics in `shown`, by their
    titles, and the time that is left."""
    if not console.is_terminal or console.log_format == "json":
        last, first = 0.0, None

        def line(report: StepReport) -> None:
            nonlocal last, first
            now, step, steps = time.monotonic(), report.step, report.num_steps
            first = first or (step - 1, now - report.seconds_per_step)
            if now - last >= 15 or step == steps:
                last = now
                pace = (now - first[1]) / (step - first[0])
                left = (steps - step) * pace
                state = _describe(report, members_per_step, shown)
                more = {"title": title, "step": step, "num_steps": steps, "seconds_left": left}
                text = f"{title} {step}/{steps}: {state}, {left:.0f} s left"
                console.say(text, **more, metrics=report.metrics)

        yield line
        return
    name, state = map(bars.TextColumn, ("{task.description}", "{task.fields[state]}"))
    times = bars.TimeElapsedColumn(), bars.TimeRemainingColumn()
    columns = name, bars.BarColumn(bar_width=20), bars.MofNCompleteColumn(), state, *times
    with bars.Progress(*columns, console=console) as bar:
        task = bar.add_task(title, total=num_steps, state="compiling")

        def update(report: StepReport) -> None:
            state = _describe(report, members_per_step, shown)
            bar.update(task, completed=report.step, state=state)

        yield update
