"""Choose or make small sets by the methods that the papers compare with."""

from __future__ import annotations

import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

import jax
import numpy as np
import tyro
from annotated_types import MinLen
from pydantic import PositiveFloat, PositiveInt

from evojax_suite import proxy_network
from evojax_suite.configuration import configuration
from evojax_suite.data import with_whole_training_set
from evojax_suite.distilled import augmentation_of
from evojax_suite.networks import NetworkConfig
from evojax_suite.operators import check_shares, random_examples
from evojax_suite.reporting.formats import short
from evojax_suite.reporting.report import Report
from evojax_suite.running import small_sets
from evojax_suite.running.options import JudgedRunOptions
from evojax_suite.running.small_sets import EvaluatedSets, SmallSet, Teacher
from evojax_suite.running.system import Job, Phase, Search, System
from evojax_suite.systems import coresets, ga_distillation
from evojax_suite.systems.coresets import gradient_matching, kernel_inducing_points
from evojax_suite.systems.devs import NETWORK, RECIPE
from evojax_suite.training import EngineConfig, TrainingConfig
from evojax_suite.types import AnyAlgorithm, Dataset, Split, training_data

Method = Literal[
    "random", "herding", "k_center", "forgetting", "gradient_matching", "kernel_inducing_points"
]
CONDENSING = {
    "gradient_matching": gradient_matching,
    "kernel_inducing_points": kernel_inducing_points,
}
"""Methods that make images, equally many of each class, by gradients; the others choose some."""
INFORMED = {
    "herding": (coresets.herding, "features"),
    "k_center": (coresets.k_center, "features"),
    "forgetting": (coresets.forgetting, "forgetting_scores"),
}
"""Methods that need a network trained on the whole training set, each with the field of
`proxy_network.Evidence` by which it chooses."""
METRICS = {"matching_loss": "matching loss"}


@configuration
class Options(JudgedRunOptions):
    """Choose a small set by random, herding, k-center or forgetting, or make one by gradients.

    One network, trained on the whole training set, serves herding, k-center (its features),
    forgetting (its history) and, with `--labels teacher`, the labels of all sets. The sets are
    evaluated like those of `devs`, without flips where the classes are digits and with shifts of at
    most 5/32 of an image.
    """

    method: Annotated[tuple[Method, ...], MinLen(1)] = (
        "random",
        "herding",
        "k_center",
        "forgetting",
    )
    """One or more methods; gradient_matching (DC) and kernel_inducing_points (KIP) make images."""
    num_samples: Annotated[tuple[int, ...], MinLen(1)] = (500, 100, 10)
    """Sizes of the sets; forgetting, herding and k-center share one training for all."""
    balanced: bool = True
    """Choose equally many images of each class; images that are made are always balanced."""
    num_images: int | None = None
    """Number of training images, a fixed, stratified part of the whole; None is all."""
    labels: Literal["hard", "teacher"] = "hard"
    """teacher: the probabilities that the network on the whole training set gives an image (Qin et
    al. 2024), in place of its class."""
    label_temperature: PositiveFloat = 1.0
    """Divides the teacher's logits; above 1 its labels are softer."""
    probe_epochs: PositiveInt = 20
    """Epochs of the network on the whole training set."""
    probe_augmentation: bool = False
    """Train this network with the augmentation of the evaluation; off in published comparisons."""
    condensation_iterations: PositiveInt = 1000
    """Iterations of gradient matching."""
    condensation: Annotated[gradient_matching.Config, tyro.conf.arg(name="dc")] = (
        gradient_matching.Config()
    )
    kernel_iterations: PositiveInt = 1000
    """Iterations of kernel inducing points."""
    kernel_points: Annotated[kernel_inducing_points.Config, tyro.conf.arg(name="kip")] = (
        kernel_inducing_points.Config()
    )
    network: tyro.conf.OmitArgPrefixes[NetworkConfig] = NETWORK
    training: tyro.conf.OmitArgPrefixes[TrainingConfig] = RECIPE
    engine: tyro.conf.OmitArgPrefixes[EngineConfig] = EngineConfig()

    def __post_init__(self):
        super().__post_init__()
        if self.network.network != "ConvNet":
            raise ValueError(f"features come from the ConvNet alone, got {self.network.network}")
        small_sets.check_labels(self.labels, self.label_temperature)


def _check(options: Options, dataset: Dataset) -> None:
    """Raise ValueError where a method cannot give a set of a requested size."""
    num_classes = dataset.num_classes
    for size in options.num_samples:
        check_shares(dataset.train.labels, size, num_classes, options.balanced)
    for method in (each for each in CONDENSING if each in options.method):
        for size in options.num_samples:
            if size % num_classes:
                raise ValueError(
                    f"{method} makes equally many images of each of the {num_classes} classes, "
                    f"got num_samples {size}"
                )
            _condensing(options, dataset, method, size)  # fails early where it does not fit
            if method == "kernel_inducing_points":
                least = replace(options.kernel_points, images_per_class=size // num_classes)
                ga_distillation.check(least.search(), dataset)


def _condensing(
    options: Options, dataset: Dataset, method: str, size: int
) -> tuple[AnyAlgorithm, int]:
    """The algorithm that makes `size` images by `method`, and its iterations."""
    config, iterations = {
        "gradient_matching": (options.condensation, options.condensation_iterations),
        "kernel_inducing_points": (options.kernel_points, options.kernel_iterations),
    }[method]
    config = replace(config, images_per_class=size // dataset.num_classes)
    module = CONDENSING[method]
    return module.build(config, dataset.num_classes, dataset.image_shape), iterations


@dataclass(frozen=True)
class _Job(Job[Options]):
    key_probe: jax.Array
    key_select: jax.Array
    key_condense: jax.Array
    key_test: jax.Array


@dataclass(frozen=True)
class _Made:
    sets: list[SmallSet]
    probe_seconds: float | None  # of the network on all images, None where it was not needed
    teacher: Teacher | None
    num_failed: int


@dataclass(frozen=True)
class _Summary:
    made: _Made
    evaluated: EvaluatedSets

    @property
    def numbers(self) -> dict[str, Any]:
        return self.evaluated.numbers


def prepare(options: Options, dataset: Dataset, directory: Path) -> _Job:
    """Check the sizes and fit the augmentation to the images."""
    dataset = with_whole_training_set(dataset, options.num_images)
    _check(options, dataset)
    options = replace(options, training=small_sets.fitted_to(options.training, dataset))
    keys = jax.random.split(jax.random.key(options.seed), 4)
    return _Job(options, dataset, directory, *keys)


def search(job: _Job) -> Search:
    """Train the network that methods need, make images by gradients, choose real ones."""
    options, dataset, data = job.options, job.dataset, training_data(job.dataset)
    num_failed, num_classes = 0, dataset.num_classes
    probe = options.probe_epochs, options.probe_augmentation
    config = small_sets.probe_config(options.network, options.training, options.engine, *probe)
    augmentation = augmentation_of(config.training)
    probed = f"network of {options.probe_epochs} epochs, augmentation {augmentation}"
    features = {
        "random": "none",
        "herding": f"flat maps of a {probed}",
        "k_center": f"flat maps of a {probed}",
        "forgetting": f"history of a {probed}",
        "gradient_matching": "gradients of new networks",
        "kernel_inducing_points": "features of new networks",
    }
    sets: list[SmallSet] = []
    evidence, probe_seconds, teacher = None, None, None
    informed = set(options.method) & INFORMED.keys()
    if informed or options.labels == "teacher":
        algorithm = proxy_network.build(config, num_classes, dataset.image_shape)
        inputs = job.key_probe, None, data, options.probe_epochs, "probe"
        trained = yield Phase("training on all", algorithm, *inputs, same_for_seeds=True)
        probe_seconds = trained.seconds + trained.compile_seconds
        num_failed += trained.num_failed
        if options.labels == "teacher":
            variables = trained.state.fit.variables
            teacher = Teacher(config, variables, options.label_temperature, probe_seconds, 0)
        if informed:
            evidence = jax.device_get(algorithm.result(trained.state, None, data))

    for method, module in CONDENSING.items():
        if method not in options.method:
            continue
        data_of_method = module.make_data(dataset)
        for size in options.num_samples:
            algorithm, iterations = _condensing(options, dataset, method, size)
            title = f"{method.replace('_', ' ')}, {size} images"
            key = jax.random.fold_in(job.key_condense, size)
            inputs = key, None, data_of_method, iterations, f"{method}-{size}"
            condensed = yield Phase(title, algorithm, *inputs, same_for_seeds=True)
            num_failed += condensed.num_failed
            made = jax.device_get(algorithm.result(condensed.state, None, data_of_method))
            seconds = condensed.seconds + condensed.compile_seconds
            sets.append(SmallSet(method, made.images, made.labels, seconds, features[method]))

    for method in options.method if not options.dry_run else ():
        if method in CONDENSING:
            continue
        for size in options.num_samples:
            start = time.perf_counter()
            shared = data.labels, size, num_classes, options.balanced
            key = jax.random.fold_in(jax.random.fold_in(job.key_select, size), number_of(method))
            if method in INFORMED:
                module, field = INFORMED[method]
                indices = module.select(key, getattr(evidence, field), *shared)
            else:
                indices = random_examples(key, *shared)
            indices = np.asarray(indices)
            seconds = time.perf_counter() - start
            if method in informed and not teacher:  # else its training counts as the teacher's
                seconds += probe_seconds or 0.0
            sets.append(small_sets.chosen(method, dataset, indices, seconds, features[method]))
    if teacher:
        sets = small_sets.taught(sets, teacher)
    return _Made(sets, probe_seconds, teacher, num_failed)


def finish(job: _Job, made: _Made, test_split: Split) -> _Summary:
    """Write the sets and evaluate them on the test split."""
    options = job.options
    numbers = {
        "num_training_images": len(job.dataset.train),
        "balanced": options.balanced,
        "probe_seconds": made.probe_seconds or 0.0,
        "num_failed": made.num_failed,
    }
    recipe = options.network, options.training, options.engine
    sets = small_sets.evaluate_sets(job, made.sets, job.key_test, *recipe, test_split, numbers)
    return _Summary(made, sets)


def present(job: _Job, summary: _Summary) -> Report | None:
    """The accuracy of each set."""
    seconds, teacher = summary.made.probe_seconds, summary.made.teacher
    rows = [
        ["balanced", str(job.options.balanced)],
        ["network on all images", "not needed" if seconds is None else f"{short(seconds)} s"],
        ["labels", teacher.in_words() if teacher else "hard"],
        ["failed losses", str(summary.made.num_failed)],
    ]
    return small_sets.report_of(job, summary.evaluated, f"{job.dataset.name}, small sets", rows)


def number_of(method: Method) -> int:
    """A number for the key of a method, the same wherever it stands in the list."""
    return get_args(Method).index(method)


SYSTEM = System(
    "coreset",
    Options,
    prepare,
    search,
    finish,
    present,
    metrics=METRICS,
    essentials=(
        "--method",
        "--dataset",
        "--num-images",
        "--num-samples",
        "--labels",
        "--num-networks",
        "--seed",
        "--resume",
    ),
    examples=("coreset --dataset cifar10 --method herding gradient_matching --num-samples 100 10",),
)
