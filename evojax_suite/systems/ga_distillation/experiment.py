"""Distil a dataset by evolution, judge it on the test part, compare it with strong random."""

from __future__ import annotations

import io
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Annotated, Literal

import jax
import jax.numpy as jnp
import numpy as np
import tyro

from evojax_suite import distilled
from evojax_suite.cli.config_file import argument
from evojax_suite.data import DataError, load
from evojax_suite.distilled import DistilledDataset
from evojax_suite.operators import encodings
from evojax_suite.reporting import plotting, report
from evojax_suite.reporting.progress import console
from evojax_suite.reporting.report import Figure, Table
from evojax_suite.running import small_sets
from evojax_suite.running.options import JudgedRunOptions, differing, duration, percent
from evojax_suite.runtime import devices
from evojax_suite.runtime.results import open_run, read_lines, write_atomically, write_json
from evojax_suite.systems import ga_distillation
from evojax_suite.systems.ga_distillation import strong_random
from evojax_suite.systems.ga_distillation.algorithm import Individual
from evojax_suite.types import Dataset, Split


def _recipe(config: ga_distillation.Config, num_generations: int) -> list[str]:
    unlike_the_paper = differing(config, ga_distillation.Config())
    return [
        word
        for name, value in {**unlike_the_paper, "num_generations": num_generations}.items()
        for word in argument(f"--{name}".replace("_", "-"), value)
    ]


RECIPES = {
    "recommended": _recipe(ga_distillation.RECOMMENDED, 1000),
    "four_in_one": _recipe(ga_distillation.FOUR_IN_ONE, 400),
}
"""The options that a recipe stands for; those given beside it win."""


@dataclass(frozen=True)
class Options(JudgedRunOptions):
    """Distil a dataset into a few synthetic images by a genetic algorithm (Sato et al. 2026)."""

    recipe: Literal["paper", "recommended", "four_in_one"] = "paper"
    """The paper's settings; those that we would use: no network is trained while it searches; or
    the same with four smaller images in each one, which networks see enlarged."""
    num_generations: Annotated[int, tyro.conf.arg(aliases=["--generations"])] = 1000
    """Generations, the evaluation of the initial individuals being the first."""
    start_from: Path | None = None
    """Begin at the images of this .npz, of any run or of your own, as many of each class as are
    searched for."""
    choose_from: int = 1
    """Networks trained on each of the last results of the search, so many of which are kept, two
    for every doubling of the generations, are judged on the validation part: the best stays."""
    labels: Literal["own", "solved", "teacher"] = "own"
    """Labels of what is found: its own; solved: those from which kernel regression predicts the
    training images best; teacher: what a network trained on the whole training set says of them."""
    label_temperature: float = 1.0
    """Divides the teacher's logits; above 1 its labels are softer."""
    teacher_epochs: int = small_sets.TEACHER_EPOCHS
    """Epochs of the teacher, without augmentation."""
    strong_random_repeats: int = 5
    """Repeats of the strong random baseline; 0 leaves it out."""
    config: tyro.conf.OmitArgPrefixes[ga_distillation.Config] = field(
        default_factory=ga_distillation.Config
    )
    params: tyro.conf.OmitArgPrefixes[ga_distillation.Params] = field(
        default_factory=ga_distillation.Params
    )

    def __post_init__(self):
        super().__post_init__()
        for name, least in (
            ("num_generations", 1),
            ("num_networks", 1),
            ("strong_random_repeats", 0),
            ("choose_from", 1),
        ):
            if getattr(self, name) < least:
                raise ValueError(f"{name} must be >= {least}, got {getattr(self, name)}")
        small_sets.check_labels(self.labels, self.label_temperature, self.teacher_epochs)
        if self.labels == "solved" and (
            self.config.fitness != "kernel_regression" or self.config.regression.temperature == 0
        ):
            raise ValueError(
                "labels solved needs --fitness kernel_regression with a temperature > 0, got "
                f"{self.config.fitness} and {self.config.regression.temperature}"
            )
        if self.config.start == "given" and self.start_from is None:
            raise ValueError("start given needs --start-from, got none")


def run(options: Options) -> Path:
    """The whole run, in the folder that is returned. Raises ValueError, DataError or OSError, each
    with one line to show."""
    options.params.check()
    if options.start_from is not None:
        options = replace(options, config=replace(options.config, start="given"))
    config = options.config
    if options.plan is not None:  # as many members as are in flight, on each device; all are alike
        alike = 2 * config.engine.resolved_members_in_flight * devices.take(options.devices)
        options.plan.members = max(1.0, config.population_size / alike)
        config = replace(config, population_size=min(config.population_size, alike))
    dataset = load(options.dataset, options.data_dir, cache=options.cache_data)
    ga_distillation.check(config, dataset)
    given = options.start_from and images_to_start_from(options.start_from, config, dataset)
    algorithm = ga_distillation.build(config, dataset.num_classes, dataset.image_shape)
    directory = options.directory("ga_distillation", dataset)
    settings = options.settings()
    open_run(directory, settings, options.resume, may_grow="num_generations")
    beyond = differing(config, ga_distillation.Config())
    beyond |= differing(options.params, ga_distillation.Params())
    own = "num_generations", "start_from", "choose_from", "labels"
    for name in (*own, "label_temperature", "teacher_epochs"):
        if getattr(options, name) != getattr(Options, name):
            beyond[name] = getattr(options, name)
    console.say(
        f"{dataset.name}: {len(dataset.train):,} training, {len(dataset.validation):,} fitness, "
        f"{len(dataset.test):,} test images, {dataset.num_classes} classes; run in {directory}"
    )
    shown = ", ".join(f"{name}={value}" for name, value in beyond.items()) or "none"
    console.say(f"settings that differ from the paper's: {shown}")

    data = ga_distillation.make_data(dataset, given)
    key_run, key_baseline, key_test = jax.random.split(jax.random.key(options.seed), 3)
    per_step = config.population_size * config.networks_per_member

    outcome = options.drive(
        "evolving",
        algorithm,
        key_run,
        options.params,
        data,
        options.num_generations,
        directory,
        members_per_step=per_step,
        same_for_seeds=algorithm.scannable,
    )
    individual = jax.device_get(algorithm.result(outcome.state, options.params, data))
    generations_of, frames = jax.device_get(
        ga_distillation.history(config, dataset.num_classes, outcome.state, data)
    )

    def judged_on(part: Split, key: jax.Array, one: Individual) -> np.ndarray:
        return distilled.accuracies_on(
            key,
            *encodings.unpacked(jnp.asarray(one.images), jnp.asarray(one.labels), config.factor),
            replace(dataset, test=part),
            config.network,
            config.training,
            options.num_networks,
            config.engine,
            options.devices,
        )

    on_the_way = [Individual(*found) for found in zip(frames.images, frames.labels, strict=True)][
        -options.choose_from :
    ]
    numbers, chosen = generations_of[-len(on_the_way) :], -1
    if len(on_the_way) > 1 and options.plan is None:
        found = [judged_on(dataset.validation, key_test, one) for one in on_the_way]
        for number, accuracies in zip(numbers, found, strict=True):
            console.say(f"generation {number:,}: {percent(accuracies)} % of the validation part")
        chosen = int(np.argmax([np.nan_to_num(accuracies.mean(), nan=-1) for accuracies in found]))
        individual = on_the_way[chosen]

    baseline_individuals, baseline_fitness, baseline_failed = None, [], 0
    if options.strong_random_repeats:
        baseline = strong_random.build(
            config, options.strong_random_repeats, dataset.num_classes, dataset.image_shape
        )
        baseline_directory = directory / "strong_random"
        baseline_outcome = options.drive(
            "strong random",
            baseline,
            key_baseline,
            options.params,
            data,
            options.strong_random_repeats,
            baseline_directory,
            members_per_step=per_step,
            same_for_seeds=algorithm.scannable,
        )
        baseline_individuals = baseline.result(baseline_outcome.state, options.params, data)
        lines = read_lines(baseline_directory / "metrics.jsonl")
        baseline_fitness = [
            line["fitness_best"] for line in lines if line["fitness_best"] is not None
        ]
        baseline_failed = baseline_outcome.num_failed

    relabel = _relabelling(options, dataset, data, directory)
    individual = jax.device_get(relabel(individual))
    if baseline_individuals is not None:
        baseline_individuals = [
            relabel(jax.tree.map(lambda leaf, i=i: leaf[i], baseline_individuals))
            for i in range(options.strong_random_repeats)
        ]
    options.end_dry_run()

    # Selection is over: only here is the test part opened.
    judge = partial(judged_on, dataset.test)
    accuracies = judge(key_test, individual)
    strong = np.array(
        [
            judge(key, one)
            for one, key in zip(
                baseline_individuals or [],
                jax.random.split(jax.random.fold_in(key_test, 1), options.strong_random_repeats),
                strict=True,
            )
        ]
    )
    result = DistilledDataset(
        images=individual.images,
        labels=individual.labels,
        dataset=dataset.name,
        class_names=dataset.class_names,
        mean=dataset.mean,
        std=dataset.std,
        network=config.network,
        training=config.training,
        seed=options.seed,
        factor=config.factor,
        test_accuracies=tuple(float(accuracy) for accuracy in accuracies),
    )
    result.save(directory / "distilled.npz")
    buffer = io.BytesIO()
    np.savez_compressed(
        buffer, generations=generations_of, images=frames.images, labels=frames.labels
    )
    write_atomically(directory / "frames.npz", buffer.getvalue())
    test_score = ga_distillation.score_on_test(config, dataset, individual)
    generations = int(outcome.state.generation)
    summary = {
        "system": "ga_distillation",
        "dataset": dataset.name,
        "test_accuracy_mean": float(np.mean(accuracies)),
        "test_accuracy_std": float(np.std(accuracies)),
        "num_networks": options.num_networks,
        "fitness_best": float(outcome.state.best_score),
        "best_generation": int(outcome.state.best_generation),
        "generation": int(numbers[chosen]),
        "num_generations": generations,
        "seconds": outcome.seconds,
        "compile_seconds": outcome.compile_seconds,
        "members_per_second": per_step * generations / outcome.seconds,
        "num_failed": outcome.num_failed + baseline_failed,
        "seed": options.seed,
        "options": beyond,
    }
    if test_score is not None:
        summary["test_score"] = test_score
        console.say(
            f"{config.fitness} gives the distilled images {test_score:.4f} on the test part"
        )
    if options.strong_random_repeats:
        summary |= {
            "strong_random_test_accuracy_mean": float(np.mean(strong)),
            "strong_random_test_accuracy_std": float(np.std(strong)),
            "strong_random_repeats": options.strong_random_repeats,
        }
    write_json(directory / "summary.json", summary)
    _present(
        directory,
        options,
        settings,
        dataset,
        result,
        summary,
        accuracies,
        strong,
        baseline_fitness,
        frames.images,
    )
    return directory


def images_to_start_from(
    path: Path, config: ga_distillation.Config, dataset: Dataset
) -> np.ndarray:
    """The images of a file (n, H, W, C), normalised as `dataset` is, class by class. Raises
    DataError where they are not as many of each class as `config` searches for."""
    found = DistilledDataset.load(path, dataset)
    if found.factor != config.factor:  # else they stay as they are stored
        found = found.unpacked()
    needed = config.images_per_class * (config.factor**2 if found.factor == 1 else 1)
    classes = found.labels.argmax(1)
    counts = np.bincount(classes, minlength=dataset.num_classes)
    if found.images.shape[1:] != dataset.image_shape or len(counts) != dataset.num_classes:
        raise DataError(
            f"{path}: images {found.images.shape[1:]} of {len(counts)} classes, allowed: "
            f"{dataset.image_shape} of {dataset.num_classes}"
        )
    if (counts != needed).any():
        wrong = int((counts != needed).argmax())
        raise DataError(
            f"{path}: {counts[wrong]} images of class {dataset.class_names[wrong]!r}, "
            f"allowed: {needed} of each"
        )
    images = found.images[classes.argsort(kind="stable")]
    pixels = images * np.array(found.std, np.float32) + np.array(found.mean, np.float32)
    images = (pixels - np.array(dataset.mean)) / np.array(dataset.std)
    packed = encodings.packed(jnp.asarray(images, jnp.float32), config.factor // found.factor)
    return np.asarray(packed)


def _relabelling(
    options: Options, dataset: Dataset, data: ga_distillation.Data, directory: Path
) -> Callable[[Individual], Individual]:
    """What gives individuals the labels that `options` asks for; a teacher is trained here."""
    config, num_classes = options.config, dataset.num_classes
    key = jax.random.fold_in(jax.random.key(options.seed), 1)
    if options.labels == "own":
        return lambda individual: individual
    if options.labels == "solved":

        def solved(individual: Individual) -> Individual:
            labels = ga_distillation.solved_labels(key, config, num_classes, individual, data)
            return individual._replace(labels=np.asarray(labels))

        return solved
    own = replace(config.training, batch_size=256)
    teacher = small_sets.train_teacher(
        options,
        key,
        dataset,
        small_sets.probe_config(config.network, own, config.engine, options.teacher_epochs),
        options.label_temperature,
        directory,
    )
    console.say(f"labels: {teacher.in_words()}")

    def taught(individual: Individual) -> Individual:
        images, _ = encodings.unpacked(
            jnp.asarray(individual.images), jnp.asarray(individual.labels), config.factor
        )
        labels = teacher.labels(np.asarray(images), num_classes)
        by_image = labels.reshape(len(individual.images), -1, num_classes).mean(1)
        return individual._replace(labels=by_image)

    return taught


def _present(
    directory: Path,
    options: Options,
    settings: dict,
    dataset: Dataset,
    result: DistilledDataset,
    summary: dict,
    accuracies: np.ndarray,
    strong: np.ndarray,
    strong_fitness: list[float],
    frames: np.ndarray,
) -> None:
    """Figures, report and the closing lines on the terminal."""
    figures = directory / "figures"
    plotting.image_rows(figures / "images.png", dataset, result.images, result.labels)
    plotting.evolution(figures / "evolution.png", dataset, frames, result.labels)
    curves = plotting.fitness_curves(
        read_lines(directory / "metrics.jsonl"), options.config.fitness, strong_fitness
    )
    rows = [["evolved", percent(accuracies), str(len(accuracies))]]
    if strong.size:
        rows.append(["strong random", percent(strong), str(strong.size)])
    options_row = ", ".join(f"{k} = {v}" for k, v in summary["options"].items()) or "none"
    numbers = [
        ["generations", f"{summary['num_generations']:,}"],
        [
            "best fitness",
            f"{summary['fitness_best']:.4f} in generation {summary['best_generation']}",
        ],
        ["time in generations", f"{summary['seconds']:.1f} s"],
        ["compilation", f"{summary['compile_seconds']:.1f} s"],
        ["members per second", f"{summary['members_per_second']:.1f}"],
        ["failed evaluations", str(summary["num_failed"])],
        ["unlike the paper", options_row],
    ]
    size = len(result.images)
    lead = (
        f"{size} synthetic images stand for the {len(dataset.train):,} training images of "
        f"{dataset.name}: networks trained on them alone classify "
        f"{100 * summary['test_accuracy_mean']:.2f}% of the {len(dataset.test):,} test images."
    )
    report.write(
        directory / "report.html",
        f"{dataset.name}, distilled by evolution",
        lead,
        [
            (f"{percent(accuracies)} %", "test accuracy"),
            *([(f"{percent(strong)} %", "strong random selection")] if strong.size else []),
            (str(size), "synthetic images"),
            (duration(summary["seconds"]), "of evolution"),
        ],
        [
            Table("Accuracy on the test part (%)", ["dataset", "mean ± std", "networks"], rows),
        ],
        [
            Figure(
                "images",
                "Real images (upper row) and synthetic ones, each stretched to its own range",
            ),
            Figure(
                "evolution",
                f"From generation 1 to {summary['num_generations']:,}, two pictures for every "
                "doubling",
            ),
            Figure("fitness", "Fitness by generation", curves),
        ],
        numbers,
        report.commands(directory, "ga-distillation", options.typed, options.data_dir),
        {"config.json": settings, "summary.json": summary},
    )
    console.say(f"test accuracy {percent(accuracies)} % ({len(accuracies)} networks)")
    if strong.size:
        gain = 100 * (np.mean(accuracies) - np.mean(strong))
        console.say(
            f"strong random {percent(strong)} % ({options.strong_random_repeats} x "
            f"{options.num_networks} networks): evolution is {gain:+.2f} points from it"
        )
    console.say(f"report: {directory / 'report.html'}, dataset: {directory / 'distilled.npz'}")
