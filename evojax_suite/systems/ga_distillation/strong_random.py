"""Strong random selection (Sato et al. 2026, section 3.3): the best of many random individuals.

One repeat draws as many individuals of real training images as the evolution has and keeps the one
with the best fitness. Repeats are steps, so that they are interrupted and resumed like generations.
"""

from __future__ import annotations

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import struct
from jaxtyping import Float, Int32

from evojax_suite.systems.ga_distillation import algorithm, fitness, individuals
from evojax_suite.systems.ga_distillation.config import Config, Params
from evojax_suite.systems.ga_distillation.individuals import Data, Individual
from evojax_suite.types import Algorithm, Array, Generation, IntScalar, Scalar, StepKeys


@struct.dataclass
class State:
    """The chosen individuals of the repeats done so far."""

    chosen: Float[Array, "repeats dims"]
    repeat: Int32[Array, ""]


class Metrics(NamedTuple):
    """The report of one repeat."""

    generation: IntScalar  # the repeat, from 1
    fitness_best: Scalar
    fitness_mean: Scalar
    num_failed: IntScalar


def build(
    config: Config, num_repeats: int, num_classes: int, image_shape: tuple[int, int, int]
) -> Algorithm[State, Params, Data, Metrics, Individual]:
    """The algorithm of `num_repeats` repeats; its result holds their individuals, (num_repeats, n,
    ...)."""
    shape = num_classes, image_shape

    def init(key: Array, params: Params, data: Data) -> State:
        del params
        individual = individuals.random_individuals(key, config, num_classes, data, 1)
        return State(chosen=jnp.tile(individual, (num_repeats, 1)), repeat=jnp.int32(0))

    def split_key(key: Array) -> StepKeys:
        key_ask, key_evaluate = jax.random.split(key)
        return StepKeys(key_ask, key_evaluate, None)

    def ask(key: Array, state: State, params: Params, data: Data) -> Array:
        del state, params
        size = config.population_size
        return individuals.random_individuals(key, config, num_classes, data, size)

    def evaluate(key: Array, population: Array, params: Params, data: Data, members: Array):
        del params
        return fitness.score_population(key, config, *shape, population, data, members).fitness

    def tell(
        key: None, state: State, population: Array, scores: Array, params: Params, data: Data
    ) -> tuple[State, Metrics]:
        del key, params, data
        failed, done = ~jnp.isfinite(scores), state.repeat + 1
        leader = fitness.rank_last(scores).argmax()
        mean = jnp.mean(scores, where=~failed)
        chosen = state.chosen.at[state.repeat].set(population[leader])
        return State(chosen, done), Metrics(done, scores[leader], mean, failed.sum())

    def result(state: State, params: Params, data: Data) -> Individual:
        del params
        decoded = partial(individuals.decode, config, *shape, data=data)
        return jax.vmap(decoded)(state.chosen)

    def finished(state: State) -> Array:
        del state
        return jnp.bool_(False)

    generation = Generation(
        config.population_size,
        *(split_key, ask, evaluate, tell),
        work=fitness.work_of(config, *shape),
        members_at_once=config.engine.resolved_members_in_flight,
    )
    repeats = Algorithm(init, generation.step, result, finished, generation=generation)
    return algorithm.with_judge(config, repeats)
