"""Forgetting events (Toneva et al. 2019, Algorithm 1): keep what a network learns and loses again.

An example is forgotten when it was classified right when training last showed it and is classified
wrong now. Examples never classified right count as forgotten most often.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp

from evojax_suite.operators import highest_scores
from evojax_suite.types import Array


class History(NamedTuple):
    """What training has seen so far of each of N examples."""

    was_correct: Array  # (N,) bool, the last time it was shown
    was_learned: Array  # (N,) bool, right at least once
    num_forgotten: Array  # (N,) int32, changes from right to wrong


def start(num_examples: int) -> History:
    """The history before any example was shown."""
    never = jnp.zeros(num_examples, bool)
    return History(never, never, jnp.zeros(num_examples, jnp.int32))


def update(history: History, correct: Array) -> History:
    """The history after each example was shown once more; correct: (N,) bool."""
    return History(
        was_correct=correct,
        was_learned=history.was_learned | correct,
        num_forgotten=history.num_forgotten + (history.was_correct & ~correct),
    )


def score(history: History) -> Array:
    """How often each example was forgotten, (N,) int32; never learned is one more than the most."""
    most = history.num_forgotten.max()
    return jnp.where(history.was_learned, history.num_forgotten, most + 1)


def select(
    key: Array,
    scores: Array,
    labels: Array,
    num_samples: int,
    num_classes: int,
    balanced: bool = True,
) -> Array:
    """Indices (num_samples,) of the examples forgotten most often; ties are broken at random.

    scores: (N,) of `score`. labels: (N,) integers. Balanced, each class gives its share.
    """
    order = jnp.lexsort((jax.random.uniform(key, scores.shape), scores))
    ranks = jnp.zeros(scores.shape).at[order].set(jnp.arange(len(scores), dtype=jnp.float32))
    return highest_scores(ranks, labels, num_samples, num_classes, balanced)
