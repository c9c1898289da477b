"""Several finished runs beside each other: mean and deviation over seeds, curves, fronts."""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from evojax_suite.reporting import report
from evojax_suite.reporting.charts import COLORS, Chart, Series
from evojax_suite.reporting.report import Figure, Report, Table
from evojax_suite.runtime.results import flat, read_lines, write_json


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
    """Columns of metrics.jsonl that are drawn against one another."""
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

    def numbers(self) -> dict[str, float]:
        """The numbers of the summary, by path; those of devs and coreset by method and size too."""
        found = {
            name: float(value)
            for name, value in flat(self.summary).items()
            if isinstance(value, int | float) and not isinstance(value, bool)
        }
        for row in self.summary.get("results", ()):
            if row["test_accuracy_mean"] is not None:
                found[_set(row)] = row["test_accuracy_mean"]
        return found


def _set(row: dict) -> str:
    return f"{row['method']}, {row['num_images']} images"


def read(path: Path, systems: Collection[str]) -> Run:
    """The run of one of `systems` in the folder `path`. Raises ValueError, one line, where none
    ended there."""
    try:
        summary = json.loads((path / "summary.json").read_text())
        settings = json.loads((path / "config.json").read_text())
    except FileNotFoundError as error:
        missing = Path(error.filename).name
        raise ValueError(f"{path} holds no finished run: {missing} is missing") from None
    except (OSError, ValueError) as error:
        raise ValueError(f"{path} holds no run: {error}") from None
    if not isinstance(summary, dict) or summary.get("system") not in systems:
        raise ValueError(f"{path}/summary.json is of none of {', '.join(systems)}")
    results = summary.get("results", [])
    if not isinstance(results, list):
        raise ValueError(f"{path}/summary.json has results that are no list")
    if type(summary.get("seed")) is not int:
        raise ValueError(f"{path}/summary.json has no seed, got {summary.get('seed')!r}")
    if not isinstance(settings, dict) or "dataset" not in settings:
        raise ValueError(f"{path}/config.json holds no settings")
    needed = {"method", "num_images", "test_accuracy_mean"}
    if not all(isinstance(row, dict) and needed <= row.keys() for row in results):
        raise ValueError(f"{path}/summary.json has results without {', '.join(sorted(needed))}")
    try:
        metrics = read_lines(path / "metrics.jsonl")
    except ValueError as error:
        raise ValueError(f"{path}/metrics.jsonl is no text: {error}") from None
    if not all(isinstance(row, dict) for row in metrics):
        raise ValueError(f"{path}/metrics.jsonl holds a line that is no object")
    return Run(path, summary, flat(settings), metrics)


@dataclass(frozen=True)
class Group:
    """Runs that differ in nothing but the seed."""

    name: str
    runs: Sequence[Run]

    @property
    def system(self) -> str:
        return self.runs[0].system

    def values(self, key: str) -> np.ndarray:
        """(k,) of the runs that have it."""
        return np.array([run.numbers()[key] for run in self.runs if key in run.numbers()], float)


def grouped(runs: Sequence[Run]) -> list[Group]:
    """Runs of equal settings together, named by what differs from others of the same system.
    Raises ValueError where two runs are of the same settings and seed."""
    paths = [run.path.resolve() for run in runs]
    for path in paths:
        if paths.count(path) > 1:
            raise ValueError(f"{path} is given twice")
    own: dict[str, list[Run]] = {}
    for run in runs:
        own.setdefault(run.system, []).append(run)
    found: dict[str, list[Run]] = {}
    for system, members in own.items():
        names = sorted({name for run in members for name in run.settings if name != "seed"})
        values = {name: [run.settings.get(name) for run in members] for name in names}
        differing = [name for name in names if any(v != values[name][0] for v in values[name])]
        for run in members:
            says = [_setting(name, run.settings.get(name)) for name in differing]
            if len(own) > 1 or not says:
                dataset = Path(str(run.settings["dataset"])).name
                says = [system, *([] if len(own) > 1 else [dataset]), *says]
            found.setdefault(", ".join(says), []).append(run)
    for name, members in found.items():
        first: dict[int, Run] = {}
        for run in members:
            other = first.setdefault(run.seed, run)
            if other is not run:
                raise ValueError(
                    f"{other.path} and {run.path} have the same settings and seed {run.seed} "
                    f"({name})"
                )
    return [
        Group(name, sorted(members, key=lambda run: run.seed)) for name, members in found.items()
    ]


def _setting(path: str, value: Any) -> str:
    """A setting in words; what is a name speaks for itself."""
    name = path.rpartition(".")[2]
    return str(value) if isinstance(value, str) else f"{name} {value}"


def _quantities(group: Group, columns: Mapping[str, Columns]) -> dict[str, Quantity]:
    """Those that a group has, by title; the accuracies of sets first."""
    sets = dict.fromkeys(_set(row) for run in group.runs for row in run.summary.get("results", ()))
    found = [*(accuracy(key, key) for key in sets), *columns[group.system].quantities]
    return {quantity.title: quantity for quantity in found if len(group.values(quantity.key))}


def _cell(group: Group, quantity: Quantity) -> str:
    values = group.values(quantity.key)
    return _spread(values, quantity) if len(values) else ""


def _spread(values: np.ndarray, quantity: Quantity) -> str:
    shown = f"{quantity.factor * values.mean():,.{quantity.digits}f}"
    if len(values) == 1:
        return shown
    return f"{shown} ± {quantity.factor * values.std():,.{quantity.digits}f}"


def _differences(groups: Sequence[Group], quantity: Quantity) -> list[list[str]]:
    """Table rows of each group's differences from the first, over the seeds that both have."""
    from scipy.stats import ttest_rel  # half a second to import

    first = {run.seed: run.numbers().get(quantity.key) for run in groups[0].runs}
    rows = []
    for group in groups[1:]:
        pairs = [(run.numbers().get(quantity.key), first.get(run.seed)) for run in group.runs]
        both = np.array([pair for pair in pairs if None not in pair], float).reshape(-1, 2)
        if not len(both):
            continue
        gain = both[:, 0] - both[:, 1]
        # A test of two seeds says nothing.
        p = (
            f"{ttest_rel(both[:, 0], both[:, 1]).pvalue:.3f}"
            if len(gain) > 2 and np.ptp(gain) > 0
            else ""
        )
        more = f"{int((gain > 0).sum())} of {len(gain)}"
        rows.append([group.name, _spread(gain, quantity), more, p])
    return rows


def _curve(group: Group, x: str, y: str, color: str) -> Series | None:
    """The mean over seeds, shaded by a standard deviation, as far as all have come."""
    lines = [
        [row for row in run.metrics if x in row and y in row and not row.get("judging")]
        for run in group.runs
    ]
    length = min(map(len, lines))
    if not length:
        return None
    xs, ys = (
        np.array(
            [[np.nan if row[k] is None else row[k] for row in own[:length]] for own in lines], float
        )
        for k in (x, y)
    )
    mean, spread = ys.mean(0), ys.std(0)
    band = (mean - spread, mean + spread) if len(lines) > 1 else (None, None)
    return Series(group.name, xs.mean(0), mean, *band, color=color)


def _figures(groups: Sequence[Group], columns: Mapping[str, Columns]) -> list[Figure]:
    colors = [COLORS[i % len(COLORS)] for i in range(len(groups))]
    figures = []
    for system in dict.fromkeys(group.system for group in groups):
        own = [(g, c) for g, c in zip(groups, colors, strict=True) if g.system == system]
        charts = []
        for x, y in columns[system].curves:
            series = [found for g, c in own if (found := _curve(g, x, y, c)) is not None]
            if series:
                title = columns[system].step if x == "generation" else x.replace("_", " ")
                charts.append(Chart(title, y.replace("_", " "), series))
        if charts:
            caption = f"{system}: mean over seeds, shaded by one standard deviation"
            figures.append(Figure(f"{system}-curves", caption, charts))
        front = [
            Series(
                group.name,
                *np.array([point[:2] for point in points], float).T,
                style="points",
                color=color,
                notes=[point[2] for point in points],
            )
            for group, color in own
            if (points := [point for run in group.runs for point in _networks(run)])
        ]
        if front:
            chart = Chart("parameters", "test accuracy (%)", front, log_x=True)
            figures.append(
                Figure(f"{system}-networks", "Each network's size and accuracy", [chart])
            )
    sets = [(g, c) for g, c in zip(groups, colors, strict=True) if g.runs[0].summary.get("results")]
    series = []
    for group, color in sets:
        methods = sorted({row["method"] for run in group.runs for row in run.summary["results"]})
        for index, method in enumerate(methods):
            rows = [
                r for run in group.runs for r in run.summary["results"] if r["method"] == method
            ]
            sizes = sorted({row["num_images"] for row in rows})
            values = [100 * group.values(f"{method}, {size} images") for size in sizes]
            if not all(map(len, values)):
                continue
            mean = np.array([v.mean() for v in values])
            spread = np.array([v.std() for v in values])
            name = f"{method}, {group.name}" if len(sets) > 1 else method
            shown = color if len(sets) > 1 else COLORS[index % len(COLORS)]
            series.append(
                Series(name, sizes, mean, mean - spread, mean + spread, "joined points", shown)
            )
    if series:
        chart = Chart("images", "test accuracy (%)", series, log_x=True)
        figures.append(
            Figure("sets", "Small sets: mean over seeds, and a standard deviation", [chart])
        )
    return figures


def _networks(run: Run) -> list[tuple[float, float, str]]:
    """The networks of a run: parameters, test accuracy in per cent, and a note of each."""
    file = run.path / "summary.json"
    rows = []
    try:
        if (run.path / "front.json").exists():
            file = run.path / "front.json"
            rows = json.loads(file.read_text())
        elif "num_parameters" in run.summary:
            rows = [run.summary, *([run.summary["smallest"]] if "smallest" in run.summary else [])]
        return [
            (
                float(row["num_parameters"]),
                100 * float(row["test_accuracy"]),
                f"seed {run.seed}" + (f", {'-'.join(map(str, units))}" if units else ""),
            )
            for row in rows
            if row["test_accuracy"] is not None
            for units in [row.get("hidden_units")]
        ]
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{file} says nothing of its networks: {error!r}") from None


def write(
    paths: Sequence[Path], folder: Path, repeat: Sequence[str], columns: Mapping[str, Columns]
) -> str:
    """Compare the runs in `paths`; write `folder`/report.html, comparison.json and figures/.

    columns: what is shown of each system. repeat: lines of shell.

    Returns a table as text. Raises ValueError, one line, for what is no finished run.
    """
    groups = grouped([read(path, columns) for path in paths])
    tables, headline, texts = [], [], []
    for system in dict.fromkeys(group.system for group in groups):
        own = [group for group in groups if group.system == system]
        quantities = {t: q for group in own for t, q in _quantities(group, columns).items()}
        header = ["", "seeds", *quantities]
        rows = [
            [group.name, str(len(group.runs)), *(_cell(group, q) for q in quantities.values())]
            for group in own
        ]
        tables.append(Table(f"{system}: mean ± standard deviation of these seeds", header, rows))
        texts.append(_as_text([header, *rows]))
        for title, quantity in list(quantities.items())[:1]:
            name, unit = title.removesuffix(" (%)"), " %" * title.endswith("(%)")
            headline += [(row[2] + unit, f"{name}, {row[0]}") for row in rows[:6] if row[2]]
            differences = _differences(own, quantity)
            if differences:
                header = ["", "difference", "seeds with more", "p (paired t-test)"]
                heading = f"{title}: difference from {own[0].name}, same seeds"
                tables.append(Table(heading, header, differences))
                texts.append(f"{heading}\n{_as_text([header, *differences])}")
    figures = _figures(groups, columns)
    folder.mkdir(parents=True, exist_ok=True)
    write_json(
        folder / "comparison.json",
        [
            {
                "name": group.name,
                "system": group.system,
                "seeds": [run.seed for run in group.runs],
                "runs": [str(run.path) for run in group.runs],
                "values": {
                    q.key: group.values(q.key) for q in _quantities(group, columns).values()
                },
            }
            for group in groups
        ],
    )
    report.write(
        folder / "report.html",
        Report(
            "Runs compared",
            f"{len(paths)} runs; those that differ in nothing but the seed are one row.",
            headline,
            tables,
            figures,
            [["runs", ", ".join(str(path) for path in paths)]],
        ),
        repeat,
        {group.name: {str(run.path): run.summary for run in group.runs} for group in groups},
    )
    return "\n\n".join(texts)


def _as_text(rows: Sequence[Sequence[str]]) -> str:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in rows
    )
