r"""Ten images by evolution on kernel regression: what runs found, class means beside it, a picture.

    for name in mnist fashion_mnist cifar10; do for seed in 0 1 2; do
      evojax-suite ga-distillation --recipe recommended --dataset $name --seed $seed \
        --name $name-$seed
      evojax-suite ga-distillation --recipe four_in_one --dataset $name --seed $seed \
        --name $name-2x2-$seed
    done; done
    python experiments/ga_distillation/ten_images.py \
      runs/{mnist,fashion_mnist,cifar10}-{,2x2-}{0,1,2}

Writes ten_images.json and ten_images.png beside this file; the picture shows the first run of each
kind. The class means are judged as that run's images are: ten new networks of its recipe, on the
test split; those that the file holds already are not judged again.
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

from evojax_suite import distilled, ga_distillation, load
from evojax_suite.distilled import DistilledDataset
from evojax_suite.reporting.charts import save_figure
from evojax_suite.reporting.formats import percent
from evojax_suite.reporting.plotting import stretched
from evojax_suite.runtime.results import write_json
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
    return ga_distillation.decode(config, dataset.num_classes, dataset.image_shape, means, data)


def judged_class_means(dataset: Dataset, found: DistilledDataset, num_networks: int) -> np.ndarray:
    """Accuracies of networks trained on the mean image of each class."""
    own = class_means(dataset)
    return distilled.accuracies_on(
        dataset.test,
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
    file = options.output.with_suffix(".json")
    means = json.loads(file.read_text())["class means"] if file.exists() else {}
    rows, table = {}, {}
    for run in options.runs:
        found = DistilledDataset.load(run / "distilled.npz")
        summary = json.loads((run / "summary.json").read_text())
        levels = summary["options"].get("levels")
        name = found.dataset + (f", {found.factor} x {found.factor}" if found.factor > 1 else "")
        name += f", {levels} levels" if levels else ""
        if name not in table:
            dataset = load(found.dataset, options.data_dir)
            rows[name] = dataset, found
            if found.dataset not in means:
                means[found.dataset] = judged_class_means(
                    dataset, found, len(found.test_accuracies)
                ).tolist()
            table[name] = []
        table[name].append(
            {
                "seed": found.seed,
                "test accuracies": found.test_accuracies,
                "seconds": summary["seconds"],
                "generations": summary["num_generations"],
                "options": summary["options"],
            }
        )
    for name, found in means.items():
        print(f"{name}, class means: {percent(found)} %")
    for name, runs in table.items():
        each = ", ".join(percent(run["test accuracies"]) for run in runs)
        seconds = np.mean([run["seconds"] for run in runs])
        over = percent([np.mean(run["test accuracies"]) for run in runs])
        whole = f"{over} % over the means of {len(runs)} runs, " if len(runs) > 1 else ""
        print(f"{name}: {whole}{each} % over networks, {seconds:.0f} s of search")
    write_json(file, {"class means": means, "runs": table})
    picture(list(rows.values()), options.output.with_suffix(".png"))


if __name__ == "__main__":
    main(tyro.cli(Options))
