"""Ryan, Thakkar, Turrell & Parikh 2024, section II: the general scheme, after Zheng, Lan &
Castellani 2023, in which predators and prey are both populations.

A predator is a network, a prey one training example. In each generation every predator trains on
the current prey, augmented anew whenever it is shown (the prey's reproduction). The fitness of a
predator is the part of the prey that it then classifies correctly, the fitness of a prey the number
of predators that misclassify it. One pass of each predator over the training set gives both,
exactly. Predators reproduce by fitness, and the next prey are drawn by fitness from the whole
training set.

Where the paper is silent, this module does the following:

- Parents are drawn in proportion to fitness; the best `num_elites` predators stay as they are.
- Crossover takes each layer whole from one of two parents, half from either. Networks with
  different initial weights lose much by it, so predators share theirs unless `shared_start` is off.
- Mutation adds to each weight Gaussian noise of `mutation_scale` times its layer's deviation.
- Prey are drawn without repetition, in proportion to the number of predators that misclassify
  them; those that no predator misclassifies come last.
- A predator keeps its optimizer's state; a child has its first parent's.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from annotated_types import Ge
from flax import struct
from jaxtyping import Float, Int, Int32
from pydantic import NonNegativeFloat, NonNegativeInt, PositiveInt

from evojax_suite import networks, training, types
from evojax_suite.configuration import Scalars, Share, configuration
from evojax_suite.data.transforms import normalize
from evojax_suite.networks import NetworkConfig
from evojax_suite.systems.cest import subsets
from evojax_suite.systems.cest.algorithm import Data
from evojax_suite.training import EngineConfig, FitState, TrainingConfig
from evojax_suite.types import Array, IntScalar, PRNGKey, PyTree, Scalar


@configuration
class Config:
    """Sizes and choices. The size of the prey is that of the data's groups."""

    num_predators: Annotated[int, Ge(2)] = 8
    """Number of networks."""
    num_elites: NonNegativeInt = 1
    """Number of predators that reproduction leaves as they are."""
    num_generations: PositiveInt = 60
    """Number of generations, each with one training of all predators."""
    shared_start: bool = True
    """Start all predators with the same weights."""

    network: NetworkConfig = NetworkConfig(network="VGG10", width=256)
    training: TrainingConfig = TrainingConfig(
        num_epochs=1, batch_size=64, crop_padding=2, flip=True, siamese=("rotate",)
    )
    """Training in a generation; augmentation is the prey's reproduction (crop, flip, rotation)."""
    engine: EngineConfig = EngineConfig()

    def __post_init__(self):
        if self.num_elites >= self.num_predators:
            most = self.num_predators - 1
            raise ValueError(f"num_elites must be in 0..{most}, got {self.num_elites}")
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
    """Deviation of the noise on a weight, relative to that of its layer's weights."""


@struct.dataclass
class State:
    """Both populations."""

    predators: FitState  # leading axis that of the predators; before the last reproduction
    fitness: Float[Array, "predators"]  # of these predators
    validation: Float[Array, "predators"]  # their accuracy on the validation split
    prey: Int32[Array, "prey"]  # examples to train on next
    generation: Int32[Array, ""]  # done


class Young(NamedTuple):
    """The predators of a generation before their training, and the prey that they train on."""

    predators: FitState  # leading axis that of the predators
    prey: Int[Array, "prey"]  # positions in the training set


class Trained(NamedTuple):
    """The predators after their training; leading axes that of the predators."""

    predators: FitState
    presentation: training.ExampleStatistics  # of the whole training set
    validation: Float[Array, "predators"]  # accuracy


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
    """The next predators: the elites, then children. fitness: in [0, 1], higher is better."""
    size = config.num_predators
    key_parents, key_both, key_layers, key_who, key_noise = jax.random.split(key, 5)
    usable = jnp.where(jnp.isfinite(fitness), fitness, 0.0)
    log_odds = jnp.where(usable > 0, jnp.log(jnp.maximum(usable, 1e-12)), -1e9)
    first, second = jax.random.categorical(key_parents, log_odds, shape=(2, size))
    is_elite = jnp.arange(size) < config.num_elites
    first = jnp.where(is_elite, jnp.argsort(-usable, stable=True), first)
    crossed = ~is_elite & (jax.random.uniform(key_both, (size,)) < params.crossover_rate)
    mutates = ~is_elite & (jax.random.uniform(key_who, (size,)) < params.mutation_rate)

    def layer_of(path: tuple[Any, ...]) -> str:
        return "/".join(str(part.key) for part in path[:-1])

    def along(flags: Array, leaf: Array):
        return flags.reshape(-1, *[1] * (leaf.ndim - 1))

    paths = jax.tree_util.tree_flatten_with_path(predators.parameters)[0]
    layers = sorted({layer_of(path) for path, _ in paths})
    from_second = jax.random.bernoulli(key_layers, 0.5, (len(layers), size)) & crossed
    noise_keys = iter(jax.random.split(key_noise, len(paths)))

    def mixed(path: tuple[Any, ...], leaf: Array):
        name = layer_of(path)
        if name not in layers:  # statistics of a layer without parameters
            return leaf[first]
        return jnp.where(along(from_second[layers.index(name)], leaf), leaf[second], leaf[first])

    def child(path: tuple[Any, ...], leaf: Array):
        values = mixed(path, leaf)
        deviation = values.std(tuple(range(1, values.ndim)), keepdims=True)
        noise = jax.random.normal(next(noise_keys), values.shape) * deviation
        return values + jnp.where(along(mutates, values), params.mutation_scale * noise, 0.0)

    mapped = jax.tree_util.tree_map_with_path
    return FitState(
        parameters=mapped(child, predators.parameters),
        statistics={kind: mapped(mixed, each) for kind, each in predators.statistics.items()},
        optimizer=jax.tree.map(lambda leaf: leaf[first], predators.optimizer),
    )


@dataclass(frozen=True)
class _PredatorPrey:
    """The functions of the algorithm and what does not change in a run."""

    config: Config
    num_classes: int
    image_shape: tuple[int, int, int]
    network: nn.Module

    def init(self, key: PRNGKey, params: Params, data: Data) -> State:
        del params
        size = self.config.num_predators
        key_start, key_prey = jax.random.split(key)

        def start(key: PRNGKey):
            return training.start_fit(key, self.network, self.config.training, self.image_shape)

        if self.config.shared_start:
            predators = jax.tree.map(lambda leaf: jnp.stack([leaf] * size), start(key_start))
        else:
            predators = jax.vmap(start)(jax.random.split(key_start, size))
        prey = subsets.random_subset(key_prey, data.groups)
        return State(predators, jnp.ones(size), jnp.zeros(size), prey, jnp.int32(0))

    def ask(self, key: PRNGKey, state: State, params: Params, data: Data) -> Young:
        del data
        predators = jax.lax.cond(
            state.generation > 0,
            lambda: reproduce(key, state.predators, state.fitness, self.config, params),
            lambda: state.predators,
        )
        return Young(predators, state.prey)

    def evaluate(
        self, key: PRNGKey, young: Young, params: Params, data: Data, members: Int[Array, "members"]
    ) -> Trained:
        del params
        network, config, engine = self.network, self.config.training, self.config.engine
        images = normalize(data.images, data.mean, data.std)
        labels = jax.nn.one_hot(data.labels, self.num_classes)
        places = jnp.zeros(len(data.labels), jnp.int32).at[: len(young.prey)].set(young.prey)
        shown = len(young.prey), config.num_epochs, places
        batch_size = engine.resolved_evaluation_batch_size(self.image_shape)

        def live(key: PRNGKey, fit: PyTree):
            fit, _ = training.fit_epochs(key, network, config, 1, fit, images, labels, *shown)
            variables = fit.variables
            outputs = training.judge_each(network, variables, images, data.labels, batch_size)
            validation = training.evaluate(network, variables, data.validation)
            return Trained(fit, outputs, validation.accuracy)

        fits = jax.tree.map(lambda leaf: leaf[members], young.predators)
        keys = jax.random.split(key, self.config.num_predators)[members]
        return training.map_members(live, (keys, fits), engine.resolved_members_in_flight)

    def tell(
        self, key: PRNGKey, state: State, young: Young, trained: Trained, params: Params, data: Data
    ) -> tuple[State, Metrics]:
        del young, params
        predators, outputs, validation = trained
        failed = ~jnp.isfinite(outputs.losses).all(1)
        fitness = jnp.where(failed, 0.0, outputs.correct[:, state.prey].mean(1))
        wrong = (~outputs.correct & ~failed[:, None]).sum(0).astype(jnp.float32)
        prey = subsets.sampled(key, wrong, data.groups)
        validation = jnp.where(failed, 0.0, validation)
        state = State(predators, fitness, validation, prey, state.generation + 1)
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

    def result(self, state: State, params: Params, data: Data) -> PyTree:
        del params, data
        best = state.validation.argmax()
        return jax.tree.map(lambda leaf: leaf[best], state.predators.variables)

    def finished(self, state: State) -> Array:
        return state.generation >= self.config.num_generations


def build(
    config: Config, num_classes: int, image_shape: tuple[int, int, int]
) -> types.Algorithm[State, Params, Data, Metrics, PyTree]:
    """One step is one generation. `data` is CEST's; the result is the flax variables of the
    predator that is best on the validation split."""
    network = networks.create(config.network, num_classes, image_shape)
    run = _PredatorPrey(config, num_classes, image_shape, network)

    def split_key(key: PRNGKey):
        return types.StepKeys(*jax.random.split(key, 3))

    parts = split_key, run.ask, run.evaluate, run.tell
    generation = types.Generation(config.num_predators, *parts)
    functions = run.init, generation.step, run.result, run.finished
    return types.Algorithm(*functions, generation=generation, image_shape=image_shape)
