"""Charts as data, drawn as PNG for papers or as figures with hover notes in a page."""

from __future__ import annotations

import functools
import textwrap
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
from matplotlib import colormaps, font_manager
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import to_hex
from matplotlib.figure import Figure
from matplotlib.text import Text
from matplotlib.ticker import EngFormatter, LogLocator, MaxNLocator, NullFormatter
from numpy.typing import ArrayLike

COLORS = "#2166ac", "#b2182b", "#4d9221", "#e08214", "#762a83", "#01665e", "#8c510a", "#666666"
"""The colours of series without one, in turn."""
_OTHER_SCRIPTS = (
    "Noto Sans CJK SC", "Noto Sans CJK JP", "WenQuanYi Zen Hei", "Droid Sans Fallback", "Noto Sans",
    "Arial Unicode MS", "PingFang SC", "Hiragino Sans", "Apple SD Gothic Neo", "Microsoft YaHei",
    "Yu Gothic", "Malgun Gothic", "Nirmala UI",
)  # fmt: skip


_LEGEND_WIDTH = 300  # pixels
_WITHIN = 5  # entries of a legend that fit into the axes
_BELOW = {"loc": "upper center", "bbox_to_anchor": (0.5, -0.16), "ncols": 2}


def gradual(count: int) -> list[str]:
    """Returns `count` colours from dark to light, for series in an order."""
    return [to_hex(color) for color in colormaps["viridis"](np.linspace(0, 0.9, count))]


@dataclass(frozen=True)
class Series:
    """One line, or one group of points; NaN and None are gaps."""

    name: str
    x: ArrayLike  # (n,)
    y: ArrayLike  # (n,)
    low: ArrayLike | None = None  # (n,): with `high` a band around a line, a bar through a point
    high: ArrayLike | None = None
    style: Literal["solid", "dashed", "points", "joined points", "star"] = "solid"
    color: str | None = None
    notes: Sequence[str] = ()
    """A text for each point, shown when the pointer hovers over it."""
    in_legend: bool = True

    @property
    def has_markers(self) -> bool:
        """Whether each point has a marker."""
        return "points" in self.style or self.style == "star"

    def band(self) -> tuple[np.ndarray, np.ndarray] | None:
        """Returns `low` and `high`, (n,) each, if there are both."""
        if self.low is None or self.high is None:
            return None
        return _numbers(self.low), _numbers(self.high)


@dataclass(frozen=True)
class Chart:
    """One pair of axes."""

    x_title: str
    y_title: str
    series: Sequence[Series]
    log_x: bool = False
    log_y: bool = False
    levels: dict[str, float] = field(default_factory=dict)
    """Horizontal lines, by name."""

    def colors(self) -> list[str]:
        """Returns the colour of each series."""
        return [s.color or COLORS[i % len(COLORS)] for i, s in enumerate(self.series)]

    def all_x(self) -> np.ndarray:
        """Returns the x of all series, (n,)."""
        return np.concatenate([_numbers(series.x) for series in self.series] or [[]])

    def all_y(self) -> np.ndarray:
        """Returns the y of all series, and the ends of their bands, (n,)."""
        parts = ((_numbers(series.y), *(series.band() or ())) for series in self.series)
        return np.concatenate([part for each in parts for part in each] or [[]])

    @property
    def num_named(self) -> int:
        """The entries of the legend."""
        return sum(series.in_legend for series in self.series) + len(self.levels)

    def counts(self) -> bool:
        """Returns whether x is a number of things, so that nothing lies between whole ones."""
        x = self.all_x()
        return not self.log_x and bool(np.all(x == np.round(x)))


def _numbers(values: ArrayLike) -> np.ndarray:
    """Returns `values` (n,) as float64, with None as NaN."""
    return np.array([np.nan if v is None else v for v in np.asarray(values, object)], float)


def column(lines: Sequence[dict[str, Any]], name: str) -> np.ndarray:
    """Returns the values of `name` in `lines`, (n,) float64, with None as NaN."""
    return _numbers([line[name] for line in lines])


def save_png(path: Path, charts: Sequence[Chart]) -> None:
    """Draw `charts` side by side into `path`."""
    width = 6.4 if len(charts) == 1 else 3.8 * len(charts)
    named = max((chart.num_named for chart in charts), default=0)
    height = 3.6 if named <= _WITHIN else 3.8 + 0.16 * -(-named // 2)
    drawing = Figure(figsize=(width, height), layout="constrained")
    for chart, axes in zip(charts, np.ravel(drawing.subplots(1, len(charts))), strict=True):
        for series, color in zip(chart.series, chart.colors(), strict=True):
            x, y, band = _numbers(series.x), _numbers(series.y), series.band()
            label = textwrap.fill(series.name, 30) if series.in_legend else None
            line = {"solid": "-", "dashed": "--", "joined points": "-"}.get(series.style, "")
            marker = "o" if series.has_markers or len(x) == 1 else ""  # a line needs two points
            marker, size = ("*", 12) if series.style == "star" else (marker, 4)
            look = {"color": color, "marker": marker, "ms": size, "ls": line, "lw": 1.2}
            if band and series.has_markers:
                axes.errorbar(x, y, (y - band[0], band[1] - y), label=label, capsize=2, **look)
                continue
            axes.plot(x, y, label=label, **look)
            if band:
                axes.fill_between(x, *band, color=color, alpha=0.15, lw=0)
        for name, level in chart.levels.items():
            axes.axhline(level, color="black", ls=":", lw=1, label=name)
        axes.set(xlabel=chart.x_title, ylabel=chart.y_title)
        for name, is_log, axis in (("x", chart.log_x, axes.xaxis), ("y", chart.log_y, axes.yaxis)):
            if is_log:
                axes.set(**{f"{name}scale": "log"})
                axis.set_major_locator(LogLocator(subs=(1, 2, 5)))
                axis.set_major_formatter(EngFormatter(sep=""))
                axis.set_minor_formatter(NullFormatter())
        if chart.counts():
            axes.xaxis.set_major_locator(MaxNLocator("auto", integer=True))
            if chart.all_x().max(initial=0) >= 10_000:
                axes.xaxis.set_major_formatter(EngFormatter(sep=""))
        axes.grid(alpha=0.3)
        if named := axes.get_legend_handles_labels()[0]:
            axes.legend(frameon=False, fontsize=8, **(_BELOW if len(named) > _WITHIN else {}))
    save_figure(drawing, path)


@functools.cache
def _fonts() -> list[str]:
    """Returns matplotlib's font, and those of the system for names of classes in other scripts."""
    present = {font.name for font in font_manager.fontManager.ttflist}
    return ["DejaVu Sans", *(name for name in _OTHER_SCRIPTS if name in present)]


def save_figure(drawing: Figure, path: Path) -> None:
    """Write a figure of matplotlib as PNG, in a folder that is made if it does not exist."""
    path.parent.mkdir(parents=True, exist_ok=True)
    FigureCanvasAgg(drawing)
    for text in drawing.findobj(Text):
        text.set_fontfamily(_fonts())
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph .* missing from font")  # drawn as a box
        drawing.savefig(path, dpi=150, bbox_inches="tight")


def _hoverable(chart: Chart):
    """Returns the chart as a figure of Bokeh, which is slow to import."""
    from bokeh.models import ColumnDataSource, HoverTool, Legend
    from bokeh.plotting import figure

    axes: dict[str, Any] = {"x_axis_label": chart.x_title, "y_axis_label": chart.y_title}
    for name, is_log in (("x", chart.log_x), ("y", chart.log_y)):
        axes[f"{name}_axis_type"] = "log" if is_log else "linear"
    tools = "pan,box_zoom,wheel_zoom,reset,save"
    plot = figure(**axes, tools=tools, toolbar_location="above", active_scroll=None)
    plot.update(height=320, min_width=280, sizing_mode="stretch_width", name=chart.y_title)
    plot.toolbar.update(logo=None, autohide=True)
    entries = []
    for series, color in zip(chart.series, chart.colors(), strict=True):
        x, y, band = _numbers(series.x), _numbers(series.y), series.band()
        columns: dict[str, Any] = {"x": x, "y": y}
        if band:
            columns |= {"low": band[0], "high": band[1]}
        if series.notes:
            columns["note"] = list(series.notes)
        source = ColumnDataSource(columns)
        look: dict[str, Any] = {"source": source, "color": color}
        glyphs = []
        if series.style in ("solid", "dashed", "joined points"):
            dash = "dashed" if series.style == "dashed" else "solid"
            glyphs.append(plot.line("x", "y", line_width=1.6, line_dash=dash, **look))
        if series.has_markers or len(x) == 1:
            size, marker = (15, "star") if series.style == "star" else (7, "circle")
            glyphs.append(plot.scatter("x", "y", size=size, marker=marker, **look))
            if band:
                glyphs.append(plot.segment("x", "low", "x", "high", **look))
                for end in ("low", "high"):
                    glyphs.append(plot.scatter("x", end, size=8, marker="dash", **look))
        elif band:
            glyphs.append(plot.varea("x", "low", "high", fill_alpha=0.15, **look))
        x_tip, y_tip = (chart.x_title, "@x{0,0.[0000]}"), (chart.y_title, "@y{0,0.[0000]}")
        tips = [(series.name, y_tip[1]), x_tip]
        if series.notes:
            tips = [(series.name, "@note"), x_tip, y_tip]
        plot.add_tools(HoverTool(renderers=glyphs[:1], tooltips=tips, line_policy="nearest"))
        if series.in_legend:
            entries.append((series.name, glyphs))
    if chart.counts():
        whole: Any = plot.xaxis
        whole.ticker.min_interval = 1
    for name, level in chart.levels.items():
        all_x = chart.all_x()
        ends = [np.nanmin(all_x), np.nanmax(all_x)] if len(all_x) else [0.0, 1.0]
        glyph = plot.line(ends, [level, level], color="black", line_dash="dotted")
        plot.add_tools(HoverTool(renderers=[glyph], tooltips=[(name, "$snap_y{0.[0000]}")]))
        entries.append((name, [glyph]))
    axes_of = (plot.xaxis, chart.log_x, chart.all_x()), (plot.yaxis, chart.log_y, chart.all_y())
    for axis, is_log, values in axes_of:
        if is_log:
            labels = _log_labels(values)
            axis.update(ticker=[*labels], major_label_overrides=labels)
    if len(entries) > 1:
        # Bokeh does not wrap a legend: as many columns as fit beside each other on a phone.
        widest = max(len(name) for name, _ in entries)
        abreast = min(len(entries), max(1, _LEGEND_WIDTH // (7 * widest + 32)))
        legend = Legend(items=entries, click_policy="hide", orientation="horizontal", ncols=abreast)
        legend.update(label_text_font_size="12px", border_line_color=None, location="bottom_left")
        plot.add_layout(legend, "below")
        plot.height = 300 + 22 * -(-len(entries) // abreast)
    return plot


def _log_labels(values: np.ndarray) -> dict[float, str]:
    """Returns where a logarithmic axis of `values` has ticks, and how they are labelled: 1, 2 and 5
    times powers of ten, or of these the powers alone where there are many decades."""
    values = values[np.isfinite(values) & (values > 0)]
    if not values.size:
        return {}
    first, last = np.floor(np.log10(values.min())) - 1, np.ceil(np.log10(values.max())) + 1
    factors = (1, 2, 5) if last - first < 6 else (1,)
    ticks = [factor * 10.0**power for power in np.arange(first, last + 1) for factor in factors]
    return {float(f"{tick:.3g}"): EngFormatter(sep="").format_eng(tick) for tick in ticks}


def as_html(charts: Sequence[Chart]) -> tuple[str, list[str]]:
    """Returns a script, and for each chart an element that it fills; both need `library()`."""
    if not charts:
        return "", []
    from bokeh.embed import components

    script, elements = components([_hoverable(chart) for chart in charts])
    return script, list(elements)


def library() -> str:
    """Returns Bokeh's script, inlined, so that a page needs no network."""
    from bokeh.resources import Resources

    return Resources(mode="inline", components=["bokeh"]).render_js()
