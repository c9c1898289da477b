"""The worth of a synthetic dataset in closed form: kernel regression on features of a network.

Training a network on every candidate is what makes evolution of datasets slow. Here one network, as
it is initialised, gives features of some real images once and of every candidate's few images; the
ridge regression from the candidate's images to their labels has a closed form (n x n equations) and
predicts the real images. That regression on random features stands for training is the idea of KIP
(Nguyen et al. 2021) and of FRePo (Zhou et al. 2022), which descend its error by gradients of
images; nothing here is differentiated.

The error is that of a classifier, not of a regression: predictions f (num_classes,) of an image
become probabilities softmax(temperature * f), and the loss of class c is the mean of
(probability of c - [label is c])^2, column c of the Brier score. Squared error of f itself,
temperature 0, spends most of its effort on images that are classified right already.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from evojax_suite.data.errors import check_types
from evojax_suite.training import EngineConfig, extract_features, map_members
from evojax_suite.types import Array, PyTree


@dataclass(frozen=True)
class KernelConfig:
    """Sizes and scalars of the regression."""

    kernel_width: int = 32
    """Filters of the networks whose features are regressed on; all else is as in `network`."""
    kernel_images: int = 1000
    """Real images, drawn anew in each generation, that are predicted."""
    ridge: float = 1e-3
    """Ridge, relative to the mean squared norm of the candidate's features."""
    temperature: float = 10.0
    """Factor of the predictions in the softmax, >= 0; 0 is squared error without a softmax."""

    def __post_init__(self):
        check_types(vars(self), type(self))
        for name in ("kernel_width", "kernel_images"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be >= 1, got {getattr(self, name)}")
        if not 0 < self.ridge < float("inf"):
            raise ValueError(f"ridge must be > 0, got {self.ridge}")
        if not 0 <= self.temperature < float("inf"):
            raise ValueError(f"temperature must be >= 0, got {self.temperature}")


class KernelScores(NamedTuple):
    """What the regression says of each candidate."""

    losses: Array  # (P, num_classes): of each class's column, lower is better
    accuracy: Array  # (P,): of the class with the largest prediction


def predict(features: Array, labels: Array, new_features: Array, ridge: float) -> Array:
    """What ridge regression on features (n, F) and labels (n, C) says of new features (m, F):
    (m, C). The kernel is linear, and `ridge` relative to the mean of its diagonal."""
    kernel = jnp.matmul(features, features.T, precision="highest")
    kernel += ridge * jnp.trace(kernel) / len(kernel) * jnp.eye(len(kernel))
    weights = jax.scipy.linalg.solve(kernel, labels, assume_a="pos")
    return jnp.matmul(
        new_features, jnp.matmul(features.T, weights, precision="highest"), precision="highest"
    )


def class_losses(predictions: Array, labels: Array, temperature: float) -> Array:
    """The loss of each class's column, (C,), of predictions (m, C) for integer labels (m,)."""
    targets = jax.nn.one_hot(labels, predictions.shape[1])
    if temperature == 0:
        return ((predictions - targets) ** 2).mean(0)
    return ((jax.nn.softmax(temperature * predictions) - targets) ** 2).mean(0)


def features_of(
    network: nn.Module, variables: PyTree, images: Array, engine: EngineConfig
) -> Array:
    """Features of images (N, H, W, C) by networks of variables with leading axis M, side by side,
    and 1 for the intercept: (N, M * F + 1). Their kernel is the sum of the networks' kernels."""
    batch_size = engine.resolved_evaluation_batch_size(images.shape[1:])

    def features(variables):
        return extract_features(network, variables, images, len(images), batch_size)

    found = jnp.moveaxis(jax.lax.map(features, variables), 0, 1).reshape(len(images), -1)
    return jnp.concatenate([found, jnp.ones((len(images), 1))], -1)


def score_population(
    key: Array,
    config: KernelConfig,
    network: nn.Module,
    num_networks: int,
    decode: Callable[[Array], Any],
    population: Array,
    images: Array,
    labels: Array,
    normalize: Callable[[Array], Array],
    engine: EngineConfig,
) -> KernelScores:
    """Score candidates (P, D), each of which `decode` turns into images (n, H, W, C) and labels
    (n, C), on real images (N, H, W, C), which `normalize` makes what networks see, and their labels
    (N,).

    All candidates see the same `num_networks` fresh networks and the same real images.
    """
    image_shape = images.shape[1:]
    num_images = jax.eval_shape(decode, population[0]).images.shape[0]
    group = max(1, engine.resolved_evaluation_batch_size(image_shape) // num_images)
    key_networks, key_images = jax.random.split(key)
    variables = jax.vmap(lambda key: network.init(key, jnp.zeros((1, *image_shape))))(
        jax.random.split(key_networks, num_networks)
    )
    shape = (min(config.kernel_images, len(images)),)
    chosen = jax.random.randint(key_images, shape, 0, len(images))
    real, real_labels = normalize(images[chosen]), labels[chosen]
    real_features = features_of(network, variables, real, engine)

    def score(candidate: Array) -> KernelScores:
        own = decode(candidate)
        features = features_of(network, variables, own.images, engine)
        # An error of the intercept would move all columns: labels are centred.
        centre = 1 / own.labels.shape[1]
        found = predict(features, own.labels - centre, real_features, config.ridge) + centre
        return KernelScores(
            losses=class_losses(found, real_labels, config.temperature),
            accuracy=(found.argmax(1) == real_labels).mean(),
        )

    return map_members(score, (population,), group)
