"""Shvai, Llanza, Hasnat & Nakib, GECCO 2022, "DEvS: Data Distillation Algorithm Based on Evolution
Strategy". Implements Algorithm 1.

The training set is the population. Each reduction trains a network on the current set with
augmentation (mutation) and mixup (crossover), clusters the features of its convolutional blocks
into as many clusters as the next set has samples, and replaces each cluster by the average of its
images and of its label vectors. No gradient with respect to an image is ever taken.

The current set is not kept as images: every sample is a weighted sum of original images, so the
state is which sample each original went into and with which weight (`assignments`, `weights`).
That has one shape for all sizes, is a few hundred kilobytes, and tells where a sample comes from.

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
  more than one, so that a set has the size that was asked for.
- A set is the average over its cluster's samples, each counting alike however many originals it
  stands for (line 5); `average="originals"` lets each original count alike.

Classes play no part in the clustering, as in the paper, so a distilled set may hold more of one
class than of another; `label_weight` draws samples of one class together.
"""

from __future__ import annotations

import time
from dataclasses import replace
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
from evojax_suite.types import Algorithm, Array, TrainingData

_STEPS_A_CALL = 100


class DistilledSet(NamedTuple):
    """Samples of one target size."""

    images: Float[Array, "samples height width channels"]  # normalised
    labels: Float[Array, "samples classes"]  # probabilities
    assignments: Int32[Array, "originals"]  # the sample that each original image went into
    weights: Float[Array, "originals"]  # the weight it has there


@struct.dataclass
class State:
    """State of the reduction."""

    fit: FitState  # the feature network in training
    epoch: Int32[Array, ""]  # its epochs done on the current set
    reduction: Int32[Array, ""]  # reductions done
    step: Int32[Array, ""]  # steps done
    assignments: Int32[Array, "originals"]
    weights: Float32[Array, "originals"]
    target_assignments: Int32[Array, "targets originals"]  # of the targets reached
    target_weights: Float32[Array, "targets originals"]


class Metrics(NamedTuple):
    """What one step reports. A reduction takes one or more steps; the last one clusters."""

    generation: np.generic  # the step, from 1
    reduction: np.generic  # that it belongs to, from 1
    num_samples: np.generic  # of the set after this step
    epoch: np.generic  # of the feature network on this set
    loss: np.generic  # of the last epoch, on augmented images
    accuracy: np.generic  # on them, of the heaviest class
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
    """The weighted sums of `values` that the samples are."""
    flat = values.reshape(len(values), -1) * weights[:, None]
    return jax.ops.segment_sum(flat, assignments, num_samples).reshape(
        num_samples, *values.shape[1:]
    )


def merge(
    assignments: Int[np.ndarray, "originals"],
    weights: Float[np.ndarray, "originals"],
    clusters: Int[np.ndarray, "samples"],
    kind: str,
) -> tuple[Int[np.ndarray, "originals"], Float[np.ndarray, "originals"]]:
    """Assignments and weights after the samples of each cluster became one (line 5).

    clusters: the cluster of each current sample. kind: "samples" or "originals", what counts
    alike.
    """
    merged = clusters[assignments]
    if kind == "originals":
        return merged, (1 / np.bincount(merged)[merged]).astype(np.float32)
    return merged, (weights / np.bincount(clusters)[merged]).astype(np.float32)


def num_steps(config: Config, num_images: int) -> int:
    """Steps of a whole run."""
    sizes = (num_images, *size_sequence(config, num_images)[:-1])
    return sum(_plan(config, size, index == 0).calls for index, size in enumerate(sizes))


class _Plan(NamedTuple):
    """The feature network's training on one set."""

    epochs: int
    batches: int  # of an epoch
    epochs_a_call: int

    @property
    def calls(self) -> int:
        return max(1, -(-self.epochs // self.epochs_a_call))


def _plan(config: Config, num_samples: int, first: bool) -> _Plan:
    batches = config.feature_training.num_batches(num_samples)
    epochs = max(config.feature_training.num_epochs, -(-config.min_training_steps // batches))
    if config.feature_network == "first" and not first:
        epochs = 0
    return _Plan(epochs, batches, max(1, _STEPS_A_CALL // batches))


class _Setup(NamedTuple):
    """What does not change in a reduction."""

    config: Config
    num_classes: int
    image_shape: tuple[int, int, int]
    network: nn.Module


@partial(jax.jit, static_argnums=0)
def _new_network(setup: _Setup, key):
    return start_fit(key, setup.network, setup.config.feature_training, setup.image_shape)


def _init(setup: _Setup, key: Array, params: None, data: TrainingData) -> State:
    del params
    num_images = len(data.labels)
    size_sequence(setup.config, num_images)
    none = jnp.zeros((len(setup.config.target_sizes), num_images))
    return State(
        fit=_new_network(setup, key),
        epoch=jnp.int32(0),
        reduction=jnp.int32(0),
        step=jnp.int32(0),
        assignments=jnp.arange(num_images, dtype=jnp.int32),
        weights=jnp.ones(num_images),
        target_assignments=none.astype(jnp.int32),
        target_weights=none,
    )


@partial(jax.jit, static_argnums=0)
def _current_set(setup: _Setup, state, data):
    """Images and labels, in buffers of the size of the whole training set."""
    return tuple(
        average(state.assignments, state.weights, values, len(data.labels))
        for values in (
            normalize(data.images, data.mean, data.std),
            jax.nn.one_hot(data.labels, setup.num_classes),
        )
    )


def _step(
    setup: _Setup, key: Array, state: State, params: None, data: TrainingData
) -> tuple[State, Metrics]:
    del params
    key_fit, key_cluster, key_network = jax.random.split(key, 3)
    seconds: dict[str, float] = {}
    clock = time.perf_counter()

    def lap(stage: str, value: Any) -> Any:
        nonlocal clock
        jax.block_until_ready(value)
        seconds[stage] = time.perf_counter() - clock
        clock = time.perf_counter()
        return value

    num_images = len(data.labels)
    sizes = (num_images, *size_sequence(setup.config, num_images))
    reduction = int(state.reduction)
    num_samples, next_size = sizes[reduction], sizes[reduction + 1]
    plan = _plan(setup.config, num_samples, reduction == 0)
    images, labels = lap("averaging", _current_set(setup, state, data))
    epochs = min(plan.epochs_a_call, plan.epochs - int(state.epoch))
    fit, seen = fit_epochs(
        key_fit,
        setup.network,
        setup.config.feature_training,
        plan.epochs * plan.batches,
        state.fit,
        images,
        labels,
        num_samples,
        epochs,
    )
    lap("training", seen)
    losses = np.asarray(seen.losses)[:num_samples]
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
        label_entropy=_entropy(np.asarray(labels)[:num_samples]),
        num_failed=np.int32((~np.isfinite(losses)).sum() if epochs else 0),
        stage_seconds=seconds,
    )
    state = replace(state, fit=fit, epoch=jnp.int32(done), step=state.step + 1)
    if done < plan.epochs:
        return state, metrics

    batch_size = setup.config.engine.resolved_evaluation_batch_size(setup.image_shape)
    features = lap(
        "features", extract_features(setup.network, fit.variables, images, num_samples, batch_size)
    )
    points = np.asarray(features)[:num_samples]
    if setup.config.label_weight:
        deviation = max(float(points.std()), 1e-12) * setup.config.label_weight
        points = np.concatenate([points, deviation * np.asarray(labels)[:num_samples]], axis=1)
    found = clustering.cluster(
        key_cluster,
        points,
        next_size,
        setup.config.clustering,
        setup.config.kmeans_batch_size,
        setup.config.kmeans_iterations,
        setup.config.kmeans_tolerance,
    )
    lap("clustering", None)
    assignments, weights = merge(
        np.asarray(state.assignments),
        np.asarray(state.weights),
        found.assignments,
        setup.config.average,
    )
    targets, target_weights = state.target_assignments, state.target_weights
    if next_size in setup.config.target_sizes:
        place = setup.config.target_sizes.index(next_size)
        targets = targets.at[place].set(assignments)
        target_weights = target_weights.at[place].set(weights)
    state = State(
        fit=_new_network(setup, key_network)
        if setup.config.feature_network == "retrained"
        else fit,
        epoch=jnp.int32(0),
        reduction=state.reduction + 1,
        step=state.step,
        assignments=jnp.asarray(assignments, jnp.int32),
        weights=jnp.asarray(weights),
        target_assignments=targets,
        target_weights=target_weights,
    )
    labels_after = average(
        state.assignments, state.weights, jax.nn.one_hot(data.labels, setup.num_classes), next_size
    )
    return state, metrics._replace(
        num_samples=np.int32(next_size),
        inertia=np.float32(found.inertia),
        num_empty=np.int32(found.num_empty),
        label_entropy=_entropy(np.asarray(labels_after)),
    )


def _result(
    setup: _Setup, state: State, params: None, data: TrainingData
) -> tuple[DistilledSet, ...]:
    del params
    images = normalize(data.images, data.mean, data.std)
    labels = jax.nn.one_hot(data.labels, setup.num_classes)
    return tuple(
        DistilledSet(
            average(assignments, weights, images, size),
            average(assignments, weights, labels, size),
            assignments,
            weights,
        )
        for size, assignments, weights in zip(
            setup.config.target_sizes, state.target_assignments, state.target_weights, strict=True
        )
    )


def _finished(setup: _Setup, state: State) -> Array:
    sizes = size_sequence(setup.config, len(state.assignments))
    return state.reduction >= len(sizes)


def build(
    config: Config, num_classes: int, image_shape: tuple[int, int, int]
) -> Algorithm[State, None, TrainingData, Metrics, tuple[DistilledSet, ...]]:
    """A step trains the feature network for a while or, that done, reduces the set as well.

    Not scannable: the sets shrink. `data` is a TrainingData, `params` None; the result is a tuple
    of DistilledSet, one a target.
    """
    network = networks.create(config.network, num_classes, image_shape)
    network = network.clone(bottleneck=config.bottleneck)
    setup = _Setup(config, num_classes, image_shape, network)
    return Algorithm(
        partial(_init, setup),
        partial(_step, setup),
        partial(_result, setup),
        partial(_finished, setup),
        scannable=False,
    )


def _entropy(labels: Float[np.ndarray, "samples classes"]) -> np.floating:
    logarithms = np.log(labels, where=labels > 0, out=np.zeros_like(labels))
    return -(labels * logarithms).sum(-1).mean()
