"""`evaluate --robust-scores`: the trainings that DD-Ranking's scores compare."""

from __future__ import annotations

import time
from dataclasses import replace
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from evojax_suite import distilled, networks, proxy_network, robust_scores
from evojax_suite.data import normalize, with_whole_training_set
from evojax_suite.distilled import LITERATURE
from evojax_suite.networks import NetworkConfig
from evojax_suite.operators import random_examples
from evojax_suite.reporting.formats import percent
from evojax_suite.reporting.progress import console, progress
from evojax_suite.robust_scores import Judged
from evojax_suite.running.small_sets import fitted_to
from evojax_suite.runtime import devices
from evojax_suite.runtime.loop import StepReport
from evojax_suite.training import EngineConfig, TrainingConfig, batches_of, evaluate
from evojax_suite.types import Array, Dataset, PyTree, training_data

FULL_EPOCHS = 200


def on_all(num_epochs: int) -> TrainingConfig:
    """How DD-Ranking trains a ConvNet on the whole of CIFAR-10 (REAL_DATA_TRAINING_CONFIG of its
    ddranking/utils/train_and_eval.py), but for the number of epochs, there 200."""
    return replace(LITERATURE, num_epochs=num_epochs, batch_size=512)


class Full(NamedTuple):
    """A network trained on the whole training set with hard labels."""

    variables: PyTree
    accuracy: float
    training: TrainingConfig


class Scored(NamedTuple):
    """The accuracies that the scores compare, and the trainings that gave them."""

    judged: Judged
    training: TrainingConfig
    augmented: TrainingConfig
    """`training` with the augmentation of `judged.set_augmented`."""
    full: Full | None
    """None where no network was trained on the whole training set."""

    def lines(self) -> list[str]:
        """Returns a line for each accuracy, then for each score, in per cent."""
        judged = self.judged
        rows = {"real set, hard labels": judged.real_hard, "set, hard labels": judged.set_hard}
        for training, of_set, of_random in (
            (self.training, judged.set_own, judged.random_own),
            (self.augmented, judged.set_augmented, judged.random_augmented),
            (TrainingConfig(), judged.set_plain, judged.random_plain),
        ):
            augmentation = distilled.augmentation_of(training)
            # Two of the three are often the same.
            rows[f"set, augmentation {augmentation}"] = of_set
            rows[f"random images, augmentation {augmentation}"] = of_random
        rows |= robust_scores.scores(judged)
        return [
            f"  {name}: {percent(one) if isinstance(one, np.ndarray) else f'{100 * one:.2f}'} %"
            for name, one in rows.items()
        ]

    def summary(self) -> dict[str, Any]:
        """Returns accuracies, scores, augmentation and the training on all images, for a file."""
        return {
            "accuracies": self.judged,
            "scores": robust_scores.scores(self.judged),
            "augmentation": distilled.augmentation_of(self.augmented),
            "full_training": self.full and self.full.training,
        }


def fit_on_all(key: Array, config: proxy_network.Config, dataset: Dataset) -> proxy_network.State:
    """Returns a network trained on the training split of `dataset`, and shows its progress."""
    algorithm = proxy_network.build(config, dataset.num_classes, dataset.image_shape)
    data, num_epochs = training_data(dataset), config.training.num_epochs
    key_init, key_fit = jax.random.split(key)
    state, step = algorithm.init(key_init, None, data), jax.jit(algorithm.step)
    console.say(
        f"{config.network.network} on all {len(data.labels):,} training images, {num_epochs} epochs"
    )
    with progress("training on all", num_epochs) as show:
        for epoch in range(num_epochs):
            start = time.perf_counter()
            state, metrics = step(jax.random.fold_in(key_fit, epoch), state, None, data)
            row = {name: value.item() for name, value in metrics._asdict().items()}
            show(StepReport(epoch + 1, num_epochs, row, time.perf_counter() - start, [row]))
    return state


def train_on_all(
    key: Array, dataset: Dataset, network: NetworkConfig, num_epochs: int, engine: EngineConfig
) -> Full:
    """Returns a network trained on the whole training set of `dataset`, with its test accuracy."""
    training = on_all(num_epochs)
    config = proxy_network.Config(network=network, training=training, engine=engine)
    variables = fit_on_all(key, config, with_whole_training_set(dataset)).fit.variables
    module = networks.create(network, dataset.num_classes, dataset.image_shape)
    test = batches_of(dataset, dataset.test, engine)
    accuracy = jax.jit(evaluate, static_argnums=0)(module, variables, test).accuracy
    return Full(variables, float(accuracy), training)


def _random_sets(key: Array, dataset: Dataset, size: int, number: int) -> tuple[Array, Array]:
    """Returns real training images (number, size, H, W, C), normalised, and their labels (number,
    size)."""
    train = with_whole_training_set(dataset).train
    shared = jnp.asarray(train.labels), size, dataset.num_classes
    chosen = np.stack([random_examples(each, *shared) for each in jax.random.split(key, number)])
    images = normalize(train.images[chosen], dataset.mean, dataset.std)
    return jnp.asarray(images), jnp.asarray(train.labels[chosen])


def with_some_augmentation(training: TrainingConfig, dataset: Dataset) -> TrainingConfig:
    """Returns `training`, with DSA's augmentation (no flips of digits) where it has none."""
    if distilled.augmentation_of(training) != "none":
        return training
    return fitted_to(distilled.with_augmentation(training, "siamese"), dataset)


def check(dataset: Dataset, num_images: int) -> None:
    """Raise ValueError where there are too few real images for a random set of the same size."""
    most = len(dataset.train) + len(dataset.validation)
    if num_images > most:
        raise ValueError(
            f"robust_scores take as many real images as the set has, {num_images}, of {most}"
        )


def judge(
    key: Array,
    images: np.ndarray,
    labels: np.ndarray,
    dataset: Dataset,
    network: NetworkConfig,
    training: TrainingConfig,
    num_networks: int,
    num_random: int,
    full_accuracy: float | None,
    full_epochs: int,
    engine: EngineConfig,
    num_devices: devices.Devices,
) -> Scored:
    """Train the networks that the scores compare, and evaluate them on the test split of `dataset`:
    `num_networks` on the set (n, H, W, C), as many on `num_random` random images each, and one on
    the whole training set.

    As in DD-Ranking random images are equally many of each class (a class with too few gives all)
    and, where the labels are soft, have those of a teacher, the network of the whole training set;
    a set with soft labels is trained with hard ones without augmentation. Unlike there all are
    trained as `training` says, with no search for the learning rate of the best test accuracy, and
    evaluated at the end. full_accuracy: that of a network on the whole set; None trains one.
    """
    key_fit, key_full, key_random = (jax.random.fold_in(key, number) for number in range(3))
    hard = np.eye(dataset.num_classes, dtype=np.float32)[labels.argmax(-1)]
    soft = not np.array_equal(hard, labels)
    plain = distilled.with_augmentation(training, "none")
    augmented = with_some_augmentation(training, dataset)
    full = None
    if soft or full_accuracy is None:
        full = train_on_all(key_full, dataset, network, full_epochs, engine)
        full_accuracy = full.accuracy if full_accuracy is None else full_accuracy
    real_images, classes = _random_sets(key_random, dataset, num_random, num_networks)
    real_labels = jax.nn.one_hot(classes, dataset.num_classes)
    if soft and full is not None:
        teacher = networks.create(network, dataset.num_classes, dataset.image_shape)
        real_labels = jax.lax.map(
            lambda one: jax.nn.softmax(jnp.asarray(teacher.apply(full.variables, one))), real_images
        )
    done = {}

    def on(
        name: str, images: Array | np.ndarray, labels: Array | np.ndarray, training: TrainingConfig
    ) -> np.ndarray:
        if (name, training) not in done:
            how = network, training, num_networks, engine, num_devices
            done[name, training] = distilled.accuracies_on(
                dataset.test, key_fit, images, labels, dataset, *how
            )
        return done[name, training]

    accuracies = {
        f"{data}_{name}": on(data, shown, targets, recipe)
        for name, recipe in {"own": training, "augmented": augmented, "plain": plain}.items()
        for data, shown, targets in (
            ("set", images, labels),
            ("random", real_images, real_labels),
        )
    }
    set_hard = on("hard", images, hard, plain) if soft else accuracies["set_own"]
    judged = Judged(real_hard=full_accuracy, set_hard=set_hard, **accuracies)
    return Scored(judged, training, augmented, full)
