"""Options that the commands share."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import jax
import numpy as np

from evojax_suite.data.splits import balanced_subset
from evojax_suite.results import plain
from evojax_suite.types import Dataset, Split

Scale = Literal["auto", "paper", "small"]
"""auto is small on a machine without accelerator."""


def is_small(scale: Scale) -> bool:
    """Whether the paper's sizes are to be reduced."""
    return scale == "small" or (scale == "auto" and jax.default_backend() == "cpu")


def some_images(
    dataset: Dataset, num_images: int | None, num_validation_images: int | None = None
) -> Dataset:
    """With a fixed part of the training images, balanced, and the first validation images; None is
    all."""
    train, part = dataset.train, dataset.validation
    if num_images is not None:
        kept = balanced_subset(train.labels, num_images, dataset.num_classes)
        train = Split(train.images[kept], train.labels[kept])
    most = slice(num_validation_images)
    return replace(dataset, train=train, validation=Split(part.images[most], part.labels[most]))


@dataclass(frozen=True)
class RunOptions:
    """Of every command that makes the directory of a run."""

    dataset: str = "digits"
    """digits, mnist, fashion_mnist, cifar10, a MedMNIST set, ..., or the path of your own."""
    data_dir: Path | None = None
    """Where datasets lie; the environment variable EVOJAX_SUITE_DATA by default."""
    seed: int = 0
    """Of everything random in the run."""
    name: str | None = None
    """Name of the run; system, dataset and seed by default."""
    runs_dir: Path = Path("runs")
    """Where the directory of the run is made."""
    resume: bool = False
    """Go on with an interrupted run, or with more generations."""
    checkpoint_seconds: float = 30.0
    """Least time between two checkpoints."""

    def __post_init__(self):
        for name in ("seed", "checkpoint_seconds"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} must be >= 0, got {getattr(self, name)}")

    def directory(self, system: str, dataset: Dataset) -> Path:
        """Of the run."""
        name = self.name or f"{system}-{Path(dataset.name).name}-seed{self.seed}"
        return self.runs_dir / name

    def settings(self) -> dict:
        """What decides the result, for config.json."""
        settings = plain(self)
        for name in ("resume", "runs_dir", "data_dir", "checkpoint_seconds", "name"):
            del settings[name]
        return settings


@dataclass(frozen=True)
class JudgedRunOptions(RunOptions):
    """Of every command that makes datasets."""

    num_networks: int = 10
    """Networks that judge a dataset on the test part; devs and coreset take 0 for none."""

    def __post_init__(self):
        super().__post_init__()
        if self.num_networks < 0:
            raise ValueError(f"num_networks must be >= 0, got {self.num_networks}")


def differing(value, default) -> dict:
    """Settings of a configuration that differ from another's; how it is computed is none."""
    found, defaults = {}, plain(default)
    for name, setting in plain(value).items():
        if name in ("engine", "convolution"):
            continue
        if isinstance(setting, dict):
            inner = differing(setting, defaults[name])
            prefix = f"{name}." if name.startswith("feature") else ""
            found |= {f"{prefix}{key}": item for key, item in inner.items()}
        elif setting != defaults[name]:
            found[name] = setting
    return found


def percent(accuracies: np.ndarray | list[float]) -> str:
    """Mean ± standard deviation in per cent, of accuracies in [0, 1]."""
    return f"{100 * np.mean(accuracies):.2f} ± {100 * np.std(accuracies):.2f}"
