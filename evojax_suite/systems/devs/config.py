"""The settings of a reduction by DEvS."""

from __future__ import annotations

import itertools
from dataclasses import replace
from typing import Annotated, Literal

import numpy as np
from annotated_types import Gt, MinLen
from pydantic import AllowInfNan, NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt

from evojax_suite.configuration import configuration
from evojax_suite.distilled import LITERATURE, with_augmentation
from evojax_suite.networks import NetworkConfig
from evojax_suite.systems.devs.clustering import ClusteringMethod
from evojax_suite.training import EngineConfig, TrainingConfig

NETWORK = NetworkConfig(initialization="kaiming", dropout=0.2)
"""The network of section 4.2; only the feature network has a bottleneck, too."""

RECIPE = with_augmentation(LITERATURE, "shift_flip_mixup")
"""The training that evaluates the sets: augmentation of section 4.2, the rest as Zhao et al."""


@configuration
class Config:
    """Sizes and choices; the defaults are the paper's where it states them."""

    target_sizes: Annotated[tuple[PositiveInt, ...], MinLen(1)] = (500, 100, 10)
    """Sizes of the distilled sets; one trajectory passes through all of them."""
    reduction_factor: Annotated[float, Gt(1), AllowInfNan()] = 10.0
    """Largest factor by which a reduction makes the set smaller; inf is one reduction a target."""
    sizes: tuple[PositiveInt, ...] = ()
    """All sizes after that of the training set, falling; replaces reduction_factor."""
    clustering: ClusteringMethod = "auto"
    """k-means implementation: sklearn on the CPU, jax on the device, auto whichever is faster."""
    kmeans_batch_size: PositiveInt = 1028
    """Samples of a mini-batch of k-means."""
    kmeans_iterations: PositiveInt = 200
    """Largest number of passes of k-means over the samples."""
    kmeans_tolerance: NonNegativeFloat = 1e-4
    """k-means stops when its centres move less than this, relative to the features' variance."""
    label_weight: NonNegativeFloat = 0.0
    """Weight of the label vectors beside the features (of unit variance) in the clustering."""
    average: Literal["samples", "originals"] = "samples"
    """What has equal weights in the average of a cluster."""
    feature_network: Literal["retrained", "continued", "first"] = "retrained"
    """Train a new network in each reduction (the paper's), train the last one further, or keep the
    one that was trained on the whole set."""
    bottleneck: NonNegativeInt = 128
    """Units of a dense layer before the last one of the feature network; 0 leaves it out."""
    feature_epochs: PositiveInt = 20
    """Epochs of the feature network's training in each reduction."""
    feature_learning_rate: PositiveFloat = 0.05
    """Its learning rate, constant; the rest of its training is that of the evaluation."""
    min_training_steps: NonNegativeInt = 200
    """Smallest number of steps of the feature network's training in a reduction."""

    network: NetworkConfig = NETWORK
    training: TrainingConfig = RECIPE
    engine: EngineConfig = EngineConfig()

    def __post_init__(self):
        _check_falling("target_sizes", self.target_sizes)
        if self.sizes:
            _check_falling("sizes", self.sizes)
            missing = set(self.target_sizes) - set(self.sizes)
            if missing:
                raise ValueError(f"sizes must contain the target_sizes, {min(missing)} is missing")
            last, target = self.sizes[-1], self.target_sizes[-1]
            if last != target:
                message = f"sizes must end with the last of target_sizes, {target}, got {last}"
                raise ValueError(message)
        if self.network.network != "ConvNet":
            raise ValueError(f"features come from the ConvNet alone, got {self.network.network}")

    @property
    def feature_training(self) -> TrainingConfig:
        """The training of the feature network."""
        rate, epochs = self.feature_learning_rate, self.feature_epochs
        return replace(self.training, num_epochs=epochs, learning_rate=rate, schedule="constant")


def _check_falling(name: str, sizes: tuple[int, ...]) -> None:
    for before, after in itertools.pairwise(sizes):
        if after >= before:
            raise ValueError(f"{name} must fall, got {after} after {before}")


def size_sequence(config: Config, num_images: int) -> tuple[int, ...]:
    """N_1 > ... > N_M for a training set of `num_images` = N_0 (Algorithm 1, line 1)."""
    name = "sizes" if config.sizes else "target_sizes"
    first = getattr(config, name)[0]
    if first >= num_images:
        message = f"must be below the number of training images, {num_images}, got {first}"
        raise ValueError(f"{name} {message}")
    if config.sizes:
        return config.sizes
    sizes, before = [], num_images
    for target in config.target_sizes:
        ratio = before / target
        if np.isinf(config.reduction_factor):
            num_reductions = 1
        else:  # the tolerance keeps 8 -> 1 at three halvings
            num_reductions = int(np.ceil(np.log(ratio) / np.log(config.reduction_factor) - 1e-9))
        for step in range(1, num_reductions + 1):
            size = round(before * ratio ** (-step / num_reductions))
            if size < (sizes[-1] if sizes else num_images):
                sizes.append(size)
        before = target
    return tuple(sizes)
