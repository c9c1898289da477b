"""Charts, the page of a run in a real browser, and several runs on one page."""

from __future__ import annotations

import html
import itertools
import json
import re
import shutil
import subprocess

import numpy as np
import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg

from evojax_suite.cli.main import main
from evojax_suite.reporting import charts, comparison, formats, index, report
from evojax_suite.reporting.charts import Chart, Series, as_html, save_png
from evojax_suite.reporting.comparison import Columns
from evojax_suite.reporting.progress import progress
from evojax_suite.reporting.report import Figure, Report, Table
from evojax_suite.runtime.loop import StepReport

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
CHARTS = [
    Chart(
        "generation",
        "fitness",
        [
            Series("best", [1, 2, 3], [0.1, None, 0.3]),
            Series("mean", [1, 2, 3], np.array([0.1, 0.2, 0.3]), [0.0] * 3, [0.4] * 3, "dashed"),
        ],
        levels={"strong random": 0.25},
    ),
    Chart(
        "parameters",
        "accuracy",
        [
            Series("front", [10, 1000], [0.5, 0.9], style="points", notes=["4-2", "<b>40-20"]),
            Series("sets", [10, 99], [0.4, 0.8], [0.3, 0.7], [0.5, 0.9], "joined points"),
            Series("network", [100], [0.7], style="star"),
            Series("nothing", [], [], style="points", in_legend=False),
        ],
        log_x=True,
        log_y=True,
    ),
]


def write(folder, name="report.html"):
    report.write(
        folder / name,
        Report(
            "A <title> & more",
            "One sentence.",
            [("12.3 %", "test accuracy")],
            [Table("Results <1>", ["", "x" * 40, "y" * 40], [["row", "1", "2"]])],
            [Figure("curves", "Two charts", CHARTS), Figure("again", "One", CHARTS[:1])],
            [["seconds", "3"]],
        ),
        ["evojax-suite ga-distillation --name 'a b'"],
        {"config.json": {"reduction_factor": float("inf"), "array": np.arange(2)}},
    )
    return folder / name


def test_a_chart_is_a_picture_and_a_figure(tmp_path):
    save_png(tmp_path / "new" / "chart.png", CHARTS)
    assert (tmp_path / "new" / "chart.png").read_bytes().startswith(b"\x89PNG")
    script, elements = as_html(CHARTS)
    assert len(elements) == 2
    assert "strong random" in script
    assert as_html([]) == ("", [])


def test_a_name_in_another_script_needs_no_font(tmp_path, recwarn):
    save_png(tmp_path / "chart.png", [Chart("猫", "กขค", [Series("한국어", [1, 2], [1, 2])])])
    assert not recwarn.list


@pytest.mark.parametrize(
    ("seconds", "said"), [([18, 2], ""), ([18, 15], "some 14.5 min"), ([90], "some 88.5 min")]
)
def test_a_run_is_foretold_by_a_step_that_compiles_nothing(seconds, said, capsys):
    """The first one counts only where the next is far."""
    with progress("evolving", 60, 0, {}) as show:
        for step, taken in enumerate(seconds, 1):
            show(StepReport(step, 60, {"num_failed": 0}, taken, [{}]))
    lines = [line for line in capsys.readouterr().err.splitlines() if "present pace" in line]
    assert len(lines) == bool(said)
    assert said in "".join(lines)


@pytest.mark.parametrize(("number", "below"), [(3, False), (12, True)])
def test_a_long_legend_hides_no_curve(number, below, tmp_path, monkeypatch):
    drawings = []
    monkeypatch.setattr(charts, "save_figure", lambda drawing, path: drawings.append(drawing))
    series = [Series(f"curve {i}", [0, 90_000], [0, i]) for i in range(number)]
    charts.save_png(tmp_path / "chart.png", [Chart("x", "y", series)])
    (drawing,) = drawings
    FigureCanvasAgg(drawing).draw()
    (axes,) = drawing.axes
    within = axes.get_window_extent()
    assert (axes.get_legend().get_window_extent().y1 < within.y0) == below
    assert axes.get_tightbbox().y0 >= 0
    ends = [label.get_window_extent() for label in axes.get_xticklabels()]
    assert all(one.x1 < other.x0 for one, other in itertools.pairwise(ends))


def test_the_page_fetches_nothing_and_escapes_what_it_shows(tmp_path):
    page = write(tmp_path).read_text()
    assert "A &lt;title&gt; &amp; more" in page
    assert not re.search(r"<(script|link|img)[^>]+(src|href)=\"(?!data:)", page)
    assert (tmp_path / "figures/curves.png").exists()
    assert "&#39;a b&#39;" in page


PROBE = """<script>
const errors = [];
window.addEventListener("error", event => errors.push(event.message));
const said = console.error; console.error = (...words) => { errors.push(words.join(" ")); };
window.addEventListener("load", () => setTimeout(() => {
  const boxes = [...document.querySelectorAll(".charts > div")].map(box => {
    const area = box.getBoundingClientRect(); return [area.width, area.height]; });
  const pixels = []; const visit = node => {
    if (node.tagName === "CANVAS" && node.width) pixels.push(
      new Set(node.getContext("2d").getImageData(0, 0, node.width, node.height).data).size);
    if (node.shadowRoot) visit(node.shadowRoot);
    node.childNodes.forEach(visit); };
  visit(document.body);
  const found = {errors, boxes, pixels, page: document.documentElement.scrollWidth,
                 window: window.innerWidth};
  const element = document.createElement("pre"); element.id = "found";
  element.textContent = JSON.stringify(found); document.body.append(element);
}, 1500));
</script>"""


def dumped(folder, page, width=1280):
    """The page as a browser has it in the end."""
    return subprocess.run(
        [
            CHROMIUM, "--headless=new", "--no-sandbox", "--disable-gpu",
            f"--user-data-dir={folder / 'profile'}", f"--window-size={width},900",
            "--virtual-time-budget=10000", "--dump-dom", f"file://{page}",
        ],
        capture_output=True, text=True, timeout=120, check=True,
    ).stdout  # fmt: skip


@pytest.mark.skipif(CHROMIUM is None, reason="no chromium on this machine")
@pytest.mark.parametrize("width", [500, 1280])  # headless windows are at least 500 wide
def test_a_browser_shows_every_chart_without_an_error(tmp_path, width):
    page = write(tmp_path).read_text().replace("<head>", f"<head>{PROBE}", 1)
    (tmp_path / "probed.html").write_text(page)
    said = dumped(tmp_path, tmp_path / "probed.html", width)
    match = re.search(r'<pre id="found">(.*?)</pre>', said)
    assert match
    found = json.loads(html.unescape(match.group(1)))
    assert found["errors"] == []
    assert found["window"] == width
    assert found["page"] <= width  # nothing is cut off; wide tables scroll by themselves
    assert len(found["boxes"]) == 3
    assert all(w > 250 and h > 250 for w, h in found["boxes"])
    drawn = [colors for colors in found["pixels"] if colors > 10]
    assert len(drawn) >= 3  # not empty canvases


def fake(folder, seed, accuracy, width=8, system="ga_distillation", **summary):
    folder.mkdir(parents=True)
    config = {"dataset": "digits", "seed": seed, "config": {"network": {"width": width}}}
    (folder / "config.json").write_text(json.dumps(config))
    summary = {"system": system, "seed": seed, "test_accuracy_mean": accuracy, **summary}
    (folder / "summary.json").write_text(json.dumps(summary))
    lines = [
        {"generation": g, "fitness_best": accuracy * g, "fitness_mean": None} for g in (1, 2, 3)
    ]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


def test_runs_are_compared_over_seeds(tmp_path, capsys):
    runs = [
        fake(tmp_path / f"{width}-{seed}", seed, accuracy + 0.01 * seed * seed, width)
        for width, accuracy in ((8, 0.5), (16, 0.6))
        for seed in (0, 1, 2)
    ]
    output = tmp_path / "page"
    assert main(["compare", *map(str, runs), "--output", str(output)]) == 0
    said = capsys.readouterr().out
    narrow, wide = json.loads((output / "comparison.json").read_text())
    assert (narrow["name"], wide["name"]) == ("width 8", "width 16")
    assert narrow["seeds"] == [0, 1, 2]
    assert wide["values"]["test_accuracy_mean"] == pytest.approx([0.6, 0.61, 0.64])
    values = 100 * np.array([0.5, 0.51, 0.54])
    cell = f"{values.mean():.2f} ± {values.std():.2f}"
    assert cell in said
    assert cell in (output / "report.html").read_text()
    assert "10.00 ± 0.00" in said  # the paired difference
    assert (output / "figures/ga_distillation-curves.png").exists()


def test_runs_that_differ_in_much_are_named_by_their_folders(tmp_path, capsys):
    for name, value in (("short", 1), ("long", 2)):
        for seed in (0, 1):
            run = fake(tmp_path / f"{name}-seed{seed}", seed, 0.5)
            settings = json.loads((run / "config.json").read_text())
            settings |= {f"setting_with_a_name_{letter}": value for letter in "abc"}
            (run / "config.json").write_text(json.dumps(settings))
    runs = [str(path) for path in sorted(tmp_path.iterdir(), reverse=True)]
    output = tmp_path / "page"
    assert main(["compare", *runs, "--output", str(output)]) == 0
    compared = json.loads((output / "comparison.json").read_text())
    assert [(row["name"], row["seeds"]) for row in compared] == [
        ("short", [0, 1]),
        ("long", [0, 1]),
    ]
    said = capsys.readouterr().out
    assert re.search(r"^setting_with_a_name_b +1 +2$", said, re.MULTILINE)
    assert "what differs" in (output / "report.html").read_text()


def test_sets_of_several_methods_are_compared(tmp_path):
    results = [
        {"method": m, "num_images": n, "test_accuracy_mean": a}
        for m, n, a in (("DEvS", 10, 0.3), ("DEvS", 20, 0.5), ("random", 10, 0.2))
    ]
    run = fake(tmp_path / "a", 0, 0.0, system="devs", results=results)
    other = fake(tmp_path / "b", 1, 0.0, system="devs", results=results[:2])
    said = comparison.write([run, other], tmp_path / "page", ["x"], {"devs": Columns()})
    assert said.splitlines()[0].split("  ")[-1].strip() == "random, 10 images (%)"
    assert "30.00 ± 0.00" in said


def without_dataset(run):
    (run / "config.json").write_text("{}")
    return run


def with_front(run):
    (run / "front.json").write_text('[{"num_parameters": "many", "test_accuracy": 1}]')
    return run


def test_a_comparison_among_the_runs_is_left_out(tmp_path, capsys):
    runs = [fake(tmp_path / f"run-{seed}", seed, 0.5) for seed in (0, 1)]
    page = tmp_path / "run-all"
    for _ in range(2):
        assert main(["compare", *map(str, tmp_path.glob("run-*")), "--output", str(page)]) == 0
    assert "run-all is a comparison itself" in capsys.readouterr().err
    assert json.loads((page / "comparison.json").read_text())[0]["seeds"] == [0, 1], runs


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda p: [fake(p / "a", 0, 0.5)] * 2, "is given twice"),
        (
            lambda p: [fake(p / "a", 0, 0.5), fake(p / "b", 0, 0.5)],
            "b have the same settings and seed 0 (ga_di",
        ),
        (lambda p: [fake(p / "a", 0, 0.5)], "runs must be two folders or more, got 1"),
        (lambda p: [p / "none", p / "nothing"], "none holds no finished run: summary.json"),
        (lambda p: [fake(p / "a", 0, 1, system="x"), p], "summary.json is of none of"),
        (lambda p: [fake(p / "a", 0, 1, results=3), p], "results that are no list"),
        (lambda p: [without_dataset(fake(p / "a", 0, 1)), p], "config.json holds no settings"),
        (
            lambda p: [fake(p / "a", 0, 1, system="ecomp", num_parameters=3), fake(p / "b", 1, 1)],
            "a/summary.json says nothing of its networks: KeyError('test_accuracy')",
        ),
        (
            lambda p: [with_front(fake(p / "a", 0, 1, system="ecomp")), fake(p / "b", 1, 1)],
            "front.json says nothing of its networks",
        ),
    ],
)
def test_what_cannot_be_compared_is_one_line(tmp_path, capsys, make, says):
    runs = make(tmp_path)
    assert main(["compare", *map(str, runs), "--output", str(tmp_path / "page")]) == 2
    error = capsys.readouterr().err.strip().splitlines()
    assert len(error) == 1
    assert says in error[0]
    assert not (tmp_path / "page").exists()


def test_a_folder_of_runs_has_a_page_of_all(tmp_path):
    for seed, width in ((0, 8), (1, 8), (0, 16)):
        run = fake(tmp_path / f"{width}-{seed}", seed, 0.5 + 0.1 * seed, width, dataset="digits")
        (run / "figures").mkdir()
        (run / "figures/images.png").write_bytes(b"")
        (run / "report.html").write_text("")
    fake(tmp_path / "devs", 0, 0.0, system="devs", seconds=1800.0)
    fake(tmp_path / "older", 0, 0.0, system="devs", results=[{"method": "DEvS"}])
    fake(tmp_path / "foreign", 0, 0.0, system="of another package")
    (tmp_path / "unfinished").mkdir()
    (tmp_path / "damaged").mkdir()
    for name in ("summary.json", "config.json"):
        (tmp_path / "damaged" / name).write_text("[")
    columns = {
        "ga_distillation": Columns((comparison.accuracy("test_accuracy_mean", "test accuracy"),)),
        "devs": Columns(),
    }
    page = index.write(tmp_path, columns).read_text()
    assert "4 finished runs" in page
    assert page.count('<a href="8-1/report.html">') == 2  # its name and its picture
    assert '<img src="8-1/figures/images.png"' in page
    assert '<td data-value="60.0">60.00</td>' in page
    assert '<td data-value="width 16" class="differs">width 16</td>' in page
    assert "test accuracy (%)" in page
    assert '<td data-value="1800.0">30 min</td>' in page
    assert not {"older", "foreign", "unfinished", "damaged"} & {*re.findall(r"\w+", page)}


@pytest.mark.skipif(CHROMIUM is None, reason="no chromium on this machine")
def test_the_page_of_all_runs_is_sorted_in_a_browser(tmp_path):
    for seed, accuracy in enumerate((0.5, 0.95, 0.7)):
        fake(tmp_path / f"run{seed}", seed, accuracy)
    columns = Columns((comparison.accuracy("test_accuracy_mean", "test accuracy"),))
    page = index.write(tmp_path, {"ga_distillation": columns})
    script = """<script>
    const heads = [...document.querySelectorAll("th button")].slice(1, 2), orders = [];
    for (const _ of [0, 1]) {
      heads[0].click();
      orders.push([...document.querySelectorAll("tbody a")].map(one => one.textContent).join());
    }
    document.body.insertAdjacentHTML("beforeend", `<pre id="found">${orders.join(";")}</pre>`);
    </script>"""
    page.write_text(page.read_text().replace("</body>", f"{script}</body>"))
    said = dumped(tmp_path, page)
    assert '<pre id="found">run0,run2,run1;run1,run2,run0</pre>' in said


def test_legends_wrap_and_error_bars_are_within_the_range():
    names = [f"{rule} of some length, validation" for rule in "abcdef"]
    x = [1, 2, 3]
    low, high = np.array([0.0, 1, 2]), np.array([5.0, 6, 7])
    series = [Series(name, x, [3, 4, 5], low, high, style="joined points") for name in names]
    plot = charts._hoverable(Chart("x", "y", series))
    (legend,) = plot.legend
    assert len(legend.items) == 6
    assert legend.ncols == 1
    # The range of Bokeh follows glyphs, not annotations.
    ends = {glyph.glyph.y for glyph in plot.renderers if hasattr(glyph.glyph, "marker")}
    assert ends == {"y", "low", "high"}
    short = [Series(name, x, x) for name in "ab"]
    assert charts._hoverable(Chart("x", "y", short)).legend[0].ncols == 2


@pytest.mark.parametrize(
    ("values", "some", "none"),
    [
        ([723, 9000], {500.0: "500", 1000.0: "1k", 2000.0: "2k", 10000.0: "10k"}, 3000.0),
        ([1e-6, 1e3], {1e-6: "1\N{MICRO SIGN}", 1.0: "1", 1000.0: "1k"}, 2.0),
    ],
)
def test_logarithmic_axes_have_labels(values, some, none):
    labels = charts._log_labels(np.array([*values, 0, np.nan]))
    assert some.items() <= labels.items()
    assert none not in labels
    chart = Chart("x", "y", [Series("a", values, values)], log_x=True)
    plot = charts._hoverable(chart)
    assert plot.xaxis[0].major_label_overrides == labels
    assert not plot.yaxis[0].major_label_overrides


@pytest.mark.parametrize(
    ("value", "text"),
    [(12.34, "12.3"), (1, "1.0"), (0.082, "0.082"), (0.0071999, "0.0072"), (0, "0")],
)
def test_small_numbers_keep_two_digits(value, text):
    assert formats.short(value) == text
