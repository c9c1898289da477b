"""Shrink a training set by DEvS, beside random selection."""

from __future__ import annotations

import time
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal

import jax
import numpy as np
import tyro
from pydantic import PositiveFloat, PositiveInt

from evojax_suite.configuration import configuration
from evojax_suite.data import with_whole_training_set
from evojax_suite.operators import check_shares, random_examples
from evojax_suite.reporting.comparison import SECONDS, Columns
from evojax_suite.reporting.progress import console
from evojax_suite.reporting.report import Report
from evojax_suite.running import small_sets
from evojax_suite.running.options import JudgedRunOptions, config_difference, option_difference
from evojax_suite.running.small_sets import EvaluatedSets, SmallSet, Teacher
from evojax_suite.running.system import Job, Phase, Search, System
from evojax_suite.runtime.loop import LoopResult
from evojax_suite.systems.devs.algorithm import build, num_steps
from evojax_suite.systems.devs.config import Config, size_sequence
from evojax_suite.types import Dataset, Split, TrainingData, training_data


@configuration
class Options(JudgedRunOptions):
    """Shrink a training set to a few soft-labelled images by evolution (DEvS, Shvai et al. 2022).

    Flips stay off where the classes are digits; shifts are cut to 5/32 of an image.
    """

    num_images: int | None = None
    """Use a fixed, stratified part of the training set; None is the whole."""
    random_baseline: bool = True
    """Judge class-balanced random selections of the same sizes too."""
    labels: Literal["own", "teacher"] = "own"
    """own: averages of the originals' labels, the paper's; random selections keep their classes.
    teacher: what a network trained on the whole training set gives the images of both, the
    probability of each class (Qin et al. 2024)."""
    label_temperature: PositiveFloat = 1.0
    """Divides the teacher's logits; above 1 its labels are softer."""
    teacher_epochs: PositiveInt = small_sets.TEACHER_EPOCHS
    """Epochs of the teacher, without augmentation."""
    config: tyro.conf.OmitArgPrefixes[Config] = field(default_factory=Config)

    def __post_init__(self):
        super().__post_init__()
        small_sets.check_labels(self.labels, self.label_temperature, self.teacher_epochs)


@dataclass(frozen=True)
class _Job(Job[Options]):
    phase: Phase  # the reduction
    data: TrainingData
    sizes: tuple[int, ...]
    key_random: jax.Array
    key_test: jax.Array
    key_teacher: jax.Array


@dataclass(frozen=True)
class _Reduced:
    sets: list[SmallSet]
    reduction: LoopResult
    teacher: Teacher | None

    @property
    def seconds(self) -> float:
        return self.reduction.seconds + self.reduction.compile_seconds

    @property
    def stages(self) -> dict[str, float]:
        return {name: round(value, 3) for name, value in self.reduction.stage_seconds.items()}

    @property
    def num_failed(self) -> int:
        return self.reduction.num_failed + (self.teacher.num_failed if self.teacher else 0)


@dataclass(frozen=True)
class _Summary:
    reduced: _Reduced
    evaluated: EvaluatedSets

    @property
    def numbers(self) -> dict:
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
    data = training_data(dataset)
    steps = num_steps(config, len(dataset.train))
    return _Job(
        options,
        dataset,
        directory,
        Phase("reducing", algorithm, key_run, None, data, steps),
        data,
        sizes,
        *other_keys,
        differences=differences,
        notes=(f"sizes: {' > '.join(str(size) for size in (len(dataset.train), *sizes))}",),
    )


def search(job: _Job) -> Search:
    """Shrink the training set; train the teacher where its labels are asked for."""
    options, config, dataset = job.options, job.options.config, job.dataset
    reduction = yield job.phase
    teacher = None
    if options.labels == "teacher":
        teacher = yield from small_sets.train_teacher(
            job.key_teacher,
            dataset,
            small_sets.probe_config(
                config.network, config.training, config.engine, options.teacher_epochs
            ),
            options.label_temperature,
        )
    reached = jax.device_get(job.phase.algorithm.result(reduction.state, None, job.data))
    np.savez_compressed(
        job.directory / "lineage.npz",
        **{
            f"{name}_{len(one.images)}": getattr(one, name)
            for one in reached
            for name in ("assignments", "weights")
        },
    )
    features = f"flat maps of a {config.feature_network} network, {config.feature_epochs} epochs"
    seconds = reduction.seconds + reduction.compile_seconds
    sets = [
        SmallSet("DEvS", one.images, one.labels, seconds, features, label_source="own")
        for one in reached
    ]
    for size in config.target_sizes if options.random_baseline else ():
        start = time.perf_counter()
        key = jax.random.fold_in(job.key_random, size)
        indices = np.asarray(random_examples(key, job.data.labels, size, dataset.num_classes))
        taken = time.perf_counter() - start
        sets.append(small_sets.chosen("random", dataset, indices, taken, "none"))
    return _Reduced(small_sets.taught(sets, teacher) if teacher else sets, reduction, teacher)


def finish(job: _Job, reduced: _Reduced, test_split: Split) -> _Summary:
    """Write the sets and evaluate them on the test split."""
    config = job.options.config
    times = ", ".join(f"{name} {value:.1f} s" for name, value in reduced.stages.items())
    console.say(f"time: {times}")
    numbers = {
        "num_training_images": len(job.dataset.train),
        "sizes": job.sizes,
        "seconds": reduced.seconds,
        "teacher_seconds": reduced.teacher.seconds if reduced.teacher else 0.0,
        "stage_seconds": reduced.stages,
        "num_failed": reduced.num_failed,
    }
    evaluated = small_sets.evaluate_sets(
        job,
        reduced.sets,
        job.key_test,
        config.network,
        config.training,
        config.engine,
        test_split,
        numbers,
    )
    return _Summary(reduced, evaluated)


def present(job: _Job, summary: _Summary) -> Report | None:
    """The accuracy of each set, beside random selections."""
    reduced = summary.reduced
    teacher = reduced.teacher
    numbers = [
        ["sizes", " > ".join(str(size) for size in job.sizes)],
        *([f"time in {name}", f"{value:.1f} s"] for name, value in reduced.stages.items()),
        ["time in all", f"{reduced.seconds:.1f} s"],
        ["teacher", f"{teacher.seconds:.1f} s" if teacher else "not needed"],
        ["labels", teacher.in_words() if teacher else "own"],
        ["failed losses", str(reduced.num_failed)],
    ]
    title = f"{job.dataset.name}, shrunk by DEvS"
    return small_sets.report_of(job, summary.evaluated, title, numbers)


SYSTEM = System(
    "devs",
    Options,
    prepare,
    search,
    finish,
    present,
    columns=Columns((SECONDS,)),
    metrics={"num_samples": "samples"},
)
