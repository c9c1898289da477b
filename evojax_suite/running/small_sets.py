"""What `devs` and `coreset` share: label sets by a teacher, as `ga-distillation` does too, judge
them, keep and show them."""

from __future__ import annotations

import time
from collections.abc import Generator
from dataclasses import dataclass, replace
from typing import Any, Literal, NamedTuple

import jax
import numpy as np

from evojax_suite import distilled, proxy_network
from evojax_suite.data import normalize
from evojax_suite.distilled import DistilledDataset
from evojax_suite.networks import NetworkConfig
from evojax_suite.reporting import plotting
from evojax_suite.reporting.formats import percent
from evojax_suite.reporting.progress import console
from evojax_suite.reporting.report import Figure, Report, Table
from evojax_suite.running.options import JudgedRunOptions
from evojax_suite.running.system import Job, Phase
from evojax_suite.runtime.loop import LoopResult
from evojax_suite.training import EngineConfig, TrainingConfig
from evojax_suite.types import Dataset, PyTree, Split, training_data


@dataclass(frozen=True)
class SmallSet:
    """A set that stands for the training set."""

    method: str
    images: np.ndarray  # (n, H, W, C) normalised
    labels: np.ndarray  # (n, num_classes)
    seconds: float  # that the method took, all it needs included
    features: str  # that it went by
    indices: np.ndarray | None = None  # (n,) into the training set, where they are real images
    label_source: Literal["hard", "own", "teacher"] = "hard"  # own: of the method itself

    @property
    def stem(self) -> str:
        """The stem of its files' names."""
        return f"{self.method}-{len(self.images)}" + "-teacher" * (self.label_source == "teacher")


def chosen(
    method: str, dataset: Dataset, indices: np.ndarray, seconds: float, features: str
) -> SmallSet:
    """The small set of the training images at `indices` (n,)."""
    images = normalize(dataset.train.images[indices], dataset.mean, dataset.std)
    labels = np.eye(dataset.num_classes, dtype=np.float32)[dataset.train.labels[indices]]
    return SmallSet(method, images, labels, seconds, features, indices)


def fitted_to(training: TrainingConfig, dataset: Dataset) -> TrainingConfig:
    """`training` without flips where the classes are digits, with shifts of at most 5/32 of an
    image and crops padded by at most 4/32, what the papers' 5 and 4 pixels are of their images.
    """
    digits = dataset.class_names == tuple("0123456789")
    side = min(dataset.image_shape[:2])
    return replace(
        training,
        flip=training.flip and not digits,
        siamese=tuple(name for name in training.siamese if not (digits and name == "flip")),
        shift_pixels=min(training.shift_pixels, round(side * 5 / 32)),
        crop_padding=min(training.crop_padding, round(side * 4 / 32)),
    )


TEACHER_EPOCHS = 20
"""Epochs of a teacher, where none are asked for."""


def check_labels(labels: str, temperature: float, epochs: int = TEACHER_EPOCHS) -> None:
    """Raise ValueError for epochs or a temperature of a teacher where there is none."""
    if temperature != 1 and labels != "teacher":
        raise ValueError(f"label_temperature needs --labels teacher, got {temperature}")
    if labels != "teacher" and epochs != TEACHER_EPOCHS:
        raise ValueError(f"teacher_epochs needs --labels teacher, got {epochs}")


def probe_config(
    network: NetworkConfig,
    training: TrainingConfig,
    engine: EngineConfig,
    num_epochs: int,
    augmented: bool = False,
) -> proxy_network.Config:
    """How the network on the whole training set trains: as a set's judges do, but at a constant
    learning rate and, unless `augmented`, without augmentation."""
    training = replace(training, num_epochs=num_epochs, schedule="constant")
    if not augmented:
        training = distilled.with_augmentation(training, "none")
    return proxy_network.Config(network=network, training=training, engine=engine)


class Teacher(NamedTuple):
    """A network trained on the whole training set, which labels other images."""

    config: proxy_network.Config
    variables: PyTree
    temperature: float
    """Divides its logits."""
    seconds: float
    """The time that its training took, compilation included."""
    num_failed: int
    """The number of losses of its training that were not finite."""

    def labels(self, images: np.ndarray, num_classes: int) -> np.ndarray:
        """The probabilities (n, num_classes) that it gives images (n, H, W, C), normalised."""
        return proxy_network.probabilities(
            self.config, self.variables, images, num_classes, self.temperature
        )

    def in_words(self) -> str:
        """Says how it was trained, for tables."""
        return (
            f"teacher of {self.config.training.num_epochs} epochs, augmentation "
            f"{distilled.augmentation_of(self.config.training)}, temperature {self.temperature:g}"
        )


def train_teacher(
    key: jax.Array, dataset: Dataset, config: proxy_network.Config, temperature: float
) -> Generator[Phase, LoopResult, Teacher]:
    """Train one on the training split of `dataset`, with its files in the folder `teacher`."""
    found = yield Phase(
        "teacher",
        proxy_network.build(config, dataset.num_classes, dataset.image_shape),
        key,
        None,
        training_data(dataset),
        config.training.num_epochs,
        "teacher",
    )
    seconds = found.seconds + found.compile_seconds
    return Teacher(config, found.state.fit.variables, temperature, seconds, found.num_failed)


def taught(sets: list[SmallSet], teacher: Teacher) -> list[SmallSet]:
    """`sets` with the labels of `teacher`, the seconds of its training counted in."""
    found = []
    for small in sets:
        start = time.perf_counter()
        labels = teacher.labels(small.images, small.labels.shape[1])
        seconds = small.seconds + teacher.seconds + time.perf_counter() - start
        found.append(replace(small, labels=labels, label_source="teacher", seconds=seconds))
    return found


@dataclass(frozen=True)
class EvaluatedSets:
    """Small sets and what networks that were trained on them get right of the test split."""

    sets: list[SmallSet]  # by method, the largest first
    accuracies: list[np.ndarray]  # (num_networks,) of each set
    augmentation: str
    numbers: dict[str, Any]  # of the summary
    num_test_images: int


def evaluate_sets(
    job: Job[JudgedRunOptions],
    sets: list[SmallSet],
    key: jax.Array,
    network: NetworkConfig,
    training: TrainingConfig,
    engine: EngineConfig,
    test_split: Split,
    numbers: dict[str, Any],
) -> EvaluatedSets:
    """Train networks on each of `sets`, evaluate them on the test split and write the sets.

    Every set of n images meets the same initialisations, so that methods compare. Without networks
    the sets are only written, for `evaluate`. numbers: of the summary, beside the results.
    """
    options, dataset = job.options, job.dataset
    augmentation = distilled.augmentation_of(training)
    console.say(f"judged by {options.num_networks} networks each; augmentation: {augmentation}")
    sets = sorted(sets, key=lambda small: (small.method, -len(small.images)))
    results, found = [], []
    for small in sets:
        size = len(small.images)
        accuracies = np.array([])
        if options.num_networks:
            accuracies = distilled.accuracies_on(
                test_split,
                jax.random.fold_in(key, size),
                small.images,
                small.labels,
                dataset,
                network,
                training,
                options.num_networks,
                engine,
                options.devices,
            )
        found.append(accuracies)
        DistilledDataset.made(
            dataset, small.images, small.labels, network, training, options.seed, accuracies
        ).save(job.directory / f"{small.stem}.npz")
        results.append(
            {
                "method": small.method,
                "num_images": size,
                "labels": small.label_source,
                "test_accuracy_mean": float(np.mean(accuracies)) if accuracies.size else None,
                "test_accuracy_std": float(np.std(accuracies)) if accuracies.size else None,
                "num_networks": options.num_networks,
                "augmentation": augmentation,
                "features": small.features,
                "seconds": small.seconds,
                "images_of_each_class": small.labels.sum(0, dtype=np.float64).round(2),
                "indices": small.indices,
            }
        )
        shown, unit = _shown(accuracies), " %" if accuracies.size else ""
        console.say(
            f"{small.method}, {size} images: {shown}{unit}, made in {small.seconds:.1f} s; "
            f"labels: {small.label_source}; features: {small.features}"
        )
    numbers = {**numbers, "num_networks": options.num_networks, "results": results}
    return EvaluatedSets(sets, found, augmentation, numbers, len(test_split))


def _shown(accuracies: np.ndarray) -> str:
    return percent(accuracies) if accuracies.size else "not judged"


def report_of(
    job: Job[JudgedRunOptions], found: EvaluatedSets, title: str, numbers: list[list[str]]
) -> Report | None:
    """The page of a run that makes small sets, None where they were not judged; the pictures of
    small ones are written. numbers: of the run."""
    dataset = job.dataset
    rows, figures = [], []
    for small, accuracies in zip(found.sets, found.accuracies, strict=True):
        size, seconds = len(small.images), f"{small.seconds:.1f} s"
        shown = _shown(accuracies)
        rows.append([small.method, f"{size:,}", shown, small.label_source, seconds, small.features])
        if size <= 2 * dataset.num_classes or len(found.sets) == 1:
            picture = job.directory / "figures" / f"{small.stem}.png"
            plotting.soft_label_images(picture, dataset, small.images, small.labels)
            caption = f"{small.method}: {size} images with the probabilities of their labels"
            figures.append(Figure(picture.stem, caption))
    if not job.options.num_networks:
        return None
    results = found.numbers["results"]
    curves = plotting.accuracy_by_size(
        {
            method: [
                (row["num_images"], row["test_accuracy_mean"], row["test_accuracy_std"])
                for row in results
                if row["method"] == method
            ]
            for method in sorted({row["method"] for row in results})
        }
    )
    best = max(results, key=lambda row: row["test_accuracy_mean"])
    labelled = ", labelled by a teacher," * (best["labels"] == "teacher")
    lead = (
        f"{best['num_images']} images by {best['method']}{labelled} stand for the "
        f"{len(dataset.train):,} training images of {dataset.name}: networks trained on "
        f"them alone classify {100 * best['test_accuracy_mean']:.2f}% of the "
        f"{found.num_test_images:,} test images."
    )
    header = ["method", "images", "mean ± std", "labels", "time to make it", "features"]
    judges = f"{job.options.num_networks} networks each, augmentation {found.augmentation}"
    return Report(
        title,
        lead,
        [
            (f"{row[2]} %", f"test accuracy, {row[1]} images, {row[0]}")
            for row in sorted(rows, key=lambda row: int(row[1].replace(",", "")))
            if int(row[1].replace(",", "")) == best["num_images"]
        ],
        [Table(f"Accuracy on the test split (%), {judges}", header, rows)],
        [Figure("accuracy", "Accuracy against the number of images", curves), *figures],
        numbers,
    )
