"""The long training of one architecture."""

from __future__ import annotations

from dataclasses import replace
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import struct
from jaxtyping import Int32

from evojax_suite.data.transforms import normalize
from evojax_suite.systems.de_nas.architectures import Unit
from evojax_suite.systems.de_nas.candidates import Data, network_of
from evojax_suite.systems.de_nas.config import Config
from evojax_suite.systems.de_nas.layered import COMPILER_OPTIONS
from evojax_suite.systems.de_nas.networks import fresh
from evojax_suite.training import FitState, evaluate, fit_epochs, start_fit_from
from evojax_suite.types import Algorithm, Array, IntScalar, PyTree, Scalar


@struct.dataclass
class FinalState:
    """A network in its final training."""

    fit: FitState
    epoch: Int32[Array, ""]  # epochs done


class FinalMetrics(NamedTuple):
    """The metrics of one epoch of the final training."""

    generation: IntScalar  # the epoch, from 1
    loss: Scalar  # of the augmented training images, before the step that learned from them
    accuracy: Scalar
    validation_loss: Scalar
    validation_accuracy: Scalar
    num_failed: IntScalar  # examples whose loss was NaN or infinite


def build_final(
    config: Config, units: tuple[Unit, ...], num_classes: int, image_shape: tuple[int, int, int]
) -> Algorithm[FinalState, PyTree, Data, FinalMetrics, PyTree]:
    """The final training of one architecture, `final_epochs` long; one step is one epoch.

    `params` are the network's parameters to begin with, or None for fresh ones, `data` is a Data;
    the result is the network's flax variables.
    """
    training = replace(config.training, num_epochs=config.final_epochs)
    network = network_of(config, units, num_classes)

    def init(key: Array, params: PyTree, data: Data) -> FinalState:
        del data
        variables = fresh(key, network, image_shape, config.initialization)
        if params is not None:
            variables |= {"params": params}
        return FinalState(start_fit_from(variables, training), jnp.int32(0))

    def step(key: Array, state: FinalState, params: PyTree, data: Data):
        del params
        num_images = len(data.labels)
        num_steps = training.num_epochs * training.num_batches(num_images)
        images = normalize(data.images, data.mean, data.std)
        examples = images, jax.nn.one_hot(data.labels, num_classes), num_images
        fit, seen = fit_epochs(key, network, training, num_steps, state.fit, *examples, 1)
        validation = evaluate(network, fit.variables, data.validation)
        failed = ~jnp.isfinite(seen.losses)
        metrics = FinalMetrics(
            generation=state.epoch + 1,
            loss=jnp.mean(seen.losses, where=~failed),
            accuracy=seen.correct.mean(),
            validation_loss=validation.cross_entropy,
            validation_accuracy=validation.accuracy,
            num_failed=failed.sum(),
        )
        return FinalState(fit=fit, epoch=state.epoch + 1), metrics

    def result(state: FinalState, params: PyTree, data: Data) -> PyTree:
        del params, data
        return state.fit.variables

    def finished(state: FinalState) -> Array:
        return state.epoch >= training.num_epochs

    return Algorithm(init, step, result, finished, compiler_options=COMPILER_OPTIONS)
