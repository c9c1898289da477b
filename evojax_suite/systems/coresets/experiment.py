"""Choose or make a small set by the methods that the papers compare with."""

from __future__ import annotations

import time
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

import jax
import numpy as np
import tyro

from evojax_suite import proxy_network
from evojax_suite.data import with_whole_training_set
from evojax_suite.distilled import augmentation_of
from evojax_suite.networks import NetworkConfig
from evojax_suite.operators import check_shares, random_examples
from evojax_suite.reporting.report import Report
from evojax_suite.running import small_sets
from evojax_suite.running.options import JudgedRunOptions
from evojax_suite.running.small_sets import EvaluatedSets, SmallSet, Teacher
from evojax_suite.running.system import Job, Phase, Search, System
from evojax_suite.runtime.loop import LoopResult
from evojax_suite.systems import ga_distillation
from evojax_suite.systems.coresets import (
    forgetting,
    gradient_matching,
    herding,
    k_center,
    kernel_inducing_points,
)
from evojax_suite.systems.devs import NETWORK, RECIPE
from evojax_suite.training import EngineConfig, TrainingConfig
from evojax_suite.types import Algorithm, Array, Dataset, Split, training_data

Method = Literal[
    "random", "herding", "k_center", "forgetting", "gradient_matching", "kernel_inducing_points"
]
CONDENSING = {
    "gradient_matching": gradient_matching,
    "kernel_inducing_points": kernel_inducing_points,
}
"""Methods that make images, equally many of each class, by gradients; the others choose some."""
METRICS = {"matching_loss": "matching loss"}


@dataclass(frozen=True)
class Options(JudgedRunOptions):
    """Choose a small set by random, herding, k-center or forgetting, or make one by gradients.

    One network, trained on the whole training set, serves herding, k-center (its features),
    forgetting (its history) and, with `--labels teacher`, the labels of all sets. They are judged
    as those of `devs` are, with flips off where the classes are digits and shifts of at most 5/32
    of an image.
    """

    method: tuple[Method, ...] = ("random", "herding", "k_center", "forgetting")
    """One or more methods; gradient_matching (DC) and kernel_inducing_points (KIP) make images."""
    num_samples: tuple[int, ...] = (500, 100, 10)
    """Sizes of the sets; forgetting, herding and k-center share one training for all."""
    balanced: bool = True
    """Choose equally many images of each class; images that are made always are."""
    num_images: int | None = None
    """Use a fixed, stratified part of the training set; None is the whole."""
    labels: Literal["hard", "teacher"] = "hard"
    """teacher: what the network on the whole training set gives an image, the probability of each
    class (Qin et al. 2024), in place of its class."""
    label_temperature: float = 1.0
    """Divides the teacher's logits; above 1 its labels are softer."""
    probe_epochs: int = 20
    """Epochs of the network on the whole training set."""
    probe_augmentation: bool = False
    """Train it with the augmentation of the evaluation; off as in the published comparisons."""
    condensation_iterations: int = 1000
    """Iterations of gradient matching."""
    condensation: Annotated[gradient_matching.Config, tyro.conf.arg(name="dc")] = field(
        default_factory=gradient_matching.Config
    )
    kernel_iterations: int = 1000
    """Iterations of kernel inducing points."""
    kernel_points: Annotated[kernel_inducing_points.Config, tyro.conf.arg(name="kip")] = field(
        default_factory=kernel_inducing_points.Config
    )
    network: tyro.conf.OmitArgPrefixes[NetworkConfig] = NETWORK
    training: tyro.conf.OmitArgPrefixes[TrainingConfig] = RECIPE
    engine: tyro.conf.OmitArgPrefixes[EngineConfig] = field(default_factory=EngineConfig)

    def __post_init__(self):
        super().__post_init__()
        if not self.method:
            raise ValueError(f"method must name at least one of {', '.join(get_args(Method))}")
        if not self.num_samples:
            raise ValueError("num_samples must name at least one size, got none")
        if self.network.network != "ConvNet":
            raise ValueError(f"features come from the ConvNet alone, got {self.network.network}")
        small_sets.check_labels(self.labels, self.label_temperature)
        for name in ("probe_epochs", "condensation_iterations", "kernel_iterations"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be >= 1, got {getattr(self, name)}")


def _check(options: Options, dataset: Dataset) -> None:
    for size in options.num_samples:
        check_shares(dataset.train.labels, size, dataset.num_classes, options.balanced)
    for method in (one for one in CONDENSING if one in options.method):
        for size in options.num_samples:
            if size % dataset.num_classes:
                raise ValueError(
                    f"{method} makes equally many images of each of the {dataset.num_classes} "
                    f"classes, got num_samples {size}"
                )
            _condensing(options, dataset, method, size)  # fails early where it does not fit
            if method == "kernel_inducing_points":
                least = replace(options.kernel_points, images_per_class=size // dataset.num_classes)
                ga_distillation.check(least.search(), dataset)


@dataclass(frozen=True)
class _Job(Job[Options]):
    key_probe: jax.Array
    key_select: jax.Array
    key_condense: jax.Array
    key_test: jax.Array


@dataclass(frozen=True)
class _Found:
    sets: list[SmallSet]
    probe_seconds: float | None  # of the network on all images, None where it was not needed
    teacher: Teacher | None
    num_failed: int


@dataclass(frozen=True)
class _Summary:
    found: _Found
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
    """Train the network that the methods ask, make images by gradients, choose real ones."""
    options, dataset, data = job.options, job.dataset, training_data(job.dataset)
    num_failed = 0

    def phase(title: str, algorithm: Algorithm, key: Array, data: Any, steps: int, folder: str):
        return Phase(title, algorithm, key, None, data, steps, folder, same_for_seeds=True)

    def seconds_of(result: LoopResult) -> float:
        return result.seconds + result.compile_seconds

    config = small_sets.probe_config(
        options.network,
        options.training,
        options.engine,
        options.probe_epochs,
        options.probe_augmentation,
    )
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
    informed = set(options.method) & {"herding", "k_center", "forgetting"}
    if informed or options.labels == "teacher":
        algorithm = proxy_network.build(config, dataset.num_classes, dataset.image_shape)
        trained = yield phase(
            "training on all", algorithm, job.key_probe, data, options.probe_epochs, "probe"
        )
        probe_seconds = seconds_of(trained)
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
            condensed = yield phase(
                f"{method.replace('_', ' ')}, {size} images",
                algorithm,
                jax.random.fold_in(job.key_condense, size),
                data_of_method,
                iterations,
                f"{method}-{size}",
            )
            num_failed += condensed.num_failed
            made = jax.device_get(algorithm.result(condensed.state, None, data_of_method))
            seconds = seconds_of(condensed)
            sets.append(SmallSet(method, made.images, made.labels, seconds, features[method]))

    for method in options.method if not options.dry_run else ():
        if method in CONDENSING:
            continue
        for size in options.num_samples:
            start = time.perf_counter()
            shared = (data.labels, size, dataset.num_classes, options.balanced)
            key = jax.random.fold_in(jax.random.fold_in(job.key_select, size), number_of(method))
            match method:
                case "random":
                    indices = random_examples(key, *shared)
                case "herding" if evidence:
                    indices = herding.select(key, evidence.features, *shared)
                case "k_center" if evidence:
                    indices = k_center.select(key, evidence.features, *shared)
                case "forgetting" if evidence:
                    indices = forgetting.select(key, evidence.forgetting_scores, *shared)
                case _:
                    raise AssertionError(method)
            indices = np.asarray(indices)
            seconds = time.perf_counter() - start
            if method in informed and not teacher:  # else it is the teacher, and counted with it
                seconds += probe_seconds or 0.0
            sets.append(small_sets.chosen(method, dataset, indices, seconds, features[method]))
    if teacher:
        sets = small_sets.taught(sets, teacher)
    return _Found(sets, probe_seconds, teacher, num_failed)


def finish(job: _Job, found: _Found, test_split: Split) -> _Summary:
    """Write the sets and evaluate them on the test split."""
    options = job.options
    numbers = {
        "num_training_images": len(job.dataset.train),
        "balanced": options.balanced,
        "probe_seconds": found.probe_seconds or 0.0,
        "num_failed": found.num_failed,
    }
    evaluated = small_sets.evaluate_sets(
        job,
        found.sets,
        job.key_test,
        options.network,
        options.training,
        options.engine,
        test_split,
        numbers,
    )
    return _Summary(found, evaluated)


def present(job: _Job, summary: _Summary) -> Report | None:
    """The accuracy of each set."""
    seconds, teacher = summary.found.probe_seconds, summary.found.teacher
    numbers = [
        ["balanced", str(job.options.balanced)],
        ["network on all images", "not needed" if seconds is None else f"{seconds:.1f} s"],
        ["labels", teacher.in_words() if teacher else "hard"],
        ["failed losses", str(summary.found.num_failed)],
    ]
    title = f"{job.dataset.name}, small sets"
    return small_sets.report_of(job, summary.evaluated, title, numbers)


def _condensing(
    options: Options, dataset: Dataset, method: str, size: int
) -> tuple[Algorithm, int]:
    """The algorithm that makes `size` images by `method`, and its iterations."""
    images_per_class = size // dataset.num_classes
    shape = dataset.num_classes, dataset.image_shape
    if method == "gradient_matching":
        config = replace(options.condensation, images_per_class=images_per_class)
        return gradient_matching.build(config, *shape), options.condensation_iterations
    config = replace(options.kernel_points, images_per_class=images_per_class)
    return kernel_inducing_points.build(config, *shape), options.kernel_iterations


def number_of(method: Method) -> int:
    """A number for the key of a method, the same wherever it stands in the list."""
    return get_args(Method).index(method)


SYSTEM = System("coreset", Options, prepare, search, finish, present, metrics=METRICS)
