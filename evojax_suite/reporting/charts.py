"""A chart is data: drawn as PNG for papers, or as a figure that one can hover in a page."""

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
"""Colours of series that name none, in turn."""
_OTHER_SCRIPTS = (
    "Noto Sans CJK SC", "Noto Sans CJK JP", "WenQuanYi Zen Hei", "Droid Sans Fallback", "Noto Sans",
    "Arial Unicode MS", "PingFang SC", "Hiragino Sans", "Apple SD Gothic Neo", "Microsoft YaHei",
    "Yu Gothic", "Malgun Gothic", "Nirmala UI",
)  # fmt: skip


def gradual(count: int) -> list[str]:
    """`count` colours from dark to light, for series in an order."""
    return [to_hex(color) for color in colormaps["viridis"](np.linspace(0, 0.9, count))]


@dataclass(frozen=True)
class Series:
    """One line, or one group of points; NaN and None are gaps."""

    name: str
    x: ArrayLike  # (n,)
    y: ArrayLike  # (n,)
    low: ArrayLike | None = None  # (n,): with `high` a band about a line, a bar through a point
    high: ArrayLike | None = None
    style: Literal["solid", "dashed", "points", "joined points", "star"] = "solid"
    color: str | None = None
    notes: Sequence[str] = ()
    """Text on each point, shown when the pointer hovers over it."""
    in_legend: bool = True


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
        """Colours of the series."""
        return [s.color or COLORS[i % len(COLORS)] for i, s in enumerate(self.series)]

    def all_x(self) -> np.ndarray:
        """(n,) of all series."""
        return np.concatenate([_numbers(series.x) for series in self.series] or [[]])

    def counts(self) -> bool:
        """Whether x is a number of things, so that nothing lies between whole ones."""
        x = self.all_x()
        return not self.log_x and bool(np.all(x == np.round(x)))


def _numbers(values: ArrayLike) -> np.ndarray:
    """(n,) float64, None as NaN."""
    return np.array([np.nan if v is None else v for v in np.asarray(values, object)], float)


def save_png(path: Path, charts: Sequence[Chart]) -> None:
    """Draw `charts` side by side into `path`."""
    width = 6.4 if len(charts) == 1 else 3.8 * len(charts)
    drawing = Figure(figsize=(width, 3.6), layout="constrained")
    for chart, axes in zip(charts, np.ravel(drawing.subplots(1, len(charts))), strict=True):
        for series, color in zip(chart.series, chart.colors(), strict=True):
            x, y = _numbers(series.x), _numbers(series.y)
            label = textwrap.fill(series.name, 30) if series.in_legend else None
            points = "points" in series.style or series.style == "star"
            line = {"solid": "-", "dashed": "--", "joined points": "-"}.get(series.style, "")
            marker = {"star": "*", "points": "o", "joined points": "o"}.get(series.style, "")
            marker = marker or ("o" if len(x) == 1 else "")  # a line needs two
            size = 12 if series.style == "star" else 4
            look = {"color": color, "marker": marker, "ms": size, "ls": line, "lw": 1.2}
            if series.low is None or series.high is None:
                axes.plot(x, y, label=label, **look)
            elif points:
                bars = y - _numbers(series.low), _numbers(series.high) - y
                axes.errorbar(x, y, bars, label=label, capsize=2, **look)
            else:
                axes.plot(x, y, label=label, **look)
                axes.fill_between(
                    x, _numbers(series.low), _numbers(series.high), color=color, alpha=0.15, lw=0
                )
        for name, level in chart.levels.items():
            axes.axhline(level, color="black", ls=":", lw=1, label=name)
        axes.set(xlabel=chart.x_title, ylabel=chart.y_title)
        for is_log, axis, scale in (
            (chart.log_x, axes.xaxis, axes.set_xscale),
            (chart.log_y, axes.yaxis, axes.set_yscale),
        ):
            if is_log:
                scale("log")
                axis.set_major_locator(LogLocator(subs=(1, 2, 5)))
                axis.set_major_formatter(EngFormatter(sep=""))
                axis.set_minor_formatter(NullFormatter())
        if chart.counts():
            axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.grid(alpha=0.3)
        if axes.get_legend_handles_labels()[0]:
            axes.legend(frameon=False, fontsize=8)
    save_figure(drawing, path)


@functools.cache
def _fonts() -> list[str]:
    """matplotlib's own, and for the names of classes in other scripts what the system has."""
    present = {font.name for font in font_manager.fontManager.ttflist}
    return ["DejaVu Sans", *(name for name in _OTHER_SCRIPTS if name in present)]


def save_figure(drawing: Figure, path: Path) -> None:
    """Write a figure of matplotlib as PNG; folders are made."""
    path.parent.mkdir(parents=True, exist_ok=True)
    FigureCanvasAgg(drawing)
    for text in drawing.findobj(Text):
        text.set_fontfamily(_fonts())
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph .* missing from font")  # a box stands for it
        drawing.savefig(path, dpi=150, bbox_inches="tight")


def _hoverable(chart: Chart):
    """The chart as a figure of Bokeh, which takes a while to import."""
    from bokeh.models import ColumnDataSource, HoverTool, Legend, Whisker
    from bokeh.plotting import figure

    plot = figure(
        x_axis_label=chart.x_title,
        y_axis_label=chart.y_title,
        x_axis_type="log" if chart.log_x else "linear",
        y_axis_type="log" if chart.log_y else "linear",
        height=320,
        min_width=280,
        sizing_mode="stretch_width",
        tools="pan,box_zoom,wheel_zoom,reset,save",
        toolbar_location="above",
        active_scroll=None,
        name=chart.y_title,
    )
    plot.toolbar.logo = None
    plot.toolbar.autohide = True
    entries = []
    for series, color in zip(chart.series, chart.colors(), strict=True):
        x, y = _numbers(series.x), _numbers(series.y)
        columns: dict[str, Any] = {"x": x, "y": y}
        if series.low is not None and series.high is not None:
            columns |= {"low": _numbers(series.low), "high": _numbers(series.high)}
        if series.notes:
            columns["note"] = list(series.notes)
        source = ColumnDataSource(columns)
        glyphs = []
        if series.style in ("solid", "dashed", "joined points"):
            dash = "dashed" if series.style == "dashed" else "solid"
            glyphs.append(
                plot.line("x", "y", source=source, color=color, line_width=1.6, line_dash=dash)
            )
        if "points" in series.style or series.style == "star" or len(x) == 1:
            size, marker = (15, "star") if series.style == "star" else (7, "circle")
            glyphs.append(
                plot.scatter("x", "y", source=source, color=color, size=size, marker=marker)
            )
            if "low" in columns:
                plot.add_layout(
                    Whisker(base="x", lower="low", upper="high", source=source, line_color=color)
                )
        elif "low" in columns:
            glyphs.append(
                plot.varea("x", "low", "high", source=source, color=color, fill_alpha=0.15)
            )
        says = [(series.name, "@note" if series.notes else "@y{0,0.[0000]}")]
        says.append((chart.x_title, "@x{0,0.[0000]}"))
        if series.notes:
            says.append((chart.y_title, "@y{0,0.[0000]}"))
        plot.add_tools(HoverTool(renderers=glyphs[:1], tooltips=says, line_policy="nearest"))
        if series.in_legend:
            entries.append((series.name, glyphs))
    everywhere = chart.all_x()
    if chart.counts():
        x_axis: Any = plot.xaxis
        x_axis.ticker.min_interval = 1
    for name, level in chart.levels.items():
        ends = [np.nanmin(everywhere), np.nanmax(everywhere)] if len(everywhere) else [0.0, 1.0]
        glyph = plot.line(ends, [level, level], color="black", line_dash="dotted")
        plot.add_tools(HoverTool(renderers=[glyph], tooltips=[(name, "$snap_y{0.[0000]}")]))
        entries.append((name, [glyph]))
    if len(entries) > 1:
        legend = Legend(items=entries, click_policy="hide", orientation="horizontal", ncols="auto")
        legend.label_text_font_size = "12px"
        legend.border_line_color = None
        legend.location = "bottom_left"
        plot.add_layout(legend, "below")
    return plot


def as_html(charts: Sequence[Chart]) -> tuple[str, list[str]]:
    """A script of the data, and of each chart the element that it fills; they need `library()`."""
    if not charts:
        return "", []
    from bokeh.embed import components

    script, elements = components([_hoverable(chart) for chart in charts])
    return script, list(elements)


def library() -> str:
    """Bokeh's script, inlined: a page that holds it needs no network."""
    from bokeh.resources import Resources

    return Resources(mode="inline", components=["bokeh"]).render_js()
