"""The networks of DE-NAS's Table 3 that are not its own, built and counted.

    python experiments/de_nas/known.py

The table's sizes are those for ImageNet, 1,000 classes: AlexNet (Krizhevsky et al. 2012, without
its split over two devices) for 227x227 pixels, VGG16 (Simonyan & Zisserman 2015) for 224x224.
"""

from __future__ import annotations

import flax.linen as nn
import jax
import jax.numpy as jnp

from evojax_suite.networks.layers import Conv, Dense, pool


def classified(features: jax.Array) -> jax.Array:
    features = features.reshape(features.shape[0], -1)
    for _ in range(2):
        features = nn.relu(Dense(4096)(features))
    return Dense(1000)(features)


def overlapping(features: jax.Array) -> jax.Array:
    return nn.max_pool(features, (3, 3), (2, 2))


class AlexNet(nn.Module):
    @nn.compact
    def __call__(self, images: jax.Array) -> jax.Array:
        features = overlapping(nn.relu(Conv(96, 11, 0, 4)(images)))
        features = overlapping(nn.relu(Conv(256, 5, 2)(features)))
        for filters in (384, 384, 256):
            features = nn.relu(Conv(filters)(features))
        return classified(overlapping(features))


class VGG16(nn.Module):
    @nn.compact
    def __call__(self, images: jax.Array) -> jax.Array:
        features = images
        for filters, number in ((64, 2), (128, 2), (256, 3), (512, 3), (512, 3)):
            for _ in range(number):
                features = nn.relu(Conv(filters)(features))
            features = pool("max", features)
        return classified(features)


if __name__ == "__main__":
    for network, side in ((AlexNet(), 227), (VGG16(), 224)):
        images = jax.ShapeDtypeStruct((1, side, side, 3), jnp.float32)
        variables = jax.eval_shape(network.init, jax.random.key(0), images)
        number = sum(leaf.size for leaf in jax.tree.leaves(variables))
        print(f"{type(network).__name__}: {number:,} parameters")
