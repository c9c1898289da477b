"""Zhao, Mopuri & Bilen, ICLR 2021, "Dataset Condensation with Gradient Matching" (DC), Algorithm 1.

Synthetic images are learned so that a network's gradient on them has the direction of its gradient
on real images of the same class. A step is one iteration with a freshly initialised network, in
which the images take `outer_loops` steps and the network is trained on them in between. `siamese`
makes it DSA (Zhao & Bilen, ICML 2021).

Where the published program differs from the paper's text we follow the program, except where noted:

- Image momentum is 0.5; the distance leaves out biases and normalisation scales.
- The network is not trained after the last outer loop, as nothing depends on it. The program runs
  1,001 iterations for 1,000.
- Real images are drawn with replacement; the program draws without, from classes that have more
  images than a batch.

Additions: a step whose gradient is not finite leaves the images as they were and is counted;
`networks_per_iteration` > 1 averages the distance over several networks, which changes the
algorithm and is off by default.

Convolutions are lowered as in training: differentiated twice, an iteration of (1, 1) loops at width
32, 10 x 64 real images of 32x32, took 0.39 s with split_gradient, 0.50 s with patches and 6.2 s
with native on two cores of a Xeon VM.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import struct
from jaxtyping import Float, Int, Int32
from pydantic import NonNegativeInt, PositiveFloat, PositiveInt

from evojax_suite import networks, types
from evojax_suite.configuration import configuration
from evojax_suite.data import siamese
from evojax_suite.data.transforms import normalize
from evojax_suite.networks import NetworkConfig
from evojax_suite.training import EngineConfig, map_members
from evojax_suite.types import Array, Images, IntScalar, PRNGKey, Probabilities, PyTree, Scalar

_LOOPS = {1: (1, 1), 10: (10, 50), 50: (50, 10)}  # by images per class: outer, inner
_NETWORK_BATCH = 256


@configuration
class Config:
    """Sizes and choices; the defaults are the paper's."""

    images_per_class: PositiveInt = 1
    """Number of synthetic images of each class."""
    outer_loops: PositiveInt | None = None
    """Matching steps with one network; None is 1, 10, 50 for 1, 10, 50 images per class."""
    inner_loops: NonNegativeInt | None = None
    """Epochs of the network between these; None is 1, 50, 10 for 1, 10, 50 images per class."""
    real_batch_size: PositiveInt = 256
    """Real images of a class in a matching step."""
    image_learning_rate: PositiveFloat = 0.1
    """Learning rate of the images, by SGD with momentum 0.5."""
    network_learning_rate: PositiveFloat = 0.01
    """Learning rate of the network, by SGD without momentum."""
    initialization: Literal["real", "noise"] = "real"
    """First images: real ones of the class, or standard normal noise."""
    siamese: tuple[str, ...] = ()
    """Differentiable siamese augmentation: color, crop, cutout, flip, scale, rotate."""
    networks_per_iteration: PositiveInt = 1
    """Number of networks over which the distance is averaged."""

    network: NetworkConfig = NetworkConfig()
    engine: EngineConfig = EngineConfig()

    def __post_init__(self):
        siamese.check_names(self.siamese)
        if self.network.dropout:
            raise ValueError(f"dropout has no place in matching, got {self.network.dropout}")
        if self.network.normalization == "batch":
            raise ValueError("normalization batch mixes images: take instance, layer or group")
        if (lowering := self.network.convolution) in ("fused", "compiled"):
            raise ValueError(
                f"convolution {lowering} is differentiable once, and matching needs it twice"
            )

    @property
    def loops(self) -> tuple[int, int]:
        """Outer and inner loops; None is that of the nearest known number of images or fewer."""
        outer, inner = _LOOPS[max(known for known in _LOOPS if known <= self.images_per_class)]
        outer = outer if self.outer_loops is None else self.outer_loops
        return outer, inner if self.inner_loops is None else self.inner_loops


@struct.dataclass
class Data(types.TrainingData):
    """The training split on the device, with the places of each class."""

    places: Int[Array, "classes most"]  # indices of the images of a class, repeated to fill
    counts: Int[Array, "classes"]


@struct.dataclass
class State:
    """The images and the momentum of their optimizer."""

    images: Float[Array, "classes images_per_class height width channels"]  # normalised
    momentum: Float[Array, "classes images_per_class height width channels"]
    iteration: Int32[Array, ""]


class Metrics(NamedTuple):
    """What one iteration reports."""

    generation: IntScalar  # the iteration, from 1
    matching_loss: Scalar  # mean over outer loops of the distance, per class
    num_failed: IntScalar  # outer loops whose gradient was not finite


class Condensed(NamedTuple):
    """The synthetic set, class by class."""

    images: Images  # normalised
    labels: Probabilities


def make_data(dataset: types.Dataset) -> Data:
    """The training split of `dataset`. Raises ValueError where a class has no image."""
    labels = dataset.train.labels
    counts = np.bincount(labels, minlength=dataset.num_classes)
    if counts.min() == 0:
        name = dataset.class_names[counts.argmin()]
        raise ValueError(f"class {name!r} of {dataset.name} has no training images")
    places = [np.resize(np.flatnonzero(labels == c), counts.max()) for c in range(len(counts))]
    shared = vars(types.training_data(dataset))
    return Data(**shared, places=jnp.asarray(np.stack(places)), counts=jnp.asarray(counts))


def matching_distance(real: PyTree, synthetic: PyTree) -> Scalar:
    """The sum over output channels of one minus the cosine of their gradients (eq. 9-10).

    real, synthetic: gradients of flax parameters, whose last axis is the output channel; those of
    one dimension, biases and scales, are left out.
    """

    def layer(first: Array, second: Array):
        if first.ndim < 2:
            return jnp.float32(0)
        first, second = (gradient.reshape(-1, gradient.shape[-1]) for gradient in (first, second))
        lengths = _length(first) * _length(second)
        return (1 - (first * second).sum(0) / (lengths + 1e-6)).sum()

    return jnp.sum(jnp.stack(jax.tree.leaves(jax.tree.map(layer, real, synthetic))))


def _length(columns: Float[Array, "rows columns"]) -> Float[Array, "columns"]:
    """Euclidean norm of each column; its gradient is 0, not NaN, where the column is 0."""
    squares = (columns * columns).sum(0)
    return jnp.where(squares > 0, jnp.sqrt(jnp.where(squares > 0, squares, 1)), 0)


@dataclass(frozen=True)
class _GradientMatching:
    """The functions of the algorithm and what does not change in a run."""

    config: Config
    num_classes: int
    image_shape: tuple[int, int, int]
    network: nn.Module
    labels: Int[Array, "synthetic"]

    def init(self, key: PRNGKey, params: None, data: Data) -> State:
        del params
        size = self.config.images_per_class
        key_places, key_noise = jax.random.split(key)

        def draw(key: PRNGKey, label: Array):
            """Images of a class, distinct as long as it has enough."""
            priorities = jax.random.uniform(key, data.places.shape[1:])
            first = jnp.arange(data.places.shape[1]) < data.counts[label]
            order = jnp.where(first, priorities, 2.0).argsort()
            return data.places[label, order[jnp.arange(size) % data.counts[label]]]

        if self.config.initialization == "real":
            keys = jax.random.split(key_places, self.num_classes)
            chosen = jax.vmap(draw)(keys, jnp.arange(self.num_classes))
            images = normalize(data.images[chosen], data.mean, data.std)
        else:
            images = jax.random.normal(key_noise, (self.num_classes, size, *self.image_shape))
        return State(images=images, momentum=jnp.zeros_like(images), iteration=jnp.int32(0))

    def step(self, key: PRNGKey, state: State, params: None, data: Data) -> tuple[State, Metrics]:
        del params
        num_networks = self.config.networks_per_iteration
        outer_loops, inner_loops = self.config.loops
        key_networks, key_loops = jax.random.split(key)
        nothing = jnp.zeros((1, *self.image_shape))
        keys = jax.random.split(key_networks, num_networks)
        parameters = jax.vmap(lambda key: self.network.init(key, nothing)["params"])(keys)

        def outer(carry: PyTree, index: Array):
            parameters, images, momentum = carry
            key_match, key_train = jax.random.split(jax.random.fold_in(key_loops, index))

            def epochs(key: PRNGKey, parameters: PyTree) -> PyTree:
                def epoch(number: Array, parameters: PyTree):
                    return self._train(jax.random.fold_in(key, number), parameters, images)

                # Trained before each step but the first: never after the last.
                return jax.lax.fori_loop(0, jnp.where(index > 0, inner_loops, 0), epoch, parameters)

            parameters = self._map(epochs, jax.random.split(key_train, num_networks), parameters)
            distances, gradients = self._match(key_match, parameters, images, data)
            finite = jnp.isfinite(gradients).all()
            new_momentum = 0.5 * momentum + gradients
            new_images = images - self.config.image_learning_rate * new_momentum
            images = jnp.where(finite, new_images, images)
            momentum = jnp.where(finite, new_momentum, momentum)
            return (parameters, images, momentum), (distances.mean(), finite)

        start = parameters, state.images, state.momentum
        carry, (distances, finite) = jax.lax.scan(outer, start, jnp.arange(outer_loops))
        iteration, loss = state.iteration + 1, jnp.mean(distances, where=finite)
        return State(*carry[1:], iteration), Metrics(iteration, loss, (~finite).sum())

    def result(self, state: State, params: None, data: Data) -> Condensed:
        del params, data
        images = state.images.reshape(-1, *self.image_shape)
        return Condensed(images, jax.nn.one_hot(self.labels, self.num_classes))

    def _map(self, function: Callable[..., Any], *members: PyTree) -> Any:
        return map_members(function, members, self.config.engine.resolved_members_in_flight)

    def _augment(self, key: PRNGKey, images: Array, shared: bool):
        return siamese.augment(key, images, self.config.siamese, shared)

    def _gradient(
        self, parameters: PyTree, images: Array, labels: Array, weights: Array | None = None
    ) -> PyTree:
        """Gradient of the mean loss, weighted where `weights` (N,) are given."""

        def loss(parameters: PyTree):
            logits = jnp.asarray(self.network.apply({"params": parameters}, images, train=True))
            losses = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
            return jnp.average(losses, weights=weights)

        return jax.grad(loss)(parameters)

    def _match(self, key: PRNGKey, networks_parameters: PyTree, images: Array, data: PyTree):
        """Distance (num_classes,) and its gradient, of the images of each class."""

        def of_class(key: PRNGKey, label: Array, synthetic: Array):
            key_real, key_view = jax.random.split(key)
            size = self.config.real_batch_size
            drawn = jax.random.randint(key_real, (size,), 0, data.counts[label])
            real = normalize(data.images[data.places[label, drawn]], data.mean, data.std)
            real = self._augment(key_view, real, True)

            def distance(synthetic: Array):
                view = self._augment(key_view, synthetic, True)

                def with_network(parameters: PyTree):
                    target = self._gradient(parameters, real, jnp.full(len(real), label))
                    gradient = self._gradient(parameters, view, jnp.full(len(view), label))
                    return matching_distance(target, gradient)

                return self._map(with_network, networks_parameters).mean()

            return jax.value_and_grad(distance)(synthetic)

        keys = jax.random.split(key, self.num_classes)
        return self._map(of_class, keys, jnp.arange(self.num_classes), images)

    def _train(self, key: PRNGKey, parameters: PyTree, images: Array):
        """The parameters of a network after one epoch on the synthetic set."""
        count, rate = len(self.labels), self.config.network_learning_rate
        batch_size = min(_NETWORK_BATCH, count)
        key_order, key_views = jax.random.split(key)
        order = jax.random.permutation(key_order, count)
        flat = images.reshape(count, *self.image_shape)

        def step(parameters: PyTree, batch: PyTree):
            positions = batch * batch_size + jnp.arange(batch_size)
            weights = positions < count
            chosen = order[positions % count]
            view = self._augment(jax.random.fold_in(key_views, batch), flat[chosen], False)
            gradients = self._gradient(parameters, view, self.labels[chosen], weights)
            return jax.tree.map(lambda p, g: p - rate * g, parameters, gradients), None

        return jax.lax.scan(step, parameters, jnp.arange(-(-count // batch_size)))[0]


def build(
    config: Config, num_classes: int, image_shape: tuple[int, int, int]
) -> types.Algorithm[State, None, Data, Metrics, Condensed]:
    """A step is an iteration; `params` is None."""
    network = networks.create(config.network, num_classes, image_shape)
    labels = jnp.repeat(jnp.arange(num_classes), config.images_per_class)
    dc = _GradientMatching(config, num_classes, image_shape, network, labels)
    functions = dc.init, dc.step, dc.result, lambda state: jnp.bool_(False)
    return types.Algorithm(*functions, image_shape=image_shape)
