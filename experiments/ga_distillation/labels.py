"""Small sets with hard labels and with those of a teacher, all judged alike.

    python experiments/ga_distillation/labels.py runs/a-hundred runs/devs/DEvS-100.npz --width 64

Real images chosen at random, by herding and by k-center, and the images of runs or files, which may
have soft labels of their own. One network, trained on the whole training set, gives herding and
k-center their features and all images the teacher's labels, the probabilities of the classes.
Networks of the same width judge a set on the test split by the literature's recipe. Rows are kept
in labels.json beside this file and are not run again.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated

import jax
import jax.numpy as jnp
import numpy as np
import tyro

from evojax_suite import distilled, load, proxy_network
from evojax_suite.data import normalize, with_whole_training_set
from evojax_suite.distilled import LITERATURE, DistilledDataset
from evojax_suite.networks import NetworkConfig
from evojax_suite.operators import random_examples
from evojax_suite.reporting.formats import percent
from evojax_suite.reporting.progress import console
from evojax_suite.running.robust import fit_on_all
from evojax_suite.running.small_sets import probe_config
from evojax_suite.runtime import devices
from evojax_suite.runtime.results import Rows
from evojax_suite.systems.coresets import herding, k_center
from evojax_suite.training import EngineConfig
from evojax_suite.types import Array, Dataset, training_data

OUTPUT = Path(__file__).with_name("labels.json")


@dataclass(frozen=True)
class Options:
    """What is labelled and judged."""

    sets: Annotated[tuple[Path, ...], tyro.conf.Positional] = ()
    """Folders of finished runs, or files of distilled sets."""
    dataset: str = "cifar10"
    sizes: tuple[int, ...] = (100, 500)
    """The sizes of the sets of real images."""
    width: int = 128
    """The width of the ConvNets that teach and judge."""
    teacher_epochs: int = 8
    """Epochs of the network on the whole training set."""
    num_epochs: int = LITERATURE.num_epochs
    """The epochs for which a judge trains."""
    num_networks: int = 3
    """Judges of each set."""
    seed: int = 0
    data_dir: Path | None = None
    output: Path = OUTPUT


def sets(
    options: Options, dataset: Dataset, features: Array
) -> Iterator[tuple[str, np.ndarray, np.ndarray]]:
    """Name, normalised images and labels of each set, hard or its own."""
    num_classes, classes = dataset.num_classes, jnp.asarray(dataset.train.labels)
    for size in options.sizes:
        key = jax.random.fold_in(jax.random.key(options.seed), size)
        for name, chosen in (
            ("random", random_examples(key, classes, size, num_classes)),
            ("herding", herding.select(key, features, classes, size, num_classes)),
            ("k-center", k_center.select(key, features, classes, size, num_classes)),
        ):
            indices = np.asarray(chosen)
            images = normalize(dataset.train.images[indices], dataset.mean, dataset.std)
            yield f"{name}, {size}", images, hard(dataset.train.labels[indices], num_classes)
    for path in options.sets:
        file = path / "distilled.npz" if path.is_dir() else path
        data = DistilledDataset.load(file, dataset).unpacked()
        yield path.stem, data.images, data.labels


def hard(classes: np.ndarray, num_classes: int) -> np.ndarray:
    """All weight on the class."""
    return np.eye(num_classes, dtype=np.float32)[classes]


def main(options: Options) -> None:
    rows = Rows(options.output, options, "sets", "sizes", "data_dir", "output")
    dataset = with_whole_training_set(load(options.dataset, options.data_dir))
    network, engine = NetworkConfig(width=options.width), EngineConfig()
    config = probe_config(network, LITERATURE, engine, options.teacher_epochs)
    key, num_classes = jax.random.key(options.seed), dataset.num_classes
    recipe = replace(LITERATURE, num_epochs=options.num_epochs)
    trained = fit_on_all(key, config, dataset)
    algorithm = proxy_network.build(config, num_classes, dataset.image_shape)
    features = algorithm.result(trained, None, training_data(dataset)).features
    for name, images, own in sets(options, dataset, features):
        labels = {"hard": hard(own.argmax(1), num_classes)}
        if not np.array_equal(own, labels["hard"]):
            labels["its own"] = own
        labels["a teacher's"] = proxy_network.probabilities(
            config, trained.fit.variables, images, num_classes
        )
        for title, given in labels.items():
            about = {"dataset": options.dataset, "set": name, "labels": title}
            if any(about.items() <= row.items() for row in rows):
                continue
            start = time.perf_counter()
            accuracies = distilled.accuracies_on(
                dataset.test,
                jax.random.fold_in(key, len(images)),
                images,
                given,
                dataset,
                network,
                recipe,
                options.num_networks,
                engine,
                "auto",
            )
            seconds = time.perf_counter() - start
            rows.add(about | {"accuracies": accuracies.tolist(), "seconds": seconds})
            console.say(f"{name}, {title}: {percent(accuracies)} % ({seconds:.0f} s)")
    columns = list(dict.fromkeys(row["labels"] for row in rows))
    print("| | " + " | ".join(columns) + " |", "|---" * (len(columns) + 1) + "|", sep="\n")
    for name in dict.fromkeys(row["set"] for row in rows):
        own = {row["labels"]: row["accuracies"] for row in rows if row["set"] == name}
        cells = [percent(np.array(own[title])) if title in own else "" for title in columns]
        print("| " + " | ".join([name, *cells]) + " |")


if __name__ == "__main__":
    devices.take("auto")  # before anything of JAX runs
    main(tyro.cli(Options))
