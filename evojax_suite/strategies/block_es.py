"""An antithetic evolution strategy with credit by block, as an evosax algorithm.

A candidate of many parts often has many losses, each of which belongs to one part: of ten synthetic
images each can be evaluated alone in the company of others. An ordinary strategy adds the losses
up, and the noise of nine parts hides the effect of the tenth. Here the loss of block b ranks the
perturbations of block b, which with B equal blocks of independent loss is worth B times the
population.

The rest is OpenAI-ES (Salimans et al. 2017): pairs of candidates at mean plus and minus noise,
centred ranks, Adam on the mean. The result is the polynomial-decay average of the means (Shamir and
Zhang 2013, Eq. 4), so that no schedule needs to know how long the run is.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from evosax.algorithms.base import update_best_solution_and_fitness
from evosax.algorithms.distribution_based.base import (
    DistributionBasedAlgorithm,
    Params as BaseParams,
    State as BaseState,
    metrics_fn,
)
from flax import struct
from jaxtyping import Float, Int

from evojax_suite.types import Array, IntScalar, PRNGKey, PyTree, Scalar


@struct.dataclass
class Params(BaseParams):
    """Scalars that may be traced."""

    std_init: float | Scalar = 0.4
    """Standard deviation of the noise, > 0."""
    learning_rate: float | Scalar = 0.5
    """Step size of Adam in standard deviations of the noise, > 0."""
    averaging: float | Scalar = 8.0
    """Exponent of the average, >= 0: 0 weighs all means alike, larger values favour the last."""


@struct.dataclass
class State(BaseState):
    """The state of the search: candidates are drawn around `mean`; `average` is its result."""

    average: Float[Array, "dims"]
    opt_state: optax.OptState


class BlockES(DistributionBasedAlgorithm):
    """OpenAI-ES whose `tell` takes a loss of each member, or of each of its blocks."""

    _default_params = Params()

    def __init__(
        self,
        population_size: int,
        solution: Array,
        blocks: int | Int[np.ndarray, "dims"] = 1,
        metrics_fn: Callable[..., Any] = metrics_fn,
    ):
        """solution: an example of a candidate, any pytree of numbers. blocks: the number of blocks
        of equal size that they form in order, or the block of each number, from 0 on."""
        super().__init__(population_size, solution, metrics_fn=metrics_fn)
        if population_size < 2 or population_size % 2:
            raise ValueError(f"population_size must be even and >= 2, got {population_size}")
        if isinstance(blocks, int):
            if blocks < 1 or self.num_dims % blocks:
                raise ValueError(f"blocks must divide the {self.num_dims} dimensions, got {blocks}")
            blocks = np.arange(blocks).repeat(self.num_dims // blocks)
        if blocks.shape != (self.num_dims,):
            raise ValueError(f"blocks must be of {self.num_dims} dimensions, got {blocks.shape}")
        self.block_of = blocks
        self.optimizer = optax.scale_by_adam()

    def _init(self, key: PRNGKey, params: Params) -> State:
        nothing = jnp.full(self.num_dims, jnp.nan)
        return State(
            mean=nothing,
            average=nothing,
            opt_state=self.optimizer.init(jnp.zeros(self.num_dims)),
            best_solution=nothing,
            best_fitness=jnp.inf,
            generation_counter=0,
        )

    @partial(jax.jit, static_argnames=("self",))
    def init(self, key: PRNGKey, mean: Array, params: Params) -> State:
        """The state around a first mean."""
        state = super().init(key, mean, params)
        return state.replace(average=state.mean)

    def get_mean(self, state: State):  # pyright: ignore[reportIncompatibleMethodOverride]
        """The result of the search: the average of the means."""
        return self._unravel_solution(state.average)

    def _ask(self, key: PRNGKey, state: State, params: Params):
        shape = self.population_size // 2, self.num_dims
        noise = params.std_init * jax.random.normal(key, shape)
        return jnp.concatenate([state.mean + noise, state.mean - noise]), state

    @partial(jax.jit, static_argnames=("self",))
    def tell(
        self,
        key: PRNGKey,
        population: PyTree,
        fitness: Float[Array, "population"] | Float[Array, "population blocks"],
        state: State,
        params: Params,
    ) -> tuple[State, PyTree]:
        """Move the mean by losses, NaN where an evaluation failed."""
        population = jax.vmap(self._ravel_solution)(population)
        losses = fitness.reshape(self.population_size, -1)
        total, count, pairs = losses.mean(1), state.generation_counter, self.population_size // 2
        best_solution, best_fitness = update_best_solution_and_fitness(
            population, total, state.best_solution, state.best_fitness
        )
        state = state.replace(best_solution=best_solution, best_fitness=best_fitness)
        metrics = self.metrics_fn(key, population, total, state, params)

        ranks = centred_ranks(losses)
        weights = ranks[:pairs] - ranks[pairs:]
        noise = (population[:pairs] - population[pairs:]) / (2 * params.std_init)
        block_of = self.block_of if losses.shape[1] > 1 else jnp.zeros(self.num_dims, int)
        gradient = (weights[:, block_of] * noise).sum(0) / pairs
        direction, opt_state = self.optimizer.update(gradient, state.opt_state)
        mean = state.mean - params.learning_rate * params.std_init * jnp.asarray(direction)
        average = averaged(state.average, mean, count, params.averaging)
        state = state.replace(mean=mean, average=average, opt_state=opt_state)
        return state.replace(generation_counter=count + 1), metrics


def averaged(
    average: Float[Array, "*shape"],
    latest: Float[Array, "*shape"],
    count: int | IntScalar,
    exponent: float | Scalar = Params.averaging,
) -> Float[Array, "*shape"]:
    """The polynomial-decay average of `count` values, whose average is `average`, and `latest`."""
    return average + (exponent + 1) / (exponent + count + 1) * (latest - average)


def centred_ranks(losses: Float[Array, "population blocks"]) -> Float[Array, "population blocks"]:
    """Ranks within each column, from -0.5 for the lowest loss to 0.5; NaN ranks last."""
    return losses.argsort(0).argsort(0) / (len(losses) - 1) - 0.5
