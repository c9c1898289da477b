"""Encodings: how a vector of real numbers stands for an image.

Evolution searches what the encoding spans. Pixels span everything; the lowest coefficients of a
cosine transform span smooth images with a fraction of the dimensions, each scaled so that a step of
one is one standard deviation among real images.

An encoding is linear. `spread` is data, so that one compiled program serves every dataset of its
shape.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, Protocol

import jax.numpy as jnp
import numpy as np

from evojax_suite.types import Array

EncodingName = Literal["pixels", "cosines"]


class Encoding(Protocol):
    """A linear map between codes (..., num_dims) and images (..., H, W, C)."""

    @property
    def num_dims(self) -> int:
        """Numbers that stand for one image."""
        ...

    def decode(self, codes: Array, spread: Array) -> Array:
        """The images of some codes."""
        ...

    def encode(self, images: Array, spread: Array) -> Array:
        """The codes whose images are nearest, in least squares."""
        ...


@dataclass(frozen=True)
class Pixels:
    """The pixels themselves; `spread` is not used."""

    image_shape: tuple[int, int, int]

    @property
    def num_dims(self) -> int:
        return math.prod(self.image_shape)

    def decode(self, codes: Array, spread: Array) -> Array:
        del spread
        return codes.reshape(*codes.shape[:-1], *self.image_shape)

    def encode(self, images: Array, spread: Array) -> Array:
        del spread
        return images.reshape(*images.shape[:-3], self.num_dims)


@dataclass(frozen=True)
class Cosines:
    """The lowest `count` x `count` coefficients of each channel's orthonormal DCT-II, divided by
    `spread` (H, W, C): the standard deviation of each coefficient, as `cosine_spread` gives it.

    Raises ValueError where `count` is not in 1..the image's shorter side.
    """

    image_shape: tuple[int, int, int]
    count: int

    def __post_init__(self):
        most = min(self.image_shape[:2])
        if not 1 <= self.count <= most:
            raise ValueError(f"num_cosines must be in 1..{most}, got {self.count}")

    @property
    def num_dims(self) -> int:
        return self.count**2 * self.image_shape[2]

    def _bases(self) -> tuple[np.ndarray, np.ndarray]:
        height, width, _ = self.image_shape
        return cosine_basis(height)[: self.count], cosine_basis(width)[: self.count]

    def decode(self, codes: Array, spread: Array) -> Array:
        shape = *codes.shape[:-1], self.count, self.count, self.image_shape[2]
        coefficients = codes.reshape(shape) * spread[: self.count, : self.count]
        rows, columns = self._bases()
        return jnp.einsum("kh,...klc,lw->...hwc", rows, coefficients, columns, precision="highest")

    def encode(self, images: Array, spread: Array) -> Array:
        rows, columns = self._bases()
        coefficients = jnp.einsum(
            "kh,...hwc,lw->...klc", rows, images, columns, precision="highest"
        )
        codes = coefficients / spread[: self.count, : self.count]
        return codes.reshape(*images.shape[:-3], self.num_dims)


def create(name: EncodingName, image_shape: tuple[int, int, int], num_cosines: int) -> Encoding:
    """The encoding `name` of images (H, W, C); of cosines at most as many a side as fit."""
    if name == "pixels":
        return Pixels(image_shape)
    return Cosines(image_shape, min(num_cosines, *image_shape[:2]))


def cosine_basis(size: int) -> np.ndarray:
    """The rows of the orthonormal DCT-II, (size, size) float32, from the lowest frequency on."""
    frequency, place = np.ogrid[:size, :size]
    basis = np.cos(np.pi * frequency * (2 * place + 1) / (2 * size)) * (2 / size) ** 0.5
    basis[0] /= 2**0.5
    return basis.astype(np.float32)


def cosine_spread(images: np.ndarray, least: float = 1e-3) -> np.ndarray:
    """The standard deviation of each coefficient of images (N, H, W, C): (H, W, C), and `least`
    added, since a coefficient that never varies must still be divided by."""
    rows, columns = cosine_basis(images.shape[1]), cosine_basis(images.shape[2])
    coefficients = np.einsum("kh,nhwc,lw->nklc", rows, images, columns, optimize=True)
    return coefficients.std(0) + np.float32(least)
