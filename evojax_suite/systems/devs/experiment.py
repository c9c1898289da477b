"""Shrink a training set by DEvS, judge the sets on the test part, beside random selection."""

from __future__ import annotations

import time
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal

import jax
import numpy as np
import tyro

from evojax_suite.data import load, with_whole_training_set
from evojax_suite.operators import check_shares, random_examples
from evojax_suite.reporting.progress import console
from evojax_suite.running import small_sets
from evojax_suite.running.options import JudgedRunOptions, differing
from evojax_suite.running.small_sets import SmallSet
from evojax_suite.runtime.results import open_run
from evojax_suite.systems import devs
from evojax_suite.types import training_data


@dataclass(frozen=True)
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
    label_temperature: float = 1.0
    """Divides the teacher's logits; above 1 its labels are softer."""
    teacher_epochs: int = small_sets.TEACHER_EPOCHS
    """Epochs of the teacher, without augmentation."""
    config: tyro.conf.OmitArgPrefixes[devs.Config] = field(default_factory=devs.Config)

    def __post_init__(self):
        super().__post_init__()
        small_sets.check_labels(self.labels, self.label_temperature, self.teacher_epochs)


def run(options: Options) -> Path:
    """The whole run, in the folder that is returned. Raises ValueError, DataError or OSError, each
    with one line to show."""
    dataset = with_whole_training_set(
        load(options.dataset, options.data_dir, cache=options.cache_data), options.num_images
    )
    training = small_sets.fitted_to(options.config.training, dataset)
    config = replace(options.config, training=training)
    options = replace(options, config=config)
    sizes = devs.size_sequence(config, len(dataset.train))
    algorithm = devs.build(config, dataset.num_classes, dataset.image_shape)
    if options.random_baseline:
        for size in config.target_sizes:
            check_shares(dataset.train.labels, size, dataset.num_classes, balanced=True)
    directory = options.directory("devs", dataset)
    open_run(directory, options.settings(), options.resume)
    beyond = differing(config, devs.Config())
    for name in ("labels", "label_temperature", "teacher_epochs"):
        if getattr(options, name) != getattr(Options, name):
            beyond[name] = getattr(options, name)
    console.say(
        f"{dataset.name}: {len(dataset.train):,} training, {len(dataset.test):,} test images, "
        f"{dataset.num_classes} classes; run in {directory}"
    )
    console.say(f"sizes: {' > '.join(str(size) for size in (len(dataset.train), *sizes))}")
    shown = ", ".join(f"{name}={value}" for name, value in beyond.items()) or "none"
    console.say(f"settings that differ from the defaults: {shown}")

    data = training_data(dataset)
    key_run, key_random, key_test, key_teacher = jax.random.split(jax.random.key(options.seed), 4)
    num_steps = devs.num_steps(config, len(dataset.train))
    outcome = options.drive("reducing", algorithm, key_run, None, data, num_steps, directory)
    seconds, num_failed = outcome.seconds + outcome.compile_seconds, outcome.num_failed
    teacher = None
    if options.labels == "teacher":
        teacher = small_sets.train_teacher(
            options,
            key_teacher,
            dataset,
            small_sets.probe_config(
                config.network, config.training, config.engine, options.teacher_epochs
            ),
            options.label_temperature,
            directory,
        )
        num_failed += teacher.num_failed
    options.end_dry_run()
    reached = jax.device_get(algorithm.result(outcome.state, None, data))
    features = f"flat maps of a {config.feature_network} network, {config.feature_epochs} epochs"
    sets = [
        SmallSet("DEvS", one.images, one.labels, seconds, features, label_source="own")
        for one in reached
    ]
    np.savez_compressed(
        directory / "lineage.npz",
        **{
            f"{name}_{len(one.images)}": getattr(one, name)
            for one in reached
            for name in ("assignments", "weights")
        },
    )
    if options.random_baseline:
        for size in config.target_sizes:
            start = time.perf_counter()
            key = jax.random.fold_in(key_random, size)
            indices = np.asarray(random_examples(key, data.labels, size, dataset.num_classes))
            taken = time.perf_counter() - start
            sets.append(small_sets.chosen("random", dataset, indices, taken, "none"))
    if teacher:
        sets = small_sets.taught(sets, teacher)
    stages = {name: round(value, 3) for name, value in outcome.stage_seconds.items()}
    numbers = [
        ["sizes", " > ".join(str(size) for size in sizes)],
        *([f"time in {name}", f"{value:.1f} s"] for name, value in stages.items()),
        ["time in all", f"{seconds:.1f} s"],
        ["teacher", f"{teacher.seconds:.1f} s" if teacher else "not needed"],
        ["labels", teacher.in_words() if teacher else "own"],
        ["failed losses", str(num_failed)],
        ["unlike the defaults", shown],
    ]
    console.say("time: " + ", ".join(f"{name} {value:.1f} s" for name, value in stages.items()))
    small_sets.finish(
        directory,
        options,
        dataset,
        sets,
        key_test,
        config.network,
        config.training,
        config.engine,
        {
            "system": "devs",
            "dataset": dataset.name,
            "num_training_images": len(dataset.train),
            "sizes": sizes,
            "seconds": seconds,
            "teacher_seconds": teacher.seconds if teacher else 0.0,
            "stage_seconds": stages,
            "num_networks": options.num_networks,
            "num_failed": num_failed,
            "seed": options.seed,
            "options": beyond,
        },
        f"{dataset.name}, shrunk by DEvS",
        numbers,
    )
    return directory
