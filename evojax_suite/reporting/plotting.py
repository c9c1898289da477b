"""The figures of a run: pictures as PNG files, curves and fronts as charts."""

from __future__ import annotations

from itertools import cycle
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure
from PIL import Image

from evojax_suite.data.transforms import denormalize
from evojax_suite.reporting.charts import COLORS, Chart, Series, gradual, save_figure
from evojax_suite.types import Dataset


def _column(lines: list[dict], name: str) -> np.ndarray:
    """(n,) float64; what is null is NaN."""
    return np.array([np.nan if line[name] is None else line[name] for line in lines], float)


def fitness_curves(
    metrics: list[dict], fitness: str, strong_random: list[float] | None
) -> list[Chart]:
    """Best and mean fitness by generation, with the fitness of strong random selection."""
    generations = _column(metrics, "generation")
    mean, deviation = _column(metrics, "fitness_mean"), _column(metrics, "fitness_std")
    series = [
        Series("best", generations, _column(metrics, "fitness_best")),
        Series("mean of the population", generations, mean, mean - deviation, mean + deviation),
    ]
    held_out = _column(metrics, "holdout_score")
    if np.isfinite(held_out).any():
        series.append(Series("best, held-out images", generations, held_out))
    names = {
        "accuracy": "accuracy on the fitness images",
        "cross_entropy": "minus cross-entropy",
        "kernel_regression": "minus the error of kernel regression",
    }
    levels = {"strong random": float(np.mean(strong_random))} if strong_random else {}
    return [Chart("generation", names.get(fitness, fitness), series, levels=levels)]


def _for_display(images: np.ndarray) -> np.ndarray:
    """Images (n, H, W, C) of any range to [0, 1]; of 1 or 2 channels their mean (n, H, W)."""
    images = np.clip(images, 0.0, 1.0)
    return images if images.shape[-1] in (3, 4) else images.mean(-1)


def stretched(dataset: Dataset, images: np.ndarray) -> np.ndarray:
    """Normalised images (n, H, W, C) as they are shown: each stretched to fill 0..1."""
    images = denormalize(images, dataset.mean, dataset.std)
    low = images.min((1, 2, 3), keepdims=True)
    high = images.max((1, 2, 3), keepdims=True)
    return (images - low) / np.maximum(high - low, 1e-6)


def _spread_over(number: int, most: int) -> np.ndarray:
    """Which of `number` images are shown, evenly, where there is room for `most`."""
    return np.linspace(0, number - 1, min(number, most)).round().astype(int)


def image_rows(
    path: Path, dataset: Dataset, images: np.ndarray, labels: np.ndarray, max_columns: int = 12
) -> None:
    """Real images above synthetic ones, a column an image (the paper's Figs. 4 to 11).

    images: (n, H, W, C) normalised; each is stretched to its own range, since evolution leaves
    the range of real images. labels: (n, num_classes).
    """
    chosen = _spread_over(len(images), max_columns)
    count = len(chosen)
    classes = labels[chosen].argmax(-1)
    real = _real_beside(dataset, labels[chosen])
    synthetic = stretched(dataset, np.asarray(images)[chosen])
    figure = Figure(figsize=(0.85 * count, 2.1))
    for row, (title, pictures) in enumerate(
        (("real", _for_display(real)), ("synthetic", _for_display(synthetic)))
    ):
        for column in range(count):
            axes = figure.add_subplot(2, count, row * count + column + 1)
            axes.imshow(pictures[column], cmap="gray", vmin=0, vmax=1)
            axes.set(xticks=[], yticks=[])
            if row == 0:
                axes.set_title(
                    dataset.class_names[classes[column]][:12], fontsize=7, parse_math=False
                )
            if column == 0:
                axes.set_ylabel(title, fontsize=8)
    save_figure(figure, path)


def evolution(
    path: Path,
    dataset: Dataset,
    frames: np.ndarray,
    labels: np.ndarray,
    max_columns: int = 12,
    side: int = 64,
) -> None:
    """An animated PNG of synthetic images (frames, n, H, W, C), normalised, below real ones; each
    is stretched to its own range. labels: (n, num_classes)."""
    chosen = _spread_over(frames.shape[1], max_columns)
    real = _real_beside(dataset, labels[chosen])
    size = (side, round(side * real.shape[1] / real.shape[2]))

    def row(pictures: np.ndarray) -> np.ndarray:
        pictures = np.round(255 * _for_display(pictures)).astype(np.uint8)
        large = [
            np.asarray(Image.fromarray(own).resize(size, Image.Resampling.NEAREST))
            for own in pictures
        ]
        return np.concatenate(large, 1)

    upper = row(real)
    upper = np.concatenate([upper, np.zeros_like(upper[:4])])
    pages = [
        Image.fromarray(np.concatenate([upper, row(stretched(dataset, frame[chosen]))]))
        for frame in frames
    ]
    path.parent.mkdir(parents=True, exist_ok=True)
    times = [300] * (len(pages) - 1) + [2500]
    pages[0].save(path, save_all=True, append_images=pages[1:], duration=times, loop=0)


def _real_beside(dataset: Dataset, labels: np.ndarray) -> np.ndarray:
    """The first training image of the class of each of `labels` (n, num_classes), in 0..1."""
    images = [
        dataset.train.images[np.argmax(dataset.train.labels == label)]
        for label in labels.argmax(-1)
    ]
    real = np.stack(images)
    return real / 255.0 if real.dtype == np.uint8 else real


def soft_label_images(
    path: Path, dataset: Dataset, images: np.ndarray, labels: np.ndarray, max_images: int = 20
) -> None:
    """Synthetic images with the probabilities of their labels as bars (paper 000, Fig. 1).

    images: (n, H, W, C) normalised; shown as they are, cut at black and white. labels:
    (n, num_classes).
    """
    chosen = _spread_over(len(images), max_images)
    count = len(chosen)
    columns = min(count, 5)
    rows = -(-count // columns)
    pictures = _for_display(denormalize(np.asarray(images)[chosen], dataset.mean, dataset.std))
    # One coordinate system for all: axes of their own would take seconds to draw.
    figure = Figure(figsize=(2.4 * columns, 1.2 * rows))
    axes = figure.add_axes((0, 0, 1, 1))
    row, column = np.divmod(np.arange(count), columns)
    left, top = 2.3 * column, -1.2 * row
    for picture, x, y in zip(pictures, left, top, strict=True):
        axes.imshow(picture, cmap="gray", vmin=0, vmax=1, extent=(x, x + 1, y - 1, y))
    places = (np.arange(dataset.num_classes) + 0.5) / dataset.num_classes
    axes.barh(
        (top[:, None] - places).ravel(),
        labels[chosen].ravel(),
        height=0.8 / dataset.num_classes,
        left=np.repeat(left + 1.1, dataset.num_classes),
        color="#2166ac",
    )
    for probability in (0, 1):
        axes.vlines(left + 1.1 + probability, top - 1, top, color="#aaaaaa", lw=0.5)
    if dataset.num_classes <= 20:  # the same for all, named at the end of a row
        for y in -1.2 * np.arange(rows):
            for name, place in zip(dataset.class_names, places, strict=True):
                axes.text(
                    2.3 * columns, y - place, name[:12], fontsize=5, va="center", parse_math=False
                )
    axes.set(xlim=(-0.1, 2.3 * columns + 0.5), ylim=(-1.2 * rows, 0.1), aspect="equal")
    axes.set_axis_off()
    save_figure(figure, path)


def accuracy_by_size(results: dict[str, list[tuple[int, float, float]]]) -> list[Chart]:
    """Accuracy against the number of images, a line a method.

    results: for each method (images, mean, standard deviation), accuracies in [0, 1].
    """
    series = []
    for index, (method, points) in enumerate(results.items()):
        sizes, means, deviations = (
            np.array(column, float) for column in zip(*sorted(points), strict=True)
        )
        # Side by side, so that bars of different methods do not hide each other.
        x = sizes * (1 + 0.02 * (index - len(results) / 2))
        y, spread = 100 * means, 100 * deviations
        notes = [
            f"{size:.0f} images: {m:.2f} ± {d:.2f} %"
            for size, m, d in zip(sizes, y, spread, strict=True)
        ]
        series.append(Series(method, x, y, y - spread, y + spread, "joined points", notes=notes))
    return [Chart("images", "accuracy on the test split (%)", series, log_x=True)]


def compression_curves(metrics: list[dict]) -> list[Chart]:
    """Accuracy, relative size and similarity loss of a population by generation (paper 003, Figs. 2
    to 4): the mean, shaded from the worst to the best member."""
    generations = _column(metrics, "generation") - 1
    return [
        Chart(
            "generation",
            title,
            [
                Series(
                    "mean",
                    generations,
                    _column(metrics, f"{name}_mean"),
                    _column(metrics, f"{name}_{low}"),
                    _column(metrics, f"{name}_{high}"),
                )
            ],
        )
        for name, low, high, title in (
            ("accuracy", "worst", "best", "accuracy on the batch"),
            ("relative_size", "least", "most", "relative size"),
            ("similarity_loss", "best", "worst", "similarity loss (nats)"),
        )
    ]


def accuracy_front(front: list[dict], parent: float, chosen: tuple[float, float]) -> list[Chart]:
    """A Pareto front of networks: accuracy against parameters, as parts of the parent's and of 1.

    front: rows with `relative_parameters`, `evolution_accuracy`, `hidden_units`; parent: its
    accuracy; chosen: the run's network.
    """
    # Points, no line: similarity is an objective too, so that a larger one may be less accurate.
    sizes, accuracies = (
        100 * _column(front, name) for name in ("relative_parameters", "evolution_accuracy")
    )
    notes = ["-".join(map(str, row["hidden_units"])) for row in front]
    return [
        Chart(
            "parameters (% of the parent's)",
            "accuracy on evolution's images (%)",
            [
                Series("front, of similarity too", sizes, accuracies, style="points", notes=notes),
                Series("network", [100 * chosen[0]], [100 * chosen[1]], style="star"),
            ],
            levels={"parent": 100 * parent},
        )
    ]


def training_curves(runs: dict[str, list[dict]]) -> list[Chart]:
    """Loss and accuracy by epoch, training dashed and validation solid, and validation accuracy by
    gradient examples where they were counted (paper 001, Figs. 2 to 7; paper 004, Figs. 7 and 9);
    runs: metrics of each, by name."""
    colors = dict(zip(runs, cycle(COLORS), strict=False))

    def curves(kind: str) -> list[Series]:
        found = []
        for name, lines in runs.items():
            epochs, color = _column(lines, "generation"), colors[name]
            trained, validated = _column(lines, kind), _column(lines, f"validation_{kind}")
            found += [
                Series(f"{name}, training", epochs, trained, style="dashed", color=color),
                Series(f"{name}, validation", epochs, validated, color=color),
            ]
        return found

    charts = [
        Chart("epoch", "loss (nats)", curves("loss")),
        Chart("epoch", "accuracy", curves("accuracy")),
    ]
    if all("gradient_examples" in line for lines in runs.values() for line in lines):
        seen = [
            Series(
                name,
                _column(lines, "gradient_examples"),
                _column(lines, "validation_accuracy"),
                color=colors[name],
            )
            for name, lines in runs.items()
        ]
        charts.append(Chart("gradient examples", "validation accuracy", seen))
    return charts


def resource_curves(runs: dict[str, list[dict]]) -> list[Chart]:
    """Processor and memory over time (paper 001, Figs. 8 and 9); runs: lines of
    `resources.recorded`, by name."""
    return [
        Chart(
            "seconds",
            title,
            [
                Series(name, _column(lines, "seconds"), _column(lines, kind))
                for name, lines in runs.items()
            ],
        )
        for kind, title in (
            ("cpu_percent", "processor (%, 100 is one core)"),
            ("memory_mib", "memory (MiB)"),
        )
    ]


def population_movement(populations: list[list[dict]], size: str, title: str) -> list[Chart]:
    """Error rate and size of each generation's survivors (paper 004, Fig. 6), and their means.

    populations: of each generation, rows with `accuracy`, `size` and `units`. title: what size is.
    """
    clouds, means = [], []
    colors = gradual(len(populations))
    for generation, (rows, color) in enumerate(zip(populations, colors, strict=True)):
        errors, sizes = 1 - _column(rows, "accuracy"), _column(rows, size)
        clouds.append(
            Series(
                f"generation {generation}",
                sizes,
                errors,
                style="points",
                color=color,
                notes=[_in_words(row["units"]) for row in rows],
                in_legend=generation in (0, len(populations) - 1),
            )
        )
        means.append((np.nanmean(errors), np.nanmin(errors), sizes.mean(), sizes.min()))
    mean_error, least_error, mean_size, least_size = np.array(means).T
    generations = np.arange(len(populations))
    error = "error rate (validation)"

    def both(mean, least):
        return [
            Series("mean", generations, mean),
            Series("least", generations, least, style="dashed"),
        ]

    return [
        Chart(title, error, clouds, log_x=True),
        Chart("generation", error, both(mean_error, least_error)),
        Chart("generation", title, both(mean_size, least_size), log_y=True),
    ]


def _in_words(units: list[dict]) -> str:
    """A network's units on one line."""
    return ", ".join(
        f"{unit['filters']} of {unit['kernel']}x{unit['kernel']}"
        if unit["kind"] == "convolution"
        else f"{unit['kind']} pooling"
        for unit in units
    )
