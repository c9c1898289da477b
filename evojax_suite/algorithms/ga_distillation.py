"""Sato, Tamura & Yamamoto 2026, "Dataset Distillation on Medical Dataset Using Genetic Algorithm".

An individual is a whole synthetic dataset, `images_per_class` images a class with fixed one-hot
labels; its fitness is the accuracy, on the fitness part of the data, of a freshly initialised
ConvNet trained on it alone (section 3.1). The strategy is DL-EA with Laplace crossover
(`strategies/laplace_ga.py`).

A generation evaluates the whole population, survivors too, and makes the next one; generation 1
evaluates the initial individuals, so that G generations are G * P trainings and generation 1 is
what strong random selection does.

Where we differ from the paper's text, and why:

- The paper writes "a (lx_scale) = 0.5 and b (lx_location) = 0" beside equations in which a is the
  location and b the scale. Read literally beta would be constant; location 0 and scale 0.5 are
  meant, as the parameters' names in inspyred, which the paper says it used, show.
- Eq. 4 draws sign and size of beta with one number. inspyred draws the sign apart, which makes beta
  Laplace distributed; that is the default, `laplace_sign="shared"` is the equation.
- The children of the first step get noise of deviation 1 (g = 1, Eq. 1).
- With `images_per_class` > 1 (the paper has 1) the initial images of a class are distinct.

Beyond the paper, all off by default: the options from `common_random_numbers` on. Of these
`fitness="kernel_regression"` (`kernel_regression.py`) with `strategy="BlockES"`, cosines and class
means as the start is what we would use: no network is trained while it searches.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, Literal, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from evosax.algorithms.base import EvolutionaryAlgorithm
from flax import struct

from evojax_suite import kernel_regression, networks, strategies
from evojax_suite.baselines import random
from evojax_suite.data.errors import check_types, first_line
from evojax_suite.data.transforms import normalize
from evojax_suite.imports import imported
from evojax_suite.kernel_regression import KernelConfig, Regression
from evojax_suite.networks import NetworkConfig
from evojax_suite.operators import LaplaceSign, encodings
from evojax_suite.operators.encodings import Encoding, EncodingName
from evojax_suite.training import (
    EngineConfig,
    Score,
    TrainingConfig,
    fit_and_evaluate_population,
)
from evojax_suite.types import Algorithm, Array, Dataset, Divided, PyTree

Judge = Callable[[np.ndarray, np.ndarray, np.ndarray, np.ndarray], float]
"""How much a set of images is worth, more is better, without a network: any code, a gradient is not
taken. (images (n, H, W, C), labels (n, num_classes), real images (M, H, W, C), their labels (M,)),
images normalised."""

TRAINED = "accuracy", "cross_entropy"
"""Fitness of a network that is trained on the individual."""
FITNESS = *TRAINED, "kernel_regression"


@dataclass(frozen=True)
class Config:
    """Sizes and choices; the defaults are the paper's."""

    population_size: int = 300
    """Individuals."""
    images_per_class: int = 1
    """Synthetic images of each class in an individual."""
    survival_ratio: float = 0.5
    """Part of the population that survives a generation."""
    strategy: str = "LaplaceGA"
    """LaplaceGA (the paper's), BlockES, or any evosax algorithm: SimpleGA, SNES, Sep_CMA_ES, ..."""
    strategy_std: float | None = None
    """Initial standard deviation of an evosax strategy that has one; None is its own default."""
    crossover: Literal["laplace", "none"] = "laplace"
    """none is DL-EA without crossover, the paper's Fig. 3 comparison."""
    laplace_sign: LaplaceSign = "independent"
    """How the sign of beta is drawn: independent (inspyred) or shared (Eq. 4 to the letter)."""

    common_random_numbers: bool = False
    """Give all members of a generation the same initialisation, a new one each generation."""
    networks_per_member: int = 1
    """Average the fitness of a member over this many networks; of kernel regression the kernel."""
    fitness: Literal["accuracy", "cross_entropy", "kernel_regression"] | str = "accuracy"
    """What selection maximises: the accuracy, minus the mean cross-entropy, or the mean of your own
    `training.Score`, as package.module:function, of a network that is trained on the individual;
    or, without training one, minus the error of kernel regression on training images, or your own
    `Judge`, a function of four arguments, of the images themselves."""
    encoding: EncodingName = "pixels"
    """What evolves: pixels, or the lowest cosine coefficients of each image."""
    num_cosines: int = 14
    """Coefficients a side, at most as many as fit."""
    factor: int = 1
    """Smaller images a side that one image holds; networks see each at the full size."""
    levels: int | None = None
    """Values that a pixel can take, evenly spaced from 0 to 1: 2 is one bit; None is any value."""
    start: Literal["real", "class_means", "k_means", "given"] = "real"
    """Images from which the search starts: real training images, or (for an algorithm that searches
    around a mean) the mean of each class, the centres of k-means in each class, or images that are
    given with the data."""
    fitness_subset_size: int | None = None
    """Evaluate on a fresh random subset of this many fitness images in each generation."""
    holdout_ratio: float = 0.0
    """Keep this part of the fitness images out of the fitness; the best of each generation is
    scored on them, and the run's result is the best by that score."""
    patience: int | None = None
    """Stop early after this many generations without a better score on the held-out images."""
    best_of: Literal["run", "last_generation", "mean"] = "run"
    """Which individual is the result: the run's best by its single score (the paper's), the last
    generation's best, since scores of generations with common random numbers do not compare, or
    the mean around which an algorithm searches."""
    evolve_labels: bool = False
    """Let soft labels evolve along with the images, one for each; by kernel regression they evolve
    as logits."""
    clip: Literal["unit", "image"] = "unit"
    """Bounds of children: 0..1 in the space of normalised images (the paper's), or the values that
    an image of 0..1 has there after normalisation."""

    kernel: KernelConfig = field(default_factory=KernelConfig)
    network: NetworkConfig = field(default_factory=NetworkConfig)
    training: TrainingConfig = field(default_factory=TrainingConfig)
    engine: EngineConfig = field(default_factory=EngineConfig)

    @property
    def tiles_per_class(self) -> int:
        """The number of images of each class that networks see of an individual."""
        return self.images_per_class * self.factor**2

    @property
    def regression(self) -> Regression:
        """The scalars of kernel regression on so many images."""
        return self.kernel.regression(self.tiles_per_class)

    def __post_init__(self):
        check_types(vars(self), type(self))
        if self.fitness not in FITNESS and ":" not in self.fitness:
            raise ValueError(
                f"fitness must be one of {', '.join(FITNESS)}, or package.module:function, got "
                f"{self.fitness!r}"
            )
        for name, least in (
            ("population_size", 2),
            ("images_per_class", 1),
            ("networks_per_member", 1),
            ("num_cosines", 1),
            ("factor", 1),
        ):
            if getattr(self, name) < least:
                raise ValueError(f"{name} must be >= {least}, got {getattr(self, name)}")
        if not 0 < self.survival_ratio < 1:
            raise ValueError(f"survival_ratio must be in (0, 1), got {self.survival_ratio}")
        if not 0 <= self.holdout_ratio < 1:
            raise ValueError(f"holdout_ratio must be in [0, 1), got {self.holdout_ratio}")
        if self.patience is not None and self.patience < 1:
            raise ValueError(f"patience must be >= 1, got {self.patience}")
        if self.holdout_ratio > 0 and self.best_of != "run":
            raise ValueError(
                f"best_of {self.best_of} leaves nothing to choose by holdout_ratio > 0"
            )
        if self.fitness == "kernel_regression":
            if self.network.network != "ConvNet":
                raise ValueError(
                    f"kernel_regression takes features of the ConvNet alone, got "
                    f"{self.network.network}"
                )
            for name, off in (("holdout_ratio", 0.0), ("fitness_subset_size", None)):
                if getattr(self, name) != off:
                    raise ValueError(
                        f"{name} belongs to a fitness of trained networks, got "
                        f"{getattr(self, name)} with kernel_regression"
                    )
            if self.evolve_labels and self.regression.temperature == 0:
                raise ValueError(
                    f"evolve_labels by kernel_regression needs a temperature > 0, got "
                    f"{self.regression.temperature}"
                )
        if self.clip == "image" and self.encoding != "pixels":
            raise ValueError(f"clip image needs the encoding pixels, got {self.encoding}")
        if self.patience is not None and self.holdout_ratio == 0:
            raise ValueError("patience needs a holdout_ratio > 0, got 0")
        if self.fitness_subset_size is not None and self.fitness_subset_size < 1:
            raise ValueError(f"fitness_subset_size must be >= 1, got {self.fitness_subset_size}")
        if self.levels is not None and not 2 <= self.levels <= 256:
            raise ValueError(f"levels must be in 2..256, got {self.levels}")
        if self.strategy_std is not None and not self.strategy_std > 0:
            raise ValueError(f"strategy_std must be > 0, got {self.strategy_std}")
        if self.strategy == "LaplaceGA" and self.strategy_std is not None:
            raise ValueError(f"LaplaceGA has no strategy_std, got {self.strategy_std}")
        if self.strategy != "LaplaceGA":
            for name in ("crossover", "laplace_sign", "survival_ratio", "clip"):
                value = getattr(self, name)
                if value != getattr(type(self), name):
                    raise ValueError(
                        f"{name} belongs to LaplaceGA, got {value} with {self.strategy}"
                    )


RECOMMENDED = Config(
    population_size=256,
    networks_per_member=4,
    strategy="BlockES",
    strategy_std=0.4,
    fitness="kernel_regression",
    encoding="cosines",
    start="class_means",
    best_of="mean",
    kernel=KernelConfig(kernel_images=1000),
)
"""What we would use: no network is trained while it searches."""
FOUR_IN_ONE = replace(
    RECOMMENDED,
    population_size=32,
    factor=2,
    start="k_means",
    kernel=KernelConfig(kernel_images=500),
)
"""The same for images of the same size that hold four smaller ones each."""


@struct.dataclass
class Params:
    """Scalars of LaplaceGA that users sweep; traced, arrays of shape () work too."""

    crossover_rate: float = 1.0
    """Probability that a pair of parents is crossed over, in [0, 1]."""
    laplace_location: float = 0.0
    """Location of the Laplace distribution."""
    laplace_scale: float = 0.5
    """Scale of the Laplace distribution, > 0."""
    mutation_scale: float = 1.0
    """Noise of generation g has this standard deviation over g (Eq. 1)."""

    def check(self) -> None:
        """Raise ValueError where one is out of range."""
        if not 0 <= self.crossover_rate <= 1:
            raise ValueError(f"crossover_rate must be in [0, 1], got {self.crossover_rate}")
        if not 0 < self.laplace_scale < np.inf:
            raise ValueError(f"laplace_scale must be > 0, got {self.laplace_scale}")
        if not np.isfinite(self.laplace_location):
            raise ValueError(f"laplace_location must be finite, got {self.laplace_location}")
        if not 0 <= self.mutation_scale < np.inf:
            raise ValueError(f"mutation_scale must be >= 0, got {self.mutation_scale}")


@struct.dataclass
class Data:
    """The parts of a dataset that evolution sees, on the device. Images as the dataset has them."""

    train_images: Array  # (N, H, W, C): initial individuals
    train_labels: Array  # (N,)
    fitness_images: Array  # (M, H, W, C)
    fitness_labels: Array  # (M,)
    mean: Array  # (C,)
    std: Array  # (C,)
    spread: Array  # (H, W, C): of cosine coefficients (`encodings`)
    contrast: Array  # (): the standard deviation of normalised training images
    given: Array | None = None  # (n, H, W, C), normalised, class by class: where to start


@struct.dataclass
class State:
    """What the next generation needs."""

    strategy: PyTree  # the evosax state
    population: Array  # (P, D): evaluated by the next step
    generation: Array  # () int32: generations done
    best: Array  # (D,): the result if the run ended now
    best_score: Array  # (): its fitness, or its held-out score where images are held out
    best_generation: Array  # () int32: 1-based
    frames: Array  # (num_frames, D): what the result was (`frame_of`)


def num_frames(num_dims: int) -> int:
    """How many results of earlier generations are kept: what takes a few megabytes."""
    return max(1, min(24, 2**21 // num_dims))


def frame_of(generation: Array, count: int) -> Array:
    """The place among `count` frames in which the result of a generation, from 1 on, replaces the
    one before it: two frames for every doubling, since most happens early."""
    return jnp.minimum(jnp.floor(2 * jnp.log2(generation)).astype(jnp.int32), count - 1)


class Metrics(NamedTuple):
    """What one generation reports; fitness as the paper reports it, higher is better."""

    generation: Array
    fitness_best: Array
    fitness_mean: Array
    fitness_std: Array
    accuracy_best: Array  # of the member with the best fitness
    holdout_score: Array  # of that member, NaN where nothing is held out
    best_score: Array  # of the result if the run ended now
    num_failed: Array  # members whose evaluation was NaN or infinite


class Individual(NamedTuple):
    """A synthetic dataset: images (n, H, W, C) in normalised space, labels (n, num_classes)."""

    images: Array
    labels: Array


def make_data(dataset: Dataset, given: np.ndarray | None = None) -> Data:
    """The train and validation parts of `dataset`: the test part stays closed. given: images
    (n, H, W, C), normalised, class by class, where `start` is given."""
    height, width, _ = dataset.image_shape
    number = min(1000, max(200, 2**23 // (height * width)))  # a spread needs no more
    some = dataset.train.images[:: max(1, len(dataset.train) // number)][:number]
    some = normalize(some, np.array(dataset.mean, np.float32), np.array(dataset.std, np.float32))
    return Data(
        train_images=jnp.asarray(dataset.train.images),
        train_labels=jnp.asarray(dataset.train.labels),
        fitness_images=jnp.asarray(dataset.validation.images),
        fitness_labels=jnp.asarray(dataset.validation.labels),
        mean=jnp.asarray(dataset.mean, jnp.float32),
        std=jnp.asarray(dataset.std, jnp.float32),
        spread=jnp.asarray(encodings.cosine_spread(some)),
        contrast=jnp.asarray(some.std(), jnp.float32),
        given=None if given is None else jnp.asarray(given),
    )


def check(config: Config, dataset: Dataset) -> None:
    """Raise ValueError where `dataset` is too small for `config`."""
    counts = np.bincount(dataset.train.labels, minlength=dataset.num_classes)
    if counts.min() < config.images_per_class:
        raise ValueError(
            f"images_per_class is {config.images_per_class}, but class "
            f"{dataset.class_names[counts.argmin()]!r} of {dataset.name} has only {counts.min()} "
            f"training images"
        )
    num_fitness = len(dataset.validation) - _num_holdout(config, len(dataset.validation))
    if config.fitness_subset_size is not None and config.fitness_subset_size > num_fitness:
        raise ValueError(
            f"fitness_subset_size must be <= {num_fitness} on {dataset.name}, "
            f"got {config.fitness_subset_size}"
        )


def _num_holdout(config: Config, num_images: int) -> int:
    if config.holdout_ratio == 0:
        return 0
    return min(max(1, round(config.holdout_ratio * num_images)), num_images - 1)


def _encoding(config: Config, image_shape: tuple[int, ...]) -> Encoding:
    height, width, channels = image_shape
    shape = height, width, channels
    return encodings.create(config.encoding, shape, config.num_cosines, config.factor)


def num_dims(config: Config, num_classes: int, image_shape: tuple[int, int, int]) -> int:
    """Numbers that an individual is."""
    num_images = num_classes * config.images_per_class
    num_labels = num_classes if config.evolve_labels else 0
    return num_images * (_encoding(config, image_shape).num_dims + num_labels)


LABEL_STEP = 0.2
"""What a step of one changes in a label that evolves by kernel regression: a fifth of what tells
one class from another."""


def images_and_targets(
    config: Config,
    num_classes: int,
    image_shape: tuple[int, int, int],
    individual: Array,
    data: Data,
) -> tuple[Array, Array]:
    """The images that a flat individual (D,) is, and for each (n, num_classes) numbers: what kernel
    regression makes of it, 1 for the class and 0 for others where labels do not evolve."""
    num_images = num_classes * config.images_per_class
    encoding = _encoding(config, image_shape)
    numbers = individual.reshape(num_images, -1)
    images = encoding.decode(numbers[:, : encoding.num_dims], data.spread)
    if config.levels is not None:
        pixels = encodings.rounded(images * data.std + data.mean, config.levels)
        images = (pixels - data.mean) / data.std
    if not config.evolve_labels:
        return images, _classes(config, num_classes)
    return images, numbers[:, encoding.num_dims :] * _label_step(config)


def decode(
    config: Config,
    num_classes: int,
    image_shape: tuple[int, int, int],
    individual: Array,
    data: Data,
) -> Individual:
    """The synthetic dataset that a flat individual (D,) is.

    Features of a network with instance normalisation do not depend on contrast, and a search by
    kernel regression on them leaves any. So these images get that of real ones, which other
    networks need, unless their pixels have bounds or levels.

    Labels that evolve are cut at 0 and scaled to sum 1, all zero they are uniform. By kernel
    regression, whose predictions become probabilities by a softmax, so do they: a network that
    fits such a label has the logits that the regression was given.
    """
    own = config, num_classes, image_shape, individual, data
    images, targets = images_and_targets(*own)
    if (
        config.fitness == "kernel_regression"
        and config.network.normalization in ("default", "instance")
        and config.levels is None
        and config.clip != "image"
    ):
        images *= data.contrast / jnp.maximum(images.std(), 1e-6)
    if not config.evolve_labels:
        return Individual(images, targets)
    if config.fitness == "kernel_regression":
        return Individual(images, jax.nn.softmax(config.regression.temperature * targets))
    labels = jnp.maximum(targets, 0.0)
    total = labels.sum(-1, keepdims=True)
    labels = jnp.where(total > 0, labels / jnp.where(total > 0, total, 1.0), 1.0 / num_classes)
    return Individual(images, labels)


def _classes(config: Config, num_classes: int) -> Array:
    """(n, num_classes): 1 for the class of each image."""
    classes = jnp.repeat(jnp.arange(num_classes), config.images_per_class)
    return jax.nn.one_hot(classes, num_classes)


def _label_step(config: Config) -> float:
    return LABEL_STEP if config.fitness == "kernel_regression" else 1.0


def _encoded(config: Config, num_classes: int, images: Array, spread: Array) -> Array:
    """The flat individual (D,) of normalised images (n, H, W, C), as many of each class, in the
    order of classes."""
    codes = _encoding(config, images.shape[1:]).encode(images, spread)
    if config.evolve_labels:
        labels = _classes(config, num_classes) / _label_step(config)
        codes = jnp.concatenate([codes, labels], -1)
    return codes.reshape(-1)


def random_individuals(
    key: Array, config: Config, num_classes: int, data: Data, num_individuals: int
) -> Array:
    """Flat individuals (num_individuals, D) of real training images, normalised, not clipped."""
    num_images = num_classes * config.tiles_per_class

    def draw(key):
        indices = random.select(key, data.train_labels, num_images, num_classes)
        images = normalize(data.train_images[indices], data.mean, data.std)
        return _encoded(config, num_classes, encodings.packed(images, config.factor), data.spread)

    return jax.lax.map(draw, jax.random.split(key, num_individuals))


def class_means(config: Config, num_classes: int, data: Data) -> Array:
    """The flat individual (D,) whose images are each the mean of their class's training images."""

    num_images, *shape = data.train_images.shape
    size = min(1000, num_images)

    def add(block, totals):
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
    return _encoded(config, num_classes, images, data.spread)


def class_centres(key: Array, config: Config, num_classes: int, data: Data) -> Array:
    """The flat individual (D,) whose images are centres of k-means in each class: Lloyd's
    algorithm on at most 8,192 training images, from random ones."""
    count = config.tiles_per_class
    key_some, key_first = jax.random.split(key)
    some = jax.random.permutation(key_some, len(data.train_images))[:8192]
    points = normalize(data.train_images[some], data.mean, data.std)
    labels, shape = data.train_labels[some], points.shape[1:]
    points = points.reshape(len(points), -1)
    first = random.select(key_first, data.train_labels, num_classes * count, num_classes)
    starts = normalize(data.train_images[first], data.mean, data.std)

    def of_class(label: Array, centres: Array) -> Array:
        def step(centres, _):
            distances = (centres**2).sum(1) - 2 * points @ centres.T
            nearest = jax.nn.one_hot(distances.argmin(1), count) * (labels == label)[:, None]
            sizes = nearest.sum(0)[:, None]
            means = nearest.T @ points / jnp.maximum(sizes, 1)
            return jnp.where(sizes > 0, means, centres), None

        return jax.lax.scan(step, centres, length=25)[0]

    starts = starts.reshape(num_classes, count, -1)
    centres = jax.lax.map(lambda found: of_class(*found), (jnp.arange(num_classes), starts))
    images = encodings.packed(centres.reshape(-1, *shape), config.factor)
    return _encoded(config, num_classes, images, data.spread)


class Scores(NamedTuple):
    """Scores (P,) of a population, higher is better, NaN where an evaluation failed."""

    fitness: Array
    accuracy: Array
    holdout: Array
    credit: Array | None = None  # (P, blocks): losses of each block (`strategies.BlockES`)


def score_population(
    key: Array,
    config: Config,
    num_classes: int,
    image_shape: tuple[int, int, int],
    population: Array,
    data: Data,
    members: Array | None = None,
) -> Scores:
    """Train a fresh network on each individual (P, D) and score it on the fitness images; only of
    `members`, indices (n,), where they are given: as they would score among all."""

    def decoded(member: Array) -> Individual:
        one = decode(config, num_classes, image_shape, member, data)
        return Individual(*encodings.unpacked(*one, config.factor))

    if config.fitness == "kernel_regression":
        narrow = replace(config.network, width=config.kernel.kernel_width)
        network = networks.create(narrow, num_classes, image_shape)
        some = jnp.arange(len(population)) if members is None else members

        def regressed(member: Array) -> Individual:
            one = images_and_targets(config, num_classes, image_shape, member, data)
            return Individual(*encodings.unpacked(*one, config.factor))

        own = num_classes, regressed, population, some, data
        return _score_by_kernel(key, config, network, *own)
    key_networks, key_subset = jax.random.split(key)
    images = normalize(data.fitness_images, data.mean, data.std)
    labels = data.fitness_labels
    num_holdout = _num_holdout(config, images.shape[0])
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
    key: Array,
    config: Config,
    network: nn.Module,
    num_classes: int,
    regressed: Callable[[Array], Individual],
    population: Array,
    members: Array,
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
    key: Array, config: Config, num_classes: int, individual: Individual, data: Data
) -> Array:
    """Labels (n, num_classes) that serve the images best, probabilities as of labels that evolve:
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


def _judged(judge: Judge, individuals: Individual, images: Array, labels: Array) -> Array:
    """(P,): what `judge` says of each individual. Not to be traced: with real images as arguments
    `jax.pure_callback` stands still on a CPU."""
    real = np.asarray(images), np.asarray(labels)
    own = zip(np.asarray(individuals.images), np.asarray(individuals.labels), strict=True)
    return jnp.asarray([judge(*one, *real) for one in own], jnp.float32)


def over_members(
    config: Config, init: Callable, divided: Divided, result: Callable, finished: Callable
) -> Algorithm:
    """The algorithm whose step evaluates members by `score_population`: scannable and divided over
    devices, unless `fitness` is a function of images, which is called between two programs."""
    if own_judge(config) is None:
        return Algorithm(init, divided.step, result, finished, divided=divided)
    step = divided._replace(keys=jax.jit(divided.keys), advance=jax.jit(divided.advance)).step
    return Algorithm(jax.jit(init), step, result, finished, scannable=False)


def _own(config: Config) -> tuple[Callable | None, bool]:
    """The function that `fitness` names, None where it names none of your own, and whether it takes
    images. Raises ValueError where there is no such function."""
    if config.fitness in FITNESS:
        return None, False
    function = imported(config.fitness)
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


def score_on_test(config: Config, dataset: Dataset, individual: Individual) -> float | None:
    """What the function of images that `fitness` names says of an individual on the test part, None
    where it names none. Opens the test part."""
    if (judge := own_judge(config)) is None:
        return None
    own = jnp.asarray(individual.images), jnp.asarray(individual.labels)
    images, labels = encodings.unpacked(*own, config.factor)
    real = np.asarray(normalize(dataset.test.images, dataset.mean, dataset.std))
    return float(judge(np.asarray(images), np.asarray(labels), real, dataset.test.labels))


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


def rank_last(fitness: Array) -> Array:
    """Fitness with minus infinity where an evaluation failed."""
    return jnp.where(jnp.isfinite(fitness), fitness, -jnp.inf)


def _bounds(config: Config, num_classes: int, image_shape: tuple[int, int, int], data: Data):
    """Lower and upper bound of children: scalars, or one a dimension."""
    step = _label_step(config)
    if config.clip == "unit" and not (config.evolve_labels and step != 1):
        return 0.0, 1.0
    num_images = num_classes * config.images_per_class
    bounds = []
    for value in (0.0, 1.0):
        bound = (value - data.mean) / data.std if config.clip == "image" else value
        size = _encoding(config, image_shape).num_dims
        numbers = jnp.broadcast_to(bound, (num_images, size // image_shape[-1], image_shape[-1]))
        numbers = numbers.reshape(num_images, -1)
        if config.evolve_labels:
            labels = jnp.full((num_images, num_classes), value / step)
            numbers = jnp.concatenate([numbers, labels], -1)
        bounds.append(numbers.reshape(-1))
    return bounds


def _blocks(config: Config, num_classes: int, num_dims: int) -> np.ndarray:
    """The column of credit of each number of a flat individual: of the tile that it is part of, or
    after those of the image whose label it is part of."""
    num_images, tiles = num_classes * config.images_per_class, config.factor**2
    num_labels = num_classes if config.evolve_labels else 0
    each = (num_dims // num_images - num_labels) // tiles
    of_tiles = np.arange(num_images * tiles).repeat(each).reshape(num_images, -1)
    of_labels = num_images * tiles + np.arange(num_images)[:, None].repeat(num_labels, 1)
    return np.concatenate([of_tiles, of_labels], 1).reshape(-1)


def _strategy(config: Config, num_classes: int, num_dims: int) -> EvolutionaryAlgorithm:
    """The evosax algorithm; ValueError where it does not take what `config` asks for."""
    options: dict[str, Any] = {}
    if config.strategy == "BlockES" and config.fitness == "kernel_regression":
        options = {"blocks": _blocks(config, num_classes, num_dims)}
    if config.strategy == "LaplaceGA":
        options = {
            "survival_ratio": config.survival_ratio,
            "crossover": config.crossover,
            "sign": config.laplace_sign,
        }
    elif config.strategy_std is not None and "std_schedule" in strategies.options(config.strategy):
        options = {"std_schedule": optax.constant_schedule(config.strategy_std)}
    strategy = strategies.create(config.strategy, config.population_size, num_dims, **options)
    _evosax_params(config, strategy)  # fails early where it has no standard deviation
    return strategy


def _evosax_params(config: Config, strategy: EvolutionaryAlgorithm):
    """The strategy's own parameters, with `strategy_std` where it starts from one."""
    params = strategy.default_params
    if config.strategy_std is None or "std_schedule" in strategies.options(config.strategy):
        return params
    if not hasattr(params, "std_init"):
        raise ValueError(f"{config.strategy} has no strategy_std, got {config.strategy_std}")
    return params.replace(std_init=config.strategy_std)


def history(
    config: Config, num_classes: int, state: State, data: Data
) -> tuple[np.ndarray, Individual]:
    """What the result was on the way: after which generations (F,), twice for every doubling, and
    the individuals, with a leading axis F; the last is the result."""
    height, width, channels = data.train_images.shape[1:]
    generations = 1 + np.arange(int(state.generation))
    frames = np.asarray(frame_of(jnp.asarray(generations, jnp.float32), len(state.frames)))
    last = np.append(np.diff(frames) > 0, True)
    decoded = partial(decode, config, num_classes, (height, width, channels))
    individuals = jax.lax.map(lambda frame: decoded(frame, data), state.frames[frames[last]])
    return generations[last], individuals


def build(config: Config, num_classes: int, image_shape: tuple[int, int, int]) -> Algorithm:
    """The algorithm for datasets of `num_classes` classes of images (H, W, C)."""
    networks.create(config.network, num_classes, image_shape)  # fails early where it does not fit
    own_score(config, num_classes)
    check_judge(config, num_classes, image_shape)
    strategy = _strategy(config, num_classes, num_dims(config, num_classes, image_shape))
    population_based = strategies.is_population_based(strategy)
    for name, value in (("best_of", config.best_of), ("start", config.start)):
        if population_based and value in ("mean", "class_means", "k_means", "given"):
            raise ValueError(
                f"{name} {value} needs an algorithm that searches around a mean, such as BlockES "
                f"or SNES, got {config.strategy}"
            )

    def strategy_params(params: Params, data: Data):
        if config.strategy != "LaplaceGA":
            return _evosax_params(config, strategy)
        lower, upper = _bounds(config, num_classes, image_shape, data)
        return strategy.default_params.replace(
            crossover_rate=params.crossover_rate,
            laplace_location=params.laplace_location,
            laplace_scale=params.laplace_scale,
            mutation_scale=params.mutation_scale,
            lower=lower,
            upper=upper,
        )

    def init(key: Array, params: Params, data: Data) -> State:
        key_individuals, key_strategy, key_ask = jax.random.split(key, 3)
        own = strategy_params(params, data)

        def real() -> Array:
            return random_individuals(
                key_individuals, config, num_classes, data, config.population_size
            )

        if population_based:
            worst, population = jnp.full(config.population_size, jnp.inf), real()
            state = strategy.init(key_strategy, population, worst, own)
        else:
            match config.start:
                case "class_means":
                    mean = class_means(config, num_classes, data)
                case "k_means":
                    mean = class_centres(key_individuals, config, num_classes, data)
                case "given":
                    if data.given is None:
                        raise ValueError("start given needs images that are given with the data")
                    mean = _encoded(config, num_classes, data.given, data.spread)
                case _:  # the mean of the individuals that a population starts with
                    mean = real().mean(0)
            state = strategy.init(key_strategy, mean, own)
            population, state = strategy.ask(key_ask, state, own)
        return strategies.strong(
            State(
                strategy=state,
                population=population,
                generation=jnp.int32(0),
                best=population[0],
                best_score=jnp.float32(-jnp.inf),
                best_generation=jnp.int32(0),
                frames=jnp.zeros((num_frames(population.shape[1]), population.shape[1])),
            )
        )

    def keys(key: Array) -> tuple[Array, tuple[Array, ...]]:
        key_score, *keys_advance = jax.random.split(key, 3)
        return key_score, tuple(keys_advance)

    def score(key: Array, state: State, params: Params, data: Data, members: Array) -> Scores:
        del params
        own = config, num_classes, image_shape, state.population, data
        return score_population(key, *own, members)

    def advance(
        keys: tuple[Array, ...], state: State, scores: Scores, params: Params, data: Data
    ) -> tuple[State, Metrics]:
        key_tell, key_ask = keys
        own = strategy_params(params, data)
        fitness = rank_last(scores.fitness)
        failed = ~jnp.isfinite(scores.fitness)
        loss = jnp.where(failed, jnp.nan, -scores.fitness)  # evosax minimises and knows NaN
        if scores.credit is not None:
            loss = scores.credit

        def tell(strategy_state):
            return strategies.strong(
                strategy.tell(key_tell, state.population, loss, strategy_state, own)[0]
            )

        def first(strategy_state):
            del strategy_state
            return strategies.strong(strategy.init(key_tell, state.population, loss, own))

        if population_based:
            strategy_state = jax.lax.cond(state.generation == 0, first, tell, state.strategy)
        else:
            strategy_state = tell(state.strategy)
        population, strategy_state = strategy.ask(key_ask, strategy_state, own)

        leader = fitness.argmax()
        score = fitness[leader] if config.holdout_ratio == 0 else rank_last(scores.holdout)[leader]
        leading = state.population[leader]
        if config.best_of == "mean":
            score = jnp.mean(scores.fitness, where=~failed)
            leading = strategies.mean_of(strategy, strategy_state)
        better = (score > state.best_score) | (config.best_of != "run")
        generation = state.generation + 1
        best = jnp.where(better, leading, state.best)
        frame = frame_of(generation, len(state.frames))
        state = State(
            strategy=strategy_state,
            population=population,
            generation=generation,
            best=best,
            best_score=jnp.where(better, score, state.best_score),
            best_generation=jnp.where(better, generation, state.best_generation),
            frames=state.frames.at[frame].set(best),
        )
        metrics = Metrics(
            generation=generation,
            fitness_best=scores.fitness[leader],
            fitness_mean=jnp.mean(scores.fitness, where=~failed),
            fitness_std=jnp.std(scores.fitness, where=~failed),
            accuracy_best=scores.accuracy[leader],
            holdout_score=scores.holdout[leader],
            best_score=state.best_score,
            num_failed=failed.sum(),
        )
        return strategies.strong(state), metrics

    def result(state: State, params: Params, data: Data) -> Individual:
        del params
        return decode(config, num_classes, image_shape, state.best, data)

    def finished(state: State) -> Array:
        if config.patience is None:
            return jnp.bool_(False)
        return state.generation - state.best_generation >= config.patience

    divided = Divided(config.population_size, keys, score, advance)
    return over_members(config, init, divided, result, finished)
