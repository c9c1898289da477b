"""The other networks of the distillation literature, for cross-architecture evaluation.

They follow the code of Zhao et al. 2021 (dataset condensation), written for 32x32 images. Like
there, the first convolution of LeNet, AlexNet and VGG11 is padded further where the images are
28x28, so that the maps after it are those of 32x32 images (there the rule reads "one channel"). A
network whose poolings do not fit the images refuses them with one line.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from evojax_suite.networks.layers import Conv, Convolution, Dense, normalize_features, pool
from evojax_suite.types import Array


def _flat(features: jax.Array) -> jax.Array:
    return features.reshape(features.shape[0], -1)


class MLP(nn.Module):
    """Two hidden layers of `width` units and ReLU."""

    num_classes: int
    width: int = 128
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, images: jax.Array, train: bool = False) -> jax.Array:
        features, dense = _flat(images), partial(Dense, dtype=self.dtype)
        for _ in range(2):
            features = nn.relu(dense(self.width)(features))
        return dense(self.num_classes)(features).astype(jnp.float32)


class LeNet(nn.Module):
    """LeNet-5 with ReLU and max pooling."""

    num_classes: int
    lowering: Convolution | None = None
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, images: jax.Array, train: bool = False) -> jax.Array:
        dense = partial(Dense, dtype=self.dtype)
        features, padding = images, 2 if images.shape[1] == 28 else 0
        for filters in (6, 16):
            convolution = Conv(filters, 5, padding, lowering=self.lowering, dtype=self.dtype)
            features = pool("max", nn.relu(convolution(features, train)))
            padding = 0
        features = _flat(features)
        for units in (120, 84):
            features = nn.relu(dense(units)(features))
        return dense(self.num_classes)(features).astype(jnp.float32)


class AlexNet(nn.Module):
    """The five-convolution AlexNet for small images."""

    num_classes: int
    lowering: Convolution | None = None
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, images: jax.Array, train: bool = False) -> jax.Array:
        features, first = images, 4 if images.shape[1] == 28 else 2
        layers = (128, 5, first), (192, 5, 2), (256, 3, 1), (192, 3, 1), (192, 3, 1)
        for index, layer in enumerate(layers):
            convolution = Conv(*layer, lowering=self.lowering, dtype=self.dtype)
            features = nn.relu(convolution(features, train))
            if index in (0, 1, 4):
                features = pool("max", features)
        return Dense(self.num_classes, dtype=self.dtype)(_flat(features)).astype(jnp.float32)


class VGG11(nn.Module):
    """VGG-11 with normalisation after each convolution and one dense layer."""

    num_classes: int
    normalization: str = "batch"
    lowering: Convolution | None = None
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, images: jax.Array, train: bool = False) -> jax.Array:
        shared: dict[str, Any] = {"lowering": self.lowering, "dtype": self.dtype}
        features, padding = images, 3 if images.shape[1] == 28 else 1
        for stage in ((64,), (128,), (256, 256), (512, 512), (512, 512)):
            for filters in stage:
                features = Conv(filters, padding=padding, **shared)(features, train)
                features = nn.relu(normalize_features(self.normalization, features, train))
                padding = 1
            features = pool("max", features)
        return Dense(self.num_classes, dtype=self.dtype)(_flat(features)).astype(jnp.float32)


class VGG10(nn.Module):
    """Eight convolutions and two dense layers: the network that Ryan et al. 2024 cite [5].

    Four pairs of 3x3 convolutions of `width`, then 2 * `width` filters (256 and 512 there), each
    with batch normalisation and ReLU; 2x2 max pooling and dropout after each pair, the pooling left
    out where a map has no 2x2 pixels; a dense layer of 4 * `width` units, ReLU, dropout and batch
    normalisation; a dense layer to the classes. Keras's moving averages have momentum 0.99 there
    and lag behind in short trainings; PyTorch's 0.9 here.
    """

    num_classes: int
    width: int = 256
    normalization: str = "batch"
    lowering: Convolution | None = None
    dtype: jnp.dtype = jnp.float32
    dropout: float = 0.2

    @nn.compact
    def __call__(self, images: jax.Array, train: bool = False) -> jax.Array:
        def dropped(features: jax.Array) -> jax.Array:
            return nn.Dropout(self.dropout, deterministic=not train)(features)

        features = images
        for pair in range(4):
            filters = self.width if pair == 0 else 2 * self.width
            for _ in range(2):
                features = Conv(filters, lowering=self.lowering, dtype=self.dtype)(features, train)
                features = nn.relu(normalize_features(self.normalization, features, train))
            if min(features.shape[1:3]) >= 2:
                features = pool("max", features)
            features = dropped(features)
        features = nn.relu(Dense(4 * self.width, dtype=self.dtype)(_flat(features)))
        last = "batch" if self.normalization == "batch" else "none"  # the others are for maps
        features = normalize_features(last, dropped(features), train)
        return Dense(self.num_classes, dtype=self.dtype)(features).astype(jnp.float32)


class _ResidualBlock(nn.Module):
    filters: int
    stride: int
    normalization: str
    lowering: Convolution | None
    dtype: jnp.dtype

    @nn.compact
    def __call__(self, images: jax.Array, train: bool) -> jax.Array:
        conv = partial(Conv, use_bias=False, lowering=self.lowering, dtype=self.dtype)

        def convolution(features: Array, size: int, stride: int):
            features = conv(self.filters, size, size // 2, stride)(features, train)
            return normalize_features(self.normalization, features, train)

        features = nn.relu(convolution(images, 3, self.stride))
        features = convolution(features, 3, 1)
        shortcut = images
        if self.stride != 1 or images.shape[-1] != self.filters:
            shortcut = convolution(images, 1, self.stride)
        return nn.relu(features + shortcut)


class ResNet18(nn.Module):
    """ResNet-18 for small images: 3x3 first convolution, no first pooling, global average."""

    num_classes: int
    normalization: str = "batch"
    lowering: Convolution | None = None
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, images: jax.Array, train: bool = False) -> jax.Array:
        shared = self.normalization, self.lowering, self.dtype
        features = Conv(64, use_bias=False, lowering=self.lowering, dtype=self.dtype)(images, train)
        features = nn.relu(normalize_features(self.normalization, features, train))
        for stage, filters in enumerate((64, 128, 256, 512)):
            for stride in (2 if stage else 1, 1):
                features = _ResidualBlock(filters, stride, *shared)(features, train)
        return Dense(self.num_classes, dtype=self.dtype)(features.mean((1, 2))).astype(jnp.float32)
