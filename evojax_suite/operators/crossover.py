"""Crossover of real vectors."""

from __future__ import annotations

from typing import Literal

import jax
import jax.numpy as jnp
from jaxtyping import Float

from evojax_suite.types import Array, PRNGKey, Scalar

LaplaceSign = Literal["independent", "shared"]


def laplace_crossover(
    key: PRNGKey,
    parent_1: Float[Array, "dims"],
    parent_2: Float[Array, "dims"],
    *,
    location: float | Scalar = 0.0,
    scale: float | Scalar = 0.5,
    rate: float | Scalar = 1.0,
    sign: LaplaceSign = "independent",
) -> tuple[Float[Array, "dims"], Float[Array, "dims"]]:
    """Two children by Laplace crossover (Deep & Thakur 2007, Eq. 4-5; Sato et al. 2026, Eq. 4-6).

    With probability `rate` child i is parent_i + beta |parent_1 - parent_2| with a beta for every
    element; otherwise the children are the parents. scale: > 0.

    sign: "independent" draws sign and size of beta separately, as inspyred does, so that beta is
    Laplace(location, scale). "shared" is Eq. 4 to the letter, one uniform u for both: location -
    scale ln u for u <= 1/2 and location + scale ln u above, so that the positive betas are at least
    scale ln 2 and the negative ones at most scale ln 2 in size.
    """
    key_rate, key_size, key_sign = jax.random.split(key, 3)
    uniform = 1.0 - jax.random.uniform(key_size, parent_1.shape)  # in (0, 1]: log stays finite
    match sign:
        case "independent":
            positive = jax.random.bernoulli(key_sign, 0.5, parent_1.shape)
        case "shared":
            positive = uniform <= 0.5
        case _:
            raise ValueError(f"sign must be independent or shared, got {sign!r}")
    size = -scale * jnp.log(uniform)
    beta = location + jnp.where(positive, size, -size)
    crossed = jax.random.uniform(key_rate) < rate
    offset = jnp.where(crossed, beta * jnp.abs(parent_1 - parent_2), 0.0)
    return parent_1 + offset, parent_2 + offset
