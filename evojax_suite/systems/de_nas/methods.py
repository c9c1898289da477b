"""Methods of architecture search as pure functions: which candidates to evaluate next.

A method sees a search space through four functions (`Operators`) and the search so far as arrays
(`History`); `propose` returns the next candidates. A whole search is then a loop, and hundreds of
searches of a tabulated space are one program (`cells.search`).

- evolution: differential evolution (Pei et al. 2022): one of the best + (one - another), of the
  best candidates so far.
- random: the distribution of the first candidates.
- ageing: regularised evolution (Real et al. 2019, "Regularized Evolution for Image Classifier
  Architecture Search", algorithm 1): the best of a sample of the latest candidates, mutated.
- local: hill climbing that moves to the first better neighbour and starts again from a random
  candidate where there is none (White, Nolen & Savani 2021, "Exploring the Loss Landscape in Neural
  Architecture Search").
- evosax: any algorithm of evosax on vectors that `Operators.decode` reads.
- surrogate: evolution that breeds many children and evaluates those which a regression in closed
  form thinks best. The regression is a Gaussian process on the ranks of all accuracies so far
  (normal scores, so that a few failures say no more than that they are last), the children are
  ordered by its upper confidence bound. Mutants and crossings of the best and random candidates
  compete for the same places.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated, Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
from annotated_types import Ge
from jax.scipy.linalg import solve_triangular
from jaxtyping import Bool, Float, Int, Int32
from pydantic import NonNegativeFloat, PositiveFloat, PositiveInt

from evojax_suite import strategies
from evojax_suite.configuration import Share, configuration
from evojax_suite.types import Array, IntScalar, PRNGKey, PyTree

Method = Literal["evolution", "random", "ageing", "local", "evosax", "surrogate"]


@configuration
class MethodConfig:
    """A method and its sizes."""

    method: Method = "evolution"
    population_size: Annotated[int, Ge(3)] = 20
    """Candidates from which others are made, and the random ones of the beginning: the best so far,
    or the latest where the method is ageing."""
    num_children: PositiveInt = 10
    """Candidates that are proposed together."""
    num_best: PositiveInt = 5
    """Evolution: the best from which a base is drawn."""
    differential_weight: Share = 1.0
    """Evolution: probability that a part of a difference takes part, in [0, 1]."""
    sample_size: PositiveInt = 10
    """Ageing: candidates of which the best is mutated."""
    strategy: str = "DifferentialEvolution"
    """The algorithm of the method evosax."""
    num_proposals: PositiveInt = 200
    """Surrogate: candidates from which the children are taken."""
    random_share: Share = 0.5
    """Surrogate: part of these that is random, in [0, 1]."""
    confidence: NonNegativeFloat = 1.0
    """Surrogate: standard deviations of the prediction that count in a candidate's favour."""
    noise: PositiveFloat = 0.03
    """Surrogate: variance of a rank that training anew would give, relative to that of all."""

    def __post_init__(self):
        least = {"evolution": "num_best", "ageing": "sample_size"}.get(self.method)
        if least and (value := getattr(self, least)) > self.population_size:
            most = self.population_size
            raise ValueError(f"{least} must be <= population_size = {most}, got {value}")
        if self.num_children > self.num_proposals:
            most = self.num_proposals
            raise ValueError(f"num_children must be <= {most} proposals, got {self.num_children}")


class Operators(NamedTuple):
    """What methods need of a search space, for one genome, an array of integers."""

    random: Callable[[PRNGKey], Array]
    differ: Callable[[PRNGKey, Array, Array, Array, Any], Array]
    """(key, base, one, another, weight) -> base + weight * (one - another)."""
    mutate: Callable[[PRNGKey, Array], Array]
    """A random neighbour."""
    neighbours: Callable[[Array], Array]
    """All neighbours, with a leading axis."""
    cross: Callable[[PRNGKey, Array, Array], Array]
    decode: Callable[[Array], Array]
    """The genome that a vector of real numbers encodes."""
    num_numbers: int
    """The length of such a vector."""
    kernel: Callable[[Array, Array], Array]
    """Similarities in [0, 1] of genomes (N, ...) and (M, ...): (N, M), positive definite."""


class History(NamedTuple):
    """A search so far."""

    genomes: Int[Array, "candidates ..."]  # in the order of their evaluation
    fitness: Float[Array, "candidates"]  # higher is better; -inf where there is none yet
    number: Int32[Array, ""]  # evaluated


def start(key: PRNGKey, config: MethodConfig, operators: Operators) -> PyTree:
    """What a method remembers beyond the history."""
    match config.method:
        case "local":
            return jnp.int32(0)  # where the climb began
        case "evosax":
            strategy = _strategy(config, operators)
            vectors = jax.random.normal(key, (config.num_children, operators.num_numbers))
            fitness = jnp.full(config.num_children, jnp.inf)
            based = strategies.is_population_based(strategy)
            first = (vectors, fitness) if based else (jnp.zeros(operators.num_numbers),)
            state = strategy.init(key, *first, strategy.default_params)
            return strategies.strip_weak_types(state), vectors
        case _:
            return ()


def propose(
    key: PRNGKey, config: MethodConfig, operators: Operators, history: History, memory: PyTree
) -> tuple[Int[Array, "{config.num_children} ..."], PyTree]:
    """The next candidates, and what the method remembers. The first `population_size` candidates
    are random and not asked for here, except by local search and evosax, which need none."""
    keys = jax.random.split(key, config.num_children)
    match config.method:
        case "evolution":
            return jax.vmap(lambda key: _differed(key, config, operators, history))(keys), memory
        case "random":
            return jax.vmap(operators.random)(keys), memory
        case "ageing":
            return jax.vmap(lambda key: _aged(key, config, operators, history))(keys), memory
        case "local":
            return _climbed(key, operators, history, memory)
        case "evosax":
            return _moved(key, config, operators, history, memory)
        case "surrogate":
            return _bred(key, config, operators, history), memory


def needs_population(method: Method) -> bool:
    """Whether a search begins with `population_size` random candidates."""
    return method not in ("local", "evosax")


def _differed(
    key: PRNGKey, config: MethodConfig, operators: Operators, history: History
) -> Int[Array, "..."]:
    key_base, key_others, key_differ = jax.random.split(key, 3)
    best = jax.lax.top_k(history.fitness, config.population_size)[1]
    base = jax.random.randint(key_base, (), 0, config.num_best)
    lots = jax.random.uniform(key_others, best.shape).at[base].set(-1.0)
    one, another = jax.lax.top_k(lots, 2)[1]
    alive, weight = history.genomes[best], config.differential_weight
    return operators.differ(key_differ, alive[base], alive[one], alive[another], weight)


def _aged(
    key: PRNGKey, config: MethodConfig, operators: Operators, history: History
) -> Int[Array, "..."]:
    key_sample, key_mutate = jax.random.split(key)
    size, count = config.population_size, config.sample_size
    sample = jax.random.choice(key_sample, size, (count,), replace=False) + history.number - size
    parent = sample[history.fitness[sample].argmax()]
    return operators.mutate(key_mutate, history.genomes[parent])


def _known(genomes: Array, history: History) -> Bool[Array, "genomes"]:
    """Whether each genome was evaluated before."""
    same = (genomes[:, None] == history.genomes).all(range(2, genomes.ndim + 1))
    return (same & (jnp.arange(len(history.fitness)) < history.number)).any(1)


def _climbed(
    key: PRNGKey, operators: Operators, history: History, began: IntScalar
) -> tuple[Int[Array, "1 ..."], IntScalar]:
    key_order, key_random = jax.random.split(key)
    climbing = jnp.arange(len(history.fitness)) >= began
    current = history.genomes[jnp.where(climbing, history.fitness, -jnp.inf).argmax()]
    neighbours = operators.neighbours(current)
    left = ~_known(neighbours, history) & (history.number > 0)
    lots = jnp.where(left, jax.random.uniform(key_order, left.shape), -1.0)
    again = ~left.any()
    new = jnp.where(again, operators.random(key_random), neighbours[lots.argmax()])
    return new[None], jnp.where(again, history.number, began)


def _strategy(config: MethodConfig, operators: Operators) -> Any:
    return strategies.create(config.strategy, config.num_children, operators.num_numbers)


def _moved(
    key: PRNGKey, config: MethodConfig, operators: Operators, history: History, memory: PyTree
) -> tuple[Int[Array, "children ..."], PyTree]:
    key_tell, key_ask = jax.random.split(key)
    strategy, (state, vectors) = _strategy(config, operators), memory
    params, size = strategy.default_params, config.num_children

    def told(state: PyTree) -> PyTree:
        place = jnp.maximum(history.number - size, 0)
        fitness = -jax.lax.dynamic_slice_in_dim(history.fitness, place, size)
        new, _ = strategy.tell(key_tell, vectors, fitness, state, params)
        return strategies.strip_weak_types(new)

    state = jax.lax.cond(history.number > 0, told, lambda state: state, state)
    vectors, state = strategy.ask(key_ask, state, params)
    return jax.vmap(operators.decode)(vectors), (strategies.strip_weak_types(state), vectors)


def _bred(
    key: PRNGKey, config: MethodConfig, operators: Operators, history: History
) -> Int[Array, "children ..."]:
    size, number = config.num_proposals, history.number
    key_parents, key_cross, key_mutate, key_random = jax.random.split(key, 4)
    order = jnp.argsort(-history.fitness)
    most = jnp.minimum(config.population_size, number)
    first, second = history.genomes[order[jax.random.randint(key_parents, (2, size), 0, most)]]
    children = jax.vmap(operators.cross)(jax.random.split(key_cross, size), first, second)
    # Every second child is a mutant of one parent, the others of two.
    crossed = (jnp.arange(size) % 2 == 0).reshape(-1, *[1] * (first.ndim - 1))
    children = jnp.where(crossed, children, first)
    children = jax.vmap(operators.mutate)(jax.random.split(key_mutate, size), children)
    fresh = jax.vmap(operators.random)(jax.random.split(key_random, size))
    num_fresh = round(config.random_share * size)
    proposals = jnp.concatenate([fresh[:num_fresh], children[num_fresh:]])

    equal = (proposals[:, None] == proposals).all(range(2, proposals.ndim + 1))
    repeated = jnp.tril(equal, -1).any(1) | _known(proposals, history)
    mean, deviation = predicted(config, operators, history, proposals)
    bound = mean + config.confidence * deviation
    chosen = jax.lax.top_k(jnp.where(repeated, -jnp.inf, bound), config.num_children)[1]
    return proposals[chosen]


def predicted(
    config: MethodConfig,
    operators: Operators,
    history: History,
    genomes: Int[Array, "genomes ..."],
) -> tuple[Float[Array, "genomes"], Float[Array, "genomes"]]:
    """Mean and standard deviation of the normal scores of genomes, whose ranks among the history a
    Gaussian process predicts."""
    known = jnp.arange(len(history.fitness)) < history.number
    below = (history.fitness < history.fitness[:, None]) & known
    equal = (history.fitness == history.fitness[:, None]) & known
    ranks = (below.sum(1) + equal.sum(1) / 2) / jnp.maximum(history.number, 1)
    targets = jnp.where(known, jax.scipy.stats.norm.ppf(jnp.clip(ranks, 0.001, 0.999)), 0.0)
    both = known[:, None] & known
    gram = jnp.where(both, operators.kernel(history.genomes, history.genomes), 0.0)
    factor = jnp.linalg.cholesky(gram + jnp.diag(jnp.where(known, config.noise, 1.0)))
    across = jnp.where(known, operators.kernel(genomes, history.genomes), 0.0)
    # One solve for both: two of them at once, each over many searches, can wait for each other's
    # threads on a CPU and never end.
    columns = jnp.concatenate([targets[:, None], across.T], axis=1)
    columns = solve_triangular(factor, columns, lower=True)
    whitened, whitened_across = columns[:, 0], columns[:, 1:]
    mean = whitened @ whitened_across
    explained = (whitened_across**2).sum(0)
    return mean, jnp.sqrt(jnp.maximum(1.0 - explained, 1e-6))
