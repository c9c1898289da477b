"""Encodings of images as vectors of real numbers.

Evolution searches what the encoding spans. Pixels span everything; the lowest coefficients of a
cosine transform span smooth images with a fraction of the dimensions, each scaled so that a step of
one is one standard deviation among real images.

One image may hold factor x factor smaller ones of its class, each enlarged to the full size before
it enters a network (Kim et al. 2022, "Dataset Condensation via Efficient Synthetic-Data
Parameterization", section 4.1): as many numbers, more and smoother images.

An encoding is linear; pixels of few levels are rounded after decoding. `spread` is data, so that
one compiled program serves every dataset of its shape.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, Protocol, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float, Float32, Shaped

from evojax_suite.types import Array, Images

EncodingName = Literal["pixels", "cosines"]
Codes: TypeAlias = Float[Array, "*batch dims"]
ImageBatch: TypeAlias = Float[Array, "*batch height width channels"]
Spread: TypeAlias = Float[Array, "rows columns channels"]


class Encoding(Protocol):
    """A linear map between codes and images. spread: of the cosine coefficients of whole images."""

    @property
    def num_dims(self) -> int:
        """The length of the code of one image."""
        ...

    def decode(self, codes: Codes, spread: Spread) -> ImageBatch:
        """The images that `codes` stand for."""
        ...

    def encode(self, images: ImageBatch, spread: Spread) -> Codes:
        """The codes of the least squares approximation of `images`."""
        ...


@dataclass(frozen=True)
class Pixels:
    """The identity, flattened; `spread` is not used."""

    image_shape: tuple[int, int, int]

    @property
    def num_dims(self) -> int:
        return math.prod(self.image_shape)

    def decode(self, codes: Codes, spread: Spread) -> ImageBatch:
        del spread
        return codes.reshape(*codes.shape[:-1], *self.image_shape)

    def encode(self, images: ImageBatch, spread: Spread) -> Codes:
        del spread
        return images.reshape(*images.shape[:-3], self.num_dims)


@dataclass(frozen=True)
class Cosines:
    """The lowest `count` x `count` coefficients of each channel's orthonormal DCT-II, divided by
    `spread`: the standard deviation of each coefficient, as `cosine_spread` gives it.

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

    def decode(self, codes: Codes, spread: Spread) -> ImageBatch:
        shape = *codes.shape[:-1], self.count, self.count, self.image_shape[2]
        coefficients = codes.reshape(shape) * spread[: self.count, : self.count]
        rows, columns = self._bases()
        return jnp.einsum("kh,...klc,lw->...hwc", rows, coefficients, columns, precision="highest")

    def encode(self, images: ImageBatch, spread: Spread) -> Codes:
        rows, columns = self._bases()
        codes = jnp.einsum("kh,...hwc,lw->...klc", rows, images, columns, precision="highest")
        codes /= spread[: self.count, : self.count]
        return codes.reshape(*images.shape[:-3], self.num_dims)


@dataclass(frozen=True)
class Tiles:
    """Images of factor x factor tiles, row by row, each encoded by `tile`."""

    tile: Encoding
    factor: int

    @property
    def num_dims(self) -> int:
        return self.factor**2 * self.tile.num_dims

    def decode(self, codes: Codes, spread: Spread) -> ImageBatch:
        tiles = codes.reshape(*codes.shape[:-1], self.factor**2, self.tile.num_dims)
        # An orthonormal transform of a smaller image has smaller coefficients.
        return _joined(self.tile.decode(tiles, spread / self.factor), self.factor)

    def encode(self, images: ImageBatch, spread: Spread) -> Codes:
        codes = self.tile.encode(_cut(images, self.factor), spread / self.factor)
        return codes.reshape(*images.shape[:-3], self.num_dims)


def create(
    name: EncodingName, image_shape: tuple[int, ...], num_cosines: int, factor: int = 1
) -> Encoding:
    """The encoding `name` of images (H, W, C) of factor x factor tiles, with at most as many
    cosines a side as fit. Raises ValueError where `factor` does not divide the sides."""
    height, width, channels = image_shape
    check_factor(factor, (height, width))
    shape = height // factor, width // factor, channels
    cosines = name == "cosines"
    tile = Cosines(shape, min(num_cosines, *shape[:2])) if cosines else Pixels(shape)
    return tile if factor == 1 else Tiles(tile, factor)


def check_factor(factor: int, size: tuple[int, ...]) -> None:
    """Raise ValueError where images of `size` (H, W) do not hold factor x factor tiles."""
    if factor < 1 or any(side % factor for side in size):
        raise ValueError(f"factor must be >= 1 and divide {size[0]} x {size[1]}, got {factor}")


def _cut(
    images: Float[Array, "*batch height width channels"], factor: int
) -> Float[Array, "*batch {factor}**2 height//{factor} width//{factor} channels"]:
    """Cut images into factor x factor tiles, row by row."""
    *rest, height, width, channels = images.shape
    shape = factor, height // factor, factor, width // factor, channels
    tiles = jnp.moveaxis(images.reshape(*rest, *shape), -3, -4)
    return tiles.reshape(*rest, factor**2, height // factor, width // factor, channels)


def _joined(
    tiles: Float[Array, "*batch {factor}**2 height width channels"], factor: int
) -> Float[Array, "*batch height*{factor} width*{factor} channels"]:
    """The inverse of `_cut`."""
    *rest, _, height, width, channels = tiles.shape
    rows = jnp.moveaxis(tiles.reshape(*rest, factor, factor, height, width, channels), -4, -3)
    return rows.reshape(*rest, factor * height, factor * width, channels)


def unpacked(
    images: Images, labels: Shaped[Array, "images *classes"], factor: int
) -> tuple[
    Float[Array, "images*{factor}**2 height width channels"],
    Shaped[Array, "images*{factor}**2 *classes"],
]:
    """The images and labels that enter a network: each tile enlarged to the full size (bilinear),
    with the label of its image."""
    if factor == 1:
        return images, labels
    num_images, *shape = images.shape
    large = jax.image.resize(_cut(images, factor), (num_images, factor**2, *shape), "bilinear")
    return large.reshape(-1, *shape), labels.repeat(factor**2, 0)


def packed(
    images: Float[Array, "tiles height width channels"], factor: int
) -> Float[Array, "tiles//{factor}**2 height width channels"]:
    """Shrink images (bilinear) to tiles, and join them to images of the same size."""
    if factor == 1:
        return images
    _, height, width, channels = images.shape
    shape = height // factor, width // factor, channels
    small = jax.image.resize(images, (len(images), *shape), "bilinear")
    return _joined(small.reshape(-1, factor**2, *shape), factor)


def rounded(pixels: Float[Array, "*shape"], levels: int) -> Float[Array, "*shape"]:
    """Round each pixel to the nearest of `levels` values evenly spaced from 0 to 1."""
    return jnp.round(jnp.clip(pixels, 0, 1) * (levels - 1)) / (levels - 1)


def cosine_basis(size: int) -> Float32[np.ndarray, "{size} {size}"]:
    """The orthonormal DCT-II as a matrix, a row for each frequency from the lowest on."""
    frequency, place = np.ogrid[:size, :size]
    basis = np.cos(np.pi * frequency * (2 * place + 1) / (2 * size)) * (2 / size) ** 0.5
    basis[0] /= 2**0.5
    return basis.astype(np.float32)


def cosine_spread(
    images: Float[np.ndarray, "images height width channels"], least: float = 1e-3
) -> Float[np.ndarray, "height width channels"]:
    """The standard deviation of each cosine coefficient over images, plus `least`, since codes are
    divided by it even where a coefficient never varies."""
    rows, columns = cosine_basis(images.shape[1]), cosine_basis(images.shape[2])
    coefficients = np.einsum("kh,nhwc,lw->nklc", rows, images, columns, optimize=True)
    return coefficients.std(0) + np.float32(least)
