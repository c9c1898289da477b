"""ConvNet-D of Gidaris & Komodakis 2018 as the dataset distillation literature uses it.

Blocks of 3x3 convolution, normalisation, activation and 2x2 pooling, then a dense layer. The first
convolution is padded by 3 where the images are 28x28, so that the maps are 32x32 (Sato et al. 2026,
section 3.1); 1 elsewhere, and where `first_padding` says so.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from evojax_suite.networks import blocks, compiled, layers
from evojax_suite.networks.layers import Conv, Dense


class ConvNet(nn.Module):
    """images (N, H, W, C) -> logits (N, num_classes), or the flat maps of the last block.

    `bottleneck` > 0 adds a dense layer of that many units and ReLU before the last one, `dropout`
    drops its inputs while training; Shvai et al. 2022 (section 4.2) use both.
    """

    num_classes: int
    width: int = 128
    depth: int = 3
    normalization: str = "instance"
    pooling: str = "average"
    activation: str = "relu"
    lowering: layers.Convolution | None = None
    dtype: jnp.dtype = jnp.float32
    initialization: str = "pytorch"
    dropout: float = 0.0
    bottleneck: int = 0
    first_padding: int | None = None

    @nn.compact
    def __call__(
        self, images: jax.Array, train: bool = False, features_only: bool = False
    ) -> jax.Array:
        shared: dict[str, Any] = {"dtype": self.dtype, "initialization": self.initialization}
        padding = self.first_padding
        if padding is None:
            padding = 3 if images.shape[1] == 28 else 1
        lowering = self.lowering or layers.default_convolution(train, images.shape[-1])
        kinds = self.normalization, self.activation, self.pooling
        may_fuse = kinds == blocks.LAYERS
        features = images
        for _ in range(self.depth):
            convolution = Conv(self.width, padding=padding, lowering=self.lowering, **shared)
            inputs, block = features.astype(self.dtype), None
            if may_fuse and blocks.fits(features, padding):
                block = _block_of(lowering, inputs, self.width, padding)
            if block is not None:
                kernel, _ = convolution.parameters(features)  # a bias cancels in the normalisation
                scale, bias = layers.GroupNorm().parameters(self.width)
                features = block(inputs, kernel, scale, bias, padding)
            else:
                features = convolution(features, train)
                features = layers.normalize_features(self.normalization, features, train)
                features = layers.activate(self.activation, features)
                if self.pooling != "none":
                    features = layers.pool(self.pooling, features)
            padding = 1
        flat = features.reshape(features.shape[0], -1)
        if features_only:
            return flat.astype(jnp.float32)
        if self.bottleneck:
            flat = nn.relu(Dense(self.bottleneck, name="bottleneck_layer", **shared)(flat))
        if self.dropout:
            flat = nn.Dropout(self.dropout, deterministic=not train)(flat)
        return Dense(self.num_classes, **shared)(flat).astype(jnp.float32)


def _block_of(
    lowering: layers.Convolution, images: jax.Array, filters: int, padding: int
) -> Callable[..., Any] | None:
    """The function that is a block of images (N, H, W, C), None where its layers are by themselves;
    `blocks.block` says what it takes."""
    if lowering == "compiled" and compiled.fits(images, filters, padding):
        return blocks.compiled_block
    if lowering == "fused":
        from evojax_suite.networks import fused  # which takes a tenth of a second

        if fused.fits(images, filters, padding):
            return fused.block
    return blocks.block if lowering in ("fused", "adaptive") else None
