"""Strong random selection (paper 002, section 3.3): the best of many random individuals.

One repeat draws as many individuals of real training images as the evolution has and keeps the one
with the best fitness. Repeats are steps, so that they are interrupted and resumed like generations.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import struct
from jaxtyping import Float, Int32

from evojax_suite.systems.ga_distillation.algorithm import (
    Config,
    Data,
    Individual,
    Params,
    decode,
    over_members,
    random_individuals,
    rank_last,
    score_population,
)
from evojax_suite.types import Algorithm, Array, Generation, IntScalar, Scalar, StepKeys


@struct.dataclass
class State:
    """The chosen individuals of the repeats done so far."""

    chosen: Float[Array, "repeats dims"]
    repeat: Int32[Array, ""]


class Metrics(NamedTuple):
    """What one repeat reports."""

    generation: IntScalar  # the repeat, from 1
    fitness_best: Scalar
    fitness_mean: Scalar
    num_failed: IntScalar


def build(
    config: Config, num_repeats: int, num_classes: int, image_shape: tuple[int, int, int]
) -> Algorithm[State, Params, Data, Metrics, Individual]:
    """`num_repeats` repeats; the result holds their individuals, (num_repeats, n, ...)."""

    def init(key: Array, params: Params, data: Data) -> State:
        del params
        individual = random_individuals(key, config, num_classes, data, 1)
        return State(chosen=jnp.tile(individual, (num_repeats, 1)), repeat=jnp.int32(0))

    def split_key(key: Array) -> StepKeys:
        key_ask, key_evaluate = jax.random.split(key)
        return StepKeys(key_ask, key_evaluate, None)

    def ask(key: Array, state: State, params: Params, data: Data) -> Array:
        del state, params
        return random_individuals(key, config, num_classes, data, config.population_size)

    def evaluate(
        key: Array, population: Array, params: Params, data: Data, members: Array
    ) -> Array:
        del params
        own = config, num_classes, image_shape, population, data
        return score_population(key, *own, members).fitness

    def tell(
        key: None, state: State, population: Array, fitness: Array, params: Params, data: Data
    ) -> tuple[State, Metrics]:
        del key, params, data
        failed = ~jnp.isfinite(fitness)
        leader = rank_last(fitness).argmax()
        metrics = Metrics(
            generation=state.repeat + 1,
            fitness_best=fitness[leader],
            fitness_mean=jnp.mean(fitness, where=~failed),
            num_failed=failed.sum(),
        )
        chosen = state.chosen.at[state.repeat].set(population[leader])
        return State(chosen=chosen, repeat=state.repeat + 1), metrics

    def result(state: State, params: Params, data: Data) -> Individual:
        del params
        return jax.vmap(lambda one: decode(config, num_classes, image_shape, one, data))(
            state.chosen
        )

    def finished(state: State) -> Array:
        del state
        return jnp.bool_(False)

    generation = Generation(config.population_size, split_key, ask, evaluate, tell)
    return over_members(config, init, generation, result, finished)
