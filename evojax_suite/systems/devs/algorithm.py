"""Shvai, Llanza, Hasnat & Nakib, GECCO 2022, "DEvS: Data Distillation Algorithm Based on Evolution
Strategy". Implements Algorithm 1.

The training set is the population. Each reduction trains a network on the current set with
augmentation (mutation) and mixup (crossover), clusters the features of its convolutional blocks
into as many clusters as the next set has samples, and replaces each cluster by the average of its
images and of its label vectors. No gradient with respect to an image is ever taken.

The current set is not kept as images: every sample is a weighted sum of original images, so the
state holds, for each original, the sample that it went into and its weight there (`assignments`,
`weights`). That has one shape for all sizes, takes a few hundred kilobytes, and tells where a
sample comes from.

Where the paper is silent or we differ from it, and why:

- Blocks pool 2x2: section 4.2 lists convolution, instance norm and ReLU, but follows Zhao et al.,
  whose ConvNet pools.
- The sequence of sizes is not given. By default it falls geometrically between the targets, by a
  factor of at most 10 a reduction (`reduction_factor`). Halving makes most clusters single samples,
  far from all others, and the rest few and large (experiments/devs/README.md).
- Epochs, optimizer, learning rate and batch size are not given. They are Zhao et al.'s SGD at five
  times their rate; small sets are shown until `min_training_steps` steps are done.
- The size of the bottleneck layer is not given: 128 units with ReLU (`bottleneck`; 0 is off).
- Every reduction starts from a new initialisation, as lines 2-3 read; `feature_network` has
  alternatives.
- k-means can leave clusters empty. Each takes the sample farthest from its centre among clusters of
  more than one, so that a set has the requested size.
- A new sample is the average of the samples of its cluster with equal weights, however many
  originals each stands for (line 5); `average="originals"` gives equal weights to the originals.

Classes play no part in the clustering, as in the paper, so a distilled set may hold more of one
class than of another; `label_weight` draws samples of one class together.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jaxtyping import Float, Float32, Int, Int32

from evojax_suite import networks
from evojax_suite.data.transforms import normalize
from evojax_suite.systems.devs import clustering
from evojax_suite.systems.devs.config import Config, size_sequence
from evojax_suite.training import FitState, extract_features, fit_epochs, start_fit
from evojax_suite.types import Algorithm, Array, PRNGKey, TrainingData

BATCHES_A_STEP = 100
"""Batches of the feature network's training in a step, at least an epoch."""


class DistilledSet(NamedTuple):
    """Samples of one target size."""

    images: Float[Array, "samples height width channels"]  # normalised
    labels: Float[Array, "samples classes"]  # probabilities
    assignments: Int32[Array, "originals"]  # the sample that each original image went into
    weights: Float[Array, "originals"]  # the weight it has there


@struct.dataclass
class State:
    """The feature network; the current set and those reached, as weights of the originals."""

    fit: FitState  # the feature network in training
    epoch: Int32[Array, ""]  # epochs that it has done on the current set
    reduction: Int32[Array, ""]  # reductions done
    step: Int32[Array, ""]  # steps done
    assignments: Int32[Array, "originals"]
    weights: Float32[Array, "originals"]
    target_assignments: Int32[Array, "targets originals"]  # of the targets reached
    target_weights: Float32[Array, "targets originals"]


class Metrics(NamedTuple):
    """What one step reports. A reduction takes one or more steps; the last one clusters."""

    generation: np.generic  # the step, from 1
    reduction: np.generic  # the reduction of this step, from 1
    num_samples: np.generic  # of the set after this step
    epoch: np.generic  # of the feature network on this set
    loss: np.generic  # of the last epoch, on augmented images
    accuracy: np.generic  # on these images, of the heaviest class
    inertia: np.generic  # of the clustering, NaN while training
    num_empty: np.generic  # clusters that k-means left empty
    label_entropy: np.generic  # mean over the set, in nats
    num_failed: np.generic  # samples whose loss was NaN or infinite
    stage_seconds: dict[str, float]  # measured; no part of the result


def average(
    assignments: Int[Array, "originals"],
    weights: Float[Array, "originals"],
    values: Float[Array, "originals *shape"],
    num_samples: int,
) -> Float[Array, "{num_samples} *shape"]:
    """The samples as weighted sums of `values`, the images or labels of the originals."""
    weighted = values.reshape(len(values), -1) * weights[:, None]
    sums = jax.ops.segment_sum(weighted, assignments, num_samples)
    return sums.reshape(num_samples, *values.shape[1:])


def merge(
    assignments: Int[np.ndarray, "originals"],
    weights: Float[np.ndarray, "originals"],
    clusters: Int[np.ndarray, "samples"],
    kind: str,
) -> tuple[Int[np.ndarray, "originals"], Float[np.ndarray, "originals"]]:
    """Assignments and weights after the samples of each cluster became one (line 5).

    clusters: the cluster of each current sample. kind: "samples" or "originals", whose weights in a
    cluster are equal.
    """
    merged = clusters[assignments]
    if kind == "originals":
        return merged, (1 / np.bincount(merged)[merged]).astype(np.float32)
    return merged, (weights / np.bincount(clusters)[merged]).astype(np.float32)


def _num_epochs(config: Config, num_samples: int, num_images: int) -> int:
    """The epochs of the feature network on a set."""
    if config.feature_network == "first" and num_samples < num_images:
        return 0
    least = -(-config.min_training_steps // config.feature_training.num_batches(num_samples))
    return max(config.feature_training.num_epochs, least)


def _epochs_a_step(config: Config, num_samples: int, batches: int) -> int:
    return max(1, batches // config.feature_training.num_batches(num_samples))


def _sets(config: Config, num_images: int) -> list[tuple[int, int]]:
    """The size of each set that is reduced, and the epochs of the feature network on it."""
    sizes = num_images, *size_sequence(config, num_images)[:-1]
    return [(size, _num_epochs(config, size, num_images)) for size in sizes]


def num_steps(config: Config, num_images: int) -> int:
    """Steps of a whole run."""
    each = [
        (epochs, _epochs_a_step(config, size, BATCHES_A_STEP))
        for size, epochs in _sets(config, num_images)
    ]
    return sum(max(1, -(-epochs // most)) for epochs, most in each)


def num_batches(config: Config, num_images: int) -> int:
    """Batches on which the feature networks of a whole run train."""
    batches = config.feature_training.num_batches
    return sum(epochs * batches(size) for size, epochs in _sets(config, num_images))


def _entropy(labels: Float[np.ndarray, "samples classes"]) -> np.floating:
    logarithms = np.log(labels, where=labels > 0, out=np.zeros_like(labels))
    return -(labels * logarithms).sum(-1).mean()


@dataclass(frozen=True)
class _DEvS:
    """The functions of the algorithm and what does not change in a reduction."""

    config: Config
    num_classes: int
    image_shape: tuple[int, int, int]
    network: nn.Module
    batches_a_step: int

    def init(self, key: PRNGKey, params: None, data: TrainingData) -> State:
        del params
        num_images = len(data.labels)
        size_sequence(self.config, num_images)  # raises ValueError where the sizes do not fit
        nothing = jnp.zeros((len(self.config.target_sizes), num_images))
        return State(
            fit=self._new_network(key),
            epoch=jnp.int32(0),
            reduction=jnp.int32(0),
            step=jnp.int32(0),
            assignments=jnp.arange(num_images, dtype=jnp.int32),
            weights=jnp.ones(num_images),
            target_assignments=nothing.astype(jnp.int32),
            target_weights=nothing,
        )

    def step(
        self, key: PRNGKey, state: State, params: None, data: TrainingData
    ) -> tuple[State, Metrics]:
        del params
        config, network, num_images = self.config, self.network, len(data.labels)
        key_fit, key_cluster, key_network = jax.random.split(key, 3)
        seconds: dict[str, float] = {}
        clock = time.perf_counter()

        def lap(stage: str, value: Any) -> Any:
            nonlocal clock
            jax.block_until_ready(value)
            seconds[stage] = time.perf_counter() - clock
            clock = time.perf_counter()
            return value

        sizes = (num_images, *size_sequence(config, num_images))
        reduction = int(state.reduction)
        num_samples, next_size = sizes[reduction], sizes[reduction + 1]
        num_epochs = _num_epochs(config, num_samples, num_images)
        most = _epochs_a_step(config, num_samples, self.batches_a_step)
        images, labels = lap("averaging", self._current_set(state, data))
        epochs = min(most, num_epochs - int(state.epoch))
        recipe = config.feature_training
        total = num_epochs * recipe.num_batches(num_samples)
        shown = images, labels, num_samples, epochs
        fit, seen = fit_epochs(key_fit, network, recipe, total, state.fit, *shown)
        lap("training", seen)
        losses, host_labels = (np.asarray(each)[:num_samples] for each in (seen.losses, labels))
        done = int(state.epoch) + epochs
        metrics = Metrics(
            generation=np.int32(state.step + 1),
            reduction=np.int32(reduction + 1),
            num_samples=np.int32(num_samples),
            epoch=np.int32(done),
            loss=losses.mean(),
            accuracy=np.asarray(seen.correct)[:num_samples].mean(),
            inertia=np.float32(np.nan),
            num_empty=np.int32(0),
            label_entropy=_entropy(host_labels),
            num_failed=np.int32((~np.isfinite(losses)).sum() if epochs else 0),
            stage_seconds=seconds,
        )
        state = replace(state, fit=fit, epoch=jnp.int32(done), step=state.step + 1)
        if done < num_epochs:
            return state, metrics

        batch_size = config.engine.resolved_evaluation_batch_size(self.image_shape)
        features = extract_features(network, fit.variables, images, num_samples, batch_size)
        points = np.asarray(lap("features", features))[:num_samples]
        if config.label_weight:
            deviation = max(float(points.std()), 1e-12) * config.label_weight
            points = np.concatenate([points, deviation * host_labels], axis=1)
        limits = config.kmeans_batch_size, config.kmeans_iterations, config.kmeans_tolerance
        clusters = clustering.cluster(key_cluster, points, next_size, config.clustering, *limits)
        lap("clustering", None)
        old = np.asarray(state.assignments), np.asarray(state.weights)
        assignments, weights = merge(*old, clusters.assignments, config.average)
        targets, target_weights = state.target_assignments, state.target_weights
        if next_size in config.target_sizes:
            place = config.target_sizes.index(next_size)
            targets = targets.at[place].set(assignments)
            target_weights = target_weights.at[place].set(weights)
        state = State(
            fit=self._new_network(key_network) if config.feature_network == "retrained" else fit,
            epoch=jnp.int32(0),
            reduction=state.reduction + 1,
            step=state.step,
            assignments=jnp.asarray(assignments, jnp.int32),
            weights=jnp.asarray(weights),
            target_assignments=targets,
            target_weights=target_weights,
        )
        one_hot = jax.nn.one_hot(data.labels, self.num_classes)
        labels = average(state.assignments, state.weights, one_hot, next_size)
        return state, metrics._replace(
            num_samples=np.int32(next_size),
            inertia=np.float32(clusters.inertia),
            num_empty=np.int32(clusters.num_empty),
            label_entropy=_entropy(np.asarray(labels)),
        )

    def result(self, state: State, params: None, data: TrainingData) -> tuple[DistilledSet, ...]:
        del params
        images, labels = self._originals(data)
        sizes, targets = self.config.target_sizes, (state.target_assignments, state.target_weights)
        return tuple(
            DistilledSet(
                average(assignments, weights, images, size),
                average(assignments, weights, labels, size),
                assignments,
                weights,
            )
            for size, assignments, weights in zip(sizes, *targets, strict=True)
        )

    def finished(self, state: State) -> Array:
        return state.reduction >= len(size_sequence(self.config, len(state.assignments)))

    @partial(jax.jit, static_argnums=0)
    def _new_network(self, key: PRNGKey) -> FitState:
        return start_fit(key, self.network, self.config.feature_training, self.image_shape)

    @partial(jax.jit, static_argnums=0)
    def _current_set(self, state: State, data: TrainingData) -> tuple[Array, ...]:
        """Images and labels, in buffers of the size of the whole training set."""
        num_images = len(data.labels)
        return tuple(
            average(state.assignments, state.weights, values, num_images)
            for values in self._originals(data)
        )

    def _originals(self, data: TrainingData) -> tuple[Array, Array]:
        """The images, normalised, and the one-hot labels of the training set."""
        images = normalize(data.images, data.mean, data.std)
        return images, jax.nn.one_hot(data.labels, self.num_classes)


def build(
    config: Config,
    num_classes: int,
    image_shape: tuple[int, int, int],
    batches_a_step: int = BATCHES_A_STEP,
) -> Algorithm[State, None, TrainingData, Metrics, tuple[DistilledSet, ...]]:
    """A step trains the feature network for some epochs and, after the last one, reduces the set.

    Not scannable: the sets shrink. `params` is None; the result is a DistilledSet of each target.
    """
    network = networks.create(config.network, num_classes, image_shape)
    network = network.clone(bottleneck=config.bottleneck)
    devs = _DEvS(config, num_classes, image_shape, network, batches_a_step)
    functions = devs.init, devs.step, devs.result, devs.finished
    return Algorithm(*functions, scannable=False, image_shape=image_shape)
