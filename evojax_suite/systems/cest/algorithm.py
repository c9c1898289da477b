"""Ryan, Thakkar, Turrell & Parikh 2024, "CoEvolutionary Selection Training for Efficient Deep
Neural Network Training". Implements sections III-A and III-B.

The predator, a CNN, first trains on the whole training set. Then, again and again, subsets of it
(the prey) evolve towards what the predator finds hard, and it trains on the hardest for some
epochs. One forward pass over the training set gives each example's loss, so that the fitness of any
subset is a mean of known numbers: exact, and almost free. A step is one epoch of the predator's
training; where one begins with a selection, that is part of it.

`selection` puts other rules in the evolution's place, in the same trainer: the hardest examples
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
from dataclasses import replace
from functools import partial
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jaxtyping import Bool, Float, Float32, Int, Int32, UInt8

from evojax_suite import networks
from evojax_suite.data.transforms import normalize
from evojax_suite.operators import tournament
from evojax_suite.systems.cest import subsets
from evojax_suite.systems.cest.config import Config, Params
from evojax_suite.systems.cest.subsets import Groups
from evojax_suite.training import (
    Batches,
    ExampleStatistics,
    FitState,
    batches_of,
    evaluate,
    fit_epochs,
    judge_each,
    start_fit,
)
from evojax_suite.types import (
    Algorithm,
    Array,
    Dataset,
    Images,
    IntScalar,
    Labels,
    PRNGKey,
    PyTree,
    Scalar,
)


@struct.dataclass
class Data:
    """Training and validation split on the device."""

    images: (  # floats in [0, 1]
        UInt8[Array, "images height width channels"] | Images
    )
    labels: Labels
    groups: Groups  # what the places of a subset may hold
    validation: Batches  # normalised
    mean: Float[Array, "channels"]
    std: Float[Array, "channels"]


@struct.dataclass
class State:
    """The predator in training, what it found hard, and the prey."""

    fit: FitState
    difficulty: Float[Array, "examples"]  # NaN where it was never measured
    wrong_in_a_row: Int32[Array, "examples"]  # measurements
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
    loss: Scalar  # of the examples trained on, as training saw them
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
    """Examples of a subset."""
    if config.selection == "full":
        return num_images
    return max(1, round(config.fraction * num_images))


def make_data(config: Config, dataset: Dataset) -> Data:
    """The training and validation split of `dataset`; the test split stays closed."""
    train = dataset.train
    groups = subsets.make_groups(
        train.labels,
        subset_size(config, len(train)),
        dataset.num_classes,
        config.balanced and config.selection != "full",
    )
    return Data(
        images=jnp.asarray(train.images),
        labels=jnp.asarray(train.labels),
        groups=groups,
        validation=batches_of(dataset, dataset.validation, config.engine),
        mean=jnp.asarray(dataset.mean, jnp.float32),
        std=jnp.asarray(dataset.std, jnp.float32),
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

    def vary(key, prey):
        if not config.repair:
            return prey
        keys = jax.random.split(key, len(prey))
        return jax.lax.map(lambda one: subsets.repaired(one[0], one[1], groups), (keys, prey))

    def generation(carry, key):
        prey, fitness = carry
        key_parents, key_crossover, key_mutation, key_repair = jax.random.split(key, 4)
        parents = tournament(key_parents, fitness, size, config.tournament_size)
        first, second = prey[parents[::2]], prey[parents[1::2]]
        both = subsets.two_point_crossover(key_crossover, first, second, params.crossover_rate)
        children = subsets.uniform_mutation(
            key_mutation,
            jnp.concatenate(both),
            groups,
            params.mutation_rate,
            params.gene_mutation_rate,
        )
        children = vary(key_repair, children)
        everyone = jnp.concatenate([prey, children])
        fitness = jnp.concatenate([fitness, prey_fitness(children, difficulty)])
        best = jnp.argsort(-fitness, stable=True)[:size]
        return (everyone[best], fitness[best]), None

    key_start, key_generations = jax.random.split(key)
    prey = vary(key_start, prey)
    fitness = prey_fitness(prey, difficulty)
    best = jnp.argsort(-fitness, stable=True)
    keys = jax.random.split(key_generations, config.prey_generations)
    return jax.lax.scan(generation, (prey[best], fitness[best]), keys)[0][0]


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
            subset = jnp.arange(len(groups.group_of), dtype=jnp.int32)
        case _:
            raise ValueError(f"unknown selection {config.selection!r}")
    if config.random_share and config.selection != "full":
        other = subsets.random_subset(key_share, groups)
        count = round(config.random_share * len(subset))
        replaced = jax.random.permutation(key_mix, len(subset)) < count
        subset = jnp.where(replaced, other, subset)
    return subset, prey


class _Setup(NamedTuple):
    """What does not change in a training."""

    config: Config
    num_classes: int
    image_shape: tuple[int, int, int]
    network: nn.Module
    batch_size: int


def _init(setup: _Setup, key: Array, params: Params, data: Data) -> State:
    del params
    num_images = len(data.labels)
    key_fit, key_prey = jax.random.split(key)
    members = setup.config.prey_population if setup.config.selection == "cest" else 1
    return State(
        fit=start_fit(key_fit, setup.network, setup.config.training, setup.image_shape),
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


def _learned(
    setup: _Setup,
    state: State,
    losses: Float[Array, "examples"],
    correct: Bool[Array, "examples"],
    known: Bool[Array, "examples"],
) -> State:
    """The state with new difficulties of the examples where `known` is True."""
    new = losses if setup.config.difficulty == "loss" else (~correct).astype(jnp.float32)
    new = jnp.where(jnp.isfinite(losses), new, 0.0)  # a failed loss must not be the hardest
    first = jnp.isnan(state.difficulty)
    old = jnp.where(first, new, state.difficulty)
    mixed = setup.config.difficulty_decay * old + (1 - setup.config.difficulty_decay) * new
    in_a_row = jnp.where(correct, 0, state.wrong_in_a_row + 1)
    return replace(
        state,
        difficulty=jnp.where(known, mixed, state.difficulty),
        wrong_in_a_row=jnp.where(known, in_a_row, state.wrong_in_a_row),
    )


def _measure(setup: _Setup, state: State, data: Data) -> State:
    """The pass over the training set, or over its next part."""
    num_images = len(data.labels)
    count = max(1, round(setup.config.pass_fraction * num_images))
    if count == num_images:
        part, images, labels = jnp.arange(num_images), data.images, data.labels
    else:
        part = (state.selections * count + jnp.arange(count)) % num_images
        images, labels = data.images[part], data.labels[part]
    images = normalize(images, data.mean, data.std)
    found = judge_each(setup.network, state.fit.variables, images, labels, setup.batch_size)
    losses = jnp.zeros(num_images).at[part].set(found.losses)
    correct = jnp.zeros(num_images, bool).at[part].set(found.correct)
    known = jnp.zeros(num_images, bool).at[part].set(True)
    state = _learned(setup, state, losses, correct, known)
    return replace(state, measured_examples=state.measured_examples + count)


def _hardness(setup: _Setup, state: State) -> Array:
    unknown = jnp.isnan(state.difficulty)
    values = jnp.where(unknown, jnp.nanmean(state.difficulty), state.difficulty)
    values = jnp.where(unknown.all(), 1.0, values)
    if setup.config.give_up_after:
        values = jnp.where(state.wrong_in_a_row >= setup.config.give_up_after, 0.0, values)
    return values


def _choose(setup: _Setup, key: Array, state: State, params: Params, data: Data) -> State:
    subset, prey = select(
        key, state.prey, _hardness(setup, state), data.groups, setup.config, params
    )
    padding = jnp.zeros(len(data.labels) - len(subset), jnp.int32)
    return replace(
        state,
        prey=prey,
        chosen=jnp.concatenate([subset, padding]),
        num_chosen=jnp.int32(len(subset)),
        selections=state.selections + 1,
    )


def _train(setup: _Setup, key: Array, state: State, data: Data) -> tuple[State, ExampleStatistics]:
    fit, seen = fit_epochs(
        key,
        setup.network,
        setup.config.training,
        1,
        state.fit,
        normalize(data.images, data.mean, data.std),
        jax.nn.one_hot(data.labels, setup.num_classes),
        state.num_chosen,
        1,
        state.chosen,
    )
    state = replace(
        state,
        fit=fit,
        gradient_examples=state.gradient_examples + state.num_chosen,
        epoch=state.epoch + 1,
    )
    return state, seen


def _remember(setup: _Setup, state: State, seen: ExampleStatistics) -> State:
    return _learned(setup, state, seen.losses, seen.correct, jnp.isfinite(seen.losses))


def _report(setup: _Setup, state: State, seen: ExampleStatistics, data: Data) -> Metrics:
    found = evaluate(setup.network, state.fit.variables, data.validation)
    num_images = len(data.labels)
    inside = jnp.arange(num_images) < state.num_chosen
    shown = jnp.zeros(num_images, bool).at[state.chosen].max(inside)
    failed = shown & ~jnp.isfinite(seen.losses)
    values = _hardness(setup, state)
    hardest = values[subsets.ranked(values, data.groups)].mean()
    return Metrics(
        generation=state.epoch,
        selections=state.selections,
        loss=jnp.mean(seen.losses, where=shown & ~failed),
        accuracy=jnp.mean(seen.correct, where=shown),
        validation_loss=found.cross_entropy,
        validation_accuracy=found.accuracy,
        difficulty_mean=values.mean(),
        difficulty_chosen=jnp.mean(values[state.chosen], where=inside),
        difficulty_most=hardest,
        distinct=shown.sum(),
        gradient_examples=state.gradient_examples,
        measured_examples=state.measured_examples,
        num_failed=failed.sum(),
        stage_seconds={},
    )


def _begins_with_selection(config: Config, epoch: Array) -> Array:
    since = epoch - config.initial_epochs
    return (since >= 0) & (since % config.epochs_per_selection == 0)


def _result(state: State, params: Params, data: Data) -> PyTree:
    del params, data
    return state.fit.variables


def _finished(config: Config, state: State) -> Array:
    return state.epoch >= config.training.num_epochs


class _Stages:
    """Does the stages of a step: as parts of one program or, `timed`, each as a program of its own
    whose seconds and compilation are measured apart."""

    def __init__(self, setup: _Setup, timed: bool):
        self._functions = {
            "pass": partial(_measure, setup),
            "evolution": partial(_choose, setup),
            "training": partial(_train, setup),
            "memory": partial(_remember, setup),
            "validation": partial(_report, setup),
        }
        self._timed = timed
        self._compiled: dict[str, Any] = {}
        self.seconds: dict[str, float] = {}  # of the step that is being done

    def do(self, name: str, *arguments: Any) -> Any:
        """The stage `name` of these arguments."""
        if not self._timed:
            return self._functions[name](*arguments)
        start = time.perf_counter()
        if name not in self._compiled:
            self._compiled[name] = jax.jit(self._functions[name]).lower(*arguments).compile()
            taken = time.perf_counter() - start
            self.seconds["compilation"] = self.seconds.get("compilation", 0.0) + taken
            start = time.perf_counter()
        value = jax.block_until_ready(self._compiled[name](*arguments))
        self.seconds[name] = time.perf_counter() - start
        return value

    def when(self, condition: Array, name: str, state: State, before=(), after=()) -> State:
        """The stage `name` of (*before, state, *after) where `condition` is true, else `state`."""

        def do(state: State) -> State:
            return self.do(name, *before, state, *after)

        if not self._timed:
            return jax.lax.cond(condition, do, lambda state: state, state)
        return do(state) if bool(condition) else state


def _step(
    config: Config, stages: _Stages, key: Array, state: State, params: Params, data: Data
) -> tuple[State, Metrics]:
    key_choose, key_train = jax.random.split(key)
    stages.seconds = {}
    needs_losses = config.selection in ("cest", "top_k", "loss_proportional")
    selecting = _begins_with_selection(config, state.epoch)
    passing = selecting
    if config.reuse_training_losses:  # all are known after an epoch on all of them
        passing &= ~((state.selections == 0) & (config.initial_epochs > 0))
    if needs_losses and config.pass_fraction:
        state = stages.when(passing, "pass", state, after=(data,))
    if config.selection != "full":
        state = stages.when(selecting, "evolution", state, (key_choose,), (params, data))
    state, seen = stages.do("training", key_train, state, data)
    if needs_losses and config.reuse_training_losses:
        last = _begins_with_selection(config, state.epoch)  # the next one
        state = stages.when(last, "memory", state, after=(seen,))
    metrics = stages.do("validation", state, seen, data)
    return state, metrics._replace(stage_seconds=stages.seconds)


def build(
    config: Config, num_classes: int, image_shape: tuple[int, int, int], timed: bool = False
) -> Algorithm[State, Params, Data, Metrics, PyTree]:
    """One step is one epoch; the result is the flax variables of the predator. `timed` measures the
    stages of a step and their compilation apart; a step then cannot be jitted as a whole. What it
    computes is the same."""
    network = networks.create(config.network, num_classes, image_shape)
    batch_size = config.engine.resolved_evaluation_batch_size(image_shape)
    setup = _Setup(config, num_classes, image_shape, network, batch_size)
    return Algorithm(
        partial(_init, setup),
        partial(_step, config, _Stages(setup, timed)),
        _result,
        partial(_finished, config),
        scannable=not timed,
    )


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
