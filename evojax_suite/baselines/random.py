"""Random selection: samples drawn uniformly, from each class its share or from all."""

from __future__ import annotations

import jax

from evojax_suite.operators import highest_scores
from evojax_suite.types import Array


def select(
    key: Array, labels: Array, num_samples: int, num_classes: int, balanced: bool = True
) -> Array:
    """Indices (num_samples,) into labels (N,), without replacement; balanced, class by class."""
    priorities = jax.random.uniform(key, labels.shape)
    return highest_scores(priorities, labels, num_samples, num_classes, balanced)
