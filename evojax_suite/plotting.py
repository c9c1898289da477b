"""Figures of a run, as PNG files."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from matplotlib import colormaps
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter, LogLocator, NullFormatter

from evojax_suite.data.transforms import denormalize
from evojax_suite.types import Dataset


def _save(figure: Figure, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    FigureCanvasAgg(figure)
    figure.savefig(path, dpi=150, bbox_inches="tight")


def fitness_curves(
    path: Path, metrics: list[dict], fitness: str, strong_random: list[float] | None
) -> None:
    """Best and mean fitness by generation, with the fitness of strong random selection."""
    generations = [line["generation"] for line in metrics]
    figure = Figure(figsize=(6.4, 3.8))
    axes = figure.add_subplot()

    def values(name):
        return np.array([np.nan if line[name] is None else line[name] for line in metrics])

    axes.plot(generations, values("fitness_best"), color="#2166ac", lw=0.8, label="best")
    mean, deviation = values("fitness_mean"), values("fitness_std")
    axes.plot(generations, mean, color="#b2182b", lw=0.8, label="mean of the population")
    axes.fill_between(generations, mean - deviation, mean + deviation, color="#b2182b", alpha=0.15)
    if np.isfinite(values("holdout_score")).any():
        held_out = values("holdout_score")
        axes.plot(generations, held_out, color="#4dac26", lw=0.8, label="best, held-out images")
    if strong_random:
        axes.axhline(
            float(np.mean(strong_random)), color="black", ls="--", lw=1, label="strong random"
        )
    names = {"accuracy": "accuracy on the fitness images", "cross_entropy": "minus cross-entropy"}
    axes.set(xlabel="generation", ylabel=names[fitness])
    axes.grid(alpha=0.3)
    axes.legend(frameon=False, fontsize=8)
    _save(figure, path)


def _for_display(images: np.ndarray) -> np.ndarray:
    """Images (n, H, W, C) of any range to [0, 1], grey ones without the channel axis."""
    images = np.clip(images, 0.0, 1.0)
    return images[..., 0] if images.shape[-1] == 1 else images


def image_rows(
    path: Path, dataset: Dataset, images: np.ndarray, labels: np.ndarray, max_columns: int = 12
) -> None:
    """Real images above synthetic ones, a column an image (the paper's Figs. 4 to 11).

    images: (n, H, W, C) normalised; each is stretched to its own range, since evolution leaves
    the range of real images. labels: (n, num_classes).
    """
    count = min(len(images), max_columns)
    chosen = np.linspace(0, len(images) - 1, count).round().astype(int)
    classes = labels[chosen].argmax(-1)
    real = np.stack([dataset.train.images[dataset.train.labels == c][0] for c in classes])
    scale = 255.0 if real.dtype == np.uint8 else 1.0
    synthetic = denormalize(np.asarray(images)[chosen], dataset.mean, dataset.std)
    low = synthetic.min((1, 2, 3), keepdims=True)
    high = synthetic.max((1, 2, 3), keepdims=True)
    stretched = (synthetic - low) / np.maximum(high - low, 1e-6)
    figure = Figure(figsize=(0.85 * count, 2.1))
    for row, (title, pictures) in enumerate(
        (("real", _for_display(real / scale)), ("synthetic", _for_display(stretched)))
    ):
        for column in range(count):
            axes = figure.add_subplot(2, count, row * count + column + 1)
            axes.imshow(pictures[column], cmap="gray", vmin=0, vmax=1)
            axes.set(xticks=[], yticks=[])
            if row == 0:
                axes.set_title(dataset.class_names[classes[column]][:12], fontsize=7)
            if column == 0:
                axes.set_ylabel(title, fontsize=8)
    _save(figure, path)


def soft_label_images(
    path: Path, dataset: Dataset, images: np.ndarray, labels: np.ndarray, max_images: int = 20
) -> None:
    """Synthetic images with the probabilities of their labels as bars (paper 000, Fig. 1).

    images: (n, H, W, C) normalised; shown as they are, cut at black and white. labels:
    (n, num_classes).
    """
    count = min(len(images), max_images)
    columns = min(count, 5)
    rows = -(-count // columns)
    chosen = np.linspace(0, len(images) - 1, count).round().astype(int)
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
                axes.text(2.3 * columns, y - place, name[:12], fontsize=5, va="center")
    axes.set(xlim=(-0.1, 2.3 * columns + 0.5), ylim=(-1.2 * rows, 0.1), aspect="equal")
    axes.set_axis_off()
    _save(figure, path)


def accuracy_by_size(path: Path, results: dict[str, list[tuple[int, float, float]]]) -> None:
    """Accuracy against the number of images, a line a method.

    results: for each method (images, mean, standard deviation), accuracies in [0, 1].
    """
    figure = Figure(figsize=(6.4, 3.8))
    axes = figure.add_subplot()
    for index, (method, points) in enumerate(results.items()):
        sizes, means, deviations = (
            np.array(column) for column in zip(*sorted(points), strict=True)
        )
        # Side by side, so that bars of different methods do not hide each other.
        axes.errorbar(
            sizes * (1 + 0.02 * (index - len(results) / 2)),
            100 * means,
            100 * deviations,
            marker="o",
            ms=4,
            lw=1.2,
            capsize=2,
            label=method,
        )
    all_sizes = sorted({size for points in results.values() for size, _, _ in points})
    axes.set(xlabel="images", ylabel="accuracy on the test part (%)", xscale="log")
    axes.set_xticks(all_sizes, [str(size) for size in all_sizes])
    axes.minorticks_off()
    axes.grid(alpha=0.3)
    axes.legend(frameon=False, fontsize=8)
    _save(figure, path)


def compression_curves(path: Path, metrics: list[dict]) -> None:
    """Accuracy, relative size and similarity loss of a population by generation (paper 003, Figs. 2
    to 4): the mean, shaded from the worst to the best member."""
    figure = Figure(figsize=(9.6, 3.0))
    generations = np.array([line["generation"] for line in metrics]) - 1
    for index, (name, (low, high), title) in enumerate(
        (
            ("accuracy", ("worst", "best"), "accuracy on the batch"),
            ("relative_size", ("least", "most"), "relative size"),
            ("similarity_loss", ("best", "worst"), "similarity loss (nats)"),
        )
    ):
        axes = figure.add_subplot(1, 3, index + 1)
        mean, low, high = (
            np.array(
                [
                    np.nan if line[f"{name}_{kind}"] is None else line[f"{name}_{kind}"]
                    for line in metrics
                ]
            )
            for kind in ("mean", low, high)
        )
        axes.plot(generations, mean, color="#2166ac", lw=1)
        axes.fill_between(generations, low, high, color="#2166ac", alpha=0.15, lw=0)
        axes.set(xlabel="generation", title=title)
        axes.title.set_fontsize(9)
        axes.grid(alpha=0.3)
    figure.tight_layout()
    _save(figure, path)


def accuracy_front(
    path: Path, points: list[tuple[float, float]], parent: float, chosen: tuple[float, float]
) -> None:
    """A Pareto front of networks: accuracy against parameters, as parts of the parent's and of 1.

    points: of the front (parameters, accuracy); parent: its accuracy; chosen: the run's network.
    """
    figure = Figure(figsize=(6.4, 3.8))
    axes = figure.add_subplot()
    sizes, accuracies = (100 * np.array(column) for column in zip(*sorted(points), strict=True))
    # No line: similarity is an objective too, so that a larger one may be less accurate.
    axes.plot(sizes, accuracies, "o", ms=3, color="#2166ac", label="front, of similarity too")
    axes.plot(100 * chosen[0], 100 * chosen[1], "*", ms=12, color="#b2182b", label="network")
    axes.axhline(100 * parent, color="black", ls="--", lw=1, label="parent")
    axes.set(xlabel="parameters (% of the parent's)", ylabel="accuracy on evolution's images (%)")
    axes.grid(alpha=0.3)
    axes.legend(frameon=False, fontsize=8)
    _save(figure, path)


def training_curves(path: Path, runs: dict[str, list[dict]]) -> None:
    """Loss and accuracy by epoch, training dashed and validation solid, and validation accuracy by
    gradient examples where they were counted (paper 001, Figs. 2 to 7; paper 004, Figs. 7 and 9);
    runs: metrics of each, by name."""
    counted = all("gradient_examples" in line for lines in runs.values() for line in lines)
    figure = Figure(figsize=(11, 3.5) if counted else (7.6, 3.5))
    panels = figure.subplots(1, 3 if counted else 2)

    def values(lines, key):
        return np.array([np.nan if line[key] is None else line[key] for line in lines], float)

    for index, (name, lines) in enumerate(runs.items()):
        color, epochs = f"C{index}", values(lines, "generation")
        for panel, kind in zip(panels, ("loss", "accuracy"), strict=False):
            panel.plot(epochs, values(lines, kind), "--", lw=0.9, color=color)
            label = name if kind == "accuracy" else None  # once in the legend
            validated = values(lines, f"validation_{kind}")
            panel.plot(epochs, validated, lw=1.2, color=color, label=label)
        if counted:
            seen = values(lines, "gradient_examples"), values(lines, "validation_accuracy")
            panels[2].plot(*seen, lw=1.2, color=color)
            panels[2].set(xlabel="gradient examples", ylabel="validation accuracy")
    panels[0].set(xlabel="epoch", ylabel="loss (nats)")
    panels[1].set(xlabel="epoch", ylabel="accuracy")
    for panel in panels:
        panel.grid(alpha=0.3)
    figure.tight_layout(rect=(0, 0.08, 1, 1))
    title = "dashed: training, solid: validation"
    figure.legend(loc="lower center", ncols=len(runs), frameon=False, fontsize=8, title=title,
                  title_fontsize=8)  # fmt: skip
    _save(figure, path)


def resource_curves(path: Path, runs: dict[str, list[dict]]) -> None:
    """Processor and memory over time (paper 001, Figs. 8 and 9); runs: lines of
    `resources.recorded`, by name."""
    figure = Figure(figsize=(9, 3))
    panels = figure.subplots(1, 2)
    for index, (name, lines) in enumerate(runs.items()):
        seconds = np.array([line["seconds"] for line in lines])
        for panel, kind in zip(panels, ("cpu_percent", "memory_mib"), strict=True):
            panel.plot(seconds, [line[kind] for line in lines], lw=1, color=f"C{index}", label=name)
    panels[0].set(xlabel="seconds", ylabel="processor (%, 100 is one core)")
    panels[1].set(xlabel="seconds", ylabel="memory (MiB)")
    for panel in panels:
        panel.grid(alpha=0.3)
        panel.set_ylim(bottom=0)
        panel.legend(frameon=False, fontsize=8)
    figure.tight_layout()
    _save(figure, path)


def population_movement(path: Path, populations: list[list[dict]], size: str, title: str) -> None:
    """Error rate and size of each generation's survivors (paper 004, Fig. 6), and their means.

    populations: of each generation, rows with `accuracy` and `size`. title: what size is.
    """
    figure = Figure(figsize=(9, 3.6))
    left, right = figure.subplots(1, 2)
    colors = colormaps["viridis"](np.linspace(0, 0.9, len(populations)))
    means = []
    for generation, (rows, color) in enumerate(zip(populations, colors, strict=True)):
        errors = np.array([np.nan if r["accuracy"] is None else 1 - r["accuracy"] for r in rows])
        sizes = np.array([row[size] for row in rows], float)
        named = generation in (0, len(populations) - 1)
        label = f"generation {generation}" if named else None
        left.scatter(sizes, errors, s=14, color=color, label=label, lw=0)
        means.append((np.nanmean(errors), np.nanmin(errors), sizes.mean(), sizes.min()))
    left.set(xlabel=title, ylabel="error rate (validation)", xscale="log")
    mean_error, least_error, mean_size, least_size = np.array(means).T
    generations = np.arange(len(populations))
    right.plot(generations, mean_error, color="#b2182b", lw=1.2, label="error, mean")
    right.plot(generations, least_error, "--", color="#b2182b", lw=1, label="error, least")
    right.set(xlabel="generation", ylabel="error rate (validation)")
    other = right.twinx()
    other.plot(generations, mean_size, color="#2166ac", lw=1.2, label=f"{title}, mean")
    other.plot(generations, least_size, "--", color="#2166ac", lw=1, label=f"{title}, least")
    other.set(ylabel=title, yscale="log")
    for axis in (left.xaxis, other.yaxis):
        axis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axis.set_major_formatter(EngFormatter(sep=""))
        axis.set_minor_formatter(NullFormatter())
    for axes in (left, right):
        axes.grid(alpha=0.3)
    left.legend(frameon=False, fontsize=8)
    lines = [*right.get_lines(), *other.get_lines()]
    right.legend(lines, [line.get_label() for line in lines], frameon=False, fontsize=8)
    figure.tight_layout()
    _save(figure, path)
