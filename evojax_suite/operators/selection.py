"""Selection of survivors and parents, where fitness is evosax's: lower is better; of examples."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np

from evojax_suite.types import Array


def truncation(fitness: Array, num_survivors: int) -> Array:
    """Indices (num_survivors,) of the lowest fitness (P,), best first; NaN counts as worst."""
    return jnp.argsort(jnp.where(jnp.isnan(fitness), jnp.inf, fitness))[:num_survivors]


def uniform_parents(key: Array, num_parents: int, num_pairs: int) -> tuple[Array, Array]:
    """Two index arrays (num_pairs,), uniform over 0..num_parents-1, drawn with replacement."""
    pairs = jax.random.randint(key, (2, num_pairs), 0, num_parents)
    return pairs[0], pairs[1]


def class_shares(num_samples: int, num_classes: int) -> tuple[int, ...]:
    """How many of `num_samples` each class gives: equal shares, the first classes one more."""
    share, more = divmod(num_samples, num_classes)
    return tuple(share + (label < more) for label in range(num_classes))


def check_shares(labels: np.ndarray, num_samples: int, num_classes: int, balanced: bool) -> None:
    """Raise ValueError, on the host, where labels (N,) cannot give `num_samples` samples."""
    if not 1 <= num_samples < len(labels):
        raise ValueError(f"num_samples must be in 1..{len(labels) - 1}, got {num_samples}")
    if balanced:
        counts = np.bincount(labels, minlength=num_classes)
        short = np.array(class_shares(num_samples, num_classes)) - counts
        if short.max() > 0:
            raise ValueError(
                f"num_samples is {num_samples}, but class {short.argmax()} has only "
                f"{counts[short.argmax()]} samples; unbalanced selection takes what there is"
            )


def highest_scores(
    scores: Array, labels: Array, num_samples: int, num_classes: int, balanced: bool = True
) -> Array:
    """Indices (num_samples,) of the highest scores (N,), best first.

    Balanced, each class of labels (N,) gives its share (`class_shares`), class by class; a class
    that has too few is filled up with samples of others (`check_shares` finds this before).
    """
    if not balanced:
        return jax.lax.top_k(scores, num_samples)[1]
    shares = class_shares(num_samples, num_classes)
    own = labels == jnp.arange(num_classes)[:, None]
    _, indices = jax.lax.top_k(jnp.where(own, scores, -jnp.inf), max(shares))
    return jnp.concatenate([indices[label, :share] for label, share in enumerate(shares)])
