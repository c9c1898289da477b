"""Selection of survivors and parents. Fitness here is evosax's: lower is better."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from evojax_suite.types import Array


def truncation(fitness: Array, num_survivors: int) -> Array:
    """Indices (num_survivors,) of the lowest fitness (P,), best first; NaN counts as worst."""
    return jnp.argsort(jnp.where(jnp.isnan(fitness), jnp.inf, fitness))[:num_survivors]


def uniform_parents(key: Array, num_parents: int, num_pairs: int) -> tuple[Array, Array]:
    """Two index arrays (num_pairs,), uniform over 0..num_parents-1, drawn with replacement."""
    pairs = jax.random.randint(key, (2, num_pairs), 0, num_parents)
    return pairs[0], pairs[1]
