"""A network trained on the whole training set: what coreset methods ask about its examples.

One training serves herding and k-center (features of its last block), forgetting (events over its
epochs) and soft labels (Qin, Deng & Alvarez-Melis 2024, "A Label is Worth a Thousand Images in
Dataset Distillation": what it says of any image). An epoch is a step, so that it is interrupted and
resumed like generations. EComp's parent trains the same way, and only its weights are taken.
"""

from __future__ import annotations

from dataclasses import field
from functools import partial
from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jaxtyping import Bool, Float, Float32, Int32

from evojax_suite import networks
from evojax_suite.configuration import configuration
from evojax_suite.data.transforms import normalize
from evojax_suite.networks import NetworkConfig
from evojax_suite.training import (
    EngineConfig,
    FitState,
    TrainingConfig,
    extract_features,
    fit_epochs,
    start_fit,
)
from evojax_suite.types import (
    Algorithm,
    Array,
    Images,
    IntScalar,
    Probabilities,
    PyTree,
    Scalar,
    TrainingData,
)


@configuration
class Config:
    """The network that is asked and how it trains."""

    network: NetworkConfig = field(default_factory=NetworkConfig)
    training: TrainingConfig = field(
        default_factory=lambda: TrainingConfig(
            num_epochs=20, batch_size=256, optimizer="sgd", learning_rate=0.01, l2_penalty=5e-4
        )
    )
    engine: EngineConfig = field(default_factory=EngineConfig)

    def __post_init__(self):
        if self.training.num_epochs < 1:
            raise ValueError(f"num_epochs must be >= 1, got {self.training.num_epochs}")


class ForgettingHistory(NamedTuple):
    """The forgetting events of each example so far (Toneva et al. 2019, Algorithm 1).

    An example is forgotten when it was classified right when training last showed it and is
    classified wrong now.
    """

    was_correct: Bool[Array, "examples"]  # the last time it was shown
    was_learned: Bool[Array, "examples"]  # right at least once
    num_forgotten: Int32[Array, "examples"]  # changes from right to wrong


def no_forgetting(num_examples: int) -> ForgettingHistory:
    """The history before any example was shown."""
    never = jnp.zeros(num_examples, bool)
    return ForgettingHistory(never, never, jnp.zeros(num_examples, jnp.int32))


def with_epoch(history: ForgettingHistory, correct: Bool[Array, "examples"]) -> ForgettingHistory:
    """The history after each example was shown once more."""
    return ForgettingHistory(
        was_correct=correct,
        was_learned=history.was_learned | correct,
        num_forgotten=history.num_forgotten + (history.was_correct & ~correct),
    )


def forgetting_scores(history: ForgettingHistory) -> Int32[Array, "examples"]:
    """How often each example was forgotten; one that was never classified right has one more than
    the most forgotten."""
    most = history.num_forgotten.max()
    return jnp.where(history.was_learned, history.num_forgotten, most + 1)


@struct.dataclass
class State:
    """The network, and what was seen of each example."""

    fit: FitState
    history: ForgettingHistory
    epoch: Int32[Array, ""]  # done


class Metrics(NamedTuple):
    """What one epoch reports, of the augmented images as training saw them."""

    generation: IntScalar  # the epoch, from 1
    loss: Scalar
    accuracy: Scalar
    forgotten: IntScalar  # examples forgotten in this epoch
    num_failed: IntScalar  # examples whose loss was NaN or infinite


class Evidence(NamedTuple):
    """What selection goes by."""

    features: Float[Array, "examples features"]
    forgetting_scores: Int32[Array, "examples"]


def build(
    config: Config, num_classes: int, image_shape: tuple[int, int, int]
) -> Algorithm[State, None, TrainingData, Metrics, Evidence]:
    """One step is one epoch over all images."""
    network = networks.create(config.network, num_classes, image_shape)

    def init(key: Array, params: None, data: TrainingData) -> State:
        del params
        return State(
            fit=start_fit(key, network, config.training, image_shape),
            history=no_forgetting(len(data.labels)),
            epoch=jnp.int32(0),
        )

    def step(key: Array, state: State, params: None, data: TrainingData) -> tuple[State, Metrics]:
        del params
        num_images = len(data.labels)
        fit, seen = fit_epochs(
            key,
            network,
            config.training,
            config.training.num_epochs * config.training.num_batches(num_images),
            state.fit,
            normalize(data.images, data.mean, data.std),
            jax.nn.one_hot(data.labels, num_classes),
            num_images,
            1,
        )
        history = with_epoch(state.history, seen.correct)
        failed = ~jnp.isfinite(seen.losses)
        metrics = Metrics(
            generation=state.epoch + 1,
            loss=jnp.mean(seen.losses, where=~failed),
            accuracy=seen.correct.mean(),
            forgotten=(history.num_forgotten - state.history.num_forgotten).sum(),
            num_failed=failed.sum(),
        )
        return State(fit=fit, history=history, epoch=state.epoch + 1), metrics

    def result(state: State, params: None, data: TrainingData) -> Evidence:
        del params
        images = normalize(data.images, data.mean, data.std)
        batch_size = config.engine.resolved_evaluation_batch_size(image_shape)
        features = extract_features(network, state.fit.variables, images, None, batch_size)
        return Evidence(features, forgetting_scores(state.history))

    def finished(state: State) -> Array:
        return state.epoch >= config.training.num_epochs

    return Algorithm(init, step, result, finished)


def probabilities(
    config: Config,
    variables: PyTree,
    images: Float[np.ndarray, "images height width channels"],
    num_classes: int,
    temperature: float = 1.0,
) -> Float32[np.ndarray, "images {num_classes}"]:
    """What the trained network says of images, normalised, of the training set or not:
    softmax(logits / temperature).

    variables: of its flax module. Raises ValueError where the logits are not finite.
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
    with np.errstate(
        over="ignore"
    ):  # the largest is 0 whatever the temperature, others may be -inf
        powers = np.exp((logits - logits.max(1, keepdims=True)) / temperature)
    return (powers / powers.sum(1, keepdims=True)).astype(np.float32)


@partial(jax.jit, static_argnames="network")
def _logits(network: nn.Module, variables: PyTree, images: Images) -> Probabilities:
    return jnp.asarray(network.apply(variables, images))
