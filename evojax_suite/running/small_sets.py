"""What `devs` and `coreset` share: small sets are labelled by a teacher (as `ga-distillation` does
too), evaluated, written and shown."""

from __future__ import annotations

import time
from collections.abc import Generator, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, NamedTuple

import jax
import numpy as np

from evojax_suite import distilled, proxy_network
from evojax_suite.data import normalize
from evojax_suite.distilled import DistilledDataset
from evojax_suite.networks import NetworkConfig
from evojax_suite.reporting import plotting
from evojax_suite.reporting.formats import percent, short
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
    """Returns `training` without flips where the classes are digits, with shifts of at most 5/32 of
    an image and crops padded by at most 4/32: the papers' 5 and 4 pixels of images of 32x32."""
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
"""The epochs of a teacher by default."""


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
    """Returns how the network on the whole training set trains: as those that evaluate a set do,
    but at a constant learning rate and, unless `augmented`, without augmentation."""
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
    seconds: float  # of its training, compilation included
    num_failed: int  # losses of its training that were not finite

    def labels(self, images: np.ndarray, num_classes: int) -> np.ndarray:
        """Returns the probabilities (n, num_classes) that it gives normalised images."""
        return proxy_network.probabilities(
            self.config, self.variables, images, num_classes, self.temperature
        )

    def in_words(self) -> str:
        """Returns how it was trained, for tables."""
        training = self.config.training
        return (
            f"teacher of {training.num_epochs} epochs, augmentation "
            f"{distilled.augmentation_of(training)}, temperature {self.temperature:g}"
        )


def train_teacher(
    key: jax.Array, dataset: Dataset, config: proxy_network.Config, temperature: float
) -> Generator[Phase, LoopResult, Teacher]:
    """Train a teacher on the training split of `dataset`; its files are in the folder `teacher`."""
    algorithm = proxy_network.build(config, dataset.num_classes, dataset.image_shape)
    data, num_epochs = training_data(dataset), config.training.num_epochs
    trained = yield Phase("teacher", algorithm, key, None, data, num_epochs, "teacher")
    seconds = trained.seconds + trained.compile_seconds
    return Teacher(config, trained.state.fit.variables, temperature, seconds, trained.num_failed)


def taught(sets: list[SmallSet], teacher: Teacher) -> list[SmallSet]:
    """Returns `sets` with the labels of `teacher`, the seconds of its training counted in."""

    def relabelled(small: SmallSet) -> SmallSet:
        start = time.perf_counter()
        labels = teacher.labels(small.images, small.labels.shape[1])
        seconds = small.seconds + teacher.seconds + time.perf_counter() - start
        return replace(small, labels=labels, label_source="teacher", seconds=seconds)

    return list(map(relabelled, sets))


@dataclass(frozen=True)
class EvaluatedSets:
    """Small sets, and the test accuracies of networks that were trained on them."""

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

    Networks on sets of equal size have equal initialisations, so that methods compare. Without
    networks the sets are only written, for `evaluate`. numbers: of the summary, beside the results.
    """
    options, dataset = job.options, job.dataset
    augmentation = distilled.augmentation_of(training)
    console.say(f"judged by {options.num_networks} networks each; augmentation: {augmentation}")
    sets = sorted(sets, key=lambda small: (small.method, -len(small.images)))
    results, all_accuracies = [], []
    for small in sets:
        size = len(small.images)
        accuracies = np.array([])
        if options.num_networks:
            key_set, arrays = jax.random.fold_in(key, size), (small.images, small.labels)
            how = network, training, options.num_networks, engine, options.devices
            accuracies = distilled.accuracies_on(test_split, key_set, *arrays, dataset, *how)
        all_accuracies.append(accuracies)
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
            f"{small.method}, {size} images: {shown}{unit}, made in {short(small.seconds)} s; "
            f"labels: {small.label_source}; features: {small.features}"
        )
    numbers = {**numbers, "num_networks": options.num_networks, "results": results}
    return EvaluatedSets(sets, all_accuracies, augmentation, numbers, len(test_split))


def _shown(accuracies: np.ndarray) -> str:
    return percent(accuracies) if accuracies.size else "not judged"


def _no_better_than_random(results: Sequence[dict[str, Any]]) -> str:
    """The sets whose accuracy is not a deviation above that of a random set of their size."""
    random = {row["num_images"]: row for row in results if row["method"] == "random"}
    names = []
    for row in results:
        other = random.get(row["num_images"])
        if other is None or other is row:
            continue
        if row["test_accuracy_mean"] - row["test_accuracy_std"] <= other["test_accuracy_mean"]:
            names.append(f"{row['method']} ({row['num_images']})")
    return ", ".join(names)


def report_of(
    job: Job[JudgedRunOptions], found: EvaluatedSets, title: str, numbers: list[list[str]]
) -> Report | None:
    """Returns the page of a run that makes small sets, None where they were not evaluated; pictures
    of the smaller ones are written. numbers: rows about the run."""
    dataset = job.dataset
    rows, figures = [], []
    for small, accuracies in zip(found.sets, found.accuracies, strict=True):
        size, seconds = len(small.images), f"{short(small.seconds)} s"
        shown = _shown(accuracies)
        rows.append([small.method, f"{size:,}", shown, small.label_source, seconds, small.features])
        few = size <= 2 * dataset.num_classes or len(found.sets) == 1
        if few or small.label_source == "own":  # of no original, but an average
            picture = job.directory / "figures" / f"{small.stem}.png"
            plotting.soft_label_images(picture, dataset, small.images, small.labels)
            some = "" if size <= plotting.MOST_SHOWN else f"{plotting.MOST_SHOWN} of "
            caption = f"{small.method}: {some}{size} images with the probabilities of their labels"
            figures.append(Figure(picture.stem, caption))
    if not job.options.num_networks:
        return None
    results = found.numbers["results"]
    points: dict[str, list[tuple[int, float, float]]] = {}
    for row in sorted(results, key=lambda row: row["method"]):
        point = row["num_images"], row["test_accuracy_mean"], row["test_accuracy_std"]
        points.setdefault(row["method"], []).append(point)
    curves = plotting.accuracy_by_size(points)
    best = max(results, key=lambda row: row["test_accuracy_mean"])
    labelled = ", labelled by a teacher," * (best["labels"] == "teacher")
    lead = (
        f"{best['num_images']} images by {best['method']}{labelled} stand for the "
        f"{len(dataset.train):,} training images of {dataset.name}: networks trained on "
        f"them alone classify {100 * best['test_accuracy_mean']:.2f}% of the "
        f"{found.num_test_images:,} test images."
    )
    if names := _no_better_than_random(results):
        lead += f" No better than as many random ones: {names}."
    header = ["method", "images", "mean ± std", "labels", "time to make it", "features"]
    judges = f"{job.options.num_networks} networks each, augmentation {found.augmentation}"
    return Report(
        title,
        lead,
        [
            (f"{row[2]} %", f"test accuracy, {row[1]} images, {row[0]}")
            for row in rows
            if row[1] == f"{best['num_images']:,}"
        ],
        [Table(f"Accuracy on the test split (%), {judges}", header, rows)],
        [Figure("accuracy", "Accuracy against the number of images", curves), *figures],
        numbers,
    )
