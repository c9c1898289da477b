"""The page of a run, or of several: one HTML file that needs no other file and no network."""

from __future__ import annotations

import base64
import json
import platform
import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

import jax
from jinja2 import Environment
from markupsafe import Markup

from evojax_suite.reporting import charts
from evojax_suite.reporting.charts import Chart
from evojax_suite.runtime.results import to_jsonable, write_atomically

HEAD = """<!doctype html>
<html lang="en"><head><meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<link rel="icon" href="data:,">
<title>{{ title }}</title>
<style>
body { font: 16px/1.5 system-ui, sans-serif; max-width: 72rem; margin: 0 auto; padding: 1rem;
       color: #1a1a1a; background: #fff }
h1 { font-size: 1.5rem; line-height: 1.25 } h2 { font-size: 1.1rem; margin-top: 2rem }
p.lead { font-size: 1.05rem; max-width: 48rem }
.tiles { display: flex; flex-wrap: wrap; gap: .75rem; margin: 1rem 0; padding: 0 }
.tiles div { border: 1px solid #ddd; border-radius: .5rem; padding: .5rem 1rem; min-width: 8rem }
.tiles b { display: block; font-size: 1.35rem; font-variant-numeric: tabular-nums }
.tiles span { color: #555; font-size: .9rem }
.wide { overflow-x: auto }
table { border-collapse: collapse } td, th { padding: .25rem .8rem; border-bottom: 1px solid #ddd;
       text-align: left; font-weight: normal; vertical-align: top }
thead th { border-bottom: 2px solid #888 }
td { font-variant-numeric: tabular-nums; overflow-wrap: anywhere } th { min-width: 6rem }
.charts { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 21rem), 1fr));
       gap: 1rem }
.charts > div { min-width: 0 }
.charts.one { max-width: 48rem }
figure { margin: 1.5rem 0 } figure img { max-width: 100%; height: auto }
figcaption { color: #555 }
pre { background: #f5f5f5; padding: .8rem; overflow-x: auto; font-size: .85rem;
       white-space: pre-wrap; overflow-wrap: anywhere }
"""
"""The beginning of all pages, up to the end of their common style."""

_PAGE = (
    HEAD
    + """</style>{{ library }}</head>
<body>
<h1>{{ title }}</h1>
<p class="lead">{{ lead }}</p>
<div class="tiles">{% for number, name in headline %}
<div><b>{{ number }}</b><span>{{ name }}</span></div>{% endfor %}</div>
{% macro show(table) %}<h2>{{ table.heading }}</h2>
<div class="wide"><table><thead><tr>{% for name in table.header %}<th>{{ name }}</th>{% endfor %}
</tr></thead><tbody>{% for row in table.rows %}
<tr>{% for cell in row %}{% if loop.first %}<th>{{ cell }}</th>{% else %}<td>{{ cell }}</td>
{% endif %}{% endfor %}</tr>{% endfor %}</tbody></table></div>{% endmacro %}
{% for table in tables %}{{ show(table) }}{% endfor %}
{% for figure in figures %}<figure>
{% if figure.elements %}<div class="charts{% if figure.elements | length == 1 %} one{% endif %}">
{% for element in figure.elements %}<div>{{ element }}</div>{% endfor %}</div>
{% else %}<img src="data:image/png;base64,{{ figure.png }}" alt="{{ figure.caption }}">
{% endif %}<figcaption>{{ figure.caption }}</figcaption></figure>
{% endfor %}{{ show(numbers) }}
<h2>Repeat it</h2>
<pre>{{ repeat }}</pre>
<p>{{ made_with }}</p>
{% for name, text in details.items() %}<details><summary>{{ name }}</summary>
<pre>{{ text }}</pre></details>
{% endfor %}{{ script }}
</body></html>
"""
)


@dataclass(frozen=True)
class Table:
    """Rows of text; the first cell of a row is its name."""

    heading: str
    header: Sequence[str]
    rows: Sequence[Sequence[str]]


@dataclass(frozen=True)
class Figure:
    """Charts, or a picture that is in figures/ already."""

    name: str
    """The name of its PNG, without the ending."""
    caption: str
    charts: Sequence[Chart] = ()


@dataclass(frozen=True)
class Report:
    """The content of the page of a run, and the last lines on the terminal."""

    title: str
    lead: str
    """The result in one or two sentences."""
    headline: Sequence[tuple[str, str]] = ()
    """Pairs of a number and its name."""
    tables: Sequence[Table] = ()
    figures: Sequence[Figure] = ()
    numbers: Sequence[Sequence[str]] = ()
    """Rows of a name and a number of the run."""
    closing: Sequence[str] = ()
    """Lines for the terminal."""


def write(path: Path, report: Report, repeat: Sequence[str], details: dict[str, object]) -> None:
    """Write the page, and figures/ beside it with the charts as PNG; repeat: lines of shell that
    repeat the run; details: values by name, which are shown as JSON when they are unfolded."""
    drawn = [chart for figure in report.figures for chart in figure.charts]
    script, waiting = charts.as_html(drawn)
    figures = []
    for figure in report.figures:
        file = path.parent / "figures" / f"{figure.name}.png"
        elements = [Markup(waiting.pop(0)) for _ in figure.charts]
        shown = {"caption": figure.caption, "elements": elements}
        if figure.charts:
            charts.save_png(file, figure.charts)
        else:
            shown["png"] = base64.b64encode(file.read_bytes()).decode()
        figures.append(shown)
    content = {
        **{name: getattr(report, name) for name in ("title", "lead", "headline", "tables")},
        "figures": figures,
        "numbers": Table("The run", ("", ""), report.numbers),
        "repeat": "\n".join(repeat),
        "made_with": made_with(),
        "details": {name: json.dumps(to_jsonable(v), indent=2) for name, v in details.items()},
        "library": Markup(charts.library() if drawn else ""),
        "script": Markup(script),
    }
    page = Environment(autoescape=True).from_string(_PAGE).render(content)
    write_atomically(path, page)


def made_with() -> str:
    """Returns versions and devices in one line."""
    packages = ", ".join(f"{name} {version(name)}" for name in ("evojax-suite", "jax", "evosax"))
    kinds = [device.device_kind for device in jax.devices()]
    devices = ", ".join(f"{kinds.count(kind)} x {kind}" for kind in dict.fromkeys(kinds))
    return f"Made with {packages}, Python {platform.python_version()}, on {devices}."


def commands(
    directory: Path, command: str, typed: Sequence[str], data_dir: Path | None
) -> list[str]:
    """Returns commands that repeat a run: as it was `typed`, if it was, and from its settings."""
    again = [command, "--config", str(directory / "config.json"), "--name", "again"]
    again += ["--data-dir", str(data_dir)] if data_dir else []
    return [shlex.join(["evojax-suite", *words]) for words in (typed, again) if words]
