"""Herding (Welling 2009; Rebuffi et al. 2017, iCaRL, Algorithm 4): choose what keeps the mean.

The samples of a class are chosen one after the other, each so that the mean of the chosen comes as
near as possible to the mean of the class in feature space. Some public code takes the farthest by
mistake. All classes advance at once: one matrix product a step.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Float, Int

from evojax_suite.operators import class_shares
from evojax_suite.types import Array, PRNGKey, PyTree


def select(
    key: PRNGKey,
    features: Float[Array, "examples features"],
    labels: Int[Array, "examples"],
    num_samples: int,
    num_classes: int,
    balanced: bool = True,
) -> Int[Array, "{num_samples}"]:
    """Indices of a subset whose mean features are near those of the whole.

    Balanced, each class gives its share, class by class, in the order of choice; else the subset
    follows the mean of all samples. Deterministic: `key` is unused, ties go to the lower index.
    """
    del key
    if not balanced:
        labels, num_classes = jnp.zeros_like(labels), 1
    shares = class_shares(num_samples, num_classes)
    features = jnp.asarray(features, jnp.float32)
    members = labels == jnp.arange(num_classes)[:, None]  # (C, N)
    mean = jnp.matmul(members.astype(jnp.float32), features, precision="highest")
    mean /= members.sum(1, keepdims=True)
    squares = (features * features).sum(1)

    def step(carry: PyTree, chosen_before: Array):
        total, free = carry
        # |mean - (total + x) / (n + 1)|^2 without the terms that do not depend on x
        scale = 1 / (chosen_before + 1)
        products = jnp.matmul(mean - total * scale, features.T, precision="highest")
        distances = squares * scale**2 - 2 * scale * products
        chosen = jnp.where(members & free, distances, jnp.inf).argmin(1)
        return (total + features[chosen], free.at[chosen].set(False)), chosen

    start = jnp.zeros_like(mean), jnp.ones(len(labels), bool)
    _, chosen = jax.lax.scan(step, start, jnp.arange(max(shares), dtype=jnp.float32))
    return jnp.concatenate([chosen[:share, label] for label, share in enumerate(shares)])
