"""Candidates that an evosax algorithm asks for."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jaxtyping import Float

from evojax_suite import strategies
from evojax_suite.systems.de_nas import architectures
from evojax_suite.systems.de_nas.architectures import Genome
from evojax_suite.systems.de_nas.config import Config
from evojax_suite.types import Array, PyTree


@struct.dataclass
class Encoded:
    """The candidates as vectors, and the state of the evosax algorithm that moves them."""

    vectors: Float[Array, "candidates dims"]  # from which the genomes are decoded
    strategy: PyTree  # the state of the algorithm


class EvosaxSearch(NamedTuple):
    """The functions that start an evosax algorithm, and that propose candidates."""

    start: Callable[[Array], Encoded]
    propose: Callable[[Array, Encoded, np.ndarray], tuple[Genome, Encoded]]


def evosax_search(config: Config, image_shape: tuple[int, int, int]) -> EvosaxSearch:
    """The search by an evosax algorithm, `Config.strategy`."""
    space, size, children = config.space, config.population_size, config.num_children
    num_numbers = 4 * (space.max_length + 1)
    strategy = strategies.create(config.strategy, children, num_numbers)
    params = strategy.default_params

    @jax.jit
    @jax.vmap
    def random_vectors(key: Array) -> Array:
        numbers = architectures.random_numbers(key, space, image_shape).ravel()
        return jax.scipy.stats.norm.ppf(jnp.clip(numbers, 1e-6, 1 - 1e-6))

    @jax.jit
    @jax.vmap
    def decoded(vector: Array) -> Genome:
        numbers = jax.scipy.stats.norm.cdf(vector).reshape(-1, 4)
        return architectures.decode(numbers, space, image_shape)

    def started(key: Array, vectors: Array, fitness: Array) -> PyTree:
        population_based = strategies.is_population_based(strategy)
        start = (vectors, fitness) if population_based else (vectors.mean(0),)
        return strategies.strip_weak_types(strategy.init(key, *start, params))

    def start(key: Array) -> Encoded:
        vectors = jnp.zeros((config.num_candidates, num_numbers))
        return Encoded(vectors, started(key, vectors[:children], jnp.full(children, jnp.inf)))

    def ask(key: Array, state: PyTree) -> tuple[Array, PyTree]:
        key_first, key_again = jax.random.split(key)
        vectors, asked = strategy.ask(key_first, state, params)
        for attempt in range(architectures.MOST_ATTEMPTS):
            large = ~architectures.fits(decoded(vectors), space, image_shape)
            if not large.any():
                break
            others, _ = strategy.ask(jax.random.fold_in(key_again, attempt), state, params)
            vectors = jnp.where(large[:, None], others, vectors)
        return vectors, strategies.strip_weak_types(asked)

    def propose(key: Array, encoded: Encoded, fitness: np.ndarray) -> tuple[Genome, Encoded]:
        """The next candidates. fitness: that of all before, infinite where one failed. The first
        population is that of the other methods."""
        number, state = len(fitness), encoded.strategy
        if number == 0:
            vectors = random_vectors(jax.random.split(key, size))
        else:
            key_tell, key_ask = jax.random.split(key)
            first = number == size
            best = np.argsort(fitness, kind="stable")[:children]
            told = best if first else np.arange(number)[-children:]
            known = jnp.asarray(np.where(np.isfinite(fitness), fitness, np.nan)[told])
            evaluated = encoded.vectors[told], known
            if first:
                state = started(key_tell, *evaluated)
            else:
                state, _ = strategy.tell(key_tell, *evaluated, state, params)
            vectors, state = ask(key_ask, state)
        everyone = encoded.vectors.at[number : number + len(vectors)].set(vectors)
        return decoded(vectors), Encoded(everyone, state)

    return EvosaxSearch(start, propose)
