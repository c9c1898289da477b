"""Kernel inducing points: synthetic images that descend the error of kernel regression.

Nguyen, Chen & Lee, ICLR 2021, "Dataset Meta-Learning from Kernel Ridge-Regression" (KIP), with the
features of fresh random networks in place of a neural tangent kernel, as Loo et al., NeurIPS 2022,
"Efficient Dataset Distillation using Random Feature Approximation" (RFAD).

The error, its networks, the cosines and the returned average are those of the evolution by kernel
regression (`ga_distillation/kernel_regression.py`); only the search differs: Adam on the gradient
of the sum of all columns by all images at once. A comparison of the two shows the cost, or the
gain, of a search without gradients (experiments/ga_distillation, "For equal seconds").
"""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
import optax
from flax import struct
from jaxtyping import Float, Int32
from pydantic import PositiveFloat, PositiveInt

from evojax_suite import networks
from evojax_suite.configuration import configuration
from evojax_suite.networks import NetworkConfig
from evojax_suite.operators.encodings import EncodingName
from evojax_suite.strategies.block_es import averaged
from evojax_suite.systems import ga_distillation
from evojax_suite.systems.ga_distillation import Data, Individual, make_data
from evojax_suite.systems.ga_distillation.kernel_regression import KernelConfig
from evojax_suite.training import EngineConfig
from evojax_suite.types import Algorithm, Array, IntScalar, PyTree, Scalar

__all__ = ["Config", "Metrics", "State", "build", "make_data"]


@configuration
class Config:
    """Sizes and choices; except for learning rate and start the defaults are those of
    `ga_distillation.RECOMMENDED`."""

    images_per_class: int = 1
    """Number of synthetic images of each class."""
    learning_rate: PositiveFloat = 0.03
    """Learning rate of Adam; for cosines in standard deviations of a coefficient of real images."""
    encoding: EncodingName = "cosines"
    """What is learned: pixels, or the lowest cosine coefficients of each image."""
    num_cosines: int = 14
    """Number of coefficients a side, at most as many as fit."""
    start: Literal["class_means", "k_means"] = "k_means"
    """First images: the mean of each class, or the centres of k-means in each class."""
    num_networks: PositiveInt = 4
    """Number of fresh networks in each step, whose kernels are added."""

    kernel: KernelConfig = ga_distillation.RECOMMENDED.kernel
    """Kernel regression; `company` and `columns` have no effect here."""
    network: NetworkConfig = NetworkConfig()
    engine: EngineConfig = EngineConfig()

    def __post_init__(self):
        self.search()

    def search(self) -> ga_distillation.Config:
        """The evolution that minimises the same error, by a strategy that assigns no credit to
        single images. Raises ValueError where there is none."""
        shared = ("images_per_class", "encoding", "num_cosines", "start")
        shared += ("kernel", "network", "engine")
        values = {name: getattr(self, name) for name in shared}
        values["networks_per_member"] = self.num_networks
        return replace(ga_distillation.RECOMMENDED, strategy="SNES", **values)


@struct.dataclass
class State:
    """What the next step needs."""

    code: Float[Array, "dims"]  # a flat individual of `ga_distillation`
    average: Float[Array, "dims"]  # over the steps
    opt_state: PyTree
    iteration: Int32[Array, ""]


class Metrics(NamedTuple):
    """What one step reports."""

    generation: IntScalar  # the step, from 1
    regression_loss: Scalar  # sum over the columns, of the images before the step
    regression_accuracy: Scalar
    num_failed: IntScalar  # 1 where the gradient was not finite, so that nothing changed


def build(
    config: Config, num_classes: int, image_shape: tuple[int, int, int]
) -> Algorithm[State, None, Data, Metrics, Individual]:
    """One step is a step of Adam; `params` is None."""
    search = config.search()
    shape = num_classes, image_shape
    networks.create(config.network, *shape)  # fails early where it does not fit
    ga_distillation.num_dims(search, *shape)
    optimizer = optax.adam(config.learning_rate)

    def init(key: Array, params: None, data: Data) -> State:
        del params
        if config.start == "class_means":
            code = ga_distillation.class_means(search, num_classes, data)
        else:
            code = ga_distillation.class_centres(key, search, num_classes, data)
        return State(code, code, optimizer.init(code), jnp.int32(0))

    def step(key: Array, state: State, params: None, data: Data) -> tuple[State, Metrics]:
        del params

        def loss(code: Array) -> tuple[Array, Array]:
            scores = ga_distillation.score_population(key, search, *shape, code[None], data)
            return -scores.fitness[0], scores.accuracy[0]

        (value, accuracy), gradient = jax.value_and_grad(loss, has_aux=True)(state.code)
        updates, opt_state = optimizer.update(gradient, state.opt_state)
        code = state.code + jnp.asarray(updates)
        average = averaged(state.average, code, state.iteration)
        finite = jnp.isfinite(gradient).all()
        new, old = (code, average, opt_state), (state.code, state.average, state.opt_state)
        kept = jax.tree.map(partial(jnp.where, finite), new, old)
        metrics = Metrics(state.iteration + 1, value, accuracy, ~finite * 1)
        return State(*kept, iteration=state.iteration + 1), metrics

    def result(state: State, params: None, data: Data) -> Individual:
        del params
        return ga_distillation.decode(search, *shape, state.average, data)

    return Algorithm(init, step, result, finished=lambda state: jnp.bool_(False))
