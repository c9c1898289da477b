"""Train networks on a distilled dataset with its own recipe and judge them on the test part."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

import jax
import numpy as np
import tyro

from evojax_suite import distilled, networks
from evojax_suite.commands.progress import console
from evojax_suite.data import load
from evojax_suite.distilled import DistilledDataset
from evojax_suite.networks import NetworkName
from evojax_suite.results import write_json
from evojax_suite.training import EngineConfig


@dataclass(frozen=True)
class Options:
    """Train networks on a distilled dataset and give their accuracy on the test part."""

    path: Annotated[Path, tyro.conf.Positional]
    """The distilled.npz of a run."""
    dataset: str | None = None
    """Judge on this dataset; by default on the one that was distilled."""
    network: tuple[NetworkName, ...] = ()
    """One or more architectures; the one of the recipe by default."""
    num_networks: int = 20
    """Networks of each architecture, each from its own initialisation."""
    seed: int = 1
    """Of the initialisations."""
    data_dir: Path | None = None
    """Where datasets lie; the environment variable EVOJAX_SUITE_DATA by default."""
    output: Path | None = None
    """Write the accuracies to this JSON file too."""
    engine: tyro.conf.OmitArgPrefixes[EngineConfig] = field(default_factory=EngineConfig)

    def __post_init__(self):
        if self.num_networks < 1:
            raise ValueError(f"num_networks must be >= 1, got {self.num_networks}")


def run(options: Options) -> None:
    """Print the table. Raises ValueError, DataError or OSError, each with one line to show."""
    data = DistilledDataset.load(options.path)
    dataset = load(options.dataset or data.dataset, options.data_dir)
    if dataset.class_names != data.class_names or dataset.image_shape != data.images.shape[1:]:
        raise ValueError(
            f"{options.path} holds {data.images.shape[1:]} images of {len(data.class_names)} "
            f"classes, {dataset.name} has {dataset.image_shape} and {dataset.num_classes}"
        )
    # The test images are normalised as they were when the dataset was made.
    dataset = distilled.normalized_as(dataset, data)
    names = options.network or (data.network.network,)
    for name in names:  # refuse what does not fit before the first minute of work
        recipe = distilled.with_network(data.network, name)
        networks.create(recipe, dataset.num_classes, dataset.image_shape)
    console.print(
        f"{options.path}: {len(data.images)} images of {data.dataset}, made with "
        f"{data.network.network}, seed {data.seed}"
    )
    if data.test_accuracies:
        console.print(f"stored: {_row(data.network.network, np.array(data.test_accuracies))}")
    results = {}
    for name in names:
        accuracies = distilled.accuracies_on_test(
            jax.random.key(options.seed),
            data.images,
            data.labels,
            dataset,
            distilled.with_network(data.network, name),
            data.training,
            options.num_networks,
            options.engine,
        )
        results[name] = accuracies
        print(_row(name, accuracies), flush=True)
    if options.output:
        write_json(options.output, {"dataset": data.dataset, "test_accuracies": results})


def _row(name: str, accuracies: np.ndarray) -> str:
    return (
        f"{name}: {100 * np.mean(accuracies):.2f} ± {100 * np.std(accuracies):.2f} % "
        f"({len(accuracies)} networks)"
    )
