"""k-center greedy (Wolf 2011; Sener & Savarese 2018, Algorithm 1): the farthest point comes next.

The first centre of a class is the sample nearest to its mean in feature space, as for herding: the
published CIFAR-10 figures of the two agree at one image a class (Shvai et al. 2022, Table 1).
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Float, Int

from evojax_suite.operators import class_shares
from evojax_suite.types import Array, PRNGKey


def select(
    key: PRNGKey,
    features: Float[Array, "examples features"],
    labels: Int[Array, "examples"],
    num_samples: int,
    num_classes: int,
    balanced: bool = True,
) -> Int[Array, "{num_samples}"]:
    """Indices of samples that leave no other sample far from all of them.

    Balanced, each class gives its share and is covered separately, class by class in the order of
    choice; else all samples are covered at once. Distances are updated one centre at a time:
    O(examples) memory beside the features. Deterministic: `key` is unused, ties go to the lower
    index.
    """
    del key
    if not balanced:
        labels, num_classes = jnp.zeros_like(labels), 1
    shares = class_shares(num_samples, num_classes)
    features = jnp.asarray(features, jnp.float32)
    members = labels == jnp.arange(num_classes)[:, None]  # (C, N)
    squares = (features * features).sum(1)

    def distances_to(points: Array):
        """Squared distance of each sample to the point (C, F) of its class."""
        products = jnp.matmul(points, features.T, precision="highest")
        product = jnp.take_along_axis(products, labels[None], axis=0)[0]
        return jnp.maximum(squares - 2 * product + (points * points).sum(1)[labels], 0)

    def farthest(distances: Array):
        return jnp.where(members, distances, -jnp.inf).argmax(1)

    def step(nearest: Array, _):
        chosen = farthest(nearest)
        nearest = jnp.minimum(nearest, distances_to(features[chosen]))
        return nearest.at[chosen].set(-1), chosen  # never chosen again

    mean = jnp.matmul(members.astype(jnp.float32), features, precision="highest")
    mean /= members.sum(1, keepdims=True)
    first = farthest(-distances_to(mean))
    nearest = distances_to(features[first]).at[first].set(-1)
    _, later = jax.lax.scan(step, nearest, length=max(shares) - 1)
    chosen = jnp.concatenate([first[None], later])
    return jnp.concatenate([chosen[:share, label] for label, share in enumerate(shares)])
