"""The figures of a run: pictures as PNG files, curves and fronts as charts."""

from __future__ import annotations

from itertools import cycle
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from PIL import Image

from evojax_suite.data.transforms import denormalize
from evojax_suite.reporting.charts import COLORS, Chart, Series, column, gradual, save_figure
from evojax_suite.types import Dataset

_FRAME_PIXELS = 64  # the width of an image
_IN_GRAY: dict[str, Any] = {"cmap": "gray", "vmin": 0, "vmax": 1}


def _curve(lines: list[dict[str, Any]], x: str, y: str, name: str, **look: Any) -> Series:
    return Series(name, column(lines, x), column(lines, y), **look)


def fitness_curves(
    metrics: list[dict[str, Any]],
    fitness: str,
    strong_random: list[float] | None,
    reference: dict[str, list[float]] | None = None,
) -> list[Chart]:
    """Best and mean fitness by generation, with the fitness of strong random selection, and that of
    some results by the same networks."""
    mean, deviation = column(metrics, "fitness_mean"), column(metrics, "fitness_std")
    band = {"low": mean - deviation, "high": mean + deviation}
    series = [
        _curve(metrics, "generation", "fitness_best", "best"),
        _curve(metrics, "generation", "fitness_mean", "mean of the population", **band),
    ]
    held_out = _curve(metrics, "generation", "holdout_score", "best, held-out images")
    if np.isfinite(held_out.y).any():
        series.append(held_out)
    if reference:
        line = reference["generation"], reference["fitness"]
        series.append(Series("results so far, by the same networks", *line, style="joined points"))
    names = {
        "accuracy": "accuracy on the fitness images",
        "cross_entropy": "minus cross-entropy",
        "kernel_regression": "minus the error of kernel regression",
    }
    levels = {"strong random": float(np.mean(strong_random))} if strong_random else {}
    return [Chart("generation", names.get(fitness, fitness), series, levels=levels)]


def _for_display(images: np.ndarray) -> np.ndarray:
    """Returns images (n, H, W, C) cut to [0, 1]; of 1 or 2 channels their mean (n, H, W)."""
    images = np.clip(images, 0.0, 1.0)
    return images if images.shape[-1] in (3, 4) else images.mean(-1)


def stretched(dataset: Dataset, images: np.ndarray) -> np.ndarray:
    """Returns normalised images (n, H, W, C) as they are shown, each stretched to [0, 1]."""
    images = denormalize(images, dataset.mean, dataset.std)
    low = images.min((1, 2, 3), keepdims=True)
    high = images.max((1, 2, 3), keepdims=True)
    return (images - low) / np.maximum(high - low, 1e-6)


def _evenly(number: int, most: int) -> np.ndarray:
    """Returns the indices of at most `most` of `number` images, evenly spaced."""
    return np.linspace(0, number - 1, min(number, most)).round().astype(int)


def image_rows(
    path: Path, dataset: Dataset, images: np.ndarray, labels: np.ndarray, max_columns: int = 12
) -> None:
    """Draw real images above synthetic ones, an image a column (Figs. 4 to 11 of Sato et al. 2026).

    images: (n, H, W, C) normalised; each is stretched to its range, as evolution leaves the range
    of real images. labels: (n, num_classes).
    """
    chosen = _evenly(len(images), max_columns)
    real = _real_beside(dataset, labels[chosen])
    rows = {"real": real, "synthetic": stretched(dataset, np.asarray(images)[chosen])}
    figure = Figure(figsize=(0.85 * len(chosen), 2.1))
    grid = figure.subplots(2, len(chosen), squeeze=False)
    for row, (title, pictures) in zip(grid, rows.items(), strict=True):
        row[0].set_ylabel(title, fontsize=8)
        for axes, picture in zip(row, _for_display(pictures), strict=True):
            axes.imshow(picture, **_IN_GRAY)
            axes.set(xticks=[], yticks=[])
    for axes, label in zip(grid[0], labels[chosen].argmax(-1), strict=True):
        axes.set_title(dataset.class_names[label][:12], fontsize=7, parse_math=False)
    save_figure(figure, path)


def evolution(
    path: Path,
    dataset: Dataset,
    frames: np.ndarray,
    labels: np.ndarray,
    max_columns: int = 12,
) -> None:
    """Write an animated PNG of synthetic images below real ones, each stretched to its range.

    frames: (frames, n, H, W, C), normalised. labels: (n, num_classes).
    """
    chosen = _evenly(frames.shape[1], max_columns)
    real = _real_beside(dataset, labels[chosen])
    size = (_FRAME_PIXELS, round(_FRAME_PIXELS * real.shape[1] / real.shape[2]))

    def row(images: np.ndarray) -> np.ndarray:
        pictures = map(Image.fromarray, np.round(255 * _for_display(images)).astype(np.uint8))
        large = [np.asarray(one.resize(size, Image.Resampling.NEAREST)) for one in pictures]
        return np.concatenate(large, 1)

    upper = row(real)
    upper = np.concatenate([upper, np.zeros_like(upper[:4])])
    rows = [row(stretched(dataset, frame[chosen])) for frame in frames]
    pages = [Image.fromarray(np.concatenate([upper, lower])) for lower in rows]
    path.parent.mkdir(parents=True, exist_ok=True)
    times = [300] * (len(pages) - 1) + [2500]
    pages[0].save(path, save_all=True, append_images=pages[1:], duration=times, loop=0)


def _real_beside(dataset: Dataset, labels: np.ndarray) -> np.ndarray:
    """Returns the first training image, in [0, 1], of the class of each label (n, num_classes)."""
    train = dataset.train
    real = train.images[[np.argmax(train.labels == label) for label in labels.argmax(-1)]]
    return real / 255.0 if real.dtype == np.uint8 else real


MOST_SHOWN = 20


def soft_label_images(path: Path, dataset: Dataset, images: np.ndarray, labels: np.ndarray) -> None:
    """Draw at most `MOST_SHOWN` images with the probabilities of their labels (Fig. 1 of Shvai et
    al. 2022).

    images: (n, H, W, C) normalised; cut at black and white. labels: (n, num_classes).
    """
    chosen = _evenly(len(images), MOST_SHOWN)
    columns = min(len(chosen), 5)
    rows = -(-len(chosen) // columns)
    pictures = _for_display(denormalize(np.asarray(images)[chosen], dataset.mean, dataset.std))
    # One coordinate system for all, as axes for each image would take seconds to draw.
    figure = Figure(figsize=(2.4 * columns, 1.2 * rows))
    axes = figure.add_axes((0, 0, 1, 1))
    row, place = np.divmod(np.arange(len(chosen)), columns)
    left, top = 2.3 * place, -1.2 * row
    for picture, x, y in zip(pictures, left, top, strict=True):
        axes.imshow(picture, extent=(x, x + 1, y - 1, y), **_IN_GRAY)
    num_classes = dataset.num_classes
    offsets = (np.arange(num_classes) + 0.5) / num_classes
    bottoms, lefts = (top[:, None] - offsets).ravel(), np.repeat(left + 1.1, num_classes)
    lengths, height = labels[chosen].ravel(), 0.8 / num_classes
    axes.barh(bottoms, lengths, height=height, left=lefts, color=COLORS[0])
    for probability in (0, 1):
        axes.vlines(left + 1.1 + probability, top - 1, top, color="#aaaaaa", lw=0.5)
    if num_classes <= 20:  # the same for all images, so named at the end of each row
        font: dict[str, Any] = {"fontsize": 5, "va": "center", "parse_math": False}
        for y in -1.2 * np.arange(rows):
            for name, offset in zip(dataset.class_names, offsets, strict=True):
                axes.text(2.3 * columns, y - offset, name[:12], **font)
    axes.set(xlim=(-0.1, 2.3 * columns + 0.5), ylim=(-1.2 * rows, 0.1), aspect="equal")
    axes.set_axis_off()
    save_figure(figure, path)


def accuracy_by_size(results: dict[str, list[tuple[int, float, float]]]) -> list[Chart]:
    """Accuracy against the number of images, a line for each method; results: by method the points
    (images, mean, standard deviation), with accuracies in [0, 1]."""
    series = []
    for index, (method, points) in enumerate(results.items()):
        sizes, means, deviations = np.array(sorted(points), float).T
        # Side by side, so that bars of different methods do not hide each other.
        x = sizes * (1 + 0.02 * (index - len(results) / 2))
        y, spread = 100 * means, 100 * deviations
        rows = zip(sizes, y, spread, strict=True)
        notes = [f"{size:.0f} images: {mean:.2f} ± {std:.2f} %" for size, mean, std in rows]
        series.append(Series(method, x, y, y - spread, y + spread, "joined points", notes=notes))
    return [Chart("images", "accuracy on the test split (%)", series, log_x=True)]


def compression_curves(metrics: list[dict[str, Any]]) -> list[Chart]:
    """Accuracy, relative size and similarity loss of a population by generation (Figs. 2 to 4 of
    van den Beemt et al. 2021): the mean, shaded from the worst to the best member. Generation 1 is
    the initial population, as in metrics.jsonl."""
    generations = column(metrics, "generation")
    charts = []
    for name, low, high, title in (
        ("accuracy", "worst", "best", "accuracy on the batch"),
        ("relative_size", "least", "most", "relative size"),
        ("similarity_loss", "best", "worst", "similarity loss (nats)"),
    ):
        mean, lowest, highest = (column(metrics, f"{name}_{end}") for end in ("mean", low, high))
        series = Series("mean", generations, mean, lowest, highest)
        charts.append(Chart("generation", title, [series]))
    return charts


def accuracy_front(
    front: list[dict[str, Any]], parent: float, chosen: tuple[float, float]
) -> list[Chart]:
    """A Pareto front of networks: accuracy against parameters, as parts of the parent's and of 1.

    front: rows with `relative_parameters`, `evolution_accuracy` and `hidden_units`. parent: its
    accuracy. chosen: relative parameters and accuracy of the run's network.
    """
    # Points, no line: similarity is an objective too, so that a larger one may be less accurate.
    sizes, accuracies = column(front, "relative_parameters"), column(front, "evolution_accuracy")
    notes = ["-".join(map(str, row["hidden_units"])) for row in front]
    x_title, y_title = "parameters (% of the parent's)", "accuracy on evolution's images (%)"
    networks = Series(
        "front, of similarity too", 100 * sizes, 100 * accuracies, style="points", notes=notes
    )
    one = Series("network", [100 * chosen[0]], [100 * chosen[1]], style="star")
    return [Chart(x_title, y_title, [networks, one], levels={"parent": 100 * parent})]


RULES = {
    "l1_refit": "L1, refitted",
    "elimination": "elimination, refitted",
    "components": "principal components",
}
"""Names of the rules that stand beside a front, by their key in its rows."""


def size_fronts(front: list[dict[str, Any]], chosen: dict[str, Any], size: str) -> list[Chart]:
    """Accuracy on the test split against size, of networks whose units were evolved and of those
    that simple rules give.

    front: rows with `relative_<size>`, the part of the parent's, `test_accuracy`, `hidden_units`
    and, under some of `RULES`, such a row or None. chosen: such a row, with
    `parent_test_accuracy`. size: parameters, multiplications or latency.
    """

    def series(name: str, rows: list[dict[str, Any]], style: Any):
        x, y = (100 * column(rows, key) for key in (f"relative_{size}", "test_accuracy"))
        notes = ["-".join(map(str, row["hidden_units"])) for row in rows]
        return Series(name, x, y, style=style, notes=notes)

    lines = [series("evolved", front, "joined points")]
    for rule, name in RULES.items():
        if rule in front[0]:
            lines.append(series(name, [row[rule] for row in front if row[rule]], "joined points"))
    lines.append(series("network", [chosen], "star"))
    titles = f"{size} (% of the parent's)", "accuracy on the test split (%)"
    levels = {"parent": 100 * chosen["parent_test_accuracy"]}
    return [Chart(*titles, lines, log_x=True, levels=levels)]


def training_curves(runs: dict[str, list[dict[str, Any]]]) -> list[Chart]:
    """Loss and accuracy by epoch, training dashed and validation solid, and validation accuracy by
    gradient examples where they were counted (Figs. 2 to 7 of Ryan et al. 2024; Figs. 7 and 9 of
    Pei et al. 2022). runs: metrics of each, by name."""
    colors = dict(zip(runs, cycle(COLORS), strict=False))
    charts = []
    for kind, title in (("loss", "loss (nats)"), ("accuracy", "accuracy")):
        series = []
        for name, lines in runs.items():
            look = {"style": "dashed", "color": colors[name]}
            series.append(_curve(lines, "generation", kind, f"{name}, training", **look))
            look["style"], validation = "solid", f"validation_{kind}"
            series.append(_curve(lines, "generation", validation, f"{name}, validation", **look))
        charts.append(Chart("epoch", title, series))
    if all("gradient_examples" in line for lines in runs.values() for line in lines):
        axes = "gradient_examples", "validation_accuracy"
        series = [_curve(runs[name], *axes, name, color=color) for name, color in colors.items()]
        charts.append(Chart("gradient examples", "validation accuracy", series))
    return charts


def resource_curves(runs: dict[str, list[dict[str, Any]]]) -> list[Chart]:
    """Processor and memory over time (Figs. 8 and 9 of Ryan et al. 2024). runs: lines of
    `resources.recorded`, by name."""
    kinds = {"cpu_percent": "processor (%, 100 is one core)", "memory_mib": "memory (MiB)"}
    charts = []
    for kind, title in kinds.items():
        series = [_curve(lines, "seconds", kind, name) for name, lines in runs.items()]
        charts.append(Chart("seconds", title, series))
    return charts


def population_movement(
    populations: list[list[dict[str, Any]]], size: str, title: str
) -> list[Chart]:
    """Error rate and size of each generation's survivors, and their means (Fig. 6 of Pei et al.
    2022). populations: by generation, rows with `accuracy`, `units` and what `size` names, which is
    called `title`."""
    clouds, statistics = [], []
    colors = gradual(len(populations))
    for generation, (rows, color) in enumerate(zip(populations, colors, strict=True)):
        errors, sizes = 1 - column(rows, "accuracy"), column(rows, size)
        name, at_an_end = f"generation {generation}", generation in (0, len(populations) - 1)
        look: dict[str, Any] = {"style": "points", "color": color, "in_legend": at_an_end}
        notes = [_described(row["units"]) for row in rows]
        clouds.append(Series(name, sizes, errors, notes=notes, **look))
        statistics.append((np.nanmean(errors), np.nanmin(errors), sizes.mean(), sizes.min()))
    mean_error, least_error, mean_size, least_size = np.array(statistics).T
    generations = np.arange(len(populations))

    def both(mean: np.ndarray, least: np.ndarray) -> list[Series]:
        lowest = Series("least", generations, least, style="dashed")
        return [Series("mean", generations, mean), lowest]

    error = "error rate (validation)"
    return [
        Chart(title, error, clouds, log_x=True),
        Chart("generation", error, both(mean_error, least_error)),
        Chart("generation", title, both(mean_size, least_size), log_y=True),
    ]


def _described(units: list[dict[str, Any]]) -> str:
    """Returns the units of a network on one line."""
    return ", ".join(
        f"{unit['filters']} of {unit['kernel']}x{unit['kernel']}"
        if unit["kind"] == "convolution"
        else f"{unit['kind']} pooling"
        for unit in units
    )
