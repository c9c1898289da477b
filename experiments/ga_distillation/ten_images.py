"""Ten images by evolution on kernel regression: what runs found, class means beside it, a picture.

    evojax-suite ga-distillation --recipe recommended --dataset mnist --name mnist
    evojax-suite ga-distillation --recipe recommended --dataset fashion_mnist --name fashion_mnist
    evojax-suite ga-distillation --recipe recommended --dataset cifar10 --name cifar10
    python experiments/ga_distillation/ten_images.py runs/mnist runs/fashion_mnist runs/cifar10

Writes ten_images.json and ten_images.png beside this file. The class means are judged as the run's
images are: ten new networks of the run's recipe, on the test part.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import jax
import numpy as np
import tyro
from matplotlib.figure import Figure

from evojax_suite import distilled, load
from evojax_suite.algorithms import ga_distillation
from evojax_suite.charts import save_figure
from evojax_suite.commands.options import percent
from evojax_suite.distilled import DistilledDataset
from evojax_suite.plotting import stretched
from evojax_suite.results import write_json
from evojax_suite.types import Dataset

OUTPUT = Path(__file__).with_name("ten_images")


@dataclass(frozen=True)
class Options:
    """Judge and draw."""

    runs: Annotated[tuple[Path, ...], tyro.conf.Positional]
    """Folders of finished runs."""
    data_dir: Path | None = None
    """Where datasets lie."""
    output: Path = OUTPUT
    """Without a suffix."""


def class_means(dataset: Dataset) -> ga_distillation.Individual:
    """The mean image of each class of the training part, with its hard label."""
    config = ga_distillation.Config()
    data = ga_distillation.make_data(dataset)
    means = ga_distillation.class_means(config, dataset.num_classes, data)
    return ga_distillation.decode(
        config, dataset.num_classes, dataset.image_shape, means, data.spread
    )


def judged_class_means(dataset: Dataset, found: DistilledDataset, num_networks: int) -> np.ndarray:
    """Accuracies of networks trained on the mean image of each class."""
    own = class_means(dataset)
    return distilled.accuracies_on_test(
        jax.random.key(found.seed),
        own.images,
        own.labels,
        dataset,
        found.network,
        found.training,
        num_networks,
    )


def picture(rows: list[tuple[Dataset, DistilledDataset]], path: Path) -> None:
    """A row a dataset, an image a class, each stretched to its own range."""
    figure = Figure(figsize=(8.5, 1.1 * len(rows)))
    for row, (dataset, found) in enumerate(rows):
        images = stretched(dataset, found.images)
        for column, image in enumerate(images):
            axes = figure.add_subplot(len(rows), len(images), row * len(images) + column + 1)
            axes.imshow(image.squeeze(), cmap="gray", vmin=0, vmax=1)
            axes.set(xticks=[], yticks=[])
            axes.set_title(dataset.class_names[column][:12], fontsize=7)
    figure.subplots_adjust(0.01, 0.02, 0.99, 0.9, 0.08, 0.35)
    save_figure(figure, path)


def main(options: Options) -> None:
    rows, table = [], {}
    for run in options.runs:
        found = DistilledDataset.load(run / "distilled.npz")
        summary = json.loads((run / "summary.json").read_text())
        dataset = load(found.dataset, options.data_dir)
        means = judged_class_means(dataset, found, len(found.test_accuracies))
        rows.append((dataset, found))
        table[found.dataset] = {
            "test accuracies": found.test_accuracies,
            "class means": means.tolist(),
            "seconds": summary["seconds"],
            "generations": summary["num_generations"],
            "options": summary["options"],
        }
        print(
            f"{found.dataset}: {percent(list(found.test_accuracies))} % after "
            f"{summary['seconds']:.0f} s, class means {percent(means)} %"
        )
    write_json(options.output.with_suffix(".json"), table)
    picture(rows, options.output.with_suffix(".png"))


if __name__ == "__main__":
    main(tyro.cli(Options))
