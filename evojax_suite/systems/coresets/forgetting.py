"""Forgetting events (Toneva et al. 2019, Algorithm 1): keep the examples that a network forgets.

`proxy_network` counts the events and computes the scores.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Int

from evojax_suite.operators import highest_scores
from evojax_suite.types import Array, PRNGKey


def select(
    key: PRNGKey,
    scores: Int[Array, "examples"],
    labels: Int[Array, "examples"],
    num_samples: int,
    num_classes: int,
    balanced: bool = True,
) -> Int[Array, "{num_samples}"]:
    """Indices of the examples with the highest scores (`proxy_network.forgetting_scores`); ties are
    broken at random. Balanced, each class gives its share."""
    order = jnp.lexsort((jax.random.uniform(key, scores.shape), scores))
    ranks = jnp.zeros(scores.shape).at[order].set(jnp.arange(len(scores), dtype=jnp.float32))
    return highest_scores(ranks, labels, num_samples, num_classes, balanced)
