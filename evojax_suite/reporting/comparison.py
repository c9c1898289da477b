"""Comparisons of finished runs: mean and deviation over seeds, curves, fronts."""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import cycle
from pathlib import Path
from typing import Any

import numpy as np

from evojax_suite.reporting import report
from evojax_suite.reporting.charts import COLORS, Chart, Series, column
from evojax_suite.reporting.report import Figure, Report, Table
from evojax_suite.runtime.results import flat, read_lines, write_json

_LONGEST_NAME = 40  # of a group, with its settings in it


@dataclass(frozen=True)
class Quantity:
    """A number of the summary and how it is shown."""

    key: str  # its path in the summary, joined by dots
    title: str
    factor: float = 1.0
    digits: int = 1


def accuracy(key: str, title: str) -> Quantity:
    """An accuracy of the summary, shown in per cent."""
    return Quantity(key, f"{title} (%)", 100, 2)


SECONDS = Quantity("seconds", "seconds")


@dataclass(frozen=True)
class Columns:
    """What comparisons show of the runs of a system."""

    quantities: tuple[Quantity, ...] = ()
    """The most important first; the accuracies of small sets come before them."""
    curves: tuple[tuple[str, str], ...] = ()
    """Pairs (x, y) of columns of metrics.jsonl that are drawn against each other."""
    step: str = "generation"
    """What a generation is called."""


@dataclass(frozen=True)
class Run:
    """A finished run."""

    path: Path
    summary: dict[str, Any]
    settings: dict[str, Any]  # flat
    metrics: list[dict[str, Any]]

    @property
    def system(self) -> str:
        return self.summary["system"]

    @property
    def seed(self) -> int:
        return self.summary["seed"]

    @property
    def results(self) -> list[dict[str, Any]]:
        """A row for each small set of devs and coreset; none of other systems."""
        return self.summary.get("results", [])

    def numbers(self) -> dict[str, float]:
        """Returns the numbers of the summary, by path; of `results` by method and size too."""
        numbers = {n: float(v) for n, v in flat(self.summary).items() if type(v) in (int, float)}
        tested = [row for row in self.results if row["test_accuracy_mean"] is not None]
        return numbers | {_set(row): row["test_accuracy_mean"] for row in tested}


def undefined_result(summary: Mapping[str, Any], columns: Columns) -> str | None:
    """The title of the most important quantity of a summary, or of the accuracies of all its small
    sets, if it was computed and is not finite; else None."""
    if rows := summary.get("results"):
        title, values = "the test accuracy of each set", [row["test_accuracy_mean"] for row in rows]
    elif not columns.quantities:
        return None
    else:
        first = columns.quantities[0]
        title, values = first.title, [flat(summary).get(first.key)]
    is_undefined = [value is not None and not np.isfinite(value) for value in values]
    return title if all(is_undefined) else None


def _set(row: dict[str, Any]) -> str:
    return f"{row['method']}, {row['num_images']} images"


def read(path: Path, systems: Collection[str], with_metrics: bool = True) -> Run:
    """Returns the run of one of `systems` that ended in `path`. Raises ValueError, one line."""

    def require(holds: bool, otherwise: str) -> None:
        if not holds:
            raise ValueError(f"{path}/{otherwise}")

    try:
        summary = json.loads((path / "summary.json").read_text())
        settings = json.loads((path / "config.json").read_text())
    except FileNotFoundError as error:
        missing = Path(error.filename).name
        raise ValueError(f"{path} holds no finished run: {missing} is missing") from None
    except (OSError, ValueError) as error:
        raise ValueError(f"{path} holds no run: {error}") from None
    known = isinstance(summary, dict) and summary.get("system") in systems
    require(known, f"summary.json is of none of {', '.join(systems)}")
    results, seed = summary.get("results", []), summary.get("seed")
    require(isinstance(results, list), "summary.json has results that are no list")
    require(type(seed) is int, f"summary.json has no seed, got {seed!r}")
    has_dataset = isinstance(settings, dict) and "dataset" in settings
    require(has_dataset, "config.json holds no settings")
    needed = {"method", "num_images", "test_accuracy_mean"}
    complete = all(isinstance(row, dict) and needed <= row.keys() for row in results)
    require(complete, f"summary.json has results without {', '.join(sorted(needed))}")
    try:
        metrics = read_lines(path / "metrics.jsonl") if with_metrics else []
    except ValueError as error:
        raise ValueError(f"{path}/metrics.jsonl is no text: {error}") from None
    are_objects = all(isinstance(row, dict) for row in metrics)
    require(are_objects, "metrics.jsonl holds a line that is no object")
    return Run(path, summary, flat(settings), metrics)


@dataclass(frozen=True)
class Group:
    """Runs that differ in nothing but the seed."""

    name: str
    runs: Sequence[Run]
    differing: tuple[str, ...] = ()
    """The settings that are not the same in all groups of the system."""

    @property
    def system(self) -> str:
        return self.runs[0].system

    @property
    def dataset(self) -> Any:
        return self.runs[0].summary.get("dataset")

    def values(self, key: str) -> np.ndarray:
        """Returns the number `key` of the runs that have it, (k,)."""
        return np.array([run.numbers()[key] for run in self.runs if key in run.numbers()], float)


def differing(settings: Sequence[Mapping[str, Any]]) -> list[str]:
    """Returns the settings, but the seed, that are not the same in all runs."""
    names, first = dict.fromkeys(name for each in settings for name in each), settings[0]
    return [
        name
        for name in names
        if name != "seed" and any(each.get(name) != first.get(name) for each in settings)
    ]


def grouped(runs: Sequence[Run]) -> list[Group]:
    """Returns groups of runs of equal settings, named by those that differ from others of the same
    system. Raises ValueError if two runs have the same settings and seed."""
    paths = [run.path.resolve() for run in runs]
    for path in paths:
        if paths.count(path) > 1:
            raise ValueError(f"{path} is given twice")
    of_system: dict[str, list[Run]] = {}
    for run in runs:
        of_system.setdefault(run.system, []).append(run)
    named: dict[str, list[Run]] = {}
    differ: dict[str, tuple[str, ...]] = {}
    for system, members in of_system.items():
        names = differ[system] = tuple(sorted(differing([run.settings for run in members])))
        for run in members:
            parts = [setting(name, run.settings.get(name)) for name in names]
            if len(of_system) > 1:
                parts = [system, *parts]
            elif not parts:
                parts = [system, Path(str(run.settings["dataset"])).name]
            named.setdefault(", ".join(parts), []).append(run)
    groups = []
    for name, members in named.items():
        first: dict[int, Run] = {}
        for run in members:
            other = first.setdefault(run.seed, run)
            if other is not run:
                same = f"the same settings and seed {run.seed} ({name})"
                raise ValueError(f"{other.path} and {run.path} have {same}")
        members = sorted(members, key=lambda run: run.seed)
        groups.append(Group(name, members, differ[members[0].system]))
    return _briefly_named(groups)


def _briefly_named(groups: list[Group]) -> list[Group]:
    """The groups, named by the folders of their first runs where a name is too long for a legend
    and the folders tell them apart."""
    folders = [re.sub(r"-seed\d+$", "", group.runs[0].path.resolve().name) for group in groups]
    if max(len(group.name) for group in groups) <= _LONGEST_NAME or len({*folders}) < len(groups):
        return groups
    return [replace(group, name=name) for group, name in zip(groups, folders, strict=True)]


def _differing(groups: Sequence[Group]) -> Table | None:
    """The settings in which groups of a system differ, unless they are in their names."""
    names = groups[0].differing
    if not names or all(setting(name, _value(g, name)) in g.name for g in groups for name in names):
        return None
    rows = [[name, *(str(_value(group, name)) for group in groups)] for name in names]
    return Table(f"{groups[0].system}: what differs", ["", *(group.name for group in groups)], rows)


def _value(group: Group, name: str) -> Any:
    return group.runs[0].settings.get(name)


def setting(path: str, value: Any) -> str:
    """Returns a setting as text: strings are shown without the name of the setting."""
    return value if isinstance(value, str) else f"{path.rpartition('.')[2]} {value}"


def quantities_of(group: Group, columns: Mapping[str, Columns]) -> dict[str, Quantity]:
    """Returns the quantities that a group has, by title; the accuracies of small sets first."""
    sets = dict.fromkeys(_set(row) for run in group.runs for row in run.results)
    quantities = [*(accuracy(key, key) for key in sets), *columns[group.system].quantities]
    return {quantity.title: quantity for quantity in quantities if len(group.values(quantity.key))}


def _spread(values: np.ndarray, quantity: Quantity) -> str:
    """Returns the mean of `values` (k,), with their deviation if there are several; "" of none."""
    if not len(values):
        return ""
    numbers = quantity.factor * np.array([values.mean(), values.std()])
    shown = [f"{number:,.{quantity.digits}f}" for number in numbers]
    return shown[0] if len(values) == 1 else " ± ".join(shown)


def _differences(groups: Sequence[Group], quantity: Quantity) -> list[list[str]]:
    """Returns rows of the difference of each group from the first, over seeds that both have; none
    of groups of another dataset."""
    from scipy.stats import ttest_rel  # half a second to import

    first = {run.seed: run.numbers().get(quantity.key) for run in groups[0].runs}
    rows, dataset = [], groups[0].dataset
    for group in (other for other in groups[1:] if other.dataset == dataset):
        pairs = [(run.numbers().get(quantity.key), first.get(run.seed)) for run in group.runs]
        both = np.array([pair for pair in pairs if None not in pair], float).reshape(-1, 2)
        if not len(both):
            continue
        gain = both[:, 0] - both[:, 1]
        can_be_tested = len(gain) > 2 and np.ptp(gain) > 0
        p = f"{ttest_rel(both[:, 0], both[:, 1]).pvalue:.3f}" if can_be_tested else "too few seeds"
        more = f"{int((gain > 0).sum())} of {len(gain)}"
        rows.append([group.name, _spread(gain, quantity), more, p])
    return rows


def _curve(group: Group, x: str, y: str, color: str) -> Series | None:
    """Returns the mean over seeds, shaded by a deviation, up to the last step that all have."""
    lines = [
        [row for row in run.metrics if x in row and y in row and not row.get("judging")]
        for run in group.runs
    ]
    length = min(map(len, lines))
    if not length:
        return None
    xs, ys = (np.array([column(rows[:length], name) for rows in lines]) for name in (x, y))
    mean, spread = ys.mean(0), ys.std(0)
    band = (mean - spread, mean + spread) if len(lines) > 1 else (None, None)
    return Series(group.name, xs.mean(0), mean, *band, color=color)


def _figures(groups: Sequence[Group], columns: Mapping[str, Columns]) -> list[Figure]:
    colored = [*zip(groups, cycle(COLORS), strict=False)]
    figures = []
    for system in dict.fromkeys(group.system for group in groups):
        members = [(group, color) for group, color in colored if group.system == system]
        charts = []
        for x, y in columns[system].curves:
            series = [curve for group, color in members if (curve := _curve(group, x, y, color))]
            title = columns[system].step if x == "generation" else x.replace("_", " ")
            charts += [Chart(title, y.replace("_", " "), series)] if series else []
        if charts:
            caption = f"{system}: mean over seeds, shaded by one standard deviation"
            figures.append(Figure(f"{system}-curves", caption, charts))
        front = []
        for group, color in members:
            points = [point for run in group.runs for point in _networks(run)]
            if points:
                x, y, notes = zip(*points, strict=True)
                front.append(Series(group.name, x, y, style="points", color=color, notes=notes))
        if front:
            chart = Chart("parameters", "test accuracy (%)", front, log_x=True)
            caption = "Each network's size and accuracy"
            figures.append(Figure(f"{system}-networks", caption, [chart]))
    series = _curves_by_size([group for group in groups if group.runs[0].results])
    if series:
        chart = Chart("images", "test accuracy (%)", series, log_x=True)
        caption = "Small sets: mean over seeds, and a standard deviation"
        figures.append(Figure("sets", caption, [chart]))
    return figures


def _curves_by_size(groups: Sequence[Group]) -> list[Series]:
    """Returns the accuracy of small sets by their size, for each method of each group."""
    series = []
    for group in groups:
        results = [row for run in group.runs for row in run.results]
        for method in sorted({row["method"] for row in results}):
            sizes = sorted({row["num_images"] for row in results if row["method"] == method})
            values = [100 * group.values(f"{method}, {size} images") for size in sizes]
            if not all(map(len, values)):
                continue
            mean, spread = np.array([(v.mean(), v.std()) for v in values]).T
            band = mean - spread, mean + spread
            name = method if len(groups) == 1 else f"{method}, {group.name}"
            color = COLORS[len(series) % len(COLORS)]
            series.append(Series(name, sizes, mean, *band, "joined points", color))
    return series


def _networks(run: Run) -> list[tuple[float, float, str]]:
    """Returns the networks of a run: parameters, test accuracy in per cent, and a note of each."""
    file = run.path / "summary.json"
    rows, networks = [], []
    try:
        if (run.path / "front.json").exists():
            file = run.path / "front.json"
            rows = json.loads(file.read_text())
        elif "num_parameters" in run.summary:
            rows = [run.summary, *([run.summary["smallest"]] if "smallest" in run.summary else [])]
        for row in rows:
            if row["test_accuracy"] is not None:
                size, percent = float(row["num_parameters"]), 100 * float(row["test_accuracy"])
                units = row.get("hidden_units")
                note = f"seed {run.seed}" + (f", {'-'.join(map(str, units))}" if units else "")
                networks.append((size, percent, note))
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{file} says nothing of its networks: {error!r}") from None
    return networks


def write(
    paths: Sequence[Path], folder: Path, repeat: Sequence[str], columns: Mapping[str, Columns]
) -> str:
    """Compare the runs in `paths`; write `folder`/report.html, comparison.json and figures/. Return
    tables as text. Raises ValueError, one line, for a path without a finished run.

    repeat: lines of shell that repeat the comparison. columns: what is shown, by system.
    """
    groups = grouped([read(path, columns) for path in paths])
    tables, headline, texts = [], [], []
    for system in dict.fromkeys(group.system for group in groups):
        members = [group for group in groups if group.system == system]
        quantities = {t: q for group in members for t, q in quantities_of(group, columns).items()}
        header, rows = ["", "seeds", *quantities], []
        for group in members:
            cells = [_spread(group.values(q.key), q) for q in quantities.values()]
            rows.append([group.name, str(len(group.runs)), *cells])
        tables.append(Table(f"{system}: mean ± standard deviation of these seeds", header, rows))
        texts.append(_as_text([header, *rows]))
        if unlike := _differing(members):
            tables.append(unlike)
            texts.append(f"{unlike.heading}\n{_as_text([unlike.header, *unlike.rows])}")
        for title, quantity in list(quantities.items())[:1]:
            name, unit = title.removesuffix(" (%)"), " %" * title.endswith("(%)")
            headline += [(row[2] + unit, f"{name}, {row[0]}") for row in rows[:6] if row[2]]
            differences = _differences(members, quantity)
            if differences:
                header = ["", "difference", "seeds with more", "p (paired t-test)"]
                heading = f"{title}: difference from {members[0].name}, same seeds"
                tables.append(Table(heading, header, differences))
                texts.append(f"{heading}\n{_as_text([header, *differences])}")
    figures = _figures(groups, columns)
    folder.mkdir(parents=True, exist_ok=True)
    content = []
    for group in groups:
        row: dict[str, Any] = {"name": group.name, "system": group.system}
        row["seeds"] = [run.seed for run in group.runs]
        row["runs"] = [str(run.path) for run in group.runs]
        keys = [quantity.key for quantity in quantities_of(group, columns).values()]
        content.append(row | {"values": {key: group.values(key) for key in keys}})
    write_json(folder / "comparison.json", content)
    lead = f"{len(paths)} runs; those that differ in nothing but the seed are one row."
    numbers = [["runs", ", ".join(map(str, paths))]]
    page = Report("Runs compared", lead, headline, tables, figures, numbers)
    details: dict[str, object] = {
        group.name: {str(run.path): run.summary for run in group.runs} for group in groups
    }
    report.write(folder / "report.html", page, repeat, details)
    return "\n\n".join(texts)


def _as_text(rows: Sequence[Sequence[str]]) -> str:
    widths = [max(map(len, cells)) for cells in zip(*rows, strict=True)]
    return "\n".join("  ".join(map(str.ljust, row, widths)).rstrip() for row in rows)
