"""Train networks on a small set, distilled or chosen, and evaluate them on the test split."""

from __future__ import annotations

import os
from dataclasses import field, replace
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Literal

import jax
import numpy as np
import tyro
from pydantic import PositiveInt

from evojax_suite import distilled, networks
from evojax_suite.configuration import Share, configuration
from evojax_suite.data import load
from evojax_suite.distilled import DistilledDataset
from evojax_suite.networks import NetworkConfig
from evojax_suite.reporting import formats
from evojax_suite.reporting.progress import console
from evojax_suite.running import robust
from evojax_suite.running.options import Placement, Seed, config_difference
from evojax_suite.runtime import devices
from evojax_suite.runtime.results import write_json
from evojax_suite.training import AUGMENTATION, EngineConfig, TrainingConfig

EXAMPLE = "evaluate runs/demo/distilled.npz --network ConvNet MLP LeNet"


@configuration
class Options(Placement):
    """Train networks on a small set and print their accuracy on the test split."""

    path: Annotated[Path, tyro.conf.Positional] = field(kw_only=True)
    """A .npz of a run; or the user's, with images and labels, which needs a dataset."""
    dataset: str | None = None
    """Evaluate on this dataset; by default on the one that was distilled."""
    protocol: Literal["stored", "literature"] = "stored"
    """stored: the recipe in the file. literature: 300 epochs of SGD 0.01 with momentum 0.9 and
    penalty 5e-4, divided by 10 at half, a ConvNet with the literature's settings."""
    augmentation: Literal["stored"] | distilled.AugmentationName | None = None
    """While training; by default the protocol's: stored, or none in the literature's."""
    labels: Literal["stored", "hard"] = "stored"
    """hard: all weight on the most probable class."""
    num_epochs: PositiveInt | None = None
    """Another number of epochs than the protocol's, such as 1000."""
    width: PositiveInt | None = None
    """Another width of the ConvNet than the protocol's."""
    network: tuple[networks.NetworkName | str, ...] = ()
    """One or more architectures, a user's as package.module:Class; by default the recipe's."""
    num_networks: PositiveInt = 20
    """Networks of each architecture, which differ in their initialisations."""
    robust_scores: bool = False
    """DD-Ranking's scores (Li et al. 2025), which separate the images from soft labels and from
    augmentation: networks are also trained on as many random real images, with and without
    augmentation (the recipe's, or DSA's if it has none), and one on the whole training set, which
    takes longest."""
    full_accuracy: Share | None = None
    """Test accuracy of networks trained on the whole training set, such as 0.99, for the robust
    scores. A set with hard labels then needs no such network; soft labels need it as a teacher."""
    full_epochs: PositiveInt | None = None
    """Epochs on the whole training set for robust scores; by default DD-Ranking's 200 of SGD."""
    seed: Seed = 1
    """Seed of the initialisations."""
    data_dir: Path | None = None
    """Folder of the datasets; by default that in the environment variable EVOJAX_SUITE_DATA."""
    image_size: PositiveInt | None = None
    """Height and width to which images in class folders of your own are resized."""
    cache_data: bool = True
    """Keep the pixels of archives and folders of images, which are slow to read, in the user's
    cache folder."""
    output: Path | None = None
    """Also write the accuracies to this JSON file."""
    engine: tyro.conf.OmitArgPrefixes[EngineConfig] = field(default_factory=EngineConfig)

    def __post_init__(self):
        for name in ("full_accuracy", "full_epochs"):
            if getattr(self, name) is not None and not self.robust_scores:
                raise ValueError(f"{name} needs --robust-scores, got {getattr(self, name)}")
        if self.full_accuracy is not None and len(self.network) > 1:
            raise ValueError(f"full_accuracy is of one network, got {', '.join(self.network)}")
        super().__post_init__()


def _recipe(options: Options, data: DistilledDataset) -> tuple[NetworkConfig, TrainingConfig]:
    network, training = data.network, data.training
    if options.protocol == "literature":
        network, training = NetworkConfig(), distilled.LITERATURE
    if options.augmentation == "stored":
        stored = {name: getattr(data.training, name) for name in AUGMENTATION}
        training = replace(training, **stored)
    elif options.augmentation is not None:
        training = distilled.with_augmentation(training, options.augmentation)
    if options.num_epochs is not None:
        training = replace(training, num_epochs=options.num_epochs)
    if options.width is not None:
        network = replace(network, width=options.width)
    return network, training


def run(options: Options) -> None:
    """Print the table. Raises ValueError, DataError or OSError, each with a message of one line."""
    about = {"cache": options.cache_data, "image_size": options.image_size}
    load_dataset = partial(load, data_dir=options.data_dir, **about)
    dataset = load_dataset(options.dataset) if options.dataset else None
    data = DistilledDataset.load(options.path, dataset)
    stored, data = len(data.images), data.unpacked()
    dataset = dataset or load_dataset(data.dataset)
    if dataset.class_names != data.class_names or dataset.image_shape != data.images.shape[1:]:
        raise ValueError(
            f"{options.path} holds {data.images.shape[1:]} images of {len(data.class_names)} "
            f"classes, {dataset.name} has {dataset.image_shape} and {dataset.num_classes}"
        )
    # The test images are normalised as they were when the dataset was made.
    dataset = distilled.normalized_as(dataset, data)
    network, training = _recipe(options, data)
    architectures = []
    for name in options.network or (network.network,):
        architectures.append((name, distilled.with_network(network, name)))
        # What does not fit is refused before the first minute of work; so is the output below.
        networks.create(architectures[-1][1], dataset.num_classes, dataset.image_shape)
    if options.robust_scores:
        robust.check(dataset, stored)
    output = options.output
    if output is not None and (output.is_dir() or not os.access(output.parent, os.W_OK)):
        raise OSError(f"output must be a file that can be written, got {output}")
    labels = data.labels
    if options.labels == "hard":
        labels = np.eye(dataset.num_classes, dtype=np.float32)[labels.argmax(-1)]
    made_with, protocol = data.network.network, options.protocol
    source = f"made with {made_with}, seed {data.seed}"
    console.say(f"{options.path}: {stored} images of {data.dataset}, {source}")
    changed = config_difference(training, data.training)
    changed |= config_difference(network, data.network)
    unlike = f"unlike stored: {formats.settings(changed)}"
    console.say(f"protocol {protocol}, labels {options.labels}; {unlike}")
    if data.test_accuracies:
        console.say(f"stored: {_row(made_with, np.array(data.test_accuracies))}")
    results, scores = {}, {}
    placed: dict[str, Any] = {"engine": options.engine, "num_devices": options.devices}
    for name, architecture in architectures:
        shared = data.images, labels, dataset, architecture, training, options.num_networks
        key, lines = jax.random.key(options.seed), []
        if options.robust_scores:
            epochs = options.full_epochs or robust.FULL_EPOCHS
            scored = robust.judge(key, *shared, stored, options.full_accuracy, epochs, **placed)
            results[name], scores[name] = scored.judged.set_own, scored.summary()
            lines = scored.lines()
        else:
            results[name] = distilled.accuracies_on(dataset.test, key, *shared, **placed)
        if devices.is_first():
            print(_row(name, results[name]), *lines, sep="\n", flush=True)
    if output and devices.is_first():
        content = {"dataset": data.dataset, "protocol": protocol, "labels": options.labels}
        content |= {"training": training, "test_accuracies": results}
        write_json(output, content | ({"robust": scores} if scores else {}))


def _row(name: str, accuracies: np.ndarray) -> str:
    return f"{name}: {formats.percent(accuracies)} % ({len(accuracies)} networks)"
