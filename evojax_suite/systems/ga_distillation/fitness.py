"""Fitness of synthetic datasets: by networks that train on them, by kernel regression, or by a
function of the user."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float, Int

from evojax_suite import networks
from evojax_suite.data.errors import first_line
from evojax_suite.data.transforms import normalize
from evojax_suite.imports import import_object
from evojax_suite.operators import encodings
from evojax_suite.systems.ga_distillation import individuals, kernel_regression
from evojax_suite.systems.ga_distillation.config import FITNESS, Config
from evojax_suite.systems.ga_distillation.individuals import Data, Individual
from evojax_suite.training import Evaluation, Score, fit_and_evaluate_population, forward_work
from evojax_suite.types import Array, Dataset, PRNGKey, Split

Judge = Callable[
    [
        Float[np.ndarray, "images height width channels"],
        Float[np.ndarray, "images classes"],
        Float[np.ndarray, "real_images height width channels"],
        Int[np.ndarray, "real_images"],
    ],
    float,
]
"""A fitness of images without a network, higher is better: any code, as no gradient is taken.
(images, labels, real images, their labels) -> float, images normalised."""


def num_held_out(config: Config, num_images: int) -> int:
    """The number of images, out of `num_images`, that are held out of the fitness."""
    if config.holdout_ratio == 0:
        return 0
    return min(max(1, round(config.holdout_ratio * num_images)), num_images - 1)


class Scores(NamedTuple):
    """Scores of a population; higher is better, NaN where an evaluation failed."""

    fitness: Float[Array, "population"]
    accuracy: Float[Array, "population"]
    holdout: Float[Array, "population"]
    # Losses of each block (`strategies.BlockES`).
    credit: Float[Array, "population blocks"] | None = None


def score_population(
    key: PRNGKey,
    config: Config,
    num_classes: int,
    image_shape: tuple[int, int, int],
    population: Float[Array, "population dims"],
    data: Data,
    members: Int[Array, "members"] | None = None,
) -> Scores:
    """Train a fresh network on each individual, unless `fitness` needs none, and score it.

    image_shape: (H, W, C). members: indices of the individuals to score, with the scores that they
    have among all; None is all.
    """
    shape = num_classes, image_shape
    if config.fitness == "kernel_regression":
        return _score_by_kernel(key, config, *shape, population, data, members)

    def decoded(member: Float[Array, "dims"]) -> Individual:
        one = individuals.decode(config, *shape, member, data)
        return Individual(*encodings.unpacked(*one, config.factor))

    key_networks, key_subset = jax.random.split(key)
    images = normalize(data.fitness_images, data.mean, data.std)
    labels = data.fitness_labels
    num_holdout = num_held_out(config, images.shape[0])
    # The same shuffle in each generation, as the dataset may be in any order.
    order = jax.random.permutation(jax.random.key(0), images.shape[0])
    holdout, used = order[:num_holdout], order[num_holdout:]
    if config.fitness_subset_size is not None:
        used = jax.random.permutation(key_subset, used)[: config.fitness_subset_size]
    parts = [used] if num_holdout == 0 else [used, holdout]
    decoded_members = jax.vmap(decoded)(population if members is None else population[members])
    unknown = jnp.full(len(decoded_members.images), jnp.nan)
    if (judge := own_judge(config)) is not None:
        scores = [_judged(judge, decoded_members, images[part], labels[part]) for part in parts]
        return Scores(scores[0], unknown, scores[1] if num_holdout else unknown)

    population_size, repeats = len(population), config.networks_per_member
    if config.common_random_numbers:
        keys = jnp.tile(jax.random.split(key_networks, repeats), population_size)
    else:
        keys = jax.random.split(key_networks, population_size * repeats)
    if members is not None:
        keys = keys.reshape(population_size, repeats)[members].reshape(-1)
    trained = jax.tree.map(lambda leaf: jnp.repeat(leaf, repeats, axis=0), decoded_members)
    batches = tuple(config.engine.batches(images[part], labels[part]) for part in parts)
    network, user_score = networks.create(config.network, *shape), own_score(config, num_classes)
    training, engine = config.training, config.engine
    evaluations = fit_and_evaluate_population(
        keys, network, training, trained.images, trained.labels, batches, engine, user_score
    )

    def mean(values: Any) -> Array:
        return values.reshape(-1, repeats).mean(-1)

    def score(evaluation: Evaluation):
        named = {"accuracy": evaluation.accuracy, "cross_entropy": -evaluation.cross_entropy}
        return mean(named.get(config.fitness, evaluation.score))

    holdout = score(evaluations[1]) if num_holdout else unknown
    return Scores(score(evaluations[0]), mean(evaluations[0].accuracy), holdout)


def work_of(
    config: Config, num_classes: int, image_shape: tuple[int, int, int]
) -> Callable[[Data], float] | None:
    """Returns a function of the data that returns the floating-point operations of the evaluation
    of an individual, roughly, or None where individuals share a large part of them."""
    if config.fitness == "kernel_regression":
        return None
    steps = config.training.num_epochs * num_classes * config.images_per_class * config.factor**2
    network = networks.create(config.network, num_classes, image_shape)

    def work(data: Data) -> float:
        judged = config.fitness_subset_size or len(data.fitness_labels)
        passes = config.networks_per_member * (3 * steps + judged)
        return passes * forward_work(network, image_shape)

    return work


def _score_by_kernel(
    key: PRNGKey,
    config: Config,
    num_classes: int,
    image_shape: tuple[int, int, int],
    population: Float[Array, "population dims"],
    data: Data,
    members: Int[Array, "members"] | None,
) -> Scores:
    """`score_population` without training, by the predictions of training images."""

    def regressed(member: Float[Array, "dims"]) -> Individual:
        one = individuals.images_and_targets(config, num_classes, image_shape, member, data)
        return Individual(*encodings.unpacked(*one, config.factor))

    narrow = replace(config.network, width=config.kernel.kernel_width)
    network = networks.create(narrow, num_classes, image_shape)
    regression = config.regression, network, config.networks_per_member
    members = jnp.arange(len(population)) if members is None else members
    real = data.train_images, data.train_labels, partial(normalize, mean=data.mean, std=data.std)
    classes = None
    if config.strategy == "BlockES":
        classes = jnp.repeat(jnp.arange(num_classes), config.tiles_per_class)
    all_columns = config.evolve_labels or config.regression.columns == "all"
    scores = kernel_regression.score_population(
        key, *regression, regressed, population, members, *real, config.engine, classes, all_columns
    )
    credit = None
    if scores.credit is not None:
        credit, of_all = getattr(scores.credit, config.regression.columns), scores.credit.all
        if config.evolve_labels and of_all is not None:  # a label moves all columns
            by_image = of_all.reshape(len(of_all), -1, config.factor**2).mean(-1)
            credit = jnp.concatenate([credit, by_image], 1)
    holdout = jnp.full(len(scores.accuracy), jnp.nan)
    return Scores(-scores.losses.sum(1), scores.accuracy, holdout, credit)


def solved_labels(
    key: PRNGKey, config: Config, num_classes: int, individual: Individual, data: Data
) -> Float[Array, "images {num_classes}"]:
    """The best labels for the images of an individual, probabilities like labels that evolve: those
    from which kernel regression predicts 4,000 training images with the least squared error, over
    eight times the networks of a generation."""
    images, _ = encodings.unpacked(*individual, config.factor)
    height, width, channels = images.shape[1:]
    narrow = replace(config.network, width=config.kernel.kernel_width)
    network = networks.create(narrow, num_classes, (height, width, channels))
    more = replace(config.regression, kernel_images=4000), network, 8 * config.networks_per_member
    targets = jax.nn.one_hot(data.train_labels, num_classes) - 1 / num_classes
    real = data.train_images, targets, partial(normalize, mean=data.mean, std=data.std)
    labels = kernel_regression.solve_labels(
        key, *more, images, config.factor**2, *real, config.engine
    )
    return jax.nn.softmax(config.regression.temperature * labels)


def _judged(
    judge: Judge,
    members: Individual,
    images: Float[Array, "real_images height width channels"],
    labels: Int[Array, "real_images"],
) -> Float[Array, "population"]:
    """The fitness of each individual by `judge`. Not to be traced: with real images as arguments
    `jax.pure_callback` stands still on a CPU."""
    real = np.asarray(images), np.asarray(labels)
    population = zip(np.asarray(members.images), np.asarray(members.labels), strict=True)
    return jnp.asarray([judge(*one, *real) for one in population], jnp.float32)


def _users_function(config: Config) -> tuple[Callable[..., Any] | None, bool]:
    """The user's function that `fitness` names, None where it names none, and whether it takes
    images. Raises ValueError where it cannot be imported."""
    if config.fitness in FITNESS:
        return None, False
    function = import_object(config.fitness)
    try:
        return function, len(inspect.signature(function).parameters) == 4
    except (TypeError, ValueError):  # not callable, or without a signature
        return function, False


def own_judge(config: Config) -> Judge | None:
    """The user's function of images that `fitness` names, None where it names none."""
    function, takes_images = _users_function(config)
    return function if takes_images else None


def check_judge(config: Config, num_classes: int, image_shape: tuple[int, int, int]) -> None:
    """Raise ValueError where `own_judge` gives no number for black images."""
    if (judge := own_judge(config)) is None:
        return
    num_images = num_classes * config.tiles_per_class
    labels = np.arange(num_images) % num_classes
    images = np.zeros((num_images, *image_shape), np.float32)
    try:
        float(judge(images, np.eye(num_classes, dtype=np.float32)[labels], images, labels))
    except Exception as error:
        raise ValueError(
            f"{config.fitness!r} must give a number for images (n, H, W, C), labels (n, "
            f"num_classes), real images (m, H, W, C) and labels (m,): {first_line(error)}"
        ) from error


def score_on(
    split: Split, config: Config, dataset: Dataset, individual: Individual
) -> float | None:
    """The fitness of an individual on `split`, a part of `dataset`, by the user's function of
    images; None where `fitness` names none."""
    if (judge := own_judge(config)) is None:
        return None
    images, labels = map(np.asarray, encodings.unpacked(*individual, config.factor))
    real = normalize(split.images, dataset.mean, dataset.std)
    return float(judge(images, labels, real, split.labels))


def own_score(config: Config, num_classes: int) -> Score | None:
    """The user's function of predictions that `fitness` names, None where it names none. Raises
    ValueError where it cannot be imported or does not give a number for each prediction."""
    function, takes_images = _users_function(config)
    if function is None or takes_images:
        return None
    logits = jax.ShapeDtypeStruct((2, num_classes), jnp.float32)
    labels = jax.ShapeDtypeStruct((2,), jnp.int32)
    try:
        shape = jax.eval_shape(function, logits, labels).shape
    except Exception as error:
        raise ValueError(
            f"{config.fitness!r} must take logits (n, num_classes) and labels (n,): "
            f"{first_line(error)}"
        ) from error
    if shape != (2,):
        raise ValueError(f"{config.fitness!r} must give (n,) numbers, got {shape} for n = 2")
    return function


def rank_last(fitness: Float[Array, "population"]) -> Float[Array, "population"]:
    """`fitness` with minus infinity where an evaluation failed."""
    return jnp.where(jnp.isfinite(fitness), fitness, -jnp.inf)
