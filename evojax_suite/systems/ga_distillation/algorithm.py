"""Sato, Tamura & Yamamoto 2026, "Dataset Distillation on Medical Dataset Using Genetic Algorithm".

An individual is a whole synthetic dataset, `images_per_class` images a class with fixed one-hot
labels; its fitness is the accuracy, on the fitness part of the data, of a freshly initialised
ConvNet trained on it alone (section 3.1). The strategy is DL-EA with Laplace crossover
(`strategies/laplace_ga.py`).

A generation evaluates the whole population, survivors too, and makes the next one; generation 1
evaluates the initial individuals, so that G generations are G * P trainings and generation 1 is
what strong random selection does.

Where we differ from the paper's text, and why:

- The paper writes "a (lx_scale) = 0.5 and b (lx_location) = 0" beside equations in which a is the
  location and b the scale. Read literally beta would be constant; location 0 and scale 0.5 are
  meant, as the parameters' names in inspyred, which the paper says it used, show.
- Eq. 4 draws sign and size of beta with one number. inspyred draws the sign apart, which makes beta
  Laplace distributed; that is the default, `laplace_sign="shared"` is the equation.
- The children of the first step get noise of deviation 1 (g = 1, Eq. 1).
- With `images_per_class` > 1 (the paper has 1) the initial images of a class are distinct.

Beyond the paper, all off by default: the options from `common_random_numbers` on. Of these
`fitness="kernel_regression"` (`kernel_regression.py`) with `strategy="BlockES"`, cosines and class
means as the start is what we would use: no network is trained while it searches.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
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
from evojax_suite.systems.ga_distillation.config import Config, Params
from evojax_suite.systems.ga_distillation.fitness import (
    Scores,
    check_judge,
    num_held_out,
    own_judge,
    own_score,
    rank_last,
    score_population,
)
from evojax_suite.systems.ga_distillation.individuals import (
    Data,
    Individual,
    class_centres,
    class_means,
    decode,
    encode,
    encoding_of,
    label_step,
    num_dims,
    random_individuals,
)
from evojax_suite.types import (
    Algorithm,
    Array,
    Dataset,
    Generation,
    IntScalar,
    MetricsT,
    PyTree,
    Scalar,
    StateT,
    StepKeys,
)


@struct.dataclass
class State:
    """What the next generation needs."""

    strategy: PyTree  # the evosax state
    population: Float[Array, "population dims"]  # evaluated by the next step
    generation: Int32[Array, ""]  # generations done
    best: Float[Array, "dims"]  # the result if the run ended now
    best_score: Scalar  # its fitness, or held-out score where images are held out
    best_generation: Int32[Array, ""]  # 1-based
    frames: Float[Array, "frames dims"]  # what the result was (`frame_of`)


def num_frames(num_dims: int) -> int:
    """How many results of earlier generations are kept: what takes a few megabytes."""
    return max(1, min(24, 2**21 // num_dims))


def frame_of(generation: Num[Array, "*shape"], count: int) -> Int32[Array, "*shape"]:
    """The place among `count` frames in which the result of a generation, from 1 on, replaces the
    one before it: two frames for every doubling, since most happens early."""
    return jnp.minimum(jnp.floor(2 * jnp.log2(generation)).astype(jnp.int32), count - 1)


class Metrics(NamedTuple):
    """What one generation reports; fitness as the paper reports it, higher is better."""

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
    counts = np.bincount(dataset.train.labels, minlength=dataset.num_classes)
    if counts.min() < config.images_per_class:
        raise ValueError(
            f"images_per_class is {config.images_per_class}, but class "
            f"{dataset.class_names[counts.argmin()]!r} of {dataset.name} has only {counts.min()} "
            f"training images"
        )
    num_fitness = len(dataset.validation) - num_held_out(config, len(dataset.validation))
    if config.fitness_subset_size is not None and config.fitness_subset_size > num_fitness:
        raise ValueError(
            f"fitness_subset_size must be <= {num_fitness} on {dataset.name}, "
            f"got {config.fitness_subset_size}"
        )


def over_members(
    config: Config,
    init: Callable[[Array, Params, Data], StateT],
    generation: Generation[StateT, Params, Data, MetricsT],
    result: Callable[[StateT, Params, Data], Individual],
    finished: Callable[[StateT], Array],
) -> Algorithm[StateT, Params, Data, MetricsT, Individual]:
    """The algorithm whose step evaluates members by `score_population`: scannable, and on several
    devices, unless `fitness` is a function of images, which is called between two programs."""
    if own_judge(config) is None:
        return Algorithm(init, generation.step, result, finished, generation=generation)
    step = replace(
        generation,
        split_key=jax.jit(generation.split_key),
        ask=jax.jit(generation.ask),
        tell=jax.jit(generation.tell),
    ).step
    return Algorithm(jax.jit(init), step, result, finished, scannable=False)


def _bounds(config: Config, num_classes: int, image_shape: tuple[int, int, int], data: Data):
    """Lower and upper bound of children: scalars, or one a dimension."""
    step = label_step(config)
    if config.clip == "unit" and not (config.evolve_labels and step != 1):
        return 0.0, 1.0
    num_images = num_classes * config.images_per_class
    bounds = []
    for value in (0.0, 1.0):
        bound = (value - data.mean) / data.std if config.clip == "image" else value
        size = encoding_of(config, image_shape).num_dims
        numbers = jnp.broadcast_to(bound, (num_images, size // image_shape[-1], image_shape[-1]))
        numbers = numbers.reshape(num_images, -1)
        if config.evolve_labels:
            labels = jnp.full((num_images, num_classes), value / step)
            numbers = jnp.concatenate([numbers, labels], -1)
        bounds.append(numbers.reshape(-1))
    return bounds


def _blocks(config: Config, num_classes: int, num_dims: int) -> np.ndarray:
    """The column of credit of each number of a flat individual: of the tile that it is part of, or
    after those of the image whose label it is part of."""
    num_images, tiles = num_classes * config.images_per_class, config.factor**2
    num_labels = num_classes if config.evolve_labels else 0
    each = (num_dims // num_images - num_labels) // tiles
    of_tiles = np.arange(num_images * tiles).repeat(each).reshape(num_images, -1)
    of_labels = num_images * tiles + np.arange(num_images)[:, None].repeat(num_labels, 1)
    return np.concatenate([of_tiles, of_labels], 1).reshape(-1)


def _strategy(config: Config, num_classes: int, num_dims: int) -> EvolutionaryAlgorithm:
    """The evosax algorithm; ValueError where it does not take what `config` asks for."""
    options: dict[str, Any] = {}
    if config.strategy == "BlockES" and config.fitness == "kernel_regression":
        options = {"blocks": _blocks(config, num_classes, num_dims)}
    if config.strategy == "LaplaceGA":
        options = {
            "survival_ratio": config.survival_ratio,
            "crossover": config.crossover,
            "sign": config.laplace_sign,
        }
    elif config.strategy_std is not None and "std_schedule" in strategies.options(config.strategy):
        options = {"std_schedule": optax.constant_schedule(config.strategy_std)}
    strategy = strategies.create(config.strategy, config.population_size, num_dims, **options)
    _evosax_params(config, strategy)  # fails early where it has no standard deviation
    return strategy


def _evosax_params(config: Config, strategy: EvolutionaryAlgorithm):
    """The strategy's own parameters, with `strategy_std` where it starts from one."""
    params = strategy.default_params
    if config.strategy_std is None or "std_schedule" in strategies.options(config.strategy):
        return params
    if not hasattr(params, "std_init"):
        raise ValueError(f"{config.strategy} has no strategy_std, got {config.strategy_std}")
    return params.replace(std_init=config.strategy_std)


def history(
    config: Config, num_classes: int, state: State, data: Data
) -> tuple[Int[np.ndarray, "frames"], Individual]:
    """What the result was on the way: after which generations, twice for every doubling, and the
    individuals, with a leading axis; the last is the result."""
    height, width, channels = data.train_images.shape[1:]
    generations = 1 + np.arange(int(state.generation))
    frames = np.asarray(frame_of(jnp.asarray(generations, jnp.float32), len(state.frames)))
    last = np.append(np.diff(frames) > 0, True)
    decoded = partial(decode, config, num_classes, (height, width, channels))
    individuals = jax.lax.map(lambda frame: decoded(frame, data), state.frames[frames[last]])
    return generations[last], individuals


class _Setup(NamedTuple):
    """What does not change in a search."""

    config: Config
    num_classes: int
    image_shape: tuple[int, int, int]
    strategy: EvolutionaryAlgorithm
    population_based: bool


def _strategy_params(setup: _Setup, params: Params, data: Data):
    if setup.config.strategy != "LaplaceGA":
        return _evosax_params(setup.config, setup.strategy)
    lower, upper = _bounds(setup.config, setup.num_classes, setup.image_shape, data)
    return setup.strategy.default_params.replace(
        crossover_rate=params.crossover_rate,
        laplace_location=params.laplace_location,
        laplace_scale=params.laplace_scale,
        mutation_scale=params.mutation_scale,
        lower=lower,
        upper=upper,
    )


def _init(setup: _Setup, key: Array, params: Params, data: Data) -> State:
    key_individuals, key_strategy, key_ask = jax.random.split(key, 3)
    own = _strategy_params(setup, params, data)

    def real() -> Array:
        return random_individuals(
            key_individuals, setup.config, setup.num_classes, data, setup.config.population_size
        )

    if setup.population_based:
        worst, population = jnp.full(setup.config.population_size, jnp.inf), real()
        state = setup.strategy.init(key_strategy, population, worst, own)
    else:
        match setup.config.start:
            case "class_means":
                mean = class_means(setup.config, setup.num_classes, data)
            case "k_means":
                mean = class_centres(key_individuals, setup.config, setup.num_classes, data)
            case "given":
                if data.given is None:
                    raise ValueError("start given needs images that are given with the data")
                mean = encode(setup.config, setup.num_classes, data.given, data.spread)
            case _:  # the mean of the individuals that a population starts with
                mean = real().mean(0)
        state = setup.strategy.init(key_strategy, mean, own)
        population, state = setup.strategy.ask(key_ask, state, own)
    return strategies.strip_weak_types(
        State(
            strategy=state,
            population=population,
            generation=jnp.int32(0),
            best=population[0],
            best_score=jnp.float32(-jnp.inf),
            best_generation=jnp.int32(0),
            frames=jnp.zeros((num_frames(population.shape[1]), population.shape[1])),
        )
    )


def _split_key(key: Array) -> StepKeys:
    key_evaluate, *keys_tell = jax.random.split(key, 3)
    return StepKeys(None, key_evaluate, tuple(keys_tell))


def _ask(key: None, state: State, params: Params, data: Data) -> Array:
    del key, params, data
    return state.population


def _evaluate(
    setup: _Setup, key: Array, population: Array, params: Params, data: Data, members: Array
) -> Scores:
    del params
    own = setup.config, setup.num_classes, setup.image_shape, population, data
    return score_population(key, *own, members)


def _tell_and_ask(
    setup: _Setup,
    keys: tuple[Array, ...],
    state: State,
    population: Array,
    scores: Scores,
    params: Params,
    data: Data,
) -> tuple[State, Metrics]:
    key_tell, key_ask = keys
    own = _strategy_params(setup, params, data)
    fitness = rank_last(scores.fitness)
    failed = ~jnp.isfinite(scores.fitness)
    loss = jnp.where(failed, jnp.nan, -scores.fitness)  # evosax minimises and knows NaN
    if scores.credit is not None:
        loss = scores.credit

    def tell(strategy_state):
        return strategies.strip_weak_types(
            setup.strategy.tell(key_tell, population, loss, strategy_state, own)[0]
        )

    def first(strategy_state):
        del strategy_state
        return strategies.strip_weak_types(setup.strategy.init(key_tell, population, loss, own))

    if setup.population_based:
        strategy_state = jax.lax.cond(state.generation == 0, first, tell, state.strategy)
    else:
        strategy_state = tell(state.strategy)
    next_population, strategy_state = setup.strategy.ask(key_ask, strategy_state, own)
    leader = fitness.argmax()
    score = (
        fitness[leader] if setup.config.holdout_ratio == 0 else rank_last(scores.holdout)[leader]
    )
    leading = population[leader]
    if setup.config.best_of == "mean":
        score = jnp.mean(scores.fitness, where=~failed)
        leading = strategies.mean_of(setup.strategy, strategy_state)
    better = (score > state.best_score) | (setup.config.best_of != "run")
    generation = state.generation + 1
    best = jnp.where(better, leading, state.best)
    frame = frame_of(generation, len(state.frames))
    state = State(
        strategy=strategy_state,
        population=next_population,
        generation=generation,
        best=best,
        best_score=jnp.where(better, score, state.best_score),
        best_generation=jnp.where(better, generation, state.best_generation),
        frames=state.frames.at[frame].set(best),
    )
    metrics = Metrics(
        generation=generation,
        fitness_best=scores.fitness[leader],
        fitness_mean=jnp.mean(scores.fitness, where=~failed),
        fitness_std=jnp.std(scores.fitness, where=~failed),
        accuracy_best=scores.accuracy[leader],
        holdout_score=scores.holdout[leader],
        best_score=state.best_score,
        num_failed=failed.sum(),
    )
    return strategies.strip_weak_types(state), metrics


def _result(setup: _Setup, state: State, params: Params, data: Data) -> Individual:
    del params
    return decode(setup.config, setup.num_classes, setup.image_shape, state.best, data)


def _finished(setup: _Setup, state: State) -> Array:
    if setup.config.patience is None:
        return jnp.bool_(False)
    return state.generation - state.best_generation >= setup.config.patience


def build(
    config: Config, num_classes: int, image_shape: tuple[int, int, int]
) -> Algorithm[State, Params, Data, Metrics, Individual]:
    """The algorithm for datasets of `num_classes` classes of images (H, W, C)."""
    networks.create(config.network, num_classes, image_shape)
    own_score(config, num_classes)
    check_judge(config, num_classes, image_shape)
    strategy = _strategy(config, num_classes, num_dims(config, num_classes, image_shape))
    population_based = strategies.is_population_based(strategy)
    for name, value in (("best_of", config.best_of), ("start", config.start)):
        if population_based and value in ("mean", "class_means", "k_means", "given"):
            raise ValueError(
                f"{name} {value} needs an algorithm that searches around a mean, such as BlockES "
                f"or SNES, got {config.strategy}"
            )
    setup = _Setup(config, num_classes, image_shape, strategy, population_based)
    generation = Generation(
        config.population_size,
        _split_key,
        _ask,
        partial(_evaluate, setup),
        partial(_tell_and_ask, setup),
    )
    return over_members(
        config,
        partial(_init, setup),
        generation,
        partial(_result, setup),
        partial(_finished, setup),
    )
