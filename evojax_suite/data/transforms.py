"""Normalisation, and random augmentations of a batch of images in JAX.

The augmentations are pure functions of a key; all can be jitted (integer arguments are static) and
vmapped over keys and batches.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, TypeAlias, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Int, Num, Shaped

from evojax_suite.data.errors import DataError
from evojax_suite.types import Array, Images, PRNGKey, Probabilities, Scalar

ImagesT = TypeVar("ImagesT", np.ndarray, jax.Array)
Channels: TypeAlias = Sequence[float] | np.ndarray | jax.Array
AnyImages: TypeAlias = Shaped[Array, "images height width channels"]
"""Images of any type."""
Fill: TypeAlias = float | Num[Array, ""] | Num[Array, "channels"]


def normalize(images: ImagesT, mean: Channels, std: Channels) -> ImagesT:
    """The images scaled to [0, 1], less the channel means, divided by the channel deviations.

    images: (..., C) uint8 in 0..255 or float in [0, 1], of numpy or JAX; float32 of the same
    library comes back. mean, std: C numbers (sequences or arrays, with JAX images traced ones
    too), for images in [0, 1].
    """
    library = _library(images, mean, std)
    if images.dtype != np.uint8 and not jnp.issubdtype(images.dtype, jnp.floating):
        raise DataError(f"images have type {images.dtype}; allowed: uint8, or float in [0, 1]")
    scaled = library.asarray(images, np.float32)
    if images.dtype == np.uint8:
        scaled = scaled / np.float32(255)
    return (scaled - library.asarray(mean, np.float32)) / library.asarray(std, np.float32)


def check_constants(mean: Channels, std: Channels, num_channels: int) -> None:
    """Raise ValueError where mean and std are not what `normalize` takes."""
    for name, values in (("mean", mean), ("std", std)):
        array = np.asarray(values, np.float64)
        if array.shape != (num_channels,) or not np.isfinite(array).all():
            raise ValueError(f"{name} is {array.tolist()}, allowed: {num_channels} numbers")
    if not np.min(std) > 0:
        raise ValueError(f"std is {np.asarray(std).tolist()}, allowed: numbers above 0")


def denormalize(images: ImagesT, mean: Channels, std: Channels) -> ImagesT:
    """The inverse of `normalize`: normalised (..., C) images as float32 with 1 for white, not
    clipped, as an evolved image may lie outside [0, 1]."""
    library = _library(images, mean, std)
    values = library.asarray(images, np.float32)
    return values * library.asarray(std, np.float32) + library.asarray(mean, np.float32)


def random_shift(key: PRNGKey, images: AnyImages, max_pixels: int, fill: Fill = 0.0) -> AnyImages:
    """Move each image by -max_pixels..max_pixels (whole pixels, uniform) in y and in x.

    Images are of any type, which comes back. The pixels that move in have the value `fill`; for
    black in normalised images that is -mean / std.
    """
    count, height, width, channels = images.shape
    padded_shape = (count, height + 2 * max_pixels, width + 2 * max_pixels, channels)
    canvas = jnp.broadcast_to(jnp.asarray(fill, images.dtype), padded_shape)
    rows, columns = (slice(max_pixels, max_pixels + length) for length in (height, width))
    canvas = canvas.at[:, rows, columns].set(images)
    corners = jax.random.randint(key, (count, 2), 0, 2 * max_pixels + 1)

    def window(
        image: Shaped[Array, "padded_height padded_width channels"], corner: Int[Array, "2"]
    ) -> Shaped[Array, "height width channels"]:
        return jax.lax.dynamic_slice(image, (corner[0], corner[1], 0), (height, width, channels))

    return jax.vmap(window)(canvas, corners)


def random_crop(key: PRNGKey, images: AnyImages, padding: int) -> AnyImages:
    """Pad each image with `padding` zeros on all sides and crop it back at a random place: this is
    `random_shift` under the name that it has for CIFAR (padding 4)."""
    return random_shift(key, images, padding)


def random_flip(key: PRNGKey, images: AnyImages) -> AnyImages:
    """Mirror each image left to right with probability 1/2."""
    flip = jax.random.bernoulli(key, 0.5, (images.shape[0], 1, 1, 1))
    return jnp.where(flip, images[:, :, ::-1, :], images)


def mixup(
    key: PRNGKey, images: AnyImages, labels: Array, alpha: float | Scalar
) -> tuple[Images, Probabilities]:
    """Mix each image and its label with another of the batch: lam * one + (1 - lam) * other.

    One lam from Beta(alpha, alpha) and one permutation serve the whole batch (Zhang et al., 2018).
    labels: (images, classes), probabilities (one-hot for plain labels); alpha > 0. Units are kept.
    """
    if labels.ndim != 2:
        raise DataError(f"mixup: labels have shape {labels.shape}; allowed: (N, K) probabilities")
    if isinstance(alpha, (int, float)) and not alpha > 0:
        raise DataError(f"mixup: alpha is {alpha}; allowed: above 0")
    lam_key, order_key = jax.random.split(key)
    lam = jax.random.beta(lam_key, alpha, alpha)
    order = jax.random.permutation(order_key, images.shape[0])
    mixed, soft = (lam * each + (1 - lam) * each[order] for each in (images, labels))
    return mixed, soft


def _library(images: Any, mean: Channels, std: Channels) -> Any:
    """The library of `images`, NumPy or JAX's. Raises DataError if `mean` or `std` do not fit."""
    if not images.shape[-1] == len(mean) == len(std):
        counts = f"{images.shape[-1]} channels, mean {len(mean)} and std {len(std)} numbers"
        raise DataError(f"images have {counts}; they must agree")
    return jnp if isinstance(images, jax.Array) else np
