"""Ryan, Thakkar, Turrell & Parikh 2024, "CoEvolutionary Selection Training for Efficient Deep
Neural Network Training". Implements sections III-A and III-B.

The predator, a CNN, first trains on the whole training set. Then subsets of it (the prey) evolve
repeatedly towards the examples that are hard for the predator, which trains on the hardest subset
for some epochs. One forward pass over the training set gives each example's loss, so that the
fitness of any subset is a mean of known numbers: exact, and almost free. A step is one epoch of the
predator's training; where an epoch begins with a selection, that is part of it.

`selection` replaces the evolution by other rules in the same trainer: the hardest examples
(`top_k`, the optimum of the prey's fitness, which is additive), a sample in proportion to the loss,
a random subset, the whole set.

Where the paper is silent or we differ from it, and why:

- The network is only described as 10 layers of up to 512 nodes; it is the cited one (`VGG10`).
- Epochs, batch size and rates: Adam 1e-3 and batches of 64 (Keras's usual ones); one epoch on the
  whole set, 60 in all (Figs. 2 to 7), a new selection every 5 (the figures show no number).
- The prey's operators: DEAP is named, its operators are not. Tournaments of 3, two-point crossover
  with probability 0.5, mutation with probability 0.2 that draws each index anew with probability
  0.05, as in DEAP's examples; parents and children compete ("retaining the best individuals and
  discarding the worst ones"). 50 subsets, 20 generations a selection.
- Fitness is the mean loss; `difficulty="error"` takes the error rate instead.
- Subsets may hold an example more than once, as random integers do; `repair` replaces repetitions.
- Training images are not augmented, as nothing says that they are.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jaxtyping import Bool, Float, Float32, Int, Int32

from evojax_suite import networks, training, types
from evojax_suite.data.transforms import normalize
from evojax_suite.operators import tournament
from evojax_suite.systems.cest import subsets
from evojax_suite.systems.cest.config import Config, Params
from evojax_suite.systems.cest.subsets import Groups
from evojax_suite.types import Array, IntScalar, PRNGKey, PyTree, Scalar


@struct.dataclass
class Data(types.TrainingData):
    """The training and the validation split on the device."""

    groups: Groups  # the examples that the places of a subset may hold
    validation: training.Batches  # normalised


@struct.dataclass
class State:
    """The predator in training, the difficulty of each example for it, and the prey."""

    fit: training.FitState
    difficulty: Float[Array, "examples"]  # NaN where it was never measured
    wrong_in_a_row: Int32[Array, "examples"]  # latest measurements, all of them wrong
    prey: Int32[Array, "population places"]
    chosen: Int32[Array, "examples"]  # the examples to train on come first
    num_chosen: Int32[Array, ""]
    selections: Int32[Array, ""]  # done
    gradient_examples: Float32[Array, ""]  # examples whose gradient was computed
    measured_examples: Float32[Array, ""]  # examples of the passes
    epoch: Int32[Array, ""]  # done


class Metrics(NamedTuple):
    """What one epoch reports."""

    generation: IntScalar  # the epoch, from 1
    selections: IntScalar
    loss: Scalar  # mean over the examples trained on, when training showed them
    accuracy: Scalar
    validation_loss: Scalar
    validation_accuracy: Scalar
    difficulty_mean: Scalar  # over the whole training set
    difficulty_chosen: Scalar  # over the examples trained on
    difficulty_most: Scalar  # of the hardest subset that there is
    distinct: IntScalar  # examples among the chosen, each counted once
    gradient_examples: Scalar
    measured_examples: Scalar
    num_failed: IntScalar  # examples whose loss was NaN or infinite
    stage_seconds: dict[str, float]  # measured where `timed`; no part of the result


def subset_size(config: Config, num_images: int) -> int:
    """Returns the number of examples of a subset."""
    whole = config.selection == "full"
    return num_images if whole else max(1, round(config.fraction * num_images))


def make_data(config: Config, dataset: types.Dataset) -> Data:
    """The training and the validation split of `dataset`; the test split stays closed."""
    size = subset_size(config, len(dataset.train))
    balanced = config.balanced and config.selection != "full"
    return Data(
        **vars(types.training_data(dataset)),
        groups=subsets.make_groups(dataset.train.labels, size, dataset.num_classes, balanced),
        validation=training.batches_of(dataset, dataset.validation, config.engine),
    )


def prey_fitness(
    prey: Int[Array, "population places"], difficulty: Float[Array, "examples"]
) -> Float[Array, "population"]:
    """Mean difficulty of subsets: higher is fitter."""
    return difficulty[prey].mean(1)


def evolve(
    key: PRNGKey,
    prey: Int[Array, "population places"],
    difficulty: Float[Array, "examples"],
    groups: Groups,
    config: Config,
    params: Params,
) -> Int[Array, "population places"]:
    """Subsets after `prey_generations` generations, the fittest first."""
    size = config.prey_population
    mutation_rates = params.mutation_rate, params.gene_mutation_rate

    def without_repetitions(key: PRNGKey, prey: Array) -> Array:
        if not config.repair:
            return prey
        keys = jax.random.split(key, len(prey))
        return jax.lax.map(lambda one: subsets.repaired(one[0], one[1], groups), (keys, prey))

    def fittest(prey: Array, fitness: Array):
        best = jnp.argsort(-fitness, stable=True)[:size]
        return prey[best], fitness[best]

    def generation(carry: PyTree, key: PRNGKey):
        prey, fitness = carry
        key_parents, key_crossover, key_mutation, key_repair = jax.random.split(key, 4)
        parents = prey[tournament(key_parents, fitness, size, config.tournament_size)]
        pairs = parents[::2], parents[1::2]
        children = subsets.two_point_crossover(key_crossover, *pairs, params.crossover_rate)
        children = jnp.concatenate(children)
        children = subsets.uniform_mutation(key_mutation, children, groups, *mutation_rates)
        children = without_repetitions(key_repair, children)
        everyone = jnp.concatenate([prey, children])
        fitness = jnp.concatenate([fitness, prey_fitness(children, difficulty)])
        return fittest(everyone, fitness), None

    key_start, key_generations = jax.random.split(key)
    prey = without_repetitions(key_start, prey)
    start = fittest(prey, prey_fitness(prey, difficulty))
    keys = jax.random.split(key_generations, config.prey_generations)
    return jax.lax.scan(generation, start, keys)[0][0]


def select(
    key: PRNGKey,
    prey: Int[Array, "population places"],
    hardness: Float[Array, "examples"],
    groups: Groups,
    config: Config,
    params: Params,
) -> tuple[Int[Array, "places"], Int[Array, "population places"]]:
    """A subset by the rule of `config`, and the prey after it. hardness: >= 0."""
    key_rule, key_share, key_mix = jax.random.split(key, 3)
    match config.selection:
        case "cest":
            prey = evolve(key_rule, prey, hardness, groups, config, params)
            subset = prey[0]
        case "top_k":
            subset = subsets.ranked(hardness, groups)
        case "loss_proportional":
            subset = subsets.sampled(key_rule, hardness, groups)
        case "random":
            subset = subsets.random_subset(key_rule, groups)
        case "full":
            return jnp.arange(len(groups.group_of), dtype=jnp.int32), prey
        case _:
            raise ValueError(f"unknown selection {config.selection!r}")
    if config.random_share:
        other = subsets.random_subset(key_share, groups)
        count = round(config.random_share * len(subset))
        replaced = jax.random.permutation(key_mix, len(subset)) < count
        subset = jnp.where(replaced, other, subset)
    return subset, prey


@dataclass
class _Stages:
    """Runs the stages of a step: as parts of one program or, `timed`, each as a separate program
    whose seconds and compilation are measured."""

    timed: bool
    compiled: dict[str, Any] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)  # of the current step

    def run(self, name: str, function: Callable[..., Any], *arguments: Any) -> Any:
        """Returns `function(*arguments)`; its seconds count as those of the stage `name`."""
        if not self.timed:
            return function(*arguments)
        start = time.perf_counter()
        if name not in self.compiled:
            self.compiled[name] = jax.jit(function).lower(*arguments).compile()
            taken = time.perf_counter() - start
            self.seconds["compilation"] = self.seconds.get("compilation", 0.0) + taken
            start = time.perf_counter()
        value = jax.block_until_ready(self.compiled[name](*arguments))
        self.seconds[name] = time.perf_counter() - start
        return value

    def run_if(
        self, condition: Array, name: str, function: Callable[..., State], state: State, *more: Any
    ) -> State:
        """Returns what `run` returns where `condition` is true, else `state`."""
        if self.timed:
            return self.run(name, function, state, *more) if condition else state
        return jax.lax.cond(
            condition, lambda state: function(state, *more), lambda state: state, state
        )


@dataclass(frozen=True)
class _Trainer:
    """The functions of the algorithm and what does not change in a training."""

    config: Config
    num_classes: int
    image_shape: tuple[int, int, int]
    network: nn.Module
    stages: _Stages

    def init(self, key: PRNGKey, params: Params, data: Data) -> State:
        del params
        num_images = len(data.labels)
        key_fit, key_prey = jax.random.split(key)
        members = self.config.prey_population if self.config.selection == "cest" else 1
        start = training.start_fit(key_fit, self.network, self.config.training, self.image_shape)
        return State(
            fit=start,
            difficulty=jnp.full(num_images, jnp.nan),
            wrong_in_a_row=jnp.zeros(num_images, jnp.int32),
            prey=subsets.drawn(key_prey, data.groups, members),
            chosen=jnp.arange(num_images, dtype=jnp.int32),
            num_chosen=jnp.int32(num_images),
            selections=jnp.int32(0),
            gradient_examples=jnp.float32(0),
            measured_examples=jnp.float32(0),
            epoch=jnp.int32(0),
        )

    def step(self, key: PRNGKey, state: State, params: Params, data: Data) -> tuple[State, Metrics]:
        config, stages = self.config, self.stages
        key_choose, key_train = jax.random.split(key)
        stages.seconds = {}
        needs_losses = config.selection in ("cest", "top_k", "loss_proportional")
        selecting = passing = self._begins_with_selection(state.epoch)
        if config.reuse_training_losses:  # all are known after an epoch on all of them
            passing &= ~((state.selections == 0) & (config.initial_epochs > 0))
        if needs_losses and config.pass_fraction:
            state = stages.run_if(passing, "pass", self._measure, state, data)
        if config.selection != "full":
            arguments = (state, key_choose, params, data)
            state = stages.run_if(selecting, "evolution", self._choose, *arguments)
        state, seen = stages.run("training", self._train, key_train, state, data)
        if needs_losses and config.reuse_training_losses:
            is_last = self._begins_with_selection(state.epoch)  # the next epoch does
            state = stages.run_if(is_last, "memory", self._remember, state, seen)
        metrics = stages.run("validation", self._report, state, seen, data)
        return state, metrics._replace(stage_seconds=stages.seconds)

    def result(self, state: State, params: Params, data: Data) -> PyTree:
        del params, data
        return state.fit.variables

    def finished(self, state: State) -> Array:
        return state.epoch >= self.config.training.num_epochs

    def _begins_with_selection(self, epoch: IntScalar) -> Bool[Array, ""]:
        since = epoch - self.config.initial_epochs
        return (since >= 0) & (since % self.config.epochs_per_selection == 0)

    def _measure(self, state: State, data: Data) -> State:
        """The state after a pass over the training set, or over the next part of it."""
        num_images = len(data.labels)
        count = max(1, round(self.config.pass_fraction * num_images))
        if count == num_images:
            part, images, labels = jnp.arange(num_images), data.images, data.labels
        else:
            part = (state.selections * count + jnp.arange(count)) % num_images
            images, labels = data.images[part], data.labels[part]
        images = normalize(images, data.mean, data.std)
        batch_size = self.config.engine.resolved_evaluation_batch_size(self.image_shape)
        variables = state.fit.variables
        outputs = training.judge_each(self.network, variables, images, labels, batch_size)
        losses = jnp.zeros(num_images).at[part].set(outputs.losses)
        correct = jnp.zeros(num_images, bool).at[part].set(outputs.correct)
        known = jnp.zeros(num_images, bool).at[part].set(True)
        state = self._with_difficulties(state, losses, correct, known)
        return replace(state, measured_examples=state.measured_examples + count)

    def _remember(self, state: State, seen: training.ExampleStatistics) -> State:
        """The state with the losses of the last epoch of training as difficulties."""
        return self._with_difficulties(state, seen.losses, seen.correct, jnp.isfinite(seen.losses))

    def _with_difficulties(
        self,
        state: State,
        losses: Float[Array, "examples"],
        correct: Bool[Array, "examples"],
        known: Bool[Array, "examples"],
    ) -> State:
        """The state with new difficulties of the examples where `known` is True."""
        new = losses if self.config.difficulty == "loss" else (~correct).astype(jnp.float32)
        new = jnp.where(jnp.isfinite(losses), new, 0.0)  # a failed loss must not be the hardest
        old = jnp.where(jnp.isnan(state.difficulty), new, state.difficulty)
        mixed = self.config.difficulty_decay * old + (1 - self.config.difficulty_decay) * new
        in_a_row = jnp.where(correct, 0, state.wrong_in_a_row + 1)
        return replace(
            state,
            difficulty=jnp.where(known, mixed, state.difficulty),
            wrong_in_a_row=jnp.where(known, in_a_row, state.wrong_in_a_row),
        )

    def _hardness(self, state: State) -> Float[Array, "examples"]:
        """The difficulty of each example; the mean where it is unknown, 0 where it is given up."""
        unknown = jnp.isnan(state.difficulty)
        values = jnp.where(unknown, jnp.nanmean(state.difficulty), state.difficulty)
        values = jnp.where(unknown.all(), 1.0, values)
        if self.config.give_up_after:
            values = jnp.where(state.wrong_in_a_row >= self.config.give_up_after, 0.0, values)
        return values

    def _choose(self, state: State, key: PRNGKey, params: Params, data: Data) -> State:
        """The state with the examples to train on next."""
        hardness = self._hardness(state)
        subset, prey = select(key, state.prey, hardness, data.groups, self.config, params)
        padding = jnp.zeros(len(data.labels) - len(subset), jnp.int32)
        return replace(
            state,
            prey=prey,
            chosen=jnp.concatenate([subset, padding]),
            num_chosen=jnp.int32(len(subset)),
            selections=state.selections + 1,
        )

    def _train(
        self, key: PRNGKey, state: State, data: Data
    ) -> tuple[State, training.ExampleStatistics]:
        """The state after an epoch on the chosen examples, and what training saw of them."""
        images = normalize(data.images, data.mean, data.std)
        buffer = images, jax.nn.one_hot(data.labels, self.num_classes)
        shown = state.num_chosen, 1, state.chosen
        fit, seen = training.fit_epochs(
            key, self.network, self.config.training, 1, state.fit, *buffer, *shown
        )
        gradient_examples = state.gradient_examples + state.num_chosen
        epoch = state.epoch + 1
        return replace(state, fit=fit, gradient_examples=gradient_examples, epoch=epoch), seen

    def _report(self, state: State, seen: training.ExampleStatistics, data: Data) -> Metrics:
        evaluation = training.evaluate(self.network, state.fit.variables, data.validation)
        num_images = len(data.labels)
        inside = jnp.arange(num_images) < state.num_chosen
        shown = jnp.zeros(num_images, bool).at[state.chosen].max(inside)
        failed = shown & ~jnp.isfinite(seen.losses)
        values = self._hardness(state)
        return Metrics(
            generation=state.epoch,
            selections=state.selections,
            loss=jnp.mean(seen.losses, where=shown & ~failed),
            accuracy=jnp.mean(seen.correct, where=shown),
            validation_loss=evaluation.cross_entropy,
            validation_accuracy=evaluation.accuracy,
            difficulty_mean=values.mean(),
            difficulty_chosen=jnp.mean(values[state.chosen], where=inside),
            difficulty_most=values[subsets.ranked(values, data.groups)].mean(),
            distinct=shown.sum(),
            gradient_examples=state.gradient_examples,
            measured_examples=state.measured_examples,
            num_failed=failed.sum(),
            stage_seconds={},
        )


def build(
    config: Config, num_classes: int, image_shape: tuple[int, int, int], timed: bool = False
) -> types.Algorithm[State, Params, Data, Metrics, PyTree]:
    """One step is one epoch; the result is the flax variables of the predator. `timed` measures the
    stages of a step and their compilation; a step then cannot be jitted as a whole. What it
    computes is the same."""
    network = networks.create(config.network, num_classes, image_shape)
    trainer = _Trainer(config, num_classes, image_shape, network, _Stages(timed))
    functions = trainer.init, trainer.step, trainer.result, trainer.finished
    return types.Algorithm(*functions, scannable=not timed)


def cost_seconds(stage_seconds: dict[str, float]) -> float:
    """Seconds that a rule costs, the sum over its stages except validation, which is for the curves
    alone, and compilation, which happens once."""
    return sum(stage_seconds.get(name, 0.0) for name in ("training", "pass", "evolution", "memory"))


def num_gradient_examples(config: Config, num_images: int) -> int:
    """Number of gradients of single examples that a whole run computes."""
    first = min(config.initial_epochs, config.training.num_epochs)
    rest = config.training.num_epochs - first
    return first * num_images + rest * subset_size(config, num_images)


def epochs_of_equal_gradients(config: Config, num_images: int) -> int:
    """Epochs on the whole set that compute as many gradients, or a few more."""
    return int(np.ceil(num_gradient_examples(config, num_images) / num_images))
