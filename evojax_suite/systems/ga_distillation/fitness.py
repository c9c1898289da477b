"""Fitness of synthetic datasets: of networks that train on them, of kernel regression, or of a
function of the user's own."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import replace
from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float, Int

from evojax_suite import networks
from evojax_suite.data.errors import first_line
from evojax_suite.data.transforms import normalize
from evojax_suite.imports import import_object
from evojax_suite.operators import encodings
from evojax_suite.systems.ga_distillation import kernel_regression
from evojax_suite.systems.ga_distillation.config import FITNESS, TRAINED, Config
from evojax_suite.systems.ga_distillation.individuals import (
    Data,
    Individual,
    decode,
    images_and_targets,
)
from evojax_suite.training import Score, fit_and_evaluate_population
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
"""How much a set of images is worth, more is better, without a network: any code, a gradient is not
taken. (images, labels, real images, their labels), images normalised."""


def num_held_out(config: Config, num_images: int) -> int:
    """The number of the fitness images that are held out of the fitness."""
    if config.holdout_ratio == 0:
        return 0
    return min(max(1, round(config.holdout_ratio * num_images)), num_images - 1)


class Scores(NamedTuple):
    """Scores of a population, higher is better, NaN where an evaluation failed."""

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
    """Train a fresh network on each individual and score it on the fitness images; only of
    `members`, indices, where they are given: as they would score among all."""

    def decoded(member: Float[Array, "dims"]) -> Individual:
        one = decode(config, num_classes, image_shape, member, data)
        return Individual(*encodings.unpacked(*one, config.factor))

    if config.fitness == "kernel_regression":
        narrow = replace(config.network, width=config.kernel.kernel_width)
        network = networks.create(narrow, num_classes, image_shape)
        some = jnp.arange(len(population)) if members is None else members

        def regressed(member: Float[Array, "dims"]) -> Individual:
            one = images_and_targets(config, num_classes, image_shape, member, data)
            return Individual(*encodings.unpacked(*one, config.factor))

        own = num_classes, regressed, population, some, data
        return _score_by_kernel(key, config, network, *own)
    key_networks, key_subset = jax.random.split(key)
    images = normalize(data.fitness_images, data.mean, data.std)
    labels = data.fitness_labels
    num_holdout = num_held_out(config, images.shape[0])
    # The parts are shuffled once and for all, whatever order the dataset has.
    order = jax.random.permutation(jax.random.key(0), images.shape[0])
    holdout, used = order[:num_holdout], order[num_holdout:]
    if config.fitness_subset_size is not None:
        used = jax.random.permutation(key_subset, used)[: config.fitness_subset_size]
    parts = [used] if num_holdout == 0 else [used, holdout]
    some = population if members is None else population[members]
    if (judge := own_judge(config)) is not None:
        individuals = jax.vmap(decoded)(some)
        found = [_judged(judge, individuals, images[part], labels[part]) for part in parts]
        unknown = jnp.full(len(some), jnp.nan)
        return Scores(found[0], unknown, found[1] if num_holdout else unknown)

    network = networks.create(config.network, num_classes, image_shape)
    population_size, repeats = population.shape[0], config.networks_per_member
    if config.common_random_numbers:
        keys = jnp.tile(jax.random.split(key_networks, repeats), population_size)
    else:
        keys = jax.random.split(key_networks, population_size * repeats)
    if members is not None:
        keys = keys.reshape(population_size, repeats)[members].reshape(-1)
        population_size = len(members)
    individuals = jax.vmap(decoded)(some)
    trained = jax.tree.map(lambda leaf: jnp.repeat(leaf, repeats, axis=0), individuals)
    evaluations = fit_and_evaluate_population(
        keys,
        network,
        config.training,
        trained.images,
        trained.labels,
        tuple(config.engine.batches(images[part], labels[part]) for part in parts),
        config.engine,
        own_score(config, num_classes),
    )

    def score(evaluation):
        if config.fitness in TRAINED:
            minus = config.fitness == "cross_entropy"
            value = -evaluation.cross_entropy if minus else evaluation.accuracy
        else:
            value = evaluation.score
        return value.reshape(population_size, repeats).mean(-1)

    return Scores(
        fitness=score(evaluations[0]),
        accuracy=evaluations[0].accuracy.reshape(population_size, repeats).mean(-1),
        holdout=score(evaluations[1]) if num_holdout else jnp.full(population_size, jnp.nan),
    )


def _score_by_kernel(
    key: PRNGKey,
    config: Config,
    network: nn.Module,
    num_classes: int,
    regressed: Callable[[Array], Individual],
    population: Float[Array, "population dims"],
    members: Int[Array, "members"],
    data: Data,
) -> Scores:
    """Scores without training: what kernel regression on each individual says of training images.
    network: that whose features are regressed on; regressed: what a flat individual is."""
    classes = jnp.repeat(jnp.arange(num_classes), config.tiles_per_class)
    scores = kernel_regression.score_population(
        key,
        config.regression,
        network,
        config.networks_per_member,
        regressed,
        population,
        members,
        data.train_images,
        data.train_labels,
        lambda images: normalize(images, data.mean, data.std),
        config.engine,
        classes if config.strategy == "BlockES" else None,
        config.evolve_labels or config.regression.columns == "all",
    )
    credit = None
    if scores.credit is not None:
        credit, of_all = getattr(scores.credit, config.regression.columns), scores.credit.all
        if config.evolve_labels and of_all is not None:  # a label moves all columns
            by_image = of_all.reshape(len(of_all), -1, config.factor**2).mean(-1)
            credit = jnp.concatenate([credit, by_image], 1)
    return Scores(
        fitness=-scores.losses.sum(1),
        accuracy=scores.accuracy,
        holdout=jnp.full(len(scores.accuracy), jnp.nan),
        credit=credit,
    )


def solved_labels(
    key: PRNGKey, config: Config, num_classes: int, individual: Individual, data: Data
) -> Float[Array, "images {num_classes}"]:
    """Labels that serve the images best, probabilities as of labels that evolve:
    those from which kernel regression predicts 4,000 training images with the least squared error,
    over eight times the networks of a generation."""
    images, _ = encodings.unpacked(*individual, config.factor)
    height, width, channels = images.shape[1:]
    narrow = replace(config.network, width=config.kernel.kernel_width)
    network = networks.create(narrow, num_classes, (height, width, channels))
    found = kernel_regression.solve_labels(
        key,
        replace(config.regression, kernel_images=4000),
        network,
        8 * config.networks_per_member,
        images,
        config.factor**2,
        data.train_images,
        jax.nn.one_hot(data.train_labels, num_classes) - 1 / num_classes,
        lambda images: normalize(images, data.mean, data.std),
        config.engine,
    )
    return jax.nn.softmax(config.regression.temperature * found)


def _judged(
    judge: Judge,
    individuals: Individual,
    images: Float[Array, "real_images height width channels"],
    labels: Int[Array, "real_images"],
) -> Float[Array, "population"]:
    """What `judge` says of each individual. Not to be traced: with real images as arguments
    `jax.pure_callback` stands still on a CPU."""
    real = np.asarray(images), np.asarray(labels)
    own = zip(np.asarray(individuals.images), np.asarray(individuals.labels), strict=True)
    return jnp.asarray([judge(*one, *real) for one in own], jnp.float32)


def _own(config: Config) -> tuple[Callable | None, bool]:
    """The function that `fitness` names, None where it names none of your own, and whether it takes
    images. Raises ValueError where there is no such function."""
    if config.fitness in FITNESS:
        return None, False
    function = import_object(config.fitness)
    try:
        return function, len(inspect.signature(function).parameters) == 4
    except (TypeError, ValueError):  # not callable, or one that does not tell
        return function, False


def own_judge(config: Config) -> Judge | None:
    """The function of images that `fitness` names, None where it names none."""
    function, takes_images = _own(config)
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
    """What the function of images that `fitness` names says of an individual on `split`, a part of
    `dataset`; None where it names none."""
    if (judge := own_judge(config)) is None:
        return None
    own = jnp.asarray(individual.images), jnp.asarray(individual.labels)
    images, labels = encodings.unpacked(*own, config.factor)
    real = np.asarray(normalize(split.images, dataset.mean, dataset.std))
    return float(judge(np.asarray(images), np.asarray(labels), real, split.labels))


def own_score(config: Config, num_classes: int) -> Score | None:
    """The function of predictions that `fitness` names, None where it names none of your own.
    Raises ValueError where there is no such function, or it does not give a number for each of some
    predictions."""
    function, takes_images = _own(config)
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
    """Fitness with minus infinity where an evaluation failed."""
    return jnp.where(jnp.isfinite(fitness), fitness, -jnp.inf)
