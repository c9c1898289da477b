"""Programs that other tools can run."""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.export
import jax.numpy as jnp

from evojax_suite.types import Array


def export(function: Callable[[Array], Array], image_shape: tuple[int, int, int]) -> bytes:
    """A StableHLO program of `function` for any number of images (N, H, W, C), float32, on CPU, GPU
    and TPU; `jax.export.deserialize` reads it."""
    (size,) = jax.export.symbolic_shape("n")
    images = jax.ShapeDtypeStruct((size, *image_shape), jnp.float32)
    platforms = ("cpu", "cuda", "rocm", "tpu")
    exported = jax.export.export(jax.jit(function), platforms=platforms)(images)
    return bytes(exported.serialize())
