"""Runs of several seeds at once: each is a coroutine that waits where its loop is the same program
for every seed, and when all wait, one program does the loops of all."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping, Sequence
from contextvars import copy_context
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from greenlet import getcurrent, greenlet

from evojax_suite.reporting.loggers import logged
from evojax_suite.reporting.progress import console, progress
from evojax_suite.runtime import loop
from evojax_suite.types import Algorithm, Array, PyTree


@dataclass(frozen=True)
class Wanted:
    """The loop for which a run waits, as `loop.run` takes it."""

    title: str
    algorithm: Algorithm
    key: Array
    params: PyTree
    data: PyTree
    num_steps: int
    directory: Path
    steps_per_call: int
    members_per_step: int
    options: Any  # RunOptions of the run


def others_wait(wanted: Wanted) -> loop.Outcome:
    """Let a run that is one of several wait for the others; returns what its loop came to."""
    parent = getcurrent().parent
    assert parent is not None
    return parent.switch(wanted)


def run(command: Callable[[Any], Path], options: Sequence[Any]) -> list[Path]:
    """`command` with each of `options`, of runs that differ in their seeds alone. Returns what each
    returned."""
    runs = [greenlet(command) for _ in options]
    for one in runs:
        one.gr_context = copy_context()
    at = [one.switch(replace(own, waits=True)) for one, own in zip(runs, options, strict=True)]
    while waiting := [place for place, found in enumerate(at) if isinstance(found, Wanted)]:
        first = at[waiting[0]]  # a run that has another loop first waits for its turn
        waiting = [place for place in waiting if _alike(at[place], first)]
        outcomes = _drive([at[place] for place in waiting])
        for place, outcome in zip(waiting, outcomes, strict=True):
            at[place] = runs[place].switch(outcome)
    return at


def _alike(one: Wanted, other: Wanted) -> bool:
    """Whether they may share a program: the same loop, of the same numbers."""
    if one is other:
        return True
    if one.title != other.title:
        return False
    same = jax.tree.map(jnp.array_equal, (one.params, one.data), (other.params, other.data))
    return all(jax.tree.leaves(same))


def _drive(wanted: list[Wanted]) -> list[loop.Outcome]:
    first = wanted[0]
    title = f"{first.title}, {len(wanted)} seeds" if len(wanted) > 1 else first.title
    with contextlib.ExitStack() as stack:
        show = stack.enter_context(progress(title, first.num_steps, first.members_per_step))
        logs = []
        for one in wanted:
            own = logged(one.options.loggers, one.directory, one.options.settings())
            logs.append(stack.enter_context(own))

        def on_report(reports: Mapping[int, loop.Report]) -> None:
            for place, report in reports.items():
                logs[place](report)
            show(_mean([*reports.values()]))

        return loop.run_together(
            first.algorithm,
            jnp.stack([one.key for one in wanted]),
            first.params,
            first.data,
            first.num_steps,
            [one.directory for one in wanted],
            steps_per_call=first.steps_per_call,
            checkpoint_seconds=first.options.checkpoint_seconds,
            on_report=on_report,
            on_note=console.say,
        )


def _mean(reports: list[loop.Report]) -> loop.Report:
    """The mean of the reports of runs at the same step; of counts the largest."""
    metrics = {}
    for name, value in reports[0].metrics.items():
        values = [report.metrics[name] for report in reports]
        metrics[name] = float(np.mean(values)) if isinstance(value, float) else max(values)
    return replace(reports[0], metrics=metrics)
