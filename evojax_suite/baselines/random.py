"""Random selection: images drawn uniformly from each class."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from evojax_suite.types import Array


def select(key: Array, labels: Array, num_classes: int, images_per_class: int) -> Array:
    """Indices (num_classes * images_per_class,) into `labels` (N,), class by class.

    Within a class images are drawn without replacement. A class with fewer than `images_per_class`
    images is filled up with images of other classes: check the counts on the host before.
    """
    priorities = jax.random.uniform(key, labels.shape)
    eligible = labels == jnp.arange(num_classes)[:, None]
    _, indices = jax.lax.top_k(jnp.where(eligible, priorities, -1.0), images_per_class)
    return indices.reshape(-1)
