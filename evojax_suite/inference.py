"""A trained network applied to a user's images, here or as a program that other tools run."""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.export
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float, Real

from evojax_suite.types import Array


def in_batches(
    function: Callable[[np.ndarray], Array],
    images: Real[np.ndarray, "images height width channels"],
    batch_size: int,
) -> Float[np.ndarray, "images outputs"]:
    """The outputs of `function` for images, uint8 or float in [0, 1], which it is given as float32
    in [0, 1], a batch at a time."""
    scale = np.float32(255) if images.dtype == np.uint8 else np.float32(1)
    batches = np.split(images, range(batch_size, len(images), batch_size))
    return np.concatenate([function(batch.astype(np.float32) / scale) for batch in batches])


def export(function: Callable[[Array], Array], image_shape: tuple[int, int, int]) -> bytes:
    """A StableHLO program of `function` for any number of images (N, H, W, C), float32, on CPU, GPU
    and TPU; `jax.export.deserialize` reads it."""
    (size,) = jax.export.symbolic_shape("n")
    images = jax.ShapeDtypeStruct((size, *image_shape), jnp.float32)
    platforms = ("cpu", "cuda", "rocm", "tpu")
    exported = jax.export.export(jax.jit(function), platforms=platforms)(images)
    return bytes(exported.serialize())
