"""A network trained on the whole training set, from which other methods learn about examples.

One training serves herding and k-center (features of the last block), forgetting (events over the
epochs) and soft labels (the network's predictions for any image; Qin, Deng & Alvarez-Melis 2024, "A
Label is Worth a Thousand Images in Dataset Distillation"). A step is an epoch, so that a training
is interrupted and resumed like generations. EComp's parent is trained in the same way.
"""

from __future__ import annotations

from functools import partial
from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jaxtyping import Bool, Float, Float32, Int32

from evojax_suite import networks, training, types
from evojax_suite.configuration import configuration
from evojax_suite.data.transforms import normalize
from evojax_suite.networks import NetworkConfig
from evojax_suite.training import EngineConfig, TrainingConfig
from evojax_suite.types import Array, Images, IntScalar, PRNGKey, Probabilities, PyTree, Scalar


@configuration
class Config:
    """The network and its training."""

    network: NetworkConfig = NetworkConfig()
    training: TrainingConfig = TrainingConfig(
        num_epochs=20, batch_size=256, optimizer="sgd", learning_rate=0.01, l2_penalty=5e-4
    )
    engine: EngineConfig = EngineConfig()

    def __post_init__(self):
        if self.training.num_epochs < 1:
            raise ValueError(f"num_epochs must be >= 1, got {self.training.num_epochs}")


class ForgettingHistory(NamedTuple):
    """The forgetting events of each example so far (Toneva et al. 2019, Algorithm 1).

    An example is forgotten when training shows it and it is misclassified, but was classified
    correctly when it was shown before.
    """

    was_correct: Bool[Array, "examples"]  # the last time it was shown
    was_learned: Bool[Array, "examples"]  # correct at least once
    num_forgotten: Int32[Array, "examples"]  # changes from correct to wrong


def no_forgetting(num_examples: int) -> ForgettingHistory:
    """The history before any example was shown."""
    never = jnp.zeros(num_examples, bool)
    return ForgettingHistory(never, never, jnp.zeros(num_examples, jnp.int32))


def with_epoch(history: ForgettingHistory, correct: Bool[Array, "examples"]) -> ForgettingHistory:
    """The history after each example was shown once more."""
    forgotten = history.was_correct & ~correct
    learned = history.was_learned | correct
    return ForgettingHistory(correct, learned, history.num_forgotten + forgotten)


def forgetting_scores(history: ForgettingHistory) -> Int32[Array, "examples"]:
    """The number of times that each example was forgotten; an example that was never classified
    correctly has one more than the most forgotten."""
    most = history.num_forgotten.max()
    return jnp.where(history.was_learned, history.num_forgotten, most + 1)


@struct.dataclass
class State:
    """The network in training, and the history of each example."""

    fit: training.FitState
    history: ForgettingHistory
    epoch: Int32[Array, ""]  # done


class Metrics(NamedTuple):
    """What one epoch reports, of the augmented images on which it trained."""

    generation: IntScalar  # the epoch, from 1
    loss: Scalar
    accuracy: Scalar
    forgotten: IntScalar  # examples forgotten in this epoch
    num_failed: IntScalar  # examples whose loss was NaN or infinite


class Evidence(NamedTuple):
    """The values of each example by which examples are selected."""

    features: Float[Array, "examples features"]
    forgetting_scores: Int32[Array, "examples"]


def build(
    config: Config, num_classes: int, image_shape: tuple[int, int, int]
) -> types.Algorithm[State, None, types.TrainingData, Metrics, Evidence]:
    """One step is one epoch over all images."""
    network = networks.create(config.network, num_classes, image_shape)
    recipe = config.training

    def init(key: PRNGKey, params: None, data: types.TrainingData) -> State:
        del params
        fit = training.start_fit(key, network, recipe, image_shape)
        return State(fit, no_forgetting(len(data.labels)), jnp.int32(0))

    def step(
        key: PRNGKey, state: State, params: None, data: types.TrainingData
    ) -> tuple[State, Metrics]:
        del params
        num_images = len(data.labels)
        num_steps = recipe.num_epochs * recipe.num_batches(num_images)
        images = normalize(data.images, data.mean, data.std)
        shown = images, jax.nn.one_hot(data.labels, num_classes), num_images, 1
        fit, seen = training.fit_epochs(key, network, recipe, num_steps, state.fit, *shown)
        history = with_epoch(state.history, seen.correct)
        failed = ~jnp.isfinite(seen.losses)
        metrics = Metrics(
            generation=state.epoch + 1,
            loss=jnp.mean(seen.losses, where=~failed),
            accuracy=seen.correct.mean(),
            forgotten=(history.num_forgotten - state.history.num_forgotten).sum(),
            num_failed=failed.sum(),
        )
        return State(fit, history, state.epoch + 1), metrics

    def result(state: State, params: None, data: types.TrainingData) -> Evidence:
        del params
        images = normalize(data.images, data.mean, data.std)
        size = config.engine.resolved_evaluation_batch_size(image_shape)
        features = training.extract_features(network, state.fit.variables, images, None, size)
        return Evidence(features, forgetting_scores(state.history))

    def finished(state: State) -> Array:
        return state.epoch >= recipe.num_epochs

    return types.Algorithm(init, step, result, finished)


def probabilities(
    config: Config,
    variables: PyTree,
    images: Float[np.ndarray, "images height width channels"],
    num_classes: int,
    temperature: float = 1.0,
) -> Float32[np.ndarray, "images {num_classes}"]:
    """The probabilities that the trained network gives any images: softmax(logits / temperature).

    variables: the variables of its flax module. images: normalised. Raises ValueError where the
    logits are not finite.
    """
    network = networks.create(config.network, num_classes, images.shape[1:])
    size = config.engine.resolved_evaluation_batch_size(images.shape[1:])
    batches = (images[start : start + size] for start in range(0, len(images), size))
    logits = np.concatenate([_logits(network, variables, batch) for batch in batches])
    if not np.isfinite(logits).all():
        raise ValueError(
            "the teacher diverged: its logits are not finite, and need another learning_rate, got "
            f"{config.training.learning_rate}"
        )
    logits = logits.astype(np.float64)
    # Whatever the temperature the largest exponent is 0; others may be -inf.
    with np.errstate(over="ignore"):
        powers = np.exp((logits - logits.max(1, keepdims=True)) / temperature)
    return (powers / powers.sum(1, keepdims=True)).astype(np.float32)


@partial(jax.jit, static_argnames="network")
def _logits(network: nn.Module, variables: PyTree, images: Images) -> Probabilities:
    return jnp.asarray(network.apply(variables, images))
