"""A candidate's training as a program for each layer, shared by all layers of equal shape.

A program for a whole network is compiled for a single candidate, which takes longer than a short
training does. Here a step calls a program for each layer forward, and one backward that updates the
layer too: `jax.jit` compiles them once for a shape, and candidates meet the shapes of others again,
the more so the larger `Space.filter_step` is. What is computed is the same.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Float

from evojax_suite import training as engine
from evojax_suite.data.transforms import normalize
from evojax_suite.runtime.program import COMPILED_QUICKLY, compiler_options, forget_programs
from evojax_suite.systems.de_nas.architectures import shape_after
from evojax_suite.systems.de_nas.networks import Initialization, SequenceNetwork, fresh
from evojax_suite.types import Array, Images, IntScalar, PRNGKey, Probabilities, PyTree

COMPILER_OPTIONS = COMPILED_QUICKLY | (
    compiler_options(xla_cpu_use_fusion_emitters=False) if jax.__version_info__ < (0, 11) else {}
)
"""On the CPU level 3, the default, makes these programs up to twice as slow, and the older way to
compile fusions, which later versions lack, takes a third less: experiments/de_nas/README.md."""

Maps: TypeAlias = Float[Array, "images _ _ _"]  # height, width, channels


def parts(network: SequenceNetwork) -> tuple[SequenceNetwork, ...]:
    """The units of a network as networks without a head, then the head as one without units."""
    units = [network.clone(units=(unit,), head=None) for unit in network.units]
    return *units, network.clone(units=())


def joined(network: SequenceNetwork, variables: list[PyTree]) -> PyTree:
    """The flax variables of a network from those of its `parts`."""
    number, together = 0, {}
    for part, own in zip(parts(network), variables, strict=True):
        for collection, layers in own.items():
            place = together.setdefault(collection, {})
            for name, arrays in layers.items():
                place[name if part.head else f"{name.rsplit('_', 1)[0]}_{number}"] = arrays
        number += any(unit.kind == "convolution" for unit in part.units)
    return together


@partial(jax.jit, static_argnums=(1, 2, 3, 4), compiler_options=COMPILER_OPTIONS)
def _start(
    key: PRNGKey,
    part: SequenceNetwork,
    shape: tuple[int, ...],
    initialization: Initialization,
    config: engine.TrainingConfig,
) -> engine.FitState:
    return engine.start_fit_from(fresh(key, part, shape, initialization), config)


@partial(jax.jit, static_argnums=(0, 1), compiler_options=COMPILER_OPTIONS)
def _shown(
    network: SequenceNetwork,
    config: engine.TrainingConfig,
    key: PRNGKey,
    epoch: IntScalar,
    batch: IntScalar,
    images: Images,
    labels: Probabilities,
) -> tuple[engine.Prepared, Float[Array, "batch"]]:
    """A batch of an epoch, as `training.fit_epochs` shows it, and the weights of its images."""
    num_images = len(images)
    size = min(config.batch_size or num_images, num_images)
    key_steps, order = engine.epoch_order(key, epoch, num_images, num_images)
    _, chosen, weights = engine.batch_of(order, batch, size, num_images)
    batch_key = jax.random.fold_in(key_steps, batch)
    return engine.prepared(batch_key, network, config, images[chosen], labels[chosen]), weights


_Applied: TypeAlias = Callable[[PyTree, Array], tuple[Array, PyTree]]


def _applied(part: SequenceNetwork, state: engine.FitState, rngs: dict[str, PRNGKey]) -> _Applied:
    """The part in training, a function of its parameters and inputs: outputs and statistics."""

    def apply(parameters: PyTree, features: Array) -> tuple[Array, PyTree]:
        variables = {"params": parameters, **state.statistics}
        collections = [*state.statistics]
        return part.apply(variables, features, train=True, mutable=collections, rngs=rngs)

    return apply


@partial(jax.jit, static_argnums=(0, 1), compiler_options=COMPILER_OPTIONS)
def _forward(
    part: SequenceNetwork, is_first: bool, state: engine.FitState, features: Maps
) -> tuple[Maps, PyTree, PyTree]:
    """The maps after a unit, its new statistics, and the function that goes back."""
    apply = _applied(part, state, {})
    if is_first:  # nobody asks for the gradient of the images

        def of_parameters(parameters: PyTree) -> tuple[Array, PyTree]:
            return apply(parameters, features)

        maps, back, statistics = jax.vjp(of_parameters, state.parameters, has_aux=True)
    else:
        maps, back, statistics = jax.vjp(apply, state.parameters, features, has_aux=True)
    return maps, statistics, back


@partial(jax.jit, static_argnums=0, compiler_options=COMPILER_OPTIONS)
def _backward(
    config: engine.TrainingConfig,
    num_steps: IntScalar,
    state: engine.FitState,
    statistics: PyTree,
    back: PyTree,
    gradient: Maps,
) -> tuple[Maps | None, engine.FitState]:
    """The gradient of a unit's inputs, None of the first, and the unit after the step."""
    own, *others = back(gradient)
    return (others or [None])[0], engine.updated(config, num_steps, state, own, statistics)


@partial(jax.jit, static_argnums=(0, 1), compiler_options=COMPILER_OPTIONS)
def _head(
    part: SequenceNetwork,
    config: engine.TrainingConfig,
    num_steps: IntScalar,
    state: engine.FitState,
    features: Maps,
    labels: Probabilities,
    weights: Float[Array, "batch"],
    rngs: dict[str, PRNGKey],
) -> tuple[Maps, engine.FitState]:
    """The gradient of the inputs of the head, and the head after the step."""
    apply = _applied(part, state, rngs)

    def loss(parameters: PyTree, features: Array) -> tuple[Array, PyTree]:
        logits, statistics = apply(parameters, features)
        losses = optax.softmax_cross_entropy(logits, labels)
        return (losses * weights).sum() / weights.sum(), statistics

    gradients, statistics = jax.grad(loss, (0, 1), has_aux=True)(state.parameters, features)
    return gradients[1], engine.updated(config, num_steps, state, gradients[0], statistics)


@partial(jax.jit, static_argnums=0, compiler_options=COMPILER_OPTIONS)
def _infer(part: SequenceNetwork, variables: PyTree, features: Maps) -> Array:
    return jnp.asarray(part.apply(variables, features))


_summed = jax.jit(engine.summed)


class Training(NamedTuple):
    """A network whose layers train by their own programs."""

    network: SequenceNetwork
    config: engine.TrainingConfig
    parts: tuple[SequenceNetwork, ...]
    states: list[engine.FitState]

    @property
    def variables(self) -> PyTree:
        """The flax variables of the network."""
        return joined(self.network, [state.variables for state in self.states])


def start(
    key: PRNGKey,
    network: SequenceNetwork,
    config: engine.TrainingConfig,
    image_shape: tuple[int, int, int],
    initialization: Initialization,
) -> Training:
    """A fresh network."""
    shape, states, own = image_shape, [], parts(network)
    for part, key_part in zip(own, jax.random.split(key, len(own)), strict=True):
        states.append(_start(key_part, part, shape, initialization, config))
        for unit in part.units:
            shape = shape_after(unit, shape)
    return Training(network, config, own, states)


def _step(
    training: Training, num_steps: int, shown: engine.Prepared, weights: Float[Array, "batch"]
) -> Training:
    config, states, passed = training.config, list(training.states), []
    *units, head = training.parts
    features = shown.images
    for place, unit in enumerate(units):
        features, *rest = _forward(unit, place == 0, states[place], features)
        passed.append(rest)
    arguments = num_steps, states[-1], features, shown.labels, weights, shown.rngs
    gradient, states[-1] = _head(head, config, *arguments)
    for place in reversed(range(len(units))):
        arguments = num_steps, states[place], *passed.pop(), gradient
        gradient, states[place] = _backward(config, *arguments)
    return training._replace(states=states)


def train(
    key: PRNGKey,
    training: Training,
    num_steps: int,
    images: Images,
    labels: Probabilities,
    epochs: int,
) -> Training:
    """`training.fit_epochs`, layer by layer. num_steps: of the whole training, for the schedule."""
    for epoch in range(epochs):
        for batch in range(training.config.num_batches(len(images))):
            place = key, np.int32(epoch), np.int32(batch)
            shown = _shown(training.network, training.config, *place, images, labels)
            training = _step(training, num_steps, *shown)
    return training


def evaluate(training: Training, batches: engine.Batches) -> engine.Evaluation:
    """`training.evaluate`, layer by layer."""
    variables, sums = [state.variables for state in training.states], []
    for images, labels, weights in zip(*batches, strict=True):
        features = images
        for part, own in zip(training.parts, variables, strict=True):
            features = _infer(part, own, features)
        sums.append(_summed(features, labels, weights))
    together = jax.tree.map(lambda *batch: jnp.stack(batch), *sums)
    return engine.evaluation_of(together, batches.weights.sum())


def evaluate_candidate(
    key: PRNGKey,
    network: SequenceNetwork,
    config: engine.TrainingConfig,
    ends: tuple[int, ...],
    initialization: Initialization,
    data: Any,
    bars: Float[np.ndarray, "rungs"],
) -> tuple[engine.Evaluation, Float[np.ndarray, "rungs_and_end"], int, dict[str, float]]:
    """Train a network and evaluate it at each of `ends` (epochs), where it goes on only if it
    reaches the accuracy in `bars`.

    Returns the last evaluation, the accuracies (NaN where not reached), the epochs trained, and the
    seconds; those of the first batches, which compile what no other candidate did, apart.
    """
    key_start, key_fit = jax.random.split(key)
    num_classes, num_images = network.num_classes, len(data.labels)
    clock = time.perf_counter()
    forget_programs()
    images = normalize(data.images, data.mean, data.std)
    labels = jax.nn.one_hot(data.labels, num_classes)
    num_steps = config.num_epochs * config.num_batches(num_images)
    shape = images.shape[1], images.shape[2], images.shape[3]
    training = start(key_start, network, config, shape, initialization)
    place = key_fit, np.int32(0), np.int32(0)
    _step(training, num_steps, *_shown(network, config, *place, images, labels))
    evaluate(training, jax.tree.map(lambda leaf: leaf[:1], data.validation))
    seconds = {"compilation": time.perf_counter() - clock}
    clock = time.perf_counter()
    accuracies, before = np.full(len(ends), np.nan, np.float32), 0
    evaluation = engine.Evaluation(jnp.float32(jnp.nan), jnp.float32(jnp.nan))
    for rung, end in enumerate(ends):
        key_rung = jax.random.fold_in(key_fit, rung) if len(ends) > 1 else key_fit
        training = train(key_rung, training, num_steps, images, labels, end - before)
        evaluation = evaluate(training, data.validation)
        accuracies[rung], before = evaluation.accuracy, end
        if rung < len(bars) and not accuracies[rung] >= bars[rung]:
            break
    seconds["training"] = time.perf_counter() - clock
    return evaluation, accuracies, before, seconds
