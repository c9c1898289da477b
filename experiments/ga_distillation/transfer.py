"""Distilled sets judged by networks that they were not made for: a table, resumable cell by cell.

    python experiments/ga_distillation/transfer.py runs/mnist runs/cifar10 --class-means

Writes transfer.json beside this file; cells that it holds, of the same images, recipe, networks and
seed, are not run again. ConvNets of several widths train by the set's own recipe, the architectures
of the literature, ConvNet-128 among them, by the literature's. In a column the networks of all sets
of one shape begin alike. The first cell of a column includes its compilation.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated

import jax
import numpy as np
import tyro
from ten_images import class_means

from evojax_suite import distilled, load, networks
from evojax_suite.distilled import LITERATURE, DistilledDataset
from evojax_suite.networks import NetworkConfig
from evojax_suite.reporting.formats import percent
from evojax_suite.reporting.progress import console
from evojax_suite.runtime.results import Rows
from evojax_suite.training import TrainingConfig
from evojax_suite.types import Dataset

OUTPUT = Path(__file__).with_name("transfer.json")


@dataclass(frozen=True)
class Options:
    """What is judged, and by which networks."""

    sets: Annotated[tuple[Path, ...], tyro.conf.Positional]
    """Folders of finished runs, or files of distilled sets."""
    widths: tuple[int, ...] = (32, 64, 128, 256)
    """Widths of ConvNets that train by the set's own recipe."""
    networks: tuple[str, ...] = ("MLP", "LeNet", "AlexNet", "VGG11", "ResNet18", "ConvNet")
    """Architectures that train by the literature's recipe."""
    num_networks: int = 20
    """Networks of each cell, each from its own initialisation."""
    num_epochs: int | None = None
    """Another number of epochs than the recipes'."""
    seed: int = 1
    """Seed of the initialisations."""
    class_means: bool = False
    """Judge the mean image of each class of the training part beside each set."""
    data_dir: Path | None = None
    """Where datasets lie."""
    output: Path = OUTPUT

    def __post_init__(self):
        if not self.sets:
            raise ValueError("sets must be at least one folder or file, got none")
        if self.num_networks < 1:
            raise ValueError(f"num_networks must be >= 1, got {self.num_networks}")


def columns(
    options: Options, data: DistilledDataset
) -> Iterator[tuple[str, NetworkConfig, TrainingConfig]]:
    """Name, network and recipe of each."""
    own = distilled.with_network(data.network, "ConvNet")
    changes = {} if options.num_epochs is None else {"num_epochs": options.num_epochs}
    for width in options.widths:
        network = replace(own, width=width)
        yield f"ConvNet-{width}, own recipe", network, replace(data.training, **changes)
    for name in options.networks:
        title = "ConvNet-128" if name == "ConvNet" else name
        yield title, NetworkConfig(network=name), replace(LITERATURE, **changes)


def judged_sets(options: Options) -> Iterator[tuple[str, Dataset, DistilledDataset]]:
    """Name, dataset and content of each row."""
    for path in options.sets:
        file = path / "distilled.npz" if path.is_dir() else path
        data = DistilledDataset.load(file).unpacked()
        dataset = distilled.normalized_as(load(data.dataset, options.data_dir), data)
        yield str(path), dataset, data
        if options.class_means:
            means = class_means(dataset)
            images, labels = np.asarray(means.images), np.asarray(means.labels)
            yield (
                f"class means beside {path}",
                dataset,
                replace(data, images=images, labels=labels),
            )


def table(cells: list[dict]) -> str:
    """In Markdown: a row a set, a column a network."""
    names = list(dict.fromkeys(cell["column"] for cell in cells))
    lines = ["| | " + " | ".join(names) + " |", "|---" * (len(names) + 1) + "|"]
    for name in dict.fromkeys(cell["set"] for cell in cells):
        own = {cell["column"]: cell for cell in cells if cell["set"] == name}
        shown = [
            f"{percent(np.array(cell['accuracies'], float))} ({cell['seconds']:.0f} s)"
            if cell["accuracies"]
            else "does not fit"
            for cell in (own[column] for column in names)
        ]
        lines.append(f"| {name} | " + " | ".join(shown) + " |")
    return "\n".join(lines)


def main(options: Options) -> None:
    rows, cells = Rows(options.output, options, *vars(options)), []
    for name, dataset, data in judged_sets(options):
        content = data.images.tobytes() + data.labels.tobytes()
        for column, network, training in columns(options, data):
            how = f"{network} {training} {options.num_networks} {options.seed}"
            digest = hashlib.sha256(content + how.encode()).hexdigest()[:16]
            known = [row for row in rows if (row["digest"], row["column"]) == (digest, column)]
            if known:
                cells.append(known[0] | {"set": name})
                continue
            start = time.perf_counter()
            try:
                networks.create(network, dataset.num_classes, dataset.image_shape)
            except ValueError as error:
                console.say(f"{name}: {error}")
                accuracies = []
            else:
                accuracies = distilled.accuracies_on(
                    dataset.test,
                    jax.random.key(options.seed),
                    data.images,
                    data.labels,
                    dataset,
                    network,
                    training,
                    options.num_networks,
                ).tolist()
                console.say(f"{name}, {column}: {percent(accuracies)} %")
            seconds = time.perf_counter() - start
            rows.add(
                {
                    "set": name,
                    "dataset": data.dataset,
                    "column": column,
                    "digest": digest,
                    "seed": options.seed,
                    "accuracies": accuracies,
                    "seconds": seconds,
                }
            )
            cells.append(rows.rows[-1])
    print(
        f"Test accuracy (%), {options.num_networks} networks, mean ± std; seconds of each cell.\n"
    )
    print(table(cells))


if __name__ == "__main__":
    main(tyro.cli(Options))
