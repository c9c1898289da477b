"""The training of a network to compress, where none is given, and the images of evolution."""

from __future__ import annotations

from dataclasses import replace

import jax
import numpy as np
from flax.traverse_util import flatten_dict

from evojax_suite import networks, proxy_network
from evojax_suite.data.splits import balanced_subset
from evojax_suite.networks import NetworkConfig
from evojax_suite.systems.ecomp import artifact, feed_forward
from evojax_suite.systems.ecomp.feed_forward import Network
from evojax_suite.training import TrainingConfig
from evojax_suite.types import AnyAlgorithm, Dataset, PyTree, TrainingData, training_data

PAPER_IMAGES = 10_000
"""Images that evolution uses in the paper."""


def evolution_images(dataset: Dataset, num_images: int | None, batch_size: int) -> np.ndarray:
    """Positions of the training images that evolution uses; None is the paper's number of them, or
    as many whole batches of balanced classes as there are."""
    labels, num_classes = dataset.train.labels, dataset.num_classes
    if num_images is None:
        most = num_classes * int(np.bincount(labels, minlength=num_classes).min())
        num_images = min(PAPER_IMAGES, min(most, len(labels) - 1) // batch_size * batch_size)
        if not num_images:
            raise ValueError(
                f"{dataset.name} has {most} images of balanced classes, fewer than batch_size "
                f"{batch_size}"
            )
    return balanced_subset(labels, num_images, num_classes)


def parent_training(
    dataset: Dataset, inputs: artifact.Inputs, network: NetworkConfig, num_epochs: int
) -> tuple[AnyAlgorithm, TrainingData]:
    """The algorithm whose step is an epoch of the parent's training, by the paper's recipe, and its
    data: the training split, normalised for `inputs`."""
    training = TrainingConfig(num_epochs=num_epochs, batch_size=100, learning_rate=1e-3)
    config = proxy_network.Config(network=network, training=training)
    algorithm = proxy_network.build(config, dataset.num_classes, dataset.image_shape)
    mean, std = artifact.constants(dataset, inputs)
    return algorithm, training_data(replace(dataset, mean=tuple(mean), std=tuple(std)))


def untrained(network: NetworkConfig, dataset: Dataset) -> Network:
    """A parent of zeros, with the shapes of the trained one. Raises ValueError where the images do
    not fit."""
    module = networks.create(network, dataset.num_classes, dataset.image_shape)
    images = np.zeros((1, *dataset.image_shape), np.float32)
    shapes = jax.eval_shape(module.init, jax.random.key(0), images)["params"]
    zeros = jax.tree.map(lambda leaf: np.zeros(leaf.shape, leaf.dtype), shapes)
    return from_flax(zeros, network, dataset)


def from_flax(parameters: PyTree, network: NetworkConfig, dataset: Dataset) -> Network:
    """The parameters of a flax module as a network of plain arrays."""
    flat = flatten_dict(parameters, sep=".")
    arrays = {name: np.asarray(array) for name, array in flat.items()}
    shape, num_classes = dataset.image_shape, dataset.num_classes
    return feed_forward.from_arrays(arrays, shape, num_classes, network.pooling)
