"""Distil a dataset by evolution, judge it on the test split, compare it with strong random."""

from __future__ import annotations

import io
from collections.abc import Callable, Generator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated, Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
import tyro
from pydantic import NonNegativeInt, PositiveFloat, PositiveInt

from evojax_suite import distilled
from evojax_suite.configuration import configuration
from evojax_suite.data import DataError
from evojax_suite.distilled import DistilledDataset
from evojax_suite.operators import encodings
from evojax_suite.reporting import plotting
from evojax_suite.reporting.comparison import SECONDS, Columns, Quantity, accuracy
from evojax_suite.reporting.formats import duration, percent
from evojax_suite.reporting.progress import console
from evojax_suite.reporting.report import Figure, Report, Table
from evojax_suite.running import small_sets
from evojax_suite.running.options import JudgedRunOptions, config_difference, option_difference
from evojax_suite.running.system import Job, Phase, Search, System
from evojax_suite.runtime import devices
from evojax_suite.runtime.loop import LoopResult
from evojax_suite.runtime.results import read_lines, typed_option, write_atomically
from evojax_suite.systems.ga_distillation import strong_random
from evojax_suite.systems.ga_distillation.algorithm import build, check, history
from evojax_suite.systems.ga_distillation.config import FOUR_IN_ONE, RECOMMENDED, Config, Params
from evojax_suite.systems.ga_distillation.fitness import score_on, solved_labels
from evojax_suite.systems.ga_distillation.individuals import Data, Individual, make_data
from evojax_suite.types import Dataset, Split

Relabel = Callable[[Individual], Individual]


def _recipe(config: Config, num_generations: int) -> list[str]:
    unlike_the_paper = config_difference(config, Config())
    return [
        word
        for name, value in {**unlike_the_paper, "num_generations": num_generations}.items()
        for word in typed_option(f"--{name}".replace("_", "-"), value)
    ]


RECIPES = {"recommended": _recipe(RECOMMENDED, 1000), "four_in_one": _recipe(FOUR_IN_ONE, 400)}
"""The options that a recipe stands for; those given beside it win."""


@configuration
class Options(JudgedRunOptions):
    """Distil a dataset into a few synthetic images by a genetic algorithm (Sato et al. 2026)."""

    recipe: Literal["paper", "recommended", "four_in_one"] = "paper"
    """The paper's settings; those that we would use: no network is trained while it searches; or
    the same with four smaller images in each one, which networks see enlarged."""
    num_generations: Annotated[PositiveInt, tyro.conf.arg(aliases=["--generations"])] = 1000
    """Generations, the evaluation of the initial individuals being the first."""
    start_from: Path | None = None
    """Begin at the images of this .npz, of any run or of your own, as many of each class as are
    searched for."""
    choose_from: PositiveInt = 1
    """Networks trained on each of the last results of the search, so many of which are kept, two
    for every doubling of the generations, are judged on the validation split: the best stays."""
    labels: Literal["own", "solved", "teacher"] = "own"
    """Labels of what is found: its own; solved: those from which kernel regression predicts the
    training images best; teacher: what a network trained on the whole training set says of them."""
    label_temperature: PositiveFloat = 1.0
    """Divides the teacher's logits; above 1 its labels are softer."""
    teacher_epochs: PositiveInt = small_sets.TEACHER_EPOCHS
    """Epochs of the teacher, without augmentation."""
    num_networks: PositiveInt = 10
    strong_random_repeats: NonNegativeInt = 5
    """Repeats of the strong random baseline; 0 leaves it out."""
    config: tyro.conf.OmitArgPrefixes[Config] = field(default_factory=Config)
    params: tyro.conf.OmitArgPrefixes[Params] = field(default_factory=Params)

    def __post_init__(self):
        super().__post_init__()
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


@dataclass(frozen=True)
class _Job(Job[Options]):
    config: Config  # that of the options, but in a dry run, which has fewer members
    evolving: Phase
    strong_random: Phase | None
    data: Data
    key_test: jax.Array


@dataclass(frozen=True)
class _Found:
    individual: Individual
    generation: int  # after which it was the result
    generations: np.ndarray  # (F,) of the frames
    frames: Individual  # the results on the way
    loop: LoopResult
    strong_random: list[Individual]
    strong_random_fitness: list[float]
    num_failed: int


@dataclass(frozen=True)
class _Summary:
    numbers: dict[str, Any]
    result: DistilledDataset
    accuracies: np.ndarray  # (num_networks,)
    strong: np.ndarray  # (repeats, num_networks)
    found: _Found
    num_test_images: int


def prepare(options: Options, dataset: Dataset, directory: Path) -> _Job:
    """Check the settings against the dataset, and read the images to start from."""
    options.params.check()
    if options.start_from is not None:
        options = replace(options, config=replace(options.config, start="given"))
    config, factor = options.config, 1.0
    if options.dry_run:  # as many members as are in flight, on each device; all are alike
        alike = 2 * config.engine.resolved_members_in_flight * devices.take(options.devices)
        factor = max(1.0, config.population_size / alike)
        config = replace(config, population_size=min(config.population_size, alike))
    check(config, dataset)
    given = options.start_from and images_to_start_from(options.start_from, config, dataset)
    algorithm = build(config, dataset.num_classes, dataset.image_shape)
    differences = config_difference(options.config, Config())
    differences |= config_difference(options.params, Params())
    own = "num_generations", "start_from", "choose_from", "labels"
    differences |= option_difference(options, *own, "label_temperature", "teacher_epochs")
    key_run, key_baseline, key_test = jax.random.split(jax.random.key(options.seed), 3)
    data = make_data(dataset, given)
    repeats = options.strong_random_repeats
    shared: dict[str, Any] = {
        "members_per_step": config.population_size * config.networks_per_member,
        "same_for_seeds": algorithm.scannable,
        "dry_run_factor": factor,
    }
    evolving = Phase(
        "evolving", algorithm, key_run, options.params, data, options.num_generations, **shared
    )
    baseline = None
    if repeats:
        baseline = Phase(
            "strong random",
            strong_random.build(config, repeats, dataset.num_classes, dataset.image_shape),
            key_baseline,
            options.params,
            data,
            repeats,
            "strong_random",
            **shared,
        )
    return _Job(
        options,
        dataset,
        directory,
        config,
        evolving,
        baseline,
        data,
        key_test,
        differences=differences,
    )


def search(job: _Job) -> Search:
    """Evolve, choose among the last results, repeat strong random, label what was found."""
    options, config, dataset, data = job.options, job.config, job.dataset, job.data
    evolved = yield job.evolving
    algorithm, params = job.evolving.algorithm, options.params
    individual = jax.device_get(algorithm.result(evolved.state, params, data))
    generations, frames = jax.device_get(history(config, dataset.num_classes, evolved.state, data))
    last = [Individual(*found) for found in zip(*frames, strict=True)][-options.choose_from :]
    numbers, chosen = generations[-len(last) :], -1
    if len(last) > 1 and not options.dry_run:
        found = [_accuracies(job, dataset.validation, job.key_test, one) for one in last]
        for number, accuracies in zip(numbers, found, strict=True):
            console.say(f"generation {number:,}: {percent(accuracies)} % of the validation split")
        chosen = int(np.argmax([np.nan_to_num(accuracies.mean(), nan=-1) for accuracies in found]))
        individual = last[chosen]

    random_ones, random_fitness, num_failed = [], [], evolved.num_failed
    if job.strong_random is not None:
        repeated = yield job.strong_random
        ones = job.strong_random.algorithm.result(repeated.state, params, data)
        count = options.strong_random_repeats
        random_ones = [jax.tree.map(lambda leaf, i=i: leaf[i], ones) for i in range(count)]
        lines = read_lines(job.directory / job.strong_random.folder / "metrics.jsonl")
        fitness = [line["fitness_best"] for line in lines]
        random_fitness = [value for value in fitness if value is not None]
        num_failed += repeated.num_failed
    relabel = yield from _relabelling(job)
    return _Found(
        jax.device_get(relabel(individual)),
        int(numbers[chosen]),
        generations,
        frames,
        evolved,
        [relabel(one) for one in random_ones],
        random_fitness,
        num_failed,
    )


def _accuracies(job: _Job, split: Split, key: jax.Array, one: Individual) -> np.ndarray:
    """Accuracies on `split` of the networks of the recipe, trained on an individual."""
    config = job.config
    return distilled.accuracies_on(
        split,
        key,
        *encodings.unpacked(jnp.asarray(one.images), jnp.asarray(one.labels), config.factor),
        job.dataset,
        config.network,
        config.training,
        job.options.num_networks,
        config.engine,
        job.options.devices,
    )


def _relabelling(job: _Job) -> Generator[Phase, LoopResult, Relabel]:
    """What gives individuals the labels that the options ask for; a teacher is trained here."""
    options, config, dataset, num_classes = (
        job.options,
        job.config,
        job.dataset,
        job.dataset.num_classes,
    )
    key = jax.random.fold_in(jax.random.key(options.seed), 1)
    if options.labels == "own":
        return lambda individual: individual
    if options.labels == "solved":

        def solved(individual: Individual) -> Individual:
            labels = solved_labels(key, config, num_classes, individual, job.data)
            return individual._replace(labels=np.asarray(labels))

        return solved
    own = replace(config.training, batch_size=256)
    teacher = yield from small_sets.train_teacher(
        key,
        dataset,
        small_sets.probe_config(config.network, own, config.engine, options.teacher_epochs),
        options.label_temperature,
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


def finish(job: _Job, found: _Found, test_split: Split) -> _Summary:
    """Write the images and judge them on the test split, beside those of strong random."""
    options, config, dataset = job.options, job.config, job.dataset
    individual = found.individual
    accuracies = _accuracies(job, test_split, job.key_test, individual)
    keys = jax.random.split(jax.random.fold_in(job.key_test, 1), options.strong_random_repeats)
    strong = np.array(
        [
            _accuracies(job, test_split, key, one)
            for key, one in zip(keys, found.strong_random, strict=True)
        ]
    )
    result = DistilledDataset.made(
        dataset,
        np.asarray(individual.images),
        np.asarray(individual.labels),
        config.network,
        config.training,
        options.seed,
        accuracies,
        config.factor,
    )
    result.save(job.directory / "distilled.npz")
    buffer = io.BytesIO()
    frames = found.frames
    np.savez_compressed(
        buffer, generations=found.generations, images=frames.images, labels=frames.labels
    )
    write_atomically(job.directory / "frames.npz", buffer.getvalue())
    state = found.loop.state
    num_generations = int(state.generation)
    numbers = {
        "test_accuracy_mean": float(np.mean(accuracies)),
        "test_accuracy_std": float(np.std(accuracies)),
        "num_networks": options.num_networks,
        "fitness_best": float(state.best_score),
        "best_generation": int(state.best_generation),
        "generation": found.generation,
        "num_generations": num_generations,
        "seconds": found.loop.seconds,
        "compile_seconds": found.loop.compile_seconds,
        "members_per_second": job.evolving.members_per_step * num_generations / found.loop.seconds,
        "num_failed": found.num_failed,
    }
    test_score = score_on(test_split, config, dataset, individual)
    if test_score is not None:
        numbers["test_score"] = test_score
        console.say(
            f"{config.fitness} gives the distilled images {test_score:.4f} on the test split"
        )
    if strong.size:
        numbers |= {
            "strong_random_test_accuracy_mean": float(np.mean(strong)),
            "strong_random_test_accuracy_std": float(np.std(strong)),
            "strong_random_repeats": options.strong_random_repeats,
        }
    return _Summary(numbers, result, accuracies, strong, found, len(test_split))


def present(job: _Job, summary: _Summary) -> Report:
    """The images and how they evolved, beside strong random."""
    dataset, result, numbers = job.dataset, summary.result, summary.numbers
    accuracies, strong, found = summary.accuracies, summary.strong, summary.found
    figures = job.directory / "figures"
    plotting.image_rows(figures / "images.png", dataset, result.images, result.labels)
    plotting.evolution(
        figures / "evolution.png", dataset, np.asarray(found.frames.images), result.labels
    )
    curves = plotting.fitness_curves(
        read_lines(job.directory / "metrics.jsonl"), job.config.fitness, found.strong_random_fitness
    )
    rows = [["evolved", percent(accuracies), str(len(accuracies))]]
    closing = [f"test accuracy {percent(accuracies)} % ({len(accuracies)} networks)"]
    if strong.size:
        rows.append(["strong random", percent(strong), str(strong.size)])
        gain = 100 * (np.mean(accuracies) - np.mean(strong))
        closing.append(
            f"strong random {percent(strong)} % ({len(strong)} x {len(accuracies)} networks): "
            f"evolution is {gain:+.2f} points from it"
        )
    size, num_generations = len(result.images), numbers["num_generations"]
    lead = (
        f"{size} synthetic images stand for the {len(dataset.train):,} training images of "
        f"{dataset.name}: networks trained on them alone classify "
        f"{100 * numbers['test_accuracy_mean']:.2f}% of the {summary.num_test_images:,} test "
        "images."
    )
    return Report(
        f"{dataset.name}, distilled by evolution",
        lead,
        [
            (f"{percent(accuracies)} %", "test accuracy"),
            *([(f"{percent(strong)} %", "strong random selection")] if strong.size else []),
            (str(size), "synthetic images"),
            (duration(numbers["seconds"]), "of evolution"),
        ],
        [Table("Accuracy on the test split (%)", ["dataset", "mean ± std", "networks"], rows)],
        [
            Figure(
                "images",
                "Real images (upper row) and synthetic ones, each stretched to its own range",
            ),
            Figure(
                "evolution",
                f"From generation 1 to {num_generations:,}, two pictures for every doubling",
            ),
            Figure("fitness", "Fitness by generation", curves),
        ],
        [
            ["generations", f"{num_generations:,}"],
            [
                "best fitness",
                f"{numbers['fitness_best']:.4f} in generation {numbers['best_generation']}",
            ],
            ["time in generations", f"{numbers['seconds']:.1f} s"],
            ["compilation", f"{numbers['compile_seconds']:.1f} s"],
            ["members per second", f"{numbers['members_per_second']:.1f}"],
            ["failed evaluations", str(numbers["num_failed"])],
        ],
        [*closing, f"dataset: {job.directory / 'distilled.npz'}"],
    )


def images_to_start_from(path: Path, config: Config, dataset: Dataset) -> np.ndarray:
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


SYSTEM = System(
    "ga_distillation",
    Options,
    prepare,
    search,
    finish,
    present,
    columns=Columns(
        quantities=(
            accuracy("test_accuracy_mean", "test accuracy"),
            accuracy("strong_random_test_accuracy_mean", "strong random"),
            Quantity("fitness_best", "best fitness", digits=4),
            Quantity("num_generations", "generations", digits=0),
            SECONDS,
        ),
        curves=(("generation", "fitness_best"), ("generation", "fitness_mean")),
    ),
    recipes=RECIPES,
    may_grow="num_generations",
)
