"""Synthetic datasets as flat vectors: the first ones of a search, and their images and labels."""

from __future__ import annotations

from typing import NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jaxtyping import Float, Int, UInt8

from evojax_suite.data.transforms import normalize
from evojax_suite.operators import encodings, random_examples
from evojax_suite.systems.ga_distillation.config import Config
from evojax_suite.types import Array, Dataset, Images, IntScalar, PRNGKey, Probabilities, Scalar

Vector: TypeAlias = Float[Array, "dims"]
Targets: TypeAlias = Float[Array, "images {num_classes}"]


@struct.dataclass
class Data:
    """The training and validation splits on the device, images in the type of the dataset."""

    # The source of the first individuals.
    train_images: (
        UInt8[Array, "train_images height width channels"]
        | Float[Array, "train_images height width channels"]
    )
    train_labels: Int[Array, "train_images"]
    fitness_images: (
        UInt8[Array, "fitness_images height width channels"]
        | Float[Array, "fitness_images height width channels"]
    )
    fitness_labels: Int[Array, "fitness_images"]
    mean: Float[Array, "channels"]
    std: Float[Array, "channels"]
    spread: Float[Array, "height width channels"]  # of cosine coefficients (`encodings`)
    contrast: Scalar  # the standard deviation of normalised training images
    # The images of `start="given"`, normalised, ordered by class.
    given: Images | None = None


class Individual(NamedTuple):
    """A synthetic dataset: normalised images and their labels."""

    images: Images
    labels: Probabilities


def make_data(
    dataset: Dataset, given: Float[np.ndarray, "images height width channels"] | None = None
) -> Data:
    """The training and validation splits of `dataset`: the test split stays closed. given: the
    images of `start="given"`, normalised, ordered by class."""
    height, width, _ = dataset.image_shape
    number = min(1000, max(200, 2**23 // (height * width)))  # enough for the spread
    some = dataset.train.images[:: max(1, len(dataset.train) // number)][:number]
    mean, std = np.array(dataset.mean, np.float32), np.array(dataset.std, np.float32)
    some = normalize(some, mean, std)
    return Data(
        train_images=jnp.asarray(dataset.train.images),
        train_labels=jnp.asarray(dataset.train.labels),
        fitness_images=jnp.asarray(dataset.validation.images),
        fitness_labels=jnp.asarray(dataset.validation.labels),
        mean=jnp.asarray(mean),
        std=jnp.asarray(std),
        spread=jnp.asarray(encodings.cosine_spread(some)),
        contrast=jnp.asarray(some.std(), jnp.float32),
        given=None if given is None else jnp.asarray(given),
    )


def encoding_of(config: Config, image_shape: tuple[int, ...]) -> encodings.Encoding:
    """The encoding of images (H, W, C) that `config` asks for."""
    return encodings.create(config.encoding, image_shape, config.num_cosines, config.factor)


def num_dims(config: Config, num_classes: int, image_shape: tuple[int, int, int]) -> int:
    """The length of a flat individual."""
    num_labels = num_classes if config.evolve_labels else 0
    each = encoding_of(config, image_shape).num_dims + num_labels
    return num_classes * config.images_per_class * each


def images_and_targets(
    config: Config, num_classes: int, image_shape: tuple[int, ...], individual: Vector, data: Data
) -> tuple[Images, Targets]:
    """The images of a flat individual and the targets that kernel regression predicts from each:
    1 for the class and 0 for others where labels do not evolve."""
    encoding = encoding_of(config, image_shape)
    numbers = individual.reshape(num_classes * config.images_per_class, -1)
    images = encoding.decode(numbers[:, : encoding.num_dims], data.spread)
    if config.levels is not None:
        pixels = encodings.rounded(images * data.std + data.mean, config.levels)
        images = (pixels - data.mean) / data.std
    if not config.evolve_labels:
        return images, one_hot_classes(config, num_classes)
    return images, numbers[:, encoding.num_dims :] * label_step(config)


def decode(
    config: Config, num_classes: int, image_shape: tuple[int, ...], individual: Vector, data: Data
) -> Individual:
    """The synthetic dataset of a flat individual.

    Features of a network with instance normalisation do not depend on contrast, so a search by
    kernel regression on them leaves it arbitrary. These images are scaled to the contrast of real
    ones, which other networks need, unless their pixels have bounds or levels.

    Labels that evolve are clipped at 0 and scaled to sum 1; where all are zero they are uniform. By
    kernel regression, whose predictions become probabilities by a softmax, they do so too: a
    network that fits these labels has the logits that the regression was given.
    """
    images, targets = images_and_targets(config, num_classes, image_shape, individual, data)
    by_kernel = config.fitness == "kernel_regression"
    unbounded = config.levels is None and config.clip != "image"
    if by_kernel and unbounded and config.network.normalization in ("default", "instance"):
        images *= data.contrast / jnp.maximum(images.std(), 1e-6)
    if not config.evolve_labels:
        return Individual(images, targets)
    if by_kernel:
        return Individual(images, jax.nn.softmax(config.regression.temperature * targets))
    labels = jnp.maximum(targets, 0.0)
    total = labels.sum(-1, keepdims=True)
    labels = jnp.where(total > 0, labels / jnp.where(total > 0, total, 1.0), 1.0 / num_classes)
    return Individual(images, labels)


def one_hot_classes(config: Config, num_classes: int) -> Targets:
    """The classes of the images of an individual, one-hot."""
    classes = jnp.repeat(jnp.arange(num_classes), config.images_per_class)
    return jax.nn.one_hot(classes, num_classes)


def label_step(config: Config) -> float:
    """The change of a label by a step of one: for kernel regression, whose labels evolve as logits,
    a fifth of the distance between one class and another."""
    return 0.2 if config.fitness == "kernel_regression" else 1.0


def encode(
    config: Config, num_classes: int, images: Images, spread: Float[Array, "height width channels"]
) -> Vector:
    """The flat individual of normalised images, equally many of each class, ordered by class."""
    codes = encoding_of(config, images.shape[1:]).encode(images, spread)
    if config.evolve_labels:
        labels = one_hot_classes(config, num_classes) / label_step(config)
        codes = jnp.concatenate([codes, labels], -1)
    return codes.reshape(-1)


def random_individuals(
    key: PRNGKey, config: Config, num_classes: int, data: Data, num_individuals: int
) -> Float[Array, "{num_individuals} dims"]:
    """Flat individuals of random training images, normalised and not clipped."""
    num_images = num_classes * config.tiles_per_class

    def draw(key: PRNGKey):
        indices = random_examples(key, data.train_labels, num_images, num_classes)
        images = normalize(data.train_images[indices], data.mean, data.std)
        return encode(config, num_classes, encodings.packed(images, config.factor), data.spread)

    return jax.lax.map(draw, jax.random.split(key, num_individuals))


def class_means(config: Config, num_classes: int, data: Data) -> Vector:
    """The flat individual whose images are each the mean training image of their class."""
    num_images, *shape = data.train_images.shape
    size = min(1000, num_images)

    def add(block: Array, totals: Array):
        start = jnp.minimum(block * size, num_images - size)  # the last overlaps the one before
        images, labels = (
            jax.lax.dynamic_slice_in_dim(array, start, size)
            for array in (data.train_images, data.train_labels)
        )
        new = start + jnp.arange(size) >= block * size
        members = jax.nn.one_hot(labels, num_classes) * new[:, None]
        images = images.astype(jnp.float32)
        return totals + jnp.einsum("nk,nhwc->khwc", members, images, precision="highest")

    empty = jnp.zeros((num_classes, *shape))
    totals = jax.lax.fori_loop(0, -(-num_images // size), add, empty)
    counts = jnp.bincount(data.train_labels, length=num_classes)
    means = totals / counts[:, None, None, None]
    if jnp.issubdtype(data.train_images.dtype, jnp.integer):
        means /= 255
    images = normalize(means, data.mean, data.std)
    images = encodings.packed(images.repeat(config.tiles_per_class, 0), config.factor)
    return encode(config, num_classes, images, data.spread)


def class_centres(key: PRNGKey, config: Config, num_classes: int, data: Data) -> Vector:
    """The flat individual whose images are centres of k-means in each class: Lloyd's algorithm on
    at most 8,192 training images, from random ones."""
    count = config.tiles_per_class
    key_some, key_first = jax.random.split(key)
    some = jax.random.permutation(key_some, len(data.train_images))[:8192]
    points = normalize(data.train_images[some], data.mean, data.std)
    labels, shape = data.train_labels[some], points.shape[1:]
    points = points.reshape(len(points), -1)
    first = random_examples(key_first, data.train_labels, num_classes * count, num_classes)
    starts = normalize(data.train_images[first], data.mean, data.std)

    def of_class(start: tuple[IntScalar, Float[Array, "centres features"]]):
        label, centres = start

        def step(centres: Array, _):
            distances = (centres**2).sum(1) - 2 * points @ centres.T
            nearest = jax.nn.one_hot(distances.argmin(1), count) * (labels == label)[:, None]
            sizes = nearest.sum(0)[:, None]
            means = nearest.T @ points / jnp.maximum(sizes, 1)
            return jnp.where(sizes > 0, means, centres), None

        return jax.lax.scan(step, centres, length=25)[0]

    starts = starts.reshape(num_classes, count, -1)
    centres = jax.lax.map(of_class, (jnp.arange(num_classes), starts))
    images = encodings.packed(centres.reshape(-1, *shape), config.factor)
    return encode(config, num_classes, images, data.spread)
