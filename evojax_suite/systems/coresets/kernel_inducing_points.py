"""Kernel inducing points: synthetic images that descend the error of kernel regression.

Nguyen, Chen & Lee, ICLR 2021, "Dataset Meta-Learning from Kernel Ridge-Regression" (KIP), with the
features of fresh random networks in place of a neural tangent kernel, as Loo et al., NeurIPS 2022,
"Efficient Dataset Distillation using Random Feature Approximation" (RFAD).

The error, its networks, the cosines and the average that is returned are those with which
`ga_distillation` evolves (`kernel_regression.py`); only the search differs: Adam on the gradient of
the sum of all columns by all images at once. So it is the price of doing without a gradient, or the
gain, where the two are compared (experiments/ga_distillation, "For equal seconds").
"""

from __future__ import annotations

from dataclasses import field, replace
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
    """Sizes and choices; but for step and start the defaults are `ga_distillation.RECOMMENDED`."""

    images_per_class: int = 1
    """Synthetic images of each class."""
    learning_rate: PositiveFloat = 0.03
    """The step of Adam; of cosines in standard deviations of a coefficient among real images."""
    encoding: EncodingName = "cosines"
    """What is learned: pixels, or the lowest cosine coefficients of each image."""
    num_cosines: int = 14
    """Coefficients a side, at most as many as fit."""
    start: Literal["class_means", "k_means"] = "k_means"
    """First images: the mean of each class, or the centres of k-means in each class."""
    num_networks: PositiveInt = 4
    """Fresh networks in each step, whose kernels are added."""

    kernel: KernelConfig = ga_distillation.RECOMMENDED.kernel
    """Regression; `company` and `columns` have no meaning here."""
    network: NetworkConfig = field(default_factory=NetworkConfig)
    engine: EngineConfig = field(default_factory=EngineConfig)

    def __post_init__(self):
        self.search()

    def search(self) -> ga_distillation.Config:
        """The evolution that descends the same error, by a strategy that takes no credit by image.
        Raises ValueError where there is none."""
        return replace(
            ga_distillation.RECOMMENDED,
            strategy="SNES",
            images_per_class=self.images_per_class,
            networks_per_member=self.num_networks,
            encoding=self.encoding,
            num_cosines=self.num_cosines,
            start=self.start,
            kernel=self.kernel,
            network=self.network,
            engine=self.engine,
        )


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
    regression_loss: Scalar  # the sum over columns, of the images before the step
    regression_accuracy: Scalar
    num_failed: IntScalar  # 1 where the gradient was not finite and the step was left out


def build(
    config: Config, num_classes: int, image_shape: tuple[int, int, int]
) -> Algorithm[State, None, Data, Metrics, Individual]:
    """`params` is None, `data` as `make_data` gives it; the result is an `Individual`."""
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
