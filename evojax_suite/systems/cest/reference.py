"""What no network could learn of an example: its irreducible loss, in closed form.

RHO-LOSS (Mindermann et al. 2022, "Prioritized Training on Points that are Learnable, Worth
Learning, and Not Yet Learnt") selects examples by their loss less that of a model which was trained
on other examples. What remains is the loss that can be reduced: mislabelled and ambiguous examples
have a high loss under both. There the other model is a network trained on held-out images. Here it
is a ridge regression on patches, whose predictions of each example by the regression on all others
follow from one factorisation (leave-one-out residuals; Hastie et al. 2009, eq. 7.64): no image is
held out, and nothing is trained by gradients.

The features are those of Coates, Lee & Ng 2011 ("An Analysis of Single-Layer Networks in
Unsupervised Feature Learning"): patches of training images, drawn at random and whitened, are
filters; the two halves of their response, soft-thresholded, are averaged over a grid of 3 x 3
cells.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
from jax.scipy.linalg import cho_factor, cho_solve, solve_triangular
from jaxtyping import Float, Int

from evojax_suite.types import Array, Images, Labels, PRNGKey, Probabilities, Scalar

NUM_FILTERS = 200
RIDGES = 0.1, 0.3, 1.0, 3.0
"""Relative to the mean diagonal of the Gram matrix of the features."""
TEMPERATURES = 2.0, 3.0, 5.0, 7.0, 10.0, 14.0
"""Factors of the regression's outputs before the softmax."""

_NUM_PATCHES = 20_000  # from which filters and their whitening come
_CELLS = 3
_THRESHOLD = 0.25
_DIMENSIONS = ("NHWC", "HWIO", "NHWC")


def patch_features(
    key: PRNGKey, images: Images, num_filters: int = NUM_FILTERS
) -> Callable[[Images], Float[Array, "images features"]]:
    """A function from normalised images (N, height, width, channels) to 18 features a filter. key:
    draws the patches from `images`."""
    num_images, height, width, channels = images.shape
    size = max(min(3, height, width), min(6, height // 4, width // 4))
    key_image, key_row, key_column = jax.random.split(key, 3)
    draw = partial(jax.random.randint, shape=(_NUM_PATCHES,), minval=0)
    places = (
        draw(key_image, maxval=num_images),
        draw(key_row, maxval=height - size + 1),
        draw(key_column, maxval=width - size + 1),
    )

    def patch(image: Array, row: Array, column: Array) -> Array:
        cut = jax.lax.dynamic_slice(images, (image, row, column, 0), (1, size, size, channels))
        return cut.ravel()

    patches = jax.vmap(patch)(*places)
    patches -= patches.mean(1, keepdims=True)
    patches /= jnp.sqrt(patches.var(1, keepdims=True) + 0.1)
    mean = patches.mean(0)
    values, vectors = jnp.linalg.eigh(jnp.cov(patches.T).reshape(patches.shape[1], -1))
    whitening = (vectors / jnp.sqrt(jnp.maximum(values, 0.0) + 0.1)) @ vectors.T
    filters = (patches[:num_filters] - mean) @ whitening
    filters /= jnp.linalg.norm(filters, axis=1, keepdims=True) + 1e-6
    kernels = filters @ whitening
    offsets = -kernels @ mean
    kernels = jnp.moveaxis(kernels.reshape(-1, size, size, channels), 0, -1)
    box = jnp.full((size, size, channels, 1), 1 / (size * size * channels))

    def features(images: Images) -> Array:
        def convolved(images: Array, kernel: Array) -> Array:
            shapes = (1, 1), "VALID"
            return jax.lax.conv_general_dilated(
                images, kernel, *shapes, dimension_numbers=_DIMENSIONS
            )

        mean = convolved(images, box)
        variance = jnp.maximum(convolved(images**2, box) - mean**2, 0.0)
        response = convolved(images, kernels) - mean * kernels.sum((0, 1, 2))
        response = response / jnp.sqrt(variance + 0.1) + offsets
        halves = jnp.maximum(jnp.concatenate([response, -response], -1) - _THRESHOLD, 0.0)
        # Cells of as equal a size as the map allows, as the mean over an axis of a thin matrix.
        pooled = jnp.einsum("nhwf,ah,bw->nabf", halves, *map(_cells, halves.shape[1:3]))
        return pooled.reshape(len(images), -1)

    return features


def _cells(size: int) -> Float[Array, "cells {size}"]:
    cell = jnp.arange(size) * _CELLS // size
    inside = (cell == jnp.arange(_CELLS)[:, None]).astype(jnp.float32)
    return inside / jnp.maximum(inside.sum(1, keepdims=True), 1.0)


def leave_one_out(
    features: Float[Array, "images features"],
    targets: Float[Array, "images classes"],
    ridge: float | Scalar,
) -> Float[Array, "images classes"]:
    """The prediction of each image by the ridge regression on all others. ridge: relative to the
    mean diagonal of the Gram matrix of the features; the constant is not penalised."""
    num_images, num_features = features.shape
    centred, rest = features - features.mean(0), targets - targets.mean(0)
    penalty = ridge * (centred**2).sum() / num_features
    if num_images < num_features:  # the smaller of the two Gram matrices
        factor = cho_factor(centred @ centred.T + penalty * jnp.eye(num_images), lower=True)
        inverse = cho_solve(factor, jnp.eye(num_images))
        residuals, influence = penalty * inverse @ rest, 1 - penalty * jnp.diagonal(inverse)
    else:
        factor = cho_factor(centred.T @ centred + penalty * jnp.eye(num_features), lower=True)
        residuals = rest - centred @ cho_solve(factor, centred.T @ rest)
        influence = (solve_triangular(factor[0], centred.T, lower=True) ** 2).sum(0)
    free = jnp.maximum(1 - influence - 1 / num_images, 1e-4)[:, None]
    return targets - residuals / free


def reference_probabilities(
    key: PRNGKey, images: Images, labels: Labels, num_classes: int, batch_size: int
) -> Probabilities:
    """The class probabilities of each image by the regression on all others, its ridge and
    temperature those of the lowest cross-entropy. images: normalised; batch_size: how many are
    convolved at once."""
    features_of = patch_features(key, images)
    features = jax.lax.map(lambda one: features_of(one[None])[0], images, batch_size=batch_size)
    features = features / (features.std(0) + 1e-2)
    targets = jax.nn.one_hot(labels, num_classes)
    temperatures = jnp.array(TEMPERATURES)[:, None, None]

    def predicted(ridge: Array) -> tuple[Array, Array]:
        outputs = leave_one_out(features, targets, ridge)
        logs = jax.nn.log_softmax(temperatures * outputs)
        entropies = -(logs * targets).sum(-1).mean(1)
        return logs[entropies.argmin()], entropies.min()

    logs, entropies = jax.lax.map(predicted, jnp.array(RIDGES))
    return jnp.exp(logs[entropies.argmin()])


def irreducible_losses(
    probabilities: Probabilities, labels: Int[Array, "images"]
) -> Float[Array, "images"]:
    """The cross-entropy, in nats, of labels under `reference_probabilities`."""
    own = jnp.take_along_axis(probabilities, labels[:, None], 1)[:, 0]
    return -jnp.log(jnp.maximum(own, 1e-9))
