"""The one runner of all systems: a run, several seeds, a dry run."""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import psutil
import yaml

from evojax_suite.data import load
from evojax_suite.reporting import comparison, formats, report
from evojax_suite.reporting.loggers import logged
from evojax_suite.reporting.progress import SHOWN, console, progress
from evojax_suite.running.options import RunOptions
from evojax_suite.running.system import Job, Phase, System
from evojax_suite.runtime import devices, loop
from evojax_suite.runtime.loop import LoopResult, StepReport
from evojax_suite.runtime.program import ProgramTooLarge
from evojax_suite.runtime.resources import recorded
from evojax_suite.runtime.results import (
    check_has_begun,
    open_run,
    read_lines,
    set_aside,
    write_json,
)
from evojax_suite.types import Split

_FEW_IMAGES = 5  # of a class, below which a run says so


@dataclass(frozen=True)
class _Run:
    """A run whose directory is open. The test split waits here for `finish`."""

    system: System
    job: Job[Any]
    test: Split

    def folder(self, phase: Phase) -> Path:
        return self.job.directory / phase.folder

    def leave_if_empty(self) -> None:
        """Remove the directory if nothing was computed, so that the run may begin otherwise."""
        files = [path for path in self.job.directory.rglob("*") if path.is_file()]
        if not any(path.stat().st_size for path in files if path.name != "config.json"):
            shutil.rmtree(self.job.directory)

    def finish(self, result: Any) -> Path:
        """Evaluate what the search returned, write summary and page, return the directory."""
        system, job, options = self.system, self.job, self.job.options
        directory = job.directory
        summary = system.finish(job, result, self.test)
        numbers = {
            "system": system.name,
            "dataset": job.dataset.name,
            **summary.numbers,
            "seed": options.seed,
        }
        unlike = []
        if job.differences is not None:
            numbers["options"] = job.differences
            unlike = [["unlike the paper", formats.settings(job.differences)]]
        write_json(directory / "summary.json", numbers)
        if number := numbers.get("num_failed"):
            console.say(f"failed evaluations, NaN or infinite: {number:,}")
        if undefined := comparison.undefined_result(numbers, system.columns):
            raise ValueError(
                f"nothing came of the run in {directory}: {undefined} is not finite, as where a "
                "learning rate is too large"
            )
        page = system.present(job, summary)
        if page is None:
            return directory
        report.write(
            directory / "report.html",
            replace(page, numbers=[*page.numbers, *unlike]),
            report.commands(directory, system.command, options.typed, options.data_dir),
            {"config.json": options.settings(), "summary.json": numbers},
        )
        for line in (*page.closing, f"report: {directory / 'report.html'}"):
            console.result(line)
        return directory


def _begin(system: System, options: RunOptions, may_be_new: bool = True) -> _Run:
    """Prepare a run and open its directory. may_be_new: whether one that is to go on may begin.
    Raises ValueError, DataError or OSError, one line."""
    where, cache = (options.dataset, options.data_dir), options.cache_data
    dataset = load(*where, cache=cache, image_size=options.image_size)
    directory = options.directory(system.name, dataset.name)
    if options.resume and not may_be_new and devices.is_first():
        check_has_begun(directory)
    job = system.prepare(options, dataset.without_test(), directory)
    if options.restart and (before := set_aside(directory)):
        console.say(f"the run of before is in {before}")
    open_run(directory, job.options.settings(), options.resume, system.may_grow)
    sizes = {"training": job.dataset.train, "validation": job.dataset.validation}
    sizes["test"] = dataset.test
    counts = [f"{len(split):,} {name}" for name, split in sizes.items() if len(split)]
    console.say(
        f"{dataset.name}: {', '.join(counts)} images, {dataset.num_classes} classes; run in "
        f"{directory}"
    )
    of_class = np.bincount(job.dataset.train.labels, minlength=dataset.num_classes)
    if (least := int(of_class.min())) < _FEW_IMAGES:
        name = dataset.class_names[int(of_class.argmin())]
        console.say(f"{least} training images of the class {name}: a run on so few says little")
    if job.differences is not None:
        console.say(f"settings that differ from the paper's: {formats.settings(job.differences)}")
    for note in job.notes:
        console.say(note)
    return _Run(system, job, dataset.test)


_Drive = Callable[[Sequence[_Run], Sequence[Phase]], list[LoopResult]]


def _drive(runs: Sequence[_Run], phases: Sequence[Phase]) -> list[LoopResult]:
    """Do the loop of each run; those of several runs in one program."""
    phase, options = phases[0], runs[0].job.options
    several = f", {len(runs)} seeds" if len(runs) > 1 else ""
    shown = {**SHOWN, **runs[0].system.metrics}
    folders = [run.folder(each) for run, each in zip(runs, phases, strict=True)]
    with ExitStack() as stack:
        show = stack.enter_context(
            progress(f"{phase.title}{several}", phase.num_steps, phase.members_per_step, shown)
        )
        loggers = options.loggers if devices.is_first() else ()
        logs = [
            stack.enter_context(logged(loggers, folder, run.job.options.settings()))
            for run, folder in zip(runs, folders, strict=True)
        ]
        if phase.records_resources:
            folders[0].mkdir(parents=True, exist_ok=True)
            stack.enter_context(recorded(folders[0] / "resources.jsonl"))

        def on_report(reports: Mapping[int, StepReport]) -> None:
            for place, step in reports.items():
                logs[place](step)
            show(_mean([*reports.values()]))

        shared = (phase.params, phase.data, phase.num_steps)
        settings: dict[str, Any] = {
            "steps_per_call": phase.steps_per_call,
            "checkpoint_seconds": options.checkpoint_seconds,
            "on_note": console.say,
        }
        if len(runs) > 1:
            keys = [each.key for each in phases]
            settings["num_devices"] = options.devices
            return loop.run_together(
                phase.algorithm, keys, *shared, folders, on_report=on_report, **settings
            )
        alone = {"num_devices": options.devices, "on_report": lambda step: on_report({0: step})}
        alone["on_part"] = show.part
        one = phase.algorithm, phase.key, *shared, folders[0]
        return [loop.run(*one, **alone, **settings)]


def _mean(reports: list[StepReport]) -> StepReport:
    """The mean of the reports of runs at the same step; of counts the largest."""
    metrics = {}
    for name, value in reports[0].metrics.items():
        values = [report.metrics[name] for report in reports]
        metrics[name] = float(np.mean(values)) if isinstance(value, float) else max(values)
    return replace(reports[0], metrics=metrics)


def _may_share(one: Phase, other: Phase) -> bool:
    """Whether two phases may share a program: the same loop, of the same numbers."""
    if one is other:
        return True
    if one.title != other.title or not (one.same_for_seeds and other.same_for_seeds):
        return False
    same = jax.tree.map(jnp.array_equal, (one.params, one.data), (other.params, other.data))
    return all(jax.tree.leaves(same))


def _search(runs: Sequence[_Run], drive: _Drive) -> list[Any]:
    """Advance the searches of `runs` side by side, each loop by `drive`, and return what they
    return. Loops that may share a program are driven together."""
    searches = [run.system.search(run.job) for run in runs]
    results: list[Any] = [None] * len(runs)
    waiting: dict[int, Phase] = {}

    def resume(place: int, result: LoopResult | None) -> None:
        try:
            waiting[place] = searches[place].send(result)  # pyright: ignore[reportArgumentType]
        except StopIteration as end:
            results[place] = end.value

    for place in range(len(runs)):
        resume(place, None)
    while waiting:
        # Loops of one run alone come first, as the others wait for what it wants after them.
        order = sorted(waiting, key=lambda place: (waiting[place].same_for_seeds, place))
        places = [place for place in order if _may_share(waiting[place], waiting[order[0]])]
        phases = [waiting.pop(place) for place in places]
        for place, result in zip(places, drive([runs[n] for n in places], phases), strict=True):
            resume(place, result)
    return results


def run(system: System, *options: RunOptions, may_be_new: bool = True) -> list[Path]:
    """Run `system` with each of `options`, which differ in their seeds alone, side by side: loops
    that are the same program for several seeds go on in one. Returns the directories.

    may_be_new: whether a run that is to go on may begin, as some of several seeds must. Raises
    ValueError, DataError or OSError, each with one line to show, and `loop.Interrupted`.
    """
    runs = [_begin(system, each, may_be_new) for each in options]
    try:
        results = _search(runs, _drive)
    except ProgramTooLarge:
        for run in runs:
            run.leave_if_empty()
        raise
    return [run.finish(result) for run, result in zip(runs, results, strict=True)]


def dry_run(system: System, options: RunOptions) -> None:
    """Do the first steps of each loop in a folder that is deleted; print settings, times and memory
    of the whole."""
    num_seeds, most_steps = len(options.each()), 0
    rows: list[tuple[Phase, _Pace]] = []
    first: list[LoopResult] = []  # of the first loop

    def drive_few(runs: Sequence[_Run], phases: Sequence[Phase]) -> list[LoopResult]:
        nonlocal most_steps, first
        (run,), (phase,) = runs, phases
        if phase.dry_run_like is not None and rows:
            rows.append((phase, rows[0][1].times(phase.dry_run_like)))
            return first
        steps = min(phase.num_steps, phase.dry_run_steps)
        most_steps = max(most_steps, phase.dry_run_steps)
        results = _drive(runs, [replace(phase, num_steps=steps)])
        first = first or results
        rows.append((phase, _pace(phase, run.folder(phase))))
        return results

    with tempfile.TemporaryDirectory(prefix="evojax-suite-") as folder:
        here = {"runs_dir": Path(folder), "name": "run", "resume": False, "loggers": ()}
        run = _begin(system, replace(options.each()[0], **here).here())
        try:
            _search([run], drive_few)
        except loop.Interrupted as stop:
            how = "nothing of a dry run is kept"
            raise loop.Interrupted(stop.signal_number, stop.step, how) from None
        settings = json.loads((run.job.directory / "config.json").read_text())
    if not devices.is_first():
        return
    print(yaml.safe_dump(settings, sort_keys=False, allow_unicode=True).rstrip())
    print(f"\nmemory: {_memory()}")
    shown, total = formats.short_duration, 0.0
    for phase, pace in rows:
        per_step = (pace.work + pace.compilation) / phase.dry_run_at_once
        seconds = pace.once + phase.num_steps * per_step
        total += num_seeds * seconds
        print(
            f"{phase.title}: {shown(seconds)}, {phase.num_steps:,} steps of {shown(per_step)} and "
            f"{shown(pace.once)} of compilation"
        )
    if not rows:
        print("no steps to time: what selects and judges is not predicted")
        return
    all_seeds = f", {num_seeds} seeds" if num_seeds > 1 else ""
    few = f" {most_steps}" if most_steps > 1 else ""
    print(
        f"in all {shown(total)}{all_seeds}, if the other steps are like the first{few}; "
        "what judges at the end is not in it"
    )


class _Pace(NamedTuple):
    """Seconds of a step, those of its compilation apart, and of what happens once."""

    work: float
    compilation: float
    once: float

    def times(self, work: float) -> _Pace:
        """Returns the pace of a loop whose step works `work` times as long, compiled once."""
        return _Pace(work * self.work, 0.0, self.once or self.compilation)


def _pace(phase: Phase, folder: Path) -> _Pace:
    """The pace of a loop from some of its steps. The very first one counts only where there is no
    other, as it may compile: what it takes beyond the others happens once, on all images as on a
    part. Compilation that is a stage of every step is part of each; that of some steps alone
    happens once."""
    lines = read_lines(folder / "timing.jsonl")
    shares = []  # of compilation in the seconds of each call
    for line in lines:
        stages = line["stages"]
        shares.append(stages.get("compilation", 0.0) / max(sum(stages.values()), 1e-9))
    each, once = min(shares) > 0, 0.0
    works, compilations = [], []
    for line, share in zip(lines, shares, strict=True):
        stage = share * line["seconds"]
        works.append((line["seconds"] - stage) / line["steps"])
        compilations.append(each * stage / line["steps"])
        once += line["compile_seconds"] + (not each) * stage
    work, compilation = (float(np.mean(some[1:] or some)) for some in (works, compilations))
    once += max(0.0, works[0] + compilations[0] - work - compilation)
    return _Pace(phase.dry_run_factor * work, compilation, once)


def _memory() -> str:
    """The most that was in use: of a device where it tells, of the process else."""
    stats = [device.memory_stats() or {} for device in jax.local_devices()]
    peaks = [one["peak_bytes_in_use"] for one in stats if "peak_bytes_in_use" in one]
    if peaks:
        return f"{max(peaks) / 2**30:.1f} GiB on a device"
    return f"{psutil.Process().memory_info().rss / 2**30:.1f} GiB"
