"""The page of a folder of runs: what came of each, and how it differs from the others."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

from jinja2 import Environment

from evojax_suite.reporting import comparison, report
from evojax_suite.reporting.comparison import SECONDS, Columns, Group, Quantity, Run
from evojax_suite.reporting.formats import duration
from evojax_suite.runtime.results import write_atomically

_PAGE = (
    report.HEAD
    + """\
th button { all: unset; cursor: pointer } th button:focus-visible { outline: 2px solid }
th[aria-sort=ascending] button::after { content: " \u25b2" }
th[aria-sort=descending] button::after { content: " \u25bc" }
body { max-width: 90rem } th { min-width: 0 } td, tbody th { white-space: nowrap }
td.differs { min-width: 14rem; white-space: normal }
td img { max-width: 8rem; max-height: 3.5rem; display: block }
</style></head>
<body>
<h1>{{ title }}</h1>
<p class="lead">{{ count }} finished run{{ "" if count == 1 else "s" }}, the latest first; a click
on a column sorts by it.</p>
{% for table in tables %}<h2>{{ table.system }}</h2>
<div class="wide"><table><thead><tr>{% for name in table.header %}
<th><button>{{ name }}</button></th>{% endfor %}<th></th></tr></thead><tbody>
{% for run in table.runs %}<tr>
<th data-value="{{ run.name }}"><a href="{{ run.page }}">{{ run.name }}</a></th>
{% for shown, value in run.cells %}<td data-value="{{ value }}"
{%- if loop.last %} class="differs"{% endif %}>{{ shown }}</td>
{% endfor %}<td>{% if run.picture %}<a href="{{ run.page }}"><img src="{{ run.picture }}" alt=""
 loading="lazy"></a>{% endif %}</td></tr>{% endfor %}</tbody></table></div>{% endfor %}
<script>
for (const head of document.querySelectorAll("th:has(button)"))
  head.firstChild.onclick = () => {
    const down = head.getAttribute("aria-sort") === "ascending";
    const value = row => row.cells[head.cellIndex].dataset.value;
    const order = (a, b) => (a === "") - (b === "") ||
      (down ? -1 : 1) * a.localeCompare(b, undefined, {numeric: true});
    for (const other of head.parentNode.cells) other.removeAttribute("aria-sort");
    head.setAttribute("aria-sort", down ? "descending" : "ascending");
    const body = head.closest("table").tBodies[0];
    body.append(...[...body.rows].sort((a, b) => order(value(a), value(b))));
  };
</script>
</body></html>
"""
)

_MOST_QUANTITIES, _MOST_SETTINGS = 3, 8  # that are shown of a run


@dataclass(frozen=True)
class _Row:
    """A run as the page shows it; `cells` are pairs of a text and what it is sorted by."""

    name: str
    page: str
    picture: str | None
    cells: Sequence[tuple[str, Any]]


def write(folder: Path, columns: Mapping[str, Columns]) -> Path:
    """Write `folder`/index.html of the finished runs that lie in it and return its path. columns:
    what is shown, by system; other folders are left out."""
    runs = [run for path in folder.iterdir() if (run := _read(path, columns))]
    runs.sort(key=_ended, reverse=True)
    tables = []
    for system in dict.fromkeys(run.system for run in runs):
        members = [run for run in runs if run.system == system]
        found = comparison.quantities_of(Group(system, members), columns).values()
        quantities = [each for each in found if each != SECONDS][:_MOST_QUANTITIES]
        differing = comparison.differing([run.settings for run in members])
        differing = [name for name in differing if name != "dataset"]  # it has a column
        header = ["run", *(each.title for each in quantities), "dataset", "time", "seed", "ended"]
        header.append("what differs")
        rows = [_row(run, quantities, differing) for run in members]
        tables.append({"system": system, "header": header, "runs": rows})
    content = {"title": f"Runs in {folder.name}", "count": len(runs), "tables": tables}
    path = folder / "index.html"
    write_atomically(path, Environment(autoescape=True).from_string(_PAGE).render(content))
    return path


def _read(path: Path, columns: Mapping[str, Columns]) -> Run | None:
    """The run in `path`, without its metrics; None where there is no finished one."""
    try:
        return comparison.read(path, columns, with_metrics=False)
    except ValueError:
        return None


def _ended(run: Run) -> float:
    return (run.path / "summary.json").stat().st_mtime


def _row(run: Run, quantities: Sequence[Quantity], names: Sequence[str]) -> _Row:
    name, numbers = run.path.name, run.numbers()

    def cell(quantity: Quantity) -> tuple[str, Any]:
        if quantity.key not in numbers:
            return "", ""
        value = quantity.factor * numbers[quantity.key]
        return f"{value:,.{quantity.digits}f}", value

    seconds, seed = numbers.get("seconds"), run.summary.get("seed", "")
    ended, dataset = datetime.fromtimestamp(_ended(run)), run.summary.get("dataset", "")
    settings = {name: value for name in names if (value := run.settings.get(name)) is not None}
    shown = [comparison.setting(*each) for each in [*settings.items()][:_MOST_SETTINGS]]
    shown += [f"and {more} others"] if (more := len(settings) - _MOST_SETTINGS) > 0 else []
    page = run.path / "report.html"
    pictures = sorted(run.path.glob("figures/*.png"), key=lambda file: file.stat().st_mtime)
    return _Row(
        name,
        f"{name}/{page.name}" if page.exists() else name,
        f"{name}/figures/{pictures[0].name}" if pictures else None,
        (
            *map(cell, quantities),
            (dataset, dataset),
            ("", "") if seconds is None else (duration(seconds), seconds),
            (seed, seed),
            (f"{ended:%Y-%m-%d %H:%M}", ended.isoformat()),
            (", ".join(shown), ", ".join(shown)),
        ),
    )
