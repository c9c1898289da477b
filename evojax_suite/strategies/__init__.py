"""evosax algorithms built on this package's operators, and any evosax algorithm by name."""

from __future__ import annotations

import inspect
from typing import Any

import jax
import jax.numpy as jnp
from evosax.algorithms import algorithms as evosax_algorithms
from evosax.algorithms.base import EvolutionaryAlgorithm
from evosax.algorithms.distribution_based.base import DistributionBasedAlgorithm
from evosax.algorithms.population_based.base import PopulationBasedAlgorithm
from jaxtyping import Float

from evojax_suite.names import did_you_mean
from evojax_suite.strategies.block_es import BlockES as BlockES
from evojax_suite.strategies.laplace_ga import LaplaceGA as LaplaceGA
from evojax_suite.types import PyTree

STRATEGIES: dict[str, type[EvolutionaryAlgorithm]] = {
    "LaplaceGA": LaplaceGA,
    "BlockES": BlockES,
    **evosax_algorithms,
}


def _find(name: str) -> type[EvolutionaryAlgorithm]:
    if name not in STRATEGIES:
        hint = did_you_mean(name, STRATEGIES)
        raise ValueError(f"strategy must be one of {', '.join(STRATEGIES)}, got {name!r}{hint}")
    return STRATEGIES[name]


def options(name: str) -> frozenset[str]:
    """The names of the arguments of the constructor of the strategy `name`."""
    return frozenset(inspect.signature(_find(name).__init__).parameters)


def create(name: str, population_size: int, num_dims: int, **options: Any) -> EvolutionaryAlgorithm:
    """The evosax algorithm `name` for vectors of `num_dims` real numbers. Raises ValueError for an
    unknown name, and where the algorithm refuses the population size."""
    try:
        return _find(name)(population_size=population_size, solution=jnp.zeros(num_dims), **options)
    except (AssertionError, TypeError) as error:
        raise ValueError(
            f"{name} with a population of {population_size} cannot be built: {error}"
        ) from error


def is_population_based(strategy: EvolutionaryAlgorithm) -> bool:
    """Whether `init` takes an evaluated population; otherwise it takes a mean."""
    return isinstance(strategy, PopulationBasedAlgorithm)


def mean_of(strategy: EvolutionaryAlgorithm, state: PyTree) -> Float[jax.Array, "dims"]:
    """The mean around which an algorithm that is not population-based searches."""
    assert isinstance(strategy, DistributionBasedAlgorithm)
    return jnp.asarray(strategy.get_mean(state))


def strip_weak_types(state: PyTree) -> PyTree:
    """`state` without weak types, so that it keeps its types from step to step."""
    return jax.tree.map(
        lambda leaf: jax.lax.convert_element_type(leaf, jnp.result_type(leaf)), state
    )
