"""Ryan, Thakkar, Turrell & Parikh 2024, "CoEvolutionary Selection Training for Efficient Deep
Neural Network Training". Implements sections III-A and III-B.

The predator, a CNN, first trains on the whole training set. Then subsets of it (the prey) evolve
repeatedly towards the examples that are hard for the predator, which trains on the hardest subset
for some epochs. One forward pass over the training set gives each example's loss, so that the
fitness of any subset is a mean of known numbers: exact, and almost free. A step is one epoch of the
predator's training; where an epoch begins with a selection, that is part of it.

`selection` replaces the evolution by other rules in the same trainer: the hardest examples
(`top_k`, the optimum of the prey's fitness, which is additive), a sample in proportion to the loss,
a random subset, the whole set; rules that choose in each step (`online`); subsets by gradients
(`gradients`); and InfoBatch (Qin et al. 2024, "InfoBatch: Lossless Training Speed Up by Unbiased
Dynamic Data Pruning"), which leaves out, at random, some of the examples whose loss was below the
mean when they were last shown, and weighs the rest of these so that the expected gradient stays
that of the whole set. The recommended rule, `reducible_loss`, is RHO-LOSS with a reference in
closed form (`reference`).

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

import math
import time
from collections.abc import Callable, Hashable
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, NamedTuple, TypeAlias

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jax.core import Tracer
from jaxtyping import Bool, Float, Float32, Int, Int32

from evojax_suite import networks, training, types
from evojax_suite.data.transforms import normalize
from evojax_suite.operators import tournament
from evojax_suite.runtime.program import COMPILED_QUICKLY
from evojax_suite.systems.cest import gradients, online, reference, subsets
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
    irreducible: Float[Array, "examples"]  # loss; 0 where no reference is needed
    outputs: gradients.Outputs | None  # of the last pass, where gradients are matched
    chosen: Int32[Array, "examples"]  # the examples to train on come first
    num_chosen: Int32[Array, ""]
    importance: Float[Array, "examples"]  # factors of their losses
    selections: Int32[Array, ""]  # done
    num_steps: Int32[Array, ""]  # of the optimizer, done
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
    prey: Int[Array, "population places"],
    difficulty: Float[Array, "examples"],
    gradients: Float[Array, "examples numbers"] | None = None,
    matching_weight: float | Scalar = 0.0,
) -> Float[Array, "population"]:
    """Fitness of subsets, higher is better: their mean difficulty.

    With `gradients` of the examples it is the difficulty, in standard deviations of the means of
    random subsets, and, by `matching_weight` in [0, 1], the squared distance of the mean gradient
    from that of all examples, in units of its expectation for random subsets.
    """
    means = difficulty[prey].mean(1)
    if gradients is None:
        return means
    size = prey.shape[1]
    hardness = (means - difficulty.mean()) / (difficulty.std() / np.sqrt(size) + 1e-12)
    distances = ((gradients[prey].mean(1) - gradients.mean(0)) ** 2).sum(1)
    mismatch = distances / (gradients.var(0).sum() / size + 1e-12)
    return (1 - matching_weight) * hardness - matching_weight * mismatch


def evolve(
    key: PRNGKey,
    prey: Int[Array, "population places"],
    difficulty: Float[Array, "examples"],
    groups: Groups,
    config: Config,
    params: Params,
    gradients: Float[Array, "examples numbers"] | None = None,
) -> Int[Array, "population places"]:
    """Subsets after `prey_generations` generations, the fittest first. gradients: of each example,
    where they are matched."""
    size = config.prey_population
    mutation_rates = params.mutation_rate, params.gene_mutation_rate

    def fitness_of(prey: Array) -> Array:
        return prey_fitness(prey, difficulty, gradients, params.matching_weight)

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
        fitness = jnp.concatenate([fitness, fitness_of(children)])
        return fittest(everyone, fitness), None

    key_start, key_generations = jax.random.split(key)
    prey = without_repetitions(key_start, prey)
    start = fittest(prey, fitness_of(prey))
    keys = jax.random.split(key_generations, config.prey_generations)
    return jax.lax.scan(generation, start, keys)[0][0]


def select(
    key: PRNGKey,
    prey: Int[Array, "population places"],
    hardness: Float[Array, "examples"],
    groups: Groups,
    config: Config,
    params: Params,
    gradients: Float[Array, "examples numbers"] | None = None,
) -> tuple[Int[Array, "places"], Int[Array, "population places"]]:
    """A subset by the rule of `config`, and the prey after it. hardness: >= 0. gradients: of each
    example, where prey matches them."""
    key_rule, key_share, key_mix = jax.random.split(key, 3)
    match config.selection:
        case "cest":
            prey = evolve(key_rule, prey, hardness, groups, config, params, gradients)
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


Programs: TypeAlias = dict[Hashable, Any]
"""Compiled stages, by name, by what they compute with, and by the shapes of their arguments."""


def _epoch(
    network: nn.Module,
    recipe: training.TrainingConfig,
    num_classes: int,
    key: PRNGKey,
    fit: training.FitState,
    data: types.TrainingData,
    chosen: Int32[Array, "examples"],
    num_chosen: Int32[Array, ""],
    importance: Float[Array, "examples"],
    num_steps: IntScalar,
) -> tuple[training.FitState, training.ExampleStatistics]:
    """An epoch on the first `num_chosen` of `chosen`. num_steps: those of the whole training."""
    images = normalize(data.images, data.mean, data.std)
    buffer = images, jax.nn.one_hot(data.labels, num_classes)
    how, shown = (network, recipe, num_steps), (num_chosen, 1, chosen, importance)
    return training.fit_epochs(key, *how, fit, *buffer, *shown)


@dataclass
class _Stages:
    """Runs the stages of a step: as parts of one program or, `timed`, each as a separate program
    whose seconds and compilation are measured."""

    timed: bool
    compiled: Programs = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)  # of the current step

    def run(self, name: str, of: Hashable, function: Callable[..., Any], *arguments: Any) -> Any:
        """Returns `function(*arguments)`; its seconds count as those of the stage `name`. of: all
        that the function computes with but its arguments."""
        leaves = jax.tree.leaves(arguments)
        if not self.timed or any(isinstance(leaf, Tracer) for leaf in leaves):
            return function(*arguments)
        start = time.perf_counter()
        shapes = tuple((jnp.shape(leaf), jnp.result_type(leaf)) for leaf in leaves)
        program = name, of, shapes
        if program not in self.compiled:
            lowered = jax.jit(function, compiler_options=COMPILED_QUICKLY).lower(*arguments)
            self.compiled[program] = lowered.compile()
            taken = time.perf_counter() - start
            self.seconds["compilation"] = self.seconds.get("compilation", 0.0) + taken
            start = time.perf_counter()
        value = jax.block_until_ready(self.compiled[program](*arguments))
        self.seconds[name] = time.perf_counter() - start
        return value

    def run_if(
        self,
        condition: Array,
        name: str,
        of: Hashable,
        function: Callable[..., State],
        state: State,
        *more: Any,
    ) -> State:
        """Returns what `run` returns where `condition` is true, else `state`."""
        if self.timed:
            return self.run(name, of, function, state, *more) if condition else state
        return jax.lax.cond(
            condition, lambda state: function(state, *more), lambda state: state, state
        )

    def either(
        self,
        condition: Array,
        first: Callable[[State], Any],
        second: Callable[[State], Any],
        state: State,
    ) -> Any:
        """Returns what the first function returns where `condition` is true, else the second."""
        if self.timed:
            return first(state) if condition else second(state)
        return jax.lax.cond(condition, first, second, state)


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
        # Trainings of any length begin alike.
        of = self.network, replace(self.config.training, num_epochs=0), self.image_shape
        start = self.stages.run("start", of, lambda key: training.start_fit(key, *of), key_fit)
        outputs = None
        if self.config.matches_gradients:
            shapes = jax.eval_shape(self._outputs, start, data)
            outputs = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), shapes)
        return State(
            fit=start,
            difficulty=jnp.full(num_images, jnp.nan),
            wrong_in_a_row=jnp.zeros(num_images, jnp.int32),
            prey=subsets.drawn(key_prey, data.groups, members),
            irreducible=jnp.zeros(num_images),
            outputs=outputs,
            chosen=jnp.arange(num_images, dtype=jnp.int32),
            num_chosen=jnp.int32(num_images),
            importance=jnp.ones(num_images),
            selections=jnp.int32(0),
            num_steps=jnp.int32(0),
            gradient_examples=jnp.float32(0),
            measured_examples=jnp.float32(0),
            epoch=jnp.int32(0),
        )

    def step(self, key: PRNGKey, state: State, params: Params, data: Data) -> tuple[State, Metrics]:
        config, stages = self.config, self.stages
        of = config, self.num_classes, self.image_shape
        key_choose, key_train, key_reference = jax.random.split(key, 3)
        stages.seconds = {}
        selecting = passing = self._begins_with_selection(state.epoch)
        remembers = config.needs_losses and config.reuse_training_losses
        remembers |= config.selection == "infobatch"
        if config.reuse_training_losses:  # all are known after an epoch on all of them
            passing &= ~((state.selections == 0) & (config.initial_epochs > 0))
        if config.needs_reference:
            first = state.epoch == 0
            state = stages.run_if(first, "reference", of, self._refer, state, key_reference, data)
        if config.needs_losses and config.pass_fraction:
            state = stages.run_if(passing, "pass", of, self._measure, state, data)
        if config.selection != "full" and not config.is_online:
            arguments = (state, key_choose, params, data)
            state = stages.run_if(selecting, "evolution", of, self._choose, *arguments)
        train = partial(self._train_on_chosen, key_train, data)
        if config.is_online:
            first, choosing = state.epoch < config.initial_epochs, self._train_choosing
            online = partial(stages.run, "training", of, choosing, key_train, params, data)
            state, seen = stages.either(first, train, online, state)
        else:
            state, seen = train(state)
        state = replace(state, epoch=state.epoch + 1)
        if remembers:
            is_last = self._begins_with_selection(state.epoch)  # the next epoch does
            state = stages.run_if(is_last, "memory", of, self._remember, state, seen)
        metrics = stages.run("validation", of, self._report, state, seen, data)
        return state, metrics._replace(stage_seconds=stages.seconds)

    def result(self, state: State, params: Params, data: Data) -> PyTree:
        del params, data
        return state.fit.variables

    def finished(self, state: State) -> Array:
        return state.epoch >= self.config.training.num_epochs

    def _begins_with_selection(self, epoch: IntScalar) -> Bool[Array, ""]:
        each = 1 if self.config.selection == "infobatch" else self.config.epochs_per_selection
        since = epoch - self.config.initial_epochs
        return (since >= 0) & (since % each == 0)

    def _refer(self, state: State, key: PRNGKey, data: Data) -> State:
        """The state with the losses that no training could reduce."""
        images = normalize(data.images, data.mean, data.std)
        batch_size = self.config.engine.resolved_evaluation_batch_size(self.image_shape)
        found = reference.reference_probabilities(
            key, images, data.labels, self.num_classes, batch_size
        )
        return replace(state, irreducible=reference.irreducible_losses(found, data.labels))

    def _outputs(self, fit: training.FitState, data: Data) -> gradients.Outputs:
        images = normalize(data.images, data.mean, data.std)
        batch_size = self.config.engine.resolved_evaluation_batch_size(self.image_shape)
        return gradients.outputs(self.network, fit.variables, images, data.labels, batch_size)

    def _measure(self, state: State, data: Data) -> State:
        """The state after a pass over the training set, or over the next part of it."""
        num_images = len(data.labels)
        if self.config.needs_outputs:
            found, everything = self._outputs(state.fit, data), jnp.ones(num_images, bool)
            state = replace(state, measured_examples=state.measured_examples + num_images)
            if self.config.matches_gradients:
                state = replace(state, outputs=found)
            return self._with_difficulties(
                state, self._hardness_of(state, found), found.correct, everything
            )
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
        state = self._remembering(state, losses, correct, known)
        return replace(state, measured_examples=state.measured_examples + count)

    def _hardness_of(self, state: State, found: gradients.Outputs) -> Float[Array, "examples"]:
        match self.config.difficulty:
            case "el2n":
                return gradients.error_norms(found)
            case "grand":
                return gradients.norms(found)
            case _:
                return self._hardness_by_loss(state, found.losses, found.correct)

    def _hardness_by_loss(
        self, state: State, losses: Float[Array, "examples"], correct: Bool[Array, "examples"]
    ) -> Float[Array, "examples"]:
        match self.config.difficulty:
            case "error":
                return jnp.where(jnp.isfinite(losses), ~correct, jnp.nan)
            case "reducible":
                return jnp.maximum(losses - state.irreducible, 0.0)
            case _:
                return losses

    def _remember(self, state: State, seen: training.ExampleStatistics) -> State:
        """The state with the losses of the last epoch of training as difficulties."""
        return self._remembering(state, seen.losses, seen.correct, jnp.isfinite(seen.losses))

    def _remembering(
        self,
        state: State,
        losses: Float[Array, "examples"],
        correct: Bool[Array, "examples"],
        known: Bool[Array, "examples"],
    ) -> State:
        new = self._hardness_by_loss(state, losses, correct)
        return self._with_difficulties(state, new, correct, known)

    def _with_difficulties(
        self,
        state: State,
        new: Float[Array, "examples"],
        correct: Bool[Array, "examples"],
        known: Bool[Array, "examples"],
    ) -> State:
        """The state with new difficulties of the examples where `known` is True."""
        new = jnp.where(jnp.isfinite(new), new, 0.0)  # a failed loss must not be the hardest
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
        config, found = self.config, state.outputs
        state = replace(state, selections=state.selections + 1)
        if config.selection == "infobatch":
            return self._pruned(state, key)
        weights = jnp.ones(len(data.groups.places))
        if found is not None and config.selection in ("craig", "grad_match"):
            rule = gradients.craig if config.selection == "craig" else gradients.grad_match
            (subset, weights), prey = rule(found, data.groups), state.prey
        else:
            sketched = None
            if found is not None:
                key, key_sketch = jax.random.split(key)
                sketched = gradients.sketched(key_sketch, found)
            arguments = self._hardness(state), data.groups, config, params, sketched
            subset, prey = select(key, state.prey, *arguments)
        padding = jnp.zeros(len(data.labels) - len(subset), jnp.int32)
        return replace(
            state,
            prey=prey,
            chosen=jnp.concatenate([subset, padding]),
            num_chosen=jnp.int32(len(subset)),
            importance=jnp.ones(len(data.labels)).at[subset].set(weights),
        )

    def _pruned(self, state: State, key: PRNGKey) -> State:
        """The state without some of the examples whose loss was below the mean (InfoBatch)."""
        config, values = self.config, self._hardness(state)
        last = round((1 - config.whole_at_end) * config.training.num_epochs)
        rate = jnp.where(state.epoch < last, config.prune_rate, 0.0)
        low = values < values.mean()
        pruned = low & (jax.random.uniform(key, values.shape) < rate)
        return replace(
            state,
            chosen=jnp.argsort(pruned, stable=True).astype(jnp.int32),
            num_chosen=jnp.sum(~pruned, dtype=jnp.int32),
            importance=jnp.where(low, 1 / (1 - rate), 1.0),
        )

    def _train_on_chosen(
        self, key: PRNGKey, data: Data, state: State
    ) -> tuple[State, training.ExampleStatistics]:
        """The state after an epoch on the chosen examples, and what training saw of them. The
        program is that of all rules which choose before an epoch."""
        recipe, num_images = self.config.training, len(data.labels)
        new = recipe.num_batches(state.num_chosen, num_images)
        num_steps = state.num_steps + new + self._steps_after(state.epoch, new, num_images)
        epoch = partial(_epoch, self.network, recipe, self.num_classes)
        of = self.network, replace(recipe, num_epochs=0), self.num_classes
        shown = types.TrainingData(data.images, data.labels, data.mean, data.std)
        chosen = state.chosen, state.num_chosen, state.importance, jnp.asarray(num_steps)
        fit, seen = self.stages.run("training", of, epoch, key, state.fit, shown, *chosen)
        return replace(
            state,
            fit=fit,
            num_steps=state.num_steps + new,
            gradient_examples=state.gradient_examples + state.num_chosen,
        ), seen

    def _steps_after(
        self, epoch: IntScalar, steps: int | IntScalar, num_images: int
    ) -> Int[Array, ""]:
        """The steps that will follow an epoch, for the schedule; as many in each as in this one
        where their number is not fixed. epoch: from 0."""
        config = self.config
        recipe, size = config.training, subset_size(config, num_images)
        left = recipe.num_epochs - 1 - epoch
        if config.selection == "infobatch":
            return left * steps
        whole = recipe.num_batches(num_images)
        few = (
            online.steps_and_batch(recipe, size)[0]
            if config.is_online
            else recipe.num_batches(size, num_images)
        )
        first = jnp.clip(config.initial_epochs - 1 - epoch, 0, left)
        return first * whole + (left - first) * few

    def _train_choosing(
        self, key: PRNGKey, params: Params, data: Data, state: State
    ) -> tuple[State, training.ExampleStatistics]:
        """The same by a rule that chooses in each step."""
        images = normalize(data.images, data.mean, data.std)
        config, num_images = self.config, len(data.labels)
        number = subset_size(config, num_images)
        new = online.steps_and_batch(config.training, number)[0]
        num_steps = state.num_steps + new + self._steps_after(state.epoch, new, num_images)

        def priorities(key: PRNGKey, losses: Array, places: Array) -> Array:
            if config.selection == "selective_backprop":
                return online.loss_ranks(key, losses, 1 / config.fraction - 1)
            least = state.irreducible[places]
            return online.reducible_losses(key, losses, least, params.temperature)

        fixed = self.network, config.training, num_steps, state.fit, images, data.labels
        fit, seen = online.fit_epoch(key, *fixed, number, priorities)
        shown = ~jnp.isnan(seen.losses)
        state = replace(
            state,
            fit=fit,
            chosen=jnp.argsort(~shown, stable=True).astype(jnp.int32),
            num_chosen=jnp.sum(shown, dtype=jnp.int32),
            selections=state.selections + 1,
            num_steps=state.num_steps + new,
            gradient_examples=state.gradient_examples + shown.sum(),
            measured_examples=state.measured_examples
            + online.num_candidates(config.training, num_images, number),
        )
        return state, seen

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
    config: Config,
    num_classes: int,
    image_shape: tuple[int, int, int],
    timed: bool = False,
    programs: Programs | None = None,
) -> types.Algorithm[State, Params, Data, Metrics, PyTree]:
    """One step is one epoch; the result is the flax variables of the predator. `timed` measures the
    stages of a step and their compilation; a step then cannot be jitted as a whole. What it
    computes is the same. programs: of other trainings that are timed, which this one uses where
    they are its own, and adds to."""
    network = networks.create(config.network, num_classes, image_shape)
    stages = _Stages(timed, {} if programs is None else programs)
    trainer = _Trainer(config, num_classes, image_shape, network, stages)
    functions = trainer.init, trainer.step, trainer.result, trainer.finished
    return types.Algorithm(*functions, scannable=not timed, image_shape=image_shape)


def cost_seconds(stage_seconds: dict[str, float]) -> float:
    """Seconds that a rule costs, the sum over its stages except validation, which is for the curves
    alone, and compilation, which happens once."""
    stages = "training", "pass", "evolution", "memory", "reference"
    return sum(stage_seconds.get(name, 0.0) for name in stages)


def num_gradient_examples(config: Config, num_images: int) -> int:
    """Number of gradients of single examples that a whole run computes; of InfoBatch the most."""
    first = min(config.initial_epochs, config.training.num_epochs)
    rest = config.training.num_epochs - first
    each = num_images if config.selection == "infobatch" else subset_size(config, num_images)
    if config.is_online:
        each = math.prod(online.steps_and_batch(config.training, each))
    return first * num_images + rest * each


def epochs_of_equal_gradients(config: Config, num_images: int) -> int:
    """Epochs on the whole set that compute as many gradients, or a few more."""
    return int(np.ceil(num_gradient_examples(config, num_images) / num_images))
