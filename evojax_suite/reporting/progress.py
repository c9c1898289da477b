"""The progress of a run as a bar on the terminal, or as occasional lines where there is none."""

from __future__ import annotations

import json
import math
import time
from abc import ABC, abstractmethod
from collections.abc import Generator, Mapping
from contextlib import contextmanager
from typing import Any, Literal

from rich import progress as bars
from rich.console import Console

from evojax_suite.reporting.formats import short, short_duration
from evojax_suite.runtime.loop import PartReport, StepReport
from evojax_suite.runtime.results import to_jsonable

LogFormat = Literal["text", "json"]

_LONG = 600  # seconds that a run announces
_SOON = 60  # seconds; after a longer step it announces at once


class Terminal(Console):
    """Standard error, where a run reports its progress; its results go to standard output."""

    log_format: LogFormat = "text"

    def choose(self, *, quiet: bool = False, log_format: LogFormat = "text") -> None:
        """What is printed from here on, and how."""
        self.quiet, self.log_format = quiet, log_format

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
        parts.append(f"{short(members_per_step / report.seconds_per_step)} members/s")
    return ", ".join(parts)


class Progress(ABC):
    """Shows the reports of a loop: called with one after each call of its program, and `part` with
    one within a step that takes long."""

    def __init__(self, title: str, members_per_step: int, shown: Mapping[str, str]):
        self._title, self._members_per_step, self._shown = title, members_per_step, shown
        self._begun = self._predicted = False

    def _predict(self, seconds: float) -> None:
        """Say once, at the beginning, how long it will take, if that is long."""
        if not self._predicted and seconds > _LONG:
            console.say(f"{self._title}: some {short_duration(seconds)} at the present pace")
        self._predicted = True

    def __call__(self, report: StepReport) -> None:
        # The first call may compile, or do what happens once; if the next is near, it tells more.
        if self._begun or report.seconds_per_step > _SOON:
            self._predict((report.num_steps - report.step) * report.seconds_per_step)
        self._begun = True
        self._show(report, _describe(report, self._members_per_step, self._shown))

    def part(self, report: PartReport) -> None:
        """Show how much of a step is done."""
        self._predict(report.seconds_left)
        done, size = report.num_members, report.population_size
        self._show_part(report, f"{done:,} of {size:,} members of the next")

    @abstractmethod
    def _show(self, report: StepReport, state: str) -> None: ...

    @abstractmethod
    def _show_part(self, report: PartReport, state: str) -> None: ...


class _Bar(Progress):
    """A bar on a terminal."""

    def __init__(self, bar: bars.Progress, task: bars.TaskID, *about: Any):
        super().__init__(*about)
        self._bar, self._task = bar, task

    def _show(self, report: StepReport, state: str) -> None:
        self._bar.update(self._task, completed=report.step, state=state)

    def _show_part(self, report: PartReport, state: str) -> None:
        completed = report.step + report.num_members / report.population_size
        self._bar.update(self._task, completed=completed, state=state)


class _Lines(Progress):
    """A line every 15 seconds."""

    def __init__(self, *about: Any):
        super().__init__(*about)
        self._last = -math.inf
        self._since: tuple[int, float] | None = None  # the end of the first call: step and time

    def _line(
        self, report: StepReport | PartReport, state: str, left: float, **more: object
    ) -> None:
        step, steps = report.step, report.num_steps
        more |= {"title": self._title, "step": step, "num_steps": steps, "seconds_left": left}
        text = f"{self._title} {step}/{steps}: {state}"
        text += f", {short_duration(left)} left" if left > 0 else ""
        console.say(text, **more)

    def _show(self, report: StepReport, state: str) -> None:
        now, step, steps = time.monotonic(), report.step, report.num_steps
        call = len(report.rows)
        first, then = self._since or (step - call, now - call * report.seconds_per_step)
        self._since = self._since or (step, now)
        if now - self._last >= 15 or step == steps:
            self._last = now
            pace = (now - then) / (step - first)
            self._line(report, state, (steps - step) * pace, metrics=report.metrics)

    def _show_part(self, report: PartReport, state: str) -> None:
        now = time.monotonic()
        if now - self._last >= 15:
            self._last = now
            self._line(report, state, report.seconds_left, num_members=report.num_members)


@contextmanager
def progress(
    title: str, num_steps: int, members_per_step: int = 0, shown: Mapping[str, str] = SHOWN
) -> Generator[Progress]:
    """Yields what shows the reports of a loop: the metrics in `shown`, by their titles, and the
    time that is left."""
    about = title, members_per_step, shown
    if not console.is_terminal or console.log_format == "json":
        yield _Lines(*about)
        return
    name, state = map(bars.TextColumn, ("{task.description}", "{task.fields[state]}"))
    times = bars.TimeElapsedColumn(), bars.TimeRemainingColumn()
    columns = name, bars.BarColumn(bar_width=20), bars.MofNCompleteColumn(), state, *times
    with bars.Progress(*columns, console=console) as bar:
        yield _Bar(bar, bar.add_task(title, total=num_steps, state="compiling"), *about)
