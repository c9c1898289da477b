"""Distil a dataset by evolution, evaluate it on the test split, compare it with strong random."""

from __future__ import annotations

import io
from collections.abc import Callable, Generator
from dataclasses import dataclass, field, replace
from functools import partial
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
from evojax_suite.reporting.formats import duration, percent, short
from evojax_suite.reporting.progress import console
from evojax_suite.reporting.report import Figure, Report, Table
from evojax_suite.running import small_sets
from evojax_suite.running.options import JudgedRunOptions, config_difference, option_difference
from evojax_suite.running.system import Job, Phase, Search, System
from evojax_suite.runtime import devices
from evojax_suite.runtime.loop import LoopResult
from evojax_suite.runtime.results import read_lines, typed_option, write_atomically
from evojax_suite.systems.ga_distillation import strong_random
from evojax_suite.systems.ga_distillation.algorithm import (
    build,
    check,
    history,
    reference_fitness,
)
from evojax_suite.systems.ga_distillation.config import FOUR_IN_ONE, RECOMMENDED, Config, Params
from evojax_suite.systems.ga_distillation.fitness import own_judge, score_on, solved_labels
from evojax_suite.systems.ga_distillation.individuals import Individual, make_data
from evojax_suite.types import Dataset, Split


def _recipe(config: Config, num_generations: int) -> list[str]:
    settings = config_difference(config, Config()) | {"num_generations": num_generations}
    options = [typed_option(f"--{n}".replace("_", "-"), value) for n, value in settings.items()]
    return [word for words in options for word in words]


RECIPES = {"recommended": _recipe(RECOMMENDED, 1000), "four_in_one": _recipe(FOUR_IN_ONE, 400)}
"""The options that a recipe stands for; options given beside it take precedence."""


@configuration
class Options(JudgedRunOptions):
    """Distil a dataset into a few synthetic images by a genetic algorithm (Sato et al. 2026)."""

    recipe: Literal["paper", "recommended", "four_in_one"] = "paper"
    """The paper's settings; the recommended ones: no network is trained during the search; or the
    same with four smaller images in each one, which are enlarged for networks."""
    num_generations: Annotated[PositiveInt, tyro.conf.arg(aliases=["--generations"])] = 1000
    """Generations, the evaluation of the initial individuals being the first."""
    start_from: Path | None = None
    """Begin at the images of this .npz, of any run or of the user, as many of each class as are
    searched for."""
    choose_from: PositiveInt = 1
    """The number of last results of the search, two for every doubling of the generations, from
    which the best is chosen by networks trained on each and evaluated on the validation split."""
    labels: Literal["own", "solved", "teacher"] = "own"
    """Labels of the result: own: those of the search; solved: those from which kernel regression
    predicts the training images best; teacher: those by a network trained on the whole training
    set."""
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
        fitness, temperature = self.config.fitness, self.config.regression.temperature
        if self.labels == "solved" and (fitness != "kernel_regression" or temperature == 0):
            raise ValueError(
                "labels solved needs --fitness kernel_regression with a temperature > 0, got "
                f"{fitness} and {temperature}"
            )
        if self.config.start == "given" and self.start_from is None:
            raise ValueError("start given needs --start-from, got none")


@dataclass(frozen=True)
class _Job(Job[Options]):
    config: Config  # that of the options, with fewer members in a dry run
    evolving: Phase
    strong_random: Phase | None
    key_test: jax.Array


@dataclass(frozen=True)
class _Outcome:
    individual: Individual
    generation: int  # after which it was the result
    generations: np.ndarray  # (F,) of the frames
    frames: Individual  # the results during the search
    loop: LoopResult
    strong_random: list[Individual]
    strong_random_fitness: list[float]
    num_failed: int
    reference: dict[str, list[float]] | None  # fitness of results during the search, by generation


@dataclass(frozen=True)
class _Summary:
    numbers: dict[str, Any]
    result: DistilledDataset
    accuracies: np.ndarray  # (num_networks,)
    strong: np.ndarray  # (repeats, num_networks)
    outcome: _Outcome
    num_test_images: int


_READABLE = 16  # generations from which on progress is judged by the same networks
_LARGEST_PART = 20  # of the work on a member that a dry run leaves out


def _like(config: Config, dataset: Dataset, num_devices: int) -> tuple[Config, float]:
    """A configuration whose steps take a known part of the time of those of `config`, and how many
    times as long these take: fewer members, as all are alike, and, where they are trained, a part
    of the epochs and of the images that evaluate them. Kernel regression shares much of its work
    among members: the configuration itself."""
    if config.fitness == "kernel_regression":
        return config, 1.0
    alike = max(2, config.engine.resolved_members_in_flight * num_devices)
    alike = min(config.population_size, alike)
    like, factor = replace(config, population_size=alike), config.population_size / alike
    images = config.fitness_subset_size or len(dataset.validation)
    part = min(_LARGEST_PART, config.training.num_epochs // 5, images // 200)
    if own_judge(config) is not None or config.holdout_ratio or part <= 1:
        return like, factor
    training = replace(config.training, num_epochs=config.training.num_epochs // part)
    like = replace(like, training=training, fitness_subset_size=images // part)
    return like, factor * part


def prepare(options: Options, dataset: Dataset, directory: Path) -> _Job:
    """Check the settings against the dataset, and read the images to start from."""
    options.params.check()
    if options.start_from is not None:
        options = replace(options, config=replace(options.config, start="given"))
    config, factor, shape = options.config, 1.0, (dataset.num_classes, dataset.image_shape)
    check(config, dataset)
    if options.dry_run:
        config, factor = _like(config, dataset, devices.take(options.devices))
    given = options.start_from and images_to_start_from(options.start_from, config, dataset)
    algorithm = build(config, *shape)
    differences = config_difference(options.config, Config())
    differences |= config_difference(options.params, Params())
    others = "num_generations", "start_from", "choose_from", "labels"
    differences |= option_difference(options, *others, "label_temperature", "teacher_epochs")
    key_run, key_baseline, key_test = jax.random.split(jax.random.key(options.seed), 3)
    phase = partial(
        Phase,
        params=options.params,
        data=make_data(dataset, given),
        members_per_step=config.population_size * config.networks_per_member,
        same_for_seeds=algorithm.scannable,
        dry_run_steps=3 if config.fitness == "kernel_regression" else 1,
        dry_run_factor=factor,
    )
    evolving = phase("evolving", algorithm, key_run, num_steps=options.num_generations)
    baseline, repeats = None, options.strong_random_repeats
    if repeats:
        inputs: dict[str, Any] = {"num_steps": repeats, "dry_run_steps": 1}
        if options.dry_run and config.fitness == "kernel_regression":
            # Here members share little, as each is compared on all validation images.
            drawn = replace(config, population_size=max(2, config.population_size // 4))
            inputs["dry_run_factor"] = config.population_size / drawn.population_size
            inputs["members_per_step"] = drawn.population_size * drawn.networks_per_member
        else:
            drawn = config
        repeated = strong_random.build(drawn, repeats, *shape)
        baseline = phase("strong random", repeated, key_baseline, folder="strong_random", **inputs)
    parts = config, evolving, baseline, key_test
    return _Job(options, dataset, directory, *parts, differences=differences)


def search(job: _Job) -> Search:
    """Evolve, choose among the last results, repeat strong random, and label the results."""
    options, dataset, evolving, baseline = job.options, job.dataset, job.evolving, job.strong_random
    params, data = evolving.params, evolving.data
    evolved = yield evolving
    individual = jax.device_get(evolving.algorithm.result(evolved.state, params, data))
    results = history(job.config, dataset.num_classes, evolved.state, data)
    generations, frames = jax.device_get(results)
    last = [Individual(*frame) for frame in zip(*frames, strict=True)][-options.choose_from :]
    numbers, chosen = generations[-len(last) :], -1  # the final result, unless another is better
    if len(last) > 1 and not options.dry_run:
        accuracies = [_accuracies(job, dataset.validation, job.key_test, one) for one in last]
        for number, each in zip(numbers, accuracies, strict=True):
            console.say(f"generation {number:,}: {percent(each)} % of the validation split")
        chosen = int(np.argmax([np.nan_to_num(each.mean(), nan=-1) for each in accuracies]))
        individual = last[chosen]

    ones, fitness, num_failed = [], [], evolved.num_failed
    if baseline is not None:
        repeated = yield baseline
        results = baseline.algorithm.result(repeated.state, params, data)
        ones = [Individual(*one) for one in zip(*results, strict=True)]
        lines = read_lines(job.directory / baseline.folder / "metrics.jsonl")
        fitness = [line["fitness_best"] for line in lines if line["fitness_best"] is not None]
        num_failed += repeated.num_failed
    labels = yield from _labelling(job)
    individual, *ones = [one._replace(labels=labels(one)) for one in (individual, *ones)]
    of_search = int(numbers[chosen]), generations, frames, evolved
    reference = _reference(job, evolved)
    return _Outcome(individual, *of_search, ones, fitness, num_failed, reference)


def _reference(job: _Job, evolved: LoopResult) -> dict[str, list[float]] | None:
    """The fitness of the results during the search, all by the same networks; None where there are
    too few to read progress from, or the fitness is a function of the user's."""
    options, config = job.options, job.config
    few = int(evolved.state.generation) < _READABLE
    if few or options.dry_run or own_judge(config) is not None:
        return None
    key = jax.random.fold_in(jax.random.key(options.seed), 2)
    about = config, job.dataset.num_classes, evolved.state, job.evolving.data
    generations, values = reference_fitness(key, *about)
    return {"generation": generations.tolist(), "fitness": values.tolist()}


def _accuracies(job: _Job, split: Split, key: jax.Array, one: Individual) -> np.ndarray:
    """Accuracies on `split` of the networks of the recipe, trained on an individual."""
    options, config = job.options, job.config
    images, labels = encodings.unpacked(*one, config.factor)
    recipe = config.network, config.training, options.num_networks, config.engine, options.devices
    return distilled.accuracies_on(split, key, images, labels, job.dataset, *recipe)


def _labelling(job: _Job) -> Generator[Phase, LoopResult, Callable[[Individual], np.ndarray]]:
    """Returns a function of an individual that returns the labels that the options ask for; yields
    the training of a teacher."""
    options, config, dataset = job.options, job.config, job.dataset
    key, num_classes = jax.random.fold_in(jax.random.key(options.seed), 1), dataset.num_classes
    if options.labels == "own":
        return lambda one: np.asarray(one.labels)
    if options.labels == "solved":
        data = job.evolving.data
        return lambda one: np.asarray(solved_labels(key, config, num_classes, one, data))
    training, engine = replace(config.training, batch_size=256), config.engine
    probe = small_sets.probe_config(config.network, training, engine, options.teacher_epochs)
    teacher = yield from small_sets.train_teacher(key, dataset, probe, options.label_temperature)
    console.say(f"labels: {teacher.in_words()}")

    def taught(one: Individual) -> np.ndarray:
        images, _ = encodings.unpacked(*one, config.factor)
        labels = teacher.labels(np.asarray(images), num_classes)
        return labels.reshape(len(one.images), -1, num_classes).mean(1)

    return taught


def finish(job: _Job, outcome: _Outcome, test_split: Split) -> _Summary:
    """Write the images and evaluate them on the test split, beside those of strong random."""
    options, config, dataset = job.options, job.config, job.dataset
    individual, frames, loop = outcome.individual, outcome.frames, outcome.loop
    accuracies = _accuracies(job, test_split, job.key_test, individual)
    keys = jax.random.split(jax.random.fold_in(job.key_test, 1), options.strong_random_repeats)
    baselines = zip(keys, outcome.strong_random, strict=True)
    strong = np.array([_accuracies(job, test_split, key, one) for key, one in baselines])
    images, labels = map(np.asarray, individual)
    recipe = config.network, config.training, options.seed, accuracies, config.factor
    result = DistilledDataset.made(dataset, images, labels, *recipe)
    result.save(job.directory / "distilled.npz")
    buffer = io.BytesIO()
    np.savez_compressed(buffer, generations=outcome.generations, **frames._asdict())
    write_atomically(job.directory / "frames.npz", buffer.getvalue())
    num_generations = int(loop.state.generation)
    numbers: dict[str, Any] = {
        "test_accuracy_mean": float(np.mean(accuracies)),
        "test_accuracy_std": float(np.std(accuracies)),
        "num_networks": options.num_networks,
        "fitness_best": float(loop.state.best_score),
        "best_generation": int(loop.state.best_generation),
        "generation": outcome.generation,
        "num_generations": num_generations,
        "seconds": loop.seconds,
        "compile_seconds": loop.compile_seconds,
        "members_per_second": job.evolving.members_per_step * num_generations / loop.seconds,
        "num_failed": outcome.num_failed,
    }
    if outcome.reference:
        numbers["reference"] = outcome.reference
    score = score_on(test_split, config, dataset, individual)
    if score is not None:
        numbers["test_score"] = score
        console.say(f"{config.fitness} gives the distilled images {score:.4f} on the test split")
    if strong.size:
        numbers |= {
            "strong_random_test_accuracy_mean": float(np.mean(strong)),
            "strong_random_test_accuracy_std": float(np.std(strong)),
            "strong_random_repeats": options.strong_random_repeats,
        }
    return _Summary(numbers, result, accuracies, strong, outcome, len(test_split))


def _no_better(job: _Job, accuracies: np.ndarray, strong: np.ndarray) -> list[str]:
    """A sentence where evolution came to no more than its first draw, and what to change."""
    if not strong.size or np.mean(accuracies) - np.std(accuracies) > np.mean(strong):
        return []
    advice = ", or --recipe recommended" if job.options.recipe == "paper" else ""
    return [
        "That is no better than strong random selection, the best of as many random individuals "
        f"as the population has: try more --generations, more --networks-per-member{advice}."
    ]


def present(job: _Job, summary: _Summary) -> Report:
    """The images and how they evolved, beside strong random."""
    dataset, result, numbers = job.dataset, summary.result, summary.numbers
    accuracies, strong, outcome = summary.accuracies, summary.strong, summary.outcome
    folder, size, steps = job.directory, len(result.images), numbers["num_generations"]
    figures, frames = folder / "figures", np.asarray(outcome.frames.images)
    plotting.image_rows(figures / "images.png", dataset, result.images, result.labels)
    plotting.evolution(figures / "evolution.png", dataset, frames, result.labels)
    metrics, baseline = read_lines(folder / "metrics.jsonl"), outcome.strong_random_fitness
    curves = plotting.fitness_curves(metrics, job.config.fitness, baseline, outcome.reference)
    shown, count = percent(accuracies), len(accuracies)
    headline, rows = [(f"{shown} %", "test accuracy")], [["evolved", shown, str(count)]]
    closing = [f"test accuracy {shown} % ({count} networks)"]
    if strong.size:
        headline.append((f"{percent(strong)} %", "strong random selection"))
        rows.append(["strong random", percent(strong), str(strong.size)])
        gain = 100 * (np.mean(accuracies) - np.mean(strong))
        closing.append(
            f"strong random {percent(strong)} % ({len(strong)} x {count} networks): "
            f"evolution is {gain:+.2f} points from it"
        )
    told = _no_better(job, accuracies, strong)
    closing += told
    lead = (
        f"{size} synthetic images stand for the {len(dataset.train):,} training images of "
        f"{dataset.name}: networks trained on them alone classify "
        f"{100 * numbers['test_accuracy_mean']:.2f}% of the {summary.num_test_images:,} test "
        f"{' '.join(['images.', *told])}"
    )
    real = "Real images (upper row) and synthetic ones, each stretched to its own range"
    doubling = f"From generation 1 to {steps:,}, two pictures for every doubling"
    best = f"{numbers['fitness_best']:.4f} in generation {numbers['best_generation']}"
    return Report(
        f"{dataset.name}, distilled by evolution",
        lead,
        [
            *headline,
            (str(size), "synthetic images"),
            (duration(numbers["seconds"]), "of evolution"),
        ],
        [Table("Accuracy on the test split (%)", ["dataset", "mean ± std", "networks"], rows)],
        [
            Figure("images", real),
            Figure("evolution", doubling),
            Figure("fitness", "Fitness by generation", curves),
        ],
        [
            ["generations", f"{steps:,}"],
            ["best fitness", best],
            ["time in generations", f"{short(numbers['seconds'])} s"],
            ["compilation", f"{short(numbers['compile_seconds'])} s"],
            ["members per second", short(numbers["members_per_second"])],
            ["failed evaluations", str(numbers["num_failed"])],
        ],
        [*closing, f"dataset: {folder / 'distilled.npz'}"],
    )


def images_to_start_from(path: Path, config: Config, dataset: Dataset) -> np.ndarray:
    """The images (n, H, W, C) of a file, normalised as `dataset` is and ordered by class. Raises
    DataError where they are not as many of each class as `config` searches for."""
    loaded, num_classes = DistilledDataset.load(path, dataset), dataset.num_classes
    if loaded.factor != config.factor:  # else they stay as they are stored
        loaded = loaded.unpacked()
    needed = config.images_per_class * (config.factor**2 if loaded.factor == 1 else 1)
    shape, classes = loaded.images.shape[1:], loaded.labels.argmax(1)
    counts = np.bincount(classes, minlength=num_classes)
    if shape != dataset.image_shape or len(counts) != num_classes:
        allowed = f"{dataset.image_shape} of {num_classes}"
        raise DataError(f"{path}: images {shape} of {len(counts)} classes, allowed: {allowed}")
    if (counts != needed).any():
        wrong = int((counts != needed).argmax())
        of_class = f"{counts[wrong]} images of class {dataset.class_names[wrong]!r}"
        raise DataError(f"{path}: {of_class}, allowed: {needed} of each")
    images = loaded.images[classes.argsort(kind="stable")]
    pixels = images * np.array(loaded.std, np.float32) + np.array(loaded.mean, np.float32)
    images = (pixels - np.array(dataset.mean)) / np.array(dataset.std)
    packed = encodings.packed(jnp.asarray(images, jnp.float32), config.factor // loaded.factor)
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
    essentials=(
        "--recipe",
        "--dataset",
        "--images-per-class",
        "--population-size",
        "--num-generations",
        "--network",
        "--seed",
        "--resume",
    ),
    examples=("ga-distillation --recipe recommended --dataset mnist",),
    may_grow="num_generations",
)
