"""DL-EA with Laplace crossover (Sato et al. 2026, section 3.1), as an evosax algorithm.

Each generation keeps the best part of the population, which is evaluated anew, and fills it up with
children: two parents are drawn uniformly, with replacement, from the survivors; the first child of
their Laplace crossover gets Gaussian noise of standard deviation 1/g (Eq. 1, g counted from 1) and
is clipped, which survivors are not. Without crossover it is DL-EA (Inan & Shehu 2024): one parent
and noise.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

import jax
import jax.numpy as jnp
from evosax.algorithms.population_based.base import (
    Params as BaseParams,
    PopulationBasedAlgorithm,
    State as State,
    metrics_fn,
)
from evosax.core.fitness_shaping import identity_fitness_shaping_fn
from flax import struct
from jaxtyping import Float

from evojax_suite.operators import LaplaceSign, laplace_crossover, truncation, uniform_parents
from evojax_suite.types import Array, PRNGKey, Scalar


@struct.dataclass
class Params(BaseParams):
    """Scalars that may be traced."""

    crossover_rate: float | Scalar = 1.0
    """Probability that a pair is crossed over, in [0, 1]."""
    laplace_location: float | Scalar = 0.0
    """Location of the Laplace distribution."""
    laplace_scale: float | Scalar = 0.5
    """Scale of the Laplace distribution, > 0."""
    mutation_scale: float | Scalar = 1.0
    """Standard deviation of the first generation's noise; generation g has 1/g of it."""
    lower: float | Scalar | Float[Array, "dims"] = -jnp.inf
    """Lower bound of children."""
    upper: float | Scalar | Float[Array, "dims"] = jnp.inf
    """Upper bound of children."""


class LaplaceGA(PopulationBasedAlgorithm):
    """Truncation selection, Laplace crossover, shrinking Gaussian noise."""

    _default_params = Params()

    def __init__(
        self,
        population_size: int,
        solution: Array,
        survival_ratio: float = 0.5,
        crossover: Literal["laplace", "none"] = "laplace",
        sign: LaplaceSign = "independent",
        fitness_shaping_fn: Callable[..., Any] = identity_fitness_shaping_fn,
        metrics_fn: Callable[..., Any] = metrics_fn,
    ):
        """solution: an example of an individual, any pytree of numbers. survival_ratio: the part of
        the population that survives a generation. sign: as in `laplace_crossover`."""
        num_survivors = int(round(survival_ratio * population_size, 6))  # 0.29 * 100 gives 29
        if not 1 <= num_survivors < population_size:
            raise ValueError(
                f"survival_ratio must leave 1..{population_size - 1} survivors of a population of "
                f"{population_size}, got {survival_ratio}"
            )
        if crossover not in ("laplace", "none"):
            raise ValueError(f"crossover must be laplace or none, got {crossover!r}")
        super().__init__(population_size, solution, fitness_shaping_fn, metrics_fn)
        self.elite_ratio = survival_ratio
        self.num_survivors = num_survivors
        self.crossover = crossover
        self.sign: LaplaceSign = sign

    def _init(self, key: PRNGKey, params: Params) -> State:
        return State(
            population=jnp.full((self.population_size, self.num_dims), jnp.nan),
            fitness=jnp.full(self.population_size, jnp.inf),
            best_solution=jnp.full(self.num_dims, jnp.nan),
            best_fitness=jnp.inf,
            generation_counter=0,
        )

    def _ask(self, key: PRNGKey, state: State, params: Params):
        key_parents, key_crossover, key_noise = jax.random.split(key, 3)
        survivors = state.population[truncation(state.fitness, self.num_survivors)]
        num_children = self.population_size - self.num_survivors
        first, second = uniform_parents(key_parents, self.num_survivors, num_children)
        children = survivors[first]
        if self.crossover == "laplace":

            def cross(key: PRNGKey, parent_1: Array, parent_2: Array):
                law = {"location": params.laplace_location, "scale": params.laplace_scale}
                rate, sign = params.crossover_rate, self.sign
                return laplace_crossover(key, parent_1, parent_2, rate=rate, sign=sign, **law)[0]

            keys = jax.random.split(key_crossover, num_children)
            children = jax.vmap(cross)(keys, children, survivors[second])
        deviation = params.mutation_scale / (state.generation_counter + 1)
        children += deviation * jax.random.normal(key_noise, children.shape)
        children = jnp.clip(children, params.lower, params.upper)
        return jnp.concatenate([survivors, children]), state

    def _postprocess_fitness(self, raw_fitness: Array, fitness: Array):
        """Give failed members the worst fitness, so that none is the best of the state."""
        return jnp.where(jnp.isnan(raw_fitness), jnp.inf, fitness)

    def _tell(
        self,
        key: PRNGKey,
        population: Float[Array, "population dims"],
        fitness: Float[Array, "population"],
        state: State,
        params: Params,
    ) -> State:
        return state.replace(population=population, fitness=fitness)
