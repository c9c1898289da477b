"""Shrink a training set by DEvS and compare with random selection."""

from __future__ import annotations

import math
import time
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import jax
import numpy as np
import tyro
from pydantic import PositiveFloat, PositiveInt

from evojax_suite import networks
from evojax_suite.configuration import configuration
from evojax_suite.data import with_whole_training_set
from evojax_suite.operators import check_shares, random_examples
from evojax_suite.reporting.comparison import SECONDS, Columns
from evojax_suite.reporting.formats import short
from evojax_suite.reporting.progress import console
from evojax_suite.reporting.report import Report
from evojax_suite.running import small_sets
from evojax_suite.running.options import JudgedRunOptions, config_difference, option_difference
from evojax_suite.running.small_sets import EvaluatedSets, SmallSet, Teacher
from evojax_suite.running.system import Job, Phase, Search, System, part_for_dry_run
from evojax_suite.runtime.loop import LoopResult
from evojax_suite.systems.devs.algorithm import build, num_batches, num_steps
from evojax_suite.systems.devs.config import Config, size_sequence
from evojax_suite.training import forward_work
from evojax_suite.types import AnyAlgorithm, Dataset, Split, TrainingData, training_data


@configuration
class Options(JudgedRunOptions):
    """Shrink a training set to a few soft-labelled images by evolution (DEvS, Shvai et al. 2022).

    Flips stay off where the classes are digits; shifts are cut to 5/32 of an image.
    """

    num_images: int | None = None
    """Number of training images, a fixed, stratified part of the whole; None is all."""
    random_baseline: bool = True
    """Evaluate class-balanced random selections of the same sizes, too."""
    labels: Literal["own", "teacher"] = "own"
    """own: averages of the originals' labels, as in the paper; random selections keep their
    classes. teacher: the probabilities that a network trained on the whole training set gives the
    images of both (Qin et al. 2024)."""
    label_temperature: PositiveFloat = 1.0
    """Divides the teacher's logits; above 1 its labels are softer."""
    teacher_epochs: PositiveInt = small_sets.TEACHER_EPOCHS
    """Epochs of the teacher, without augmentation."""
    config: tyro.conf.OmitArgPrefixes[Config] = Config()

    def __post_init__(self):
        super().__post_init__()
        small_sets.check_labels(self.labels, self.label_temperature, self.teacher_epochs)


@dataclass(frozen=True)
class _Job(Job[Options]):
    phase: Phase  # the reduction
    sizes: tuple[int, ...]
    key_random: jax.Array
    key_test: jax.Array
    key_teacher: jax.Array


@dataclass(frozen=True)
class _Reduced:
    sets: list[SmallSet]
    reduction: LoopResult
    teacher: Teacher | None


@dataclass(frozen=True)
class _Summary:
    evaluated: EvaluatedSets
    teacher: Teacher | None

    @property
    def numbers(self) -> dict[str, Any]:
        return self.evaluated.numbers


def prepare(options: Options, dataset: Dataset, directory: Path) -> _Job:
    """Fit the augmentation to the images and check the sizes."""
    dataset = with_whole_training_set(dataset, options.num_images)
    config = options.config
    config = replace(config, training=small_sets.fitted_to(config.training, dataset))
    options = replace(options, config=config)
    sizes = size_sequence(config, len(dataset.train))
    algorithm = build(config, dataset.num_classes, dataset.image_shape)
    if options.random_baseline:
        for size in config.target_sizes:
            check_shares(dataset.train.labels, size, dataset.num_classes, balanced=True)
    differences = config_difference(config, Config())
    differences |= option_difference(options, "labels", "label_temperature", "teacher_epochs")
    key_run, *other_keys = jax.random.split(jax.random.key(options.seed), 4)
    steps = num_steps(config, len(dataset.train))
    data, factor = training_data(dataset), 1.0
    if options.dry_run:
        algorithm, data, factor = _for_dry_run(config, dataset, steps)
    phase = Phase("reducing", algorithm, key_run, None, data, steps, dry_run_factor=factor)
    notes = [f"sizes: {_falling((len(dataset.train), *sizes))}"]
    if (least := min(config.target_sizes)) < dataset.num_classes:
        notes.append(f"{least} images cannot have one for each of {dataset.num_classes} classes")
    job = _Job(options, dataset, directory, phase, sizes, *other_keys, differences=differences)
    return replace(job, notes=tuple(notes))


def _for_dry_run(
    config: Config, dataset: Dataset, steps: int
) -> tuple[AnyAlgorithm, TrainingData, float]:
    """The algorithm and the images of steps that are an epoch of some seconds each, and how many
    times as long one of the `steps` of the whole run is."""
    shape = dataset.num_classes, dataset.image_shape
    work = 3 * forward_work(networks.create(config.network, *shape), dataset.image_shape)
    recipe = config.feature_training
    part, _ = part_for_dry_run(dataset, work, recipe.batch_size or len(dataset.train))
    # Of the part one image is left in the end, whatever is wanted of all of them.
    own = replace(config, target_sizes=(1,), sizes=(), reduction_factor=math.inf)
    batches = num_batches(config, len(dataset.train)) / recipe.num_batches(len(part.train))
    return build(own, *shape, batches_a_step=1), training_data(part), batches / steps


def _falling(sizes: Iterable[int]) -> str:
    return " > ".join(map(str, sizes))


def search(job: _Job) -> Search:
    """Shrink the training set; train the teacher where its labels are asked for."""
    options, config, dataset = job.options, job.options.config, job.dataset
    reduction = yield job.phase
    teacher = None
    if options.labels == "teacher":
        recipe = config.network, config.training, config.engine, options.teacher_epochs
        teacher = yield from small_sets.train_teacher(
            job.key_teacher, dataset, small_sets.probe_config(*recipe), options.label_temperature
        )
    reached = jax.device_get(job.phase.algorithm.result(reduction.state, None, job.phase.data))
    lineage = {}
    for one in reached:
        lineage[f"assignments_{len(one.images)}"] = one.assignments
        lineage[f"weights_{len(one.images)}"] = one.weights
    np.savez_compressed(job.directory / "lineage.npz", **lineage)
    features = f"flat maps of a {config.feature_network} network, {config.feature_epochs} epochs"
    seconds = reduction.seconds + reduction.compile_seconds
    sets = [
        SmallSet("DEvS", one.images, one.labels, seconds, features, label_source="own")
        for one in reached
    ]
    for size in config.target_sizes if options.random_baseline and not options.dry_run else ():
        start = time.perf_counter()
        key, labels = jax.random.fold_in(job.key_random, size), job.phase.data.labels
        indices = np.asarray(random_examples(key, labels, size, dataset.num_classes))
        taken = time.perf_counter() - start
        sets.append(small_sets.chosen("random", dataset, indices, taken, "none"))
    return _Reduced(small_sets.taught(sets, teacher) if teacher else sets, reduction, teacher)


def finish(job: _Job, reduced: _Reduced, test_split: Split) -> _Summary:
    """Write the sets and evaluate them on the test split."""
    config, reduction, teacher = job.options.config, reduced.reduction, reduced.teacher
    stages = {name: round(value, 3) for name, value in reduction.stage_seconds.items()}
    console.say("time: " + ", ".join(f"{name} {short(value)} s" for name, value in stages.items()))
    numbers = {
        "num_training_images": len(job.dataset.train),
        "sizes": job.sizes,
        "seconds": reduction.seconds + reduction.compile_seconds,
        "teacher_seconds": teacher.seconds if teacher else 0.0,
        "stage_seconds": stages,
        "num_failed": reduction.num_failed + (teacher.num_failed if teacher else 0),
    }
    recipe = config.network, config.training, config.engine
    evaluated = small_sets.evaluate_sets(
        job, reduced.sets, job.key_test, *recipe, test_split, numbers
    )
    return _Summary(evaluated, teacher)


def present(job: _Job, summary: _Summary) -> Report | None:
    """The accuracy of each set, beside random selections."""
    numbers, teacher = summary.numbers, summary.teacher
    rows = [
        ["sizes", _falling(job.sizes)],
        *(
            [f"time in {name}", f"{short(value)} s"]
            for name, value in numbers["stage_seconds"].items()
        ),
        ["time in all", f"{short(numbers['seconds'])} s"],
        ["teacher", f"{short(teacher.seconds)} s" if teacher else "not needed"],
        ["labels", teacher.in_words() if teacher else "own"],
        ["failed losses", str(numbers["num_failed"])],
    ]
    title = f"{job.dataset.name}, shrunk by DEvS"
    return small_sets.report_of(job, summary.evaluated, title, rows)


COLUMNS, METRICS = Columns((SECONDS,)), {"num_samples": "samples"}
SYSTEM = System(
    "devs",
    Options,
    prepare,
    search,
    finish,
    present,
    columns=COLUMNS,
    metrics=METRICS,
    essentials=(
        "--dataset",
        "--num-images",
        "--target-sizes",
        "--labels",
        "--num-networks",
        "--seed",
        "--resume",
    ),
    examples=("devs --dataset cifar10 --num-images 2000 --target-sizes 500 100 10",),
)
