"""Sato, Tamura & Yamamoto 2026, "Dataset Distillation on Medical Dataset Using Genetic Algorithm".

An individual is a whole synthetic dataset, `images_per_class` images a class with fixed one-hot
labels; its fitness is the accuracy, on the validation split, of a freshly initialised ConvNet
trained on it alone (section 3.1). The strategy is DL-EA with Laplace crossover
(`strategies/laplace_ga.py`).

A generation evaluates the whole population, survivors too, and makes the next one; generation 1
evaluates the initial individuals, so that G generations are G * P trainings and generation 1 is
strong random selection.

Differences from the paper's text, and why:

- The paper writes "a (lx_scale) = 0.5 and b (lx_location) = 0" beside equations in which a is the
  location and b the scale. Read literally beta would be constant; location 0 and scale 0.5 are
  meant, as the parameters' names in inspyred, which the paper says it used, show.
- Eq. 4 draws sign and size of beta with one number. inspyred draws the sign separately, which makes
  beta Laplace distributed; that is the default, `laplace_sign="shared"` is the equation.
- The children of the first step get noise of deviation 1 (g = 1, Eq. 1).
- With `images_per_class` > 1 (the paper has 1) the initial images of a class are distinct.

Beyond the paper, all off by default: the options from `common_random_numbers` on. Recommended
(`config.RECOMMENDED`) are `fitness="kernel_regression"` (`kernel_regression.py`) with
`strategy="BlockES"`, cosines and class means as the start: no network is trained in the search.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from evosax.algorithms.base import EvolutionaryAlgorithm
from flax import struct
from jaxtyping import Float, Int, Int32, Num

from evojax_suite import networks, strategies
from evojax_suite.systems.ga_distillation import fitness, individuals
from evojax_suite.systems.ga_distillation.config import Config, Params
from evojax_suite.systems.ga_distillation.individuals import Data, Individual
from evojax_suite.types import (
    Algorithm,
    AnyAlgorithm,
    Array,
    Dataset,
    Generation,
    IntScalar,
    PRNGKey,
    PyTree,
    Scalar,
    StepKeys,
)


@struct.dataclass
class State:
    """The state between two generations."""

    strategy: PyTree  # the evosax state
    population: Float[Array, "population dims"]  # evaluated by the next step
    generation: Int32[Array, ""]  # generations done
    best: Float[Array, "dims"]  # the result if the run ended now
    best_score: Scalar  # its fitness, or held-out score where images are held out
    best_generation: Int32[Array, ""]  # 1-based
    frames: Float[Array, "frames dims"]  # earlier values of `best` (`frame_of`)


def num_frames(num_dims: int) -> int:
    """The number of results of earlier generations to keep: those that fit in a few megabytes."""
    return max(1, min(24, 2**21 // num_dims))


def frame_of(generation: Num[Array, "*shape"], count: int) -> Int32[Array, "*shape"]:
    """The place among `count` frames of the result of a generation, 1-based, where it replaces the
    one before it: two frames for every doubling, since most happens early."""
    return jnp.minimum(jnp.floor(2 * jnp.log2(generation)).astype(jnp.int32), count - 1)


class Metrics(NamedTuple):
    """The report of one generation; fitness as the paper reports it, higher is better."""

    generation: IntScalar
    fitness_best: Scalar
    fitness_mean: Scalar
    fitness_std: Scalar
    accuracy_best: Scalar  # of the member with the best fitness
    holdout_score: Scalar  # of that member, NaN where nothing is held out
    best_score: Scalar  # of the result if the run ended now
    num_failed: IntScalar  # members whose evaluation was NaN or infinite


def check(config: Config, dataset: Dataset) -> None:
    """Raise ValueError where `dataset` is too small for `config`."""
    name, num_images = dataset.name, len(dataset.validation)
    counts = np.bincount(dataset.train.labels, minlength=dataset.num_classes)
    if (least := counts.min()) < config.images_per_class:
        raise ValueError(
            f"images_per_class is {config.images_per_class}, but class "
            f"{dataset.class_names[counts.argmin()]!r} of {name} has only {least} training images"
        )
    most, size = num_images - fitness.num_held_out(config, num_images), config.fitness_subset_size
    if size is not None and size > most:
        raise ValueError(f"fitness_subset_size must be <= {most} on {name}, got {size}")


def with_judge(config: Config, algorithm: AnyAlgorithm) -> AnyAlgorithm:
    """`algorithm` as it is, or where `fitness` is a user's function of images, one whose step calls
    that between two compiled programs: it is not scannable and runs on one device."""
    generation = algorithm.generation
    if generation is None or fitness.own_judge(config) is None:
        return algorithm
    parts = {name: jax.jit(getattr(generation, name)) for name in ("split_key", "ask", "tell")}
    step, init = replace(generation, **parts).step, jax.jit(algorithm.init)
    return replace(algorithm, init=init, step=step, scannable=False, generation=None)


def _bounds(
    config: Config, num_classes: int, image_shape: tuple[int, int, int], data: Data
) -> tuple[float | Array, float | Array]:
    """Lower and upper bound of children: scalars, or one a dimension."""
    step, channels = individuals.label_step(config), image_shape[-1]
    if config.clip == "unit" and not (config.evolve_labels and step != 1):
        return 0.0, 1.0
    shape = individuals.encoding_of(config, image_shape).num_dims // channels, channels

    def bound(value: float) -> Array:
        pixel = (value - data.mean) / data.std if config.clip == "image" else value
        image = jnp.broadcast_to(pixel, shape).reshape(-1)
        label = jnp.full(num_classes if config.evolve_labels else 0, value / step)
        each = jnp.concatenate([image, label])
        return jnp.tile(each, num_classes * config.images_per_class)

    return bound(0.0), bound(1.0)


def _blocks(config: Config, num_classes: int, num_dims: int) -> np.ndarray:
    """The column of credit of each number of a flat individual: a column for each tile, and after
    them one for the label of each image."""
    num_images, tiles = num_classes * config.images_per_class, config.factor**2
    num_labels = num_classes if config.evolve_labels else 0
    each = (num_dims // num_images - num_labels) // tiles
    of_tiles = np.arange(num_images * tiles).repeat(each).reshape(num_images, -1)
    of_labels = num_images * tiles + np.arange(num_images)[:, None].repeat(num_labels, 1)
    return np.concatenate([of_tiles, of_labels], 1).reshape(-1)


def _strategy(config: Config, num_classes: int, num_dims: int) -> EvolutionaryAlgorithm:
    """The evosax algorithm. Raises ValueError where it does not take what `config` asks for."""
    name, std = config.strategy, config.strategy_std
    options: dict[str, Any] = {}
    if name == "LaplaceGA":
        ratio, sign = config.survival_ratio, config.laplace_sign
        options = {"survival_ratio": ratio, "crossover": config.crossover, "sign": sign}
    elif name == "BlockES" and config.fitness == "kernel_regression":
        options["blocks"] = _blocks(config, num_classes, num_dims)
    elif std is not None and "std_schedule" in strategies.options(name):
        options["std_schedule"] = optax.constant_schedule(std)
    strategy = strategies.create(name, config.population_size, num_dims, **options)
    _params_with_std(config, strategy)  # fails early where it has no standard deviation
    return strategy


def _params_with_std(config: Config, strategy: EvolutionaryAlgorithm):
    """The default parameters of `strategy`, with `strategy_std` where they have a first standard
    deviation."""
    params, std = strategy.default_params, config.strategy_std
    if std is None or "std_schedule" in strategies.options(config.strategy):
        return params
    if not hasattr(params, "std_init"):
        raise ValueError(f"{config.strategy} has no strategy_std, got {std}")
    return params.replace(std_init=std)


def history(
    config: Config, num_classes: int, state: State, data: Data
) -> tuple[Int[np.ndarray, "frames"], Individual]:
    """The results during the search, two for every doubling: the generations after which they were
    the result, and the individuals, with a leading axis; the last is the final result."""
    generations, frames = _kept(state)
    decoded = partial(individuals.decode, config, num_classes, data.train_images.shape[1:])
    return generations, jax.lax.map(lambda frame: decoded(frame, data), frames)


def _kept(state: State) -> tuple[Int[np.ndarray, "frames"], Float[Array, "frames dims"]]:
    """The results during the search, and the generations after which they were it."""
    generations = 1 + np.arange(int(state.generation))
    frames = np.asarray(frame_of(jnp.asarray(generations, jnp.float32), len(state.frames)))
    last = np.append(np.diff(frames) > 0, True)
    return generations[last], state.frames[frames[last]]


def reference_fitness(
    key: PRNGKey, config: Config, num_classes: int, state: State, data: Data
) -> tuple[Int[np.ndarray, "frames"], Float[np.ndarray, "frames"]]:
    """The results during the search as the generations after which they were it, and their fitness
    by the same networks for all, at least eight where they are trained: it can be compared, where
    each generation has networks of its own."""
    generations, frames = _kept(state)
    networks = max(config.networks_per_member, 8)
    config = replace(config, common_random_numbers=True, networks_per_member=networks)
    shape = num_classes, data.train_images.shape[1:]
    scores = jax.jit(fitness.score_population, static_argnums=(1, 2, 3))
    return generations, np.asarray(scores(key, config, *shape, frames, data).fitness)


@dataclass(frozen=True)
class _Distillation:
    """The functions of the algorithm, and what does not change in a search."""

    config: Config
    shape: tuple[int, tuple[int, int, int]]  # the number of classes, height, width and channels
    strategy: EvolutionaryAlgorithm

    @property
    def num_classes(self) -> int:
        return self.shape[0]

    @property
    def population_based(self) -> bool:
        """Whether the strategy evolves a population rather than a mean."""
        return strategies.is_population_based(self.strategy)

    def _evosax_params(self, params: Params, data: Data):
        if self.config.strategy != "LaplaceGA":
            return _params_with_std(self.config, self.strategy)
        lower, upper = _bounds(self.config, *self.shape, data)
        return self.strategy.default_params.replace(**vars(params), lower=lower, upper=upper)

    def _real_individuals(self, key: Array, data: Data) -> Array:
        size = self.config.population_size
        return individuals.random_individuals(key, self.config, self.num_classes, data, size)

    def _first_mean(self, key: Array, data: Data) -> Array:
        match self.config.start:
            case "class_means":
                return individuals.class_means(self.config, self.num_classes, data)
            case "k_means":
                return individuals.class_centres(key, self.config, self.num_classes, data)
            case "given":
                if data.given is None:
                    raise ValueError("start given needs images that are given with the data")
                return individuals.encode(self.config, self.num_classes, data.given, data.spread)
            case _:
                return self._real_individuals(key, data).mean(0)

    def init(self, key: Array, params: Params, data: Data) -> State:
        key_individuals, key_strategy, key_ask = jax.random.split(key, 3)
        evosax = self._evosax_params(params, data)
        if self.population_based:
            # The compiler would look for the best of a constant, seconds for a million members.
            worst = jax.lax.optimization_barrier(jnp.full(self.config.population_size, jnp.inf))
            population = self._real_individuals(key_individuals, data)
            state = self.strategy.init(key_strategy, population, worst, evosax)
        else:
            mean = self._first_mean(key_individuals, data)
            state = self.strategy.init(key_strategy, mean, evosax)
            population, state = self.strategy.ask(key_ask, state, evosax)
        first = State(
            strategy=state,
            population=population,
            generation=jnp.int32(0),
            best=population[0],
            best_score=jnp.float32(-jnp.inf),
            best_generation=jnp.int32(0),
            frames=jnp.zeros((num_frames(population.shape[1]), population.shape[1])),
        )
        return strategies.strip_weak_types(first)

    @staticmethod
    def split_key(key: Array) -> StepKeys:
        key_evaluate, *keys_tell = jax.random.split(key, 3)
        return StepKeys(None, key_evaluate, tuple(keys_tell))

    @staticmethod
    def ask(key: None, state: State, params: Params, data: Data) -> Array:
        del key, params, data
        return state.population

    def evaluate(self, key: Array, population: Array, params: Params, data: Data, members: Array):
        del params
        return fitness.score_population(key, self.config, *self.shape, population, data, members)

    def tell(
        self,
        keys: tuple[Array, ...],
        state: State,
        population: Array,
        scores: fitness.Scores,
        params: Params,
        data: Data,
    ) -> tuple[State, Metrics]:
        key_tell, key_ask = keys
        evosax = self._evosax_params(params, data)
        failed = ~jnp.isfinite(scores.fitness)
        loss = scores.credit
        if loss is None:  # evosax minimises and knows NaN
            loss = jnp.where(failed, jnp.nan, -scores.fitness)

        def first(old: Array):
            del old
            return strategies.strip_weak_types(
                self.strategy.init(key_tell, population, loss, evosax)
            )

        def later(old: Array):
            new, _ = self.strategy.tell(key_tell, population, loss, old, evosax)
            return strategies.strip_weak_types(new)

        if self.population_based:
            strategy_state = jax.lax.cond(state.generation == 0, first, later, state.strategy)
        else:
            strategy_state = later(state.strategy)
        next_population, strategy_state = self.strategy.ask(key_ask, strategy_state, evosax)

        mean_fitness = jnp.mean(scores.fitness, where=~failed)
        ranked = fitness.rank_last(scores.fitness)
        leader = ranked.argmax()
        if self.config.best_of == "mean":
            candidate, score = strategies.mean_of(self.strategy, strategy_state), mean_fitness
        else:
            held_out = self.config.holdout_ratio > 0
            score = (fitness.rank_last(scores.holdout) if held_out else ranked)[leader]
            candidate = population[leader]
        generation = state.generation + 1
        better = (score > state.best_score) | (self.config.best_of != "run")
        best = jnp.where(better, candidate, state.best)
        best_score = jnp.where(better, score, state.best_score)
        state = State(
            strategy=strategy_state,
            population=next_population,
            generation=generation,
            best=best,
            best_score=best_score,
            best_generation=jnp.where(better, generation, state.best_generation),
            frames=state.frames.at[frame_of(generation, len(state.frames))].set(best),
        )
        metrics = Metrics(
            generation=generation,
            fitness_best=scores.fitness[leader],
            fitness_mean=mean_fitness,
            fitness_std=jnp.std(scores.fitness, where=~failed),
            accuracy_best=scores.accuracy[leader],
            holdout_score=scores.holdout[leader],
            best_score=best_score,
            num_failed=failed.sum(),
        )
        return strategies.strip_weak_types(state), metrics

    def result(self, state: State, params: Params, data: Data) -> Individual:
        del params
        return individuals.decode(self.config, *self.shape, state.best, data)

    def finished(self, state: State) -> Array:
        if self.config.patience is None:
            return jnp.bool_(False)
        return state.generation - state.best_generation >= self.config.patience


def build(
    config: Config, num_classes: int, image_shape: tuple[int, int, int]
) -> Algorithm[State, Params, Data, Metrics, Individual]:
    """The algorithm for datasets of `num_classes` classes of images (H, W, C)."""
    shape = num_classes, image_shape
    networks.create(config.network, *shape)  # fails early where it does not fit
    fitness.own_score(config, num_classes)
    fitness.check_judge(config, *shape)
    strategy = _strategy(config, num_classes, individuals.num_dims(config, *shape))
    search = _Distillation(config, shape, strategy)
    for name, value in (("best_of", config.best_of), ("start", config.start)):
        if search.population_based and value in ("mean", "class_means", "k_means", "given"):
            raise ValueError(
                f"{name} {value} needs an algorithm that searches around a mean, such as BlockES "
                f"or SNES, got {config.strategy}"
            )
    parts = search.split_key, search.ask, search.evaluate, search.tell
    generation = Generation(
        config.population_size,
        *parts,
        work=fitness.work_of(config, *shape),
        members_at_once=config.engine.resolved_members_in_flight,
    )
    functions = search.init, generation.step, search.result, search.finished
    algorithm = Algorithm(*functions, generation=generation, image_shape=image_shape)
    return with_judge(config, algorithm)
