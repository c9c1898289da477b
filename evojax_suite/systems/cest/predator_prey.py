"""Ryan, Thakkar, Turrell & Parikh 2024, section II: the general scheme, after Zheng, Lan &
Castellani 2023, in which predators and prey are both populations.

A predator is a network, a prey one training example. In each generation every predator trains on
the current prey, augmented anew whenever it is shown (the prey's reproduction); its fitness is the
part of the prey that it then classifies correctly, that of a prey how many predators misclassify
it. One pass of each predator over the training set gives both, exactly. Predators reproduce by
fitness, and the next prey are drawn from the whole training set by theirs.

Where the paper is silent, and what is done:

- Parents are drawn in proportion to fitness; the best `num_elites` predators stay as they are.
- Crossover takes each layer whole from one of two parents, half from either. Networks that began
  apart lose much by it, so predators share their initial weights unless `shared_start` is off.
- Mutation adds to each weight Gaussian noise of `mutation_scale` times its layer's deviation.
- Prey are drawn without repetition, in proportion to the number of predators that misclassify
  them; those that none does come last.
- A predator keeps its optimizer's state; a child has its first parent's.
"""

from __future__ import annotations

from dataclasses import field
from functools import partial
from typing import Annotated, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from annotated_types import Ge
from flax import struct
from jaxtyping import Bool, Float, Int, Int32, Shaped
from pydantic import NonNegativeFloat, NonNegativeInt, PositiveInt

from evojax_suite import networks
from evojax_suite.configuration import Scalars, Share, configuration
from evojax_suite.data.transforms import normalize
from evojax_suite.networks import NetworkConfig
from evojax_suite.systems.cest import subsets
from evojax_suite.systems.cest.algorithm import Data
from evojax_suite.training import (
    EngineConfig,
    ExampleStatistics,
    FitState,
    TrainingConfig,
    evaluate,
    fit_epochs,
    judge_each,
    map_members,
    start_fit,
)
from evojax_suite.types import (
    Algorithm,
    Array,
    Generation,
    IntScalar,
    PRNGKey,
    PyTree,
    Scalar,
    StepKeys,
)


@configuration
class Config:
    """Sizes and choices. The size of the prey is that of the data's groups."""

    num_predators: Annotated[int, Ge(2)] = 8
    """Networks."""
    num_elites: NonNegativeInt = 1
    """Predators that no reproduction changes."""
    num_generations: PositiveInt = 60
    """Each with one training of all predators."""
    shared_start: bool = True
    """All predators begin with the same weights."""

    network: NetworkConfig = field(
        default_factory=lambda: NetworkConfig(network="VGG10", width=256)
    )
    training: TrainingConfig = field(
        default_factory=lambda: TrainingConfig(
            num_epochs=1, batch_size=64, crop_padding=2, flip=True, siamese=("rotate",)
        )
    )
    """Training in a generation; augmentation is the prey's reproduction (crop, flip, rotation)."""
    engine: EngineConfig = field(default_factory=EngineConfig)

    def __post_init__(self):
        if self.num_elites >= self.num_predators:
            raise ValueError(
                f"num_elites must be in 0..{self.num_predators - 1}, got {self.num_elites}"
            )
        if self.training.schedule != "constant":
            raise ValueError(f"schedule must be constant, got {self.training.schedule}")


@struct.dataclass
class Params(Scalars):
    """Scalars that users sweep; traced."""

    crossover_rate: Share = 0.5
    """Probability that a child has two parents, in [0, 1]."""
    mutation_rate: Share = 0.5
    """Probability that a child mutates, in [0, 1]."""
    mutation_scale: NonNegativeFloat = 0.01
    """Deviation of the noise on a weight, of the deviation of its layer's weights."""


@struct.dataclass
class State:
    """Both populations."""

    predators: FitState  # leading axis theirs, as they were before the last reproduction
    fitness: Float[Array, "predators"]  # of these
    validation: Float[Array, "predators"]  # their accuracy on the validation split
    prey: Int32[Array, "prey"]  # examples to train on next
    generation: Int32[Array, ""]  # done


class Young(NamedTuple):
    """The predators of a generation before their training, and what they train on."""

    predators: FitState  # leading axis that of the predators
    prey: Int[Array, "prey"]  # positions in the training set


class Trained(NamedTuple):
    """The predators after their training, what they make of each image, and their validation
    accuracy; leading axes that of the predators."""

    predators: FitState
    presentation: ExampleStatistics
    validation: Float[Array, "predators"]


class Metrics(NamedTuple):
    """What one generation reports."""

    generation: IntScalar  # from 1
    fitness_best: Scalar  # part of the prey that the best predator classifies
    fitness_mean: Scalar
    validation_accuracy: Scalar  # of the best predator there
    validation_accuracy_mean: Scalar
    prey_fitness_mean: Scalar  # predators that misclassify an example of the next prey
    wrong_mean: Scalar  # the same over the whole training set
    num_failed: IntScalar  # predators with a loss that is NaN or infinite


def reproduce(
    key: PRNGKey,
    predators: FitState,
    fitness: Float[Array, "predators"],
    config: Config,
    params: Params,
) -> FitState:
    """The next predators: the elites, then children; higher fitness is better, in [0, 1]."""
    size = config.num_predators
    key_parents, key_both, key_layers, key_who, key_noise = jax.random.split(key, 5)
    usable = jnp.where(jnp.isfinite(fitness), fitness, 0.0)
    log_odds = jnp.where(usable > 0, jnp.log(jnp.maximum(usable, 1e-12)), -1e9)
    first, second = jax.random.categorical(key_parents, log_odds, shape=(2, size))
    is_elite = jnp.arange(size) < config.num_elites
    first = jnp.where(is_elite, jnp.argsort(-usable, stable=True), first)
    crossed = ~is_elite & (jax.random.uniform(key_both, (size,)) < params.crossover_rate)
    mutates = ~is_elite & (jax.random.uniform(key_who, (size,)) < params.mutation_rate)

    def layer_of(path) -> str:
        return "/".join(str(part.key) for part in path[:-1])

    def along(
        flags: Bool[Array, "predators"], leaf: Shaped[Array, "predators *shape"]
    ) -> Bool[Array, "predators ..."]:
        return flags.reshape(-1, *[1] * (leaf.ndim - 1))

    paths = jax.tree_util.tree_flatten_with_path(predators.parameters)[0]
    layers = sorted({layer_of(path) for path, _ in paths})
    from_second = jax.random.bernoulli(key_layers, 0.5, (len(layers), size)) & crossed
    noise_keys = iter(jax.random.split(key_noise, len(paths)))

    def mixed(path, leaf):
        name = layer_of(path)
        if name not in layers:  # statistics of a layer without parameters
            return leaf[first]
        return jnp.where(along(from_second[layers.index(name)], leaf), leaf[second], leaf[first])

    def child(path, leaf):
        values = mixed(path, leaf)
        deviation = values.std(tuple(range(1, values.ndim)), keepdims=True)
        noise = jax.random.normal(next(noise_keys), values.shape) * deviation
        return values + jnp.where(along(mutates, values), params.mutation_scale * noise, 0.0)

    return FitState(
        parameters=jax.tree_util.tree_map_with_path(child, predators.parameters),
        statistics={
            kind: jax.tree_util.tree_map_with_path(mixed, collection)
            for kind, collection in predators.statistics.items()
        },
        optimizer=jax.tree.map(lambda leaf: leaf[first], predators.optimizer),
    )


class _Setup(NamedTuple):
    """What does not change in a run."""

    config: Config
    num_classes: int
    image_shape: tuple[int, int, int]
    network: nn.Module
    batch_size: int
    in_flight: int
    size: int


def _init(setup: _Setup, key: Array, params: Params, data: Data) -> State:
    del params
    key_start, key_prey = jax.random.split(key)

    def start(key):
        return start_fit(key, setup.network, setup.config.training, setup.image_shape)

    if setup.config.shared_start:
        one = start(key_start)
        predators = jax.tree.map(lambda leaf: jnp.stack([leaf] * setup.size), one)
    else:
        predators = jax.vmap(start)(jax.random.split(key_start, setup.size))
    return State(
        predators=predators,
        fitness=jnp.ones(setup.size),
        validation=jnp.zeros(setup.size),
        prey=subsets.random_subset(key_prey, data.groups),
        generation=jnp.int32(0),
    )


def _split_key(key: Array) -> StepKeys:
    return StepKeys(*jax.random.split(key, 3))


def _ask(setup: _Setup, key: Array, state: State, params: Params, data: Data) -> Young:
    del data
    predators = jax.lax.cond(
        state.generation > 0,
        lambda: reproduce(key, state.predators, state.fitness, setup.config, params),
        lambda: state.predators,
    )
    return Young(predators, state.prey)


def _train(
    setup: _Setup, key: Array, young: Young, params: Params, data: Data, members: Array
) -> Trained:
    del params
    images = normalize(data.images, data.mean, data.std)
    labels = jax.nn.one_hot(data.labels, setup.num_classes)
    places = jnp.zeros(len(data.labels), jnp.int32).at[: len(young.prey)].set(young.prey)

    def live(key, fit):
        fit, _ = fit_epochs(
            key,
            setup.network,
            setup.config.training,
            1,
            fit,
            images,
            labels,
            len(young.prey),
            setup.config.training.num_epochs,
            places,
        )
        found = judge_each(setup.network, fit.variables, images, data.labels, setup.batch_size)
        validation = evaluate(setup.network, fit.variables, data.validation)
        return Trained(fit, found, validation.accuracy)

    own = jax.tree.map(lambda leaf: leaf[members], young.predators)
    return map_members(live, (jax.random.split(key, setup.size)[members], own), setup.in_flight)


def _tell(
    key: Array, state: State, young: Young, trained: Trained, params: Params, data: Data
) -> tuple[State, Metrics]:
    del young, params
    predators, found, validation = trained
    failed = ~jnp.isfinite(found.losses).all(1)
    fitness = jnp.where(failed, 0.0, found.correct[:, state.prey].mean(1))
    wrong = (~found.correct & ~failed[:, None]).sum(0).astype(jnp.float32)
    prey = subsets.sampled(key, wrong, data.groups)
    validation = jnp.where(failed, 0.0, validation)
    state = State(
        predators=predators,
        fitness=fitness,
        validation=validation,
        prey=prey,
        generation=state.generation + 1,
    )
    return state, Metrics(
        generation=state.generation,
        fitness_best=fitness.max(),
        fitness_mean=fitness.mean(),
        validation_accuracy=validation.max(),
        validation_accuracy_mean=validation.mean(),
        prey_fitness_mean=wrong[prey].mean(),
        wrong_mean=wrong.mean(),
        num_failed=failed.sum(),
    )


def _result(state: State, params: Params, data: Data) -> PyTree:
    del params, data
    best = state.validation.argmax()
    return jax.tree.map(lambda leaf: leaf[best], state.predators.variables)


def _finished(setup: _Setup, state: State) -> Array:
    return state.generation >= setup.config.num_generations


def build(
    config: Config, num_classes: int, image_shape: tuple[int, int, int]
) -> Algorithm[State, Params, Data, Metrics, PyTree]:
    """One step is one generation. `data` is CEST's; the result is the flax variables of the
    predator that is best on the validation split."""
    network = networks.create(config.network, num_classes, image_shape)
    batch_size = config.engine.resolved_evaluation_batch_size(image_shape)
    in_flight = config.engine.resolved_members_in_flight
    size = config.num_predators
    setup = _Setup(config, num_classes, image_shape, network, batch_size, in_flight, size)
    generation = Generation(size, _split_key, partial(_ask, setup), partial(_train, setup), _tell)
    return Algorithm(
        partial(_init, setup),
        generation.step,
        _result,
        partial(_finished, setup),
        generation=generation,
    )
