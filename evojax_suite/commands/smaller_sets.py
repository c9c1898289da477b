"""What `devs` and `coreset` share: judge sets of several methods and sizes, keep and show them."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

import jax
import numpy as np

from evojax_suite import distilled, plotting, report
from evojax_suite.commands.options import JudgedRunOptions, percent
from evojax_suite.commands.progress import console
from evojax_suite.data import normalize
from evojax_suite.distilled import DistilledDataset
from evojax_suite.networks import NetworkConfig
from evojax_suite.report import Figure, Table
from evojax_suite.results import write_json
from evojax_suite.training import EngineConfig, TrainingConfig
from evojax_suite.types import Dataset


@dataclass(frozen=True)
class SmallSet:
    """A set that stands for the training set."""

    method: str
    images: np.ndarray  # (n, H, W, C) normalised
    labels: np.ndarray  # (n, num_classes)
    seconds: float  # that the method took, all it needs included
    features: str  # that it went by
    indices: np.ndarray | None = None  # (n,) into the training set, where they are real images


def chosen(
    method: str, dataset: Dataset, indices: np.ndarray, seconds: float, features: str
) -> SmallSet:
    """Of the training images at `indices` (n,)."""
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


def finish(
    directory: Path,
    options: JudgedRunOptions,
    dataset: Dataset,
    sets: list[SmallSet],
    key: jax.Array,
    network: NetworkConfig,
    training: TrainingConfig,
    engine: EngineConfig,
    summary: dict,
    title: str,
    numbers: list[list[str]],
) -> None:
    """Judge `sets` on the test part, write artefacts, figures, summary and report, print a table.

    Every set of n images meets the same initialisations, so that methods compare. Without networks
    the sets are only written, for `evaluate`.
    """
    results, rows, figures = [], [], []
    augmentation = distilled.augmentation_of(training)
    console.say(f"judged by {options.num_networks} networks each; augmentation: {augmentation}")
    for small in sorted(sets, key=lambda small: (small.method, -len(small.images))):
        size = len(small.images)
        accuracies = np.array([])
        if options.num_networks:
            accuracies = distilled.accuracies_on_test(
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
        path = directory / f"{small.method}-{size}.npz"
        DistilledDataset(
            images=small.images,
            labels=small.labels,
            dataset=dataset.name,
            class_names=dataset.class_names,
            mean=dataset.mean,
            std=dataset.std,
            network=network,
            training=training,
            seed=options.seed,
            test_accuracies=tuple(float(accuracy) for accuracy in accuracies),
        ).save(path)
        results.append(
            {
                "method": small.method,
                "num_images": size,
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
        shown = percent(accuracies) if accuracies.size else "not judged"
        rows.append([small.method, f"{size:,}", shown, f"{small.seconds:.1f} s", small.features])
        unit = " %" if accuracies.size else ""
        console.say(
            f"{small.method}, {size} images: {shown}{unit}, made in {small.seconds:.1f} s; "
            f"features: {small.features}"
        )
        if size <= 2 * dataset.num_classes or len(sets) == 1:
            picture = directory / "figures" / f"{small.method}-{size}.png"
            plotting.soft_label_images(picture, dataset, small.images, small.labels)
            caption = f"{small.method}: {size} images with the probabilities of their labels"
            figures.append(Figure(picture.stem, caption))
    summary |= {"results": results}
    write_json(directory / "summary.json", summary)
    if not options.num_networks:
        return
    methods = sorted({row["method"] for row in results})
    curves = plotting.accuracy_by_size(
        {
            method: [
                (row["num_images"], row["test_accuracy_mean"], row["test_accuracy_std"])
                for row in results
                if row["method"] == method
            ]
            for method in methods
        }
    )
    best = max(results, key=lambda row: row["test_accuracy_mean"])
    lead = (
        f"{best['num_images']} images by {best['method']} stand for the {len(dataset.train):,} "
        f"training images of {dataset.name}: networks trained on them alone classify "
        f"{100 * best['test_accuracy_mean']:.2f}% of the {len(dataset.test):,} test images."
    )
    header = ["method", "images", "mean ± std", "time to make it", "features"]
    judges = f"{options.num_networks} networks each, augmentation {augmentation}"
    report.write(
        directory / "report.html",
        title,
        lead,
        [
            (f"{row[2]} %", f"test accuracy, {row[1]} images, {row[0]}")
            for row in sorted(rows, key=lambda row: int(row[1].replace(",", "")))
            if int(row[1].replace(",", "")) == best["num_images"]
        ],
        [
            Table(f"Accuracy on the test part (%), {judges}", header, rows),
        ],
        [Figure("accuracy", "Accuracy against the number of images", curves), *figures],
        numbers,
        report.commands(directory, summary["system"], options.typed, options.data_dir),
        {"config.json": options.settings(), "summary.json": summary},
    )
    console.say(f"report: {directory / 'report.html'}")
