"""Search a small network for a dataset of images by differential evolution."""

from __future__ import annotations

from collections.abc import Generator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, NamedTuple, TypeAlias

import jax
import numpy as np
import tyro
from pydantic import PositiveInt

from evojax_suite.configuration import configuration
from evojax_suite.data import some_images
from evojax_suite.reporting import plotting
from evojax_suite.reporting.comparison import SECONDS, Columns, Quantity, accuracy
from evojax_suite.reporting.report import Figure, Report, Table
from evojax_suite.running.options import RunOptions, Scale, config_difference, is_small
from evojax_suite.running.small_sets import fitted_to
from evojax_suite.running.system import Job, Phase, Search, System, part_for_dry_run
from evojax_suite.runtime import devices
from evojax_suite.runtime.loop import LoopResult
from evojax_suite.runtime.results import read_lines, write_json
from evojax_suite.systems.de_nas import algorithm, architectures
from evojax_suite.systems.de_nas.architectures import Unit
from evojax_suite.systems.de_nas.artifact import SearchedNetwork
from evojax_suite.systems.de_nas.candidates import (
    costs_of,
    hand_made,
    make_data,
    network_of,
    padded_network,
    padded_work,
    programs_of,
)
from evojax_suite.systems.de_nas.config import Config, Params
from evojax_suite.systems.de_nas.final_training import build_final
from evojax_suite.systems.de_nas.networks import layers, unpadded
from evojax_suite.training import Batches, batches_of, evaluate
from evojax_suite.types import Dataset, PyTree, Split

_SMALL_SPACE = {"max_filters": 16, "max_features": 256}
_SMALL_SPACE_OF_LINEAR_HEAD = {"max_filters": 24}
_SMALL = {"final_epochs": 50, "dropout": 0.2, "initialization": "kaiming"}
_SMALL_TRAINING = {"optimizer": "adam", "learning_rate": 2e-3}
_SMALL_IMAGES = 1000
_SMALL_VALIDATION_IMAGES = 5000

_SHORT = 1e12  # operations of a candidate's training by `padded_work`, of which most do a tenth
_ALONE: dict[str, Any] = {"inherit": False, "child_epochs": None}
"""The settings with which a network inherits nothing."""

FOUND = "most accurate", "smallest"
"""The roles of the networks that a search finds."""
BASELINES = {
    "random search": "baseline_random",
    "like VGG": "baseline_vgg",
    "like ResNet": "baseline_resnet",
}
"""The roles of the networks for comparison, and their names in summary.json."""


@configuration
class Options(RunOptions):
    """Search a network that is accurate for its size (Pei, Chang & Tian 2022).

    Candidates are evaluated on a validation split after a short training; the most accurate and the
    smallest of the last generation are trained at length and evaluated on the test split, and so
    are the networks that one would try first, as large as the most accurate.
    """

    recipe: Literal["paper", "recommended"] = "paper"
    """The paper's evolution of its networks; or evolution with a surrogate, of networks with batch
    normalisation, skip connections and a linear head, and random search beside it."""
    baselines: tuple[Literal["hand", "random"], ...] = ("hand",)
    """What is trained for comparison: hand, networks like VGG and ResNet with as many parameters
    as the most accurate one found; random, the most accurate of as many candidates by random
    search, which goes on from the same first population."""
    num_images: int | None = None
    """Training images, equally many of each class; all by default, 1,000 where small."""
    num_validation_images: int | None = None
    """Validation images, which candidates are compared on; all by default, at most 5,000 where
    small."""
    finalists: PositiveInt = 1
    """The most accurate networks of the last generation that train at length; the one which is then
    the most accurate on the whole validation split is the run's."""
    scale: Scale = "auto"
    """small makes what is left at the paper's setting small, and lets networks learn in the few
    steps that remain; the run says what it sets. auto is small without accelerator."""
    config: tyro.conf.OmitArgPrefixes[Config] = field(default_factory=Config)
    params: tyro.conf.OmitArgPrefixes[Params] = field(default_factory=Params)


def reduced(options: Options, dataset: Dataset) -> Options:
    """The options with everything that the user left at the paper's size made small; what was
    named stays, even where it is the paper's."""

    def is_left(value: Any, default: Any, name: str) -> bool:
        is_named = f"--{name.replace('_', '-')}" in options.named
        return not is_named and getattr(value, name) == getattr(default, name)

    def left(value: Any, default: Any, smaller: Any):
        kept = {name: v for name, v in smaller.items() if is_left(value, default, name)}
        return replace(value, **kept)

    config, default = options.config, Config()
    smaller = _SMALL_SPACE if config.head == "dense" else _SMALL_SPACE_OF_LINEAR_HEAD
    training, space = config.training, left(config.space, default.space, smaller)
    names = "optimizer", "learning_rate"
    if all(is_left(training, default.training, name) for name in names):
        training = replace(training, **_SMALL_TRAINING)
    config = replace(left(config, default, _SMALL), space=space, training=training)
    if options.num_images is None:
        options = replace(options, num_images=min(_SMALL_IMAGES, len(dataset.train)))
    if options.num_validation_images is None:
        number = min(_SMALL_VALIDATION_IMAGES, len(dataset.validation))
        options = replace(options, num_validation_images=number)
    return replace(options, config=config)


def history(config: Config, state: algorithm.State, dataset: Dataset) -> list[dict[str, Any]]:
    """The rows of history.json: every candidate, in the order in which they were made."""
    number = int(state.num_judged)
    genomes = architectures.member(state.genomes, np.arange(number))
    costs = costs_of(config, genomes, dataset.image_shape, dataset.num_classes)
    units = [architectures.to_units(architectures.member(genomes, i)) for i in range(number)]
    accuracy, population = np.asarray(state.accuracy), np.asarray(state.population)
    return [
        {
            "candidate": index + 1,
            "search_generation": config.generation_of(index),
            "accuracy": float(accuracy[index]),
            "num_epochs": int(state.num_epochs[index]),
            "num_parameters": int(costs.parameters[index]),
            "num_multiplications": int(costs.multiplications[index]),
            "survived": index in population,
            "units": [unit._asdict() for unit in units[index]],
        }
        for index in range(number)
    ]


def populations(
    config: Config, rows: list[dict[str, Any]], params: Params
) -> list[list[dict[str, Any]]]:
    """The survivors of each generation, from the first population on, from the history."""
    survivors: list[list[dict[str, Any]]] = [[]]
    for generation in range(config.num_generations + 1):
        start, end = config.candidates_of(generation)
        merged = survivors[-1] + rows[start:end]
        names = "accuracy", f"num_{config.size}"
        accuracy, sizes = (np.array([row[name] for row in merged]) for name in names)
        order = algorithm.best_first(accuracy, sizes, params, config.survival)
        survivors.append([merged[place] for place in order[: config.population_size]])
    return survivors[1:]


@dataclass(frozen=True)
class _Job(Job[Options]):
    phase: Phase  # the search
    config: Config  # of the search: that of the options, with fewer epochs in a dry run
    validation: Split  # the whole split
    key_final: jax.Array
    work: float = 0.0  # `_work_of_candidate`, once the search of a dry run has ended


class _Model(NamedTuple):
    """A network that a run compares."""

    units: tuple[Unit, ...]
    config: Config  # how it is built and trained
    search_accuracy: float | None = None  # on the validation split; None of one that no search made
    parameters: PyTree = None  # which its training begins with; None are fresh ones
    trainings: tuple[LoopResult, ...] = ()  # of the network and of the finalists that it beat
    folder: str = ""  # of its training
    trained: SearchedNetwork | None = None


_Training: TypeAlias = Generator[Phase, LoopResult, _Model]


@dataclass(frozen=True)
class _Searched:
    rows: list[dict[str, Any]]  # `history`
    loop: LoopResult
    models: dict[str, _Model]  # by role


@dataclass(frozen=True)
class _Summary:
    numbers: dict[str, Any]
    searched: _Searched
    models: dict[str, dict[str, Any]]  # by role
    num_test_images: int


def prepare(options: Options, dataset: Dataset, directory: Path) -> _Job:
    """Reduce what was left at the paper's size where the scale is small; fit the augmentation."""
    options.params.check()
    small = is_small(options.scale)
    if small:
        options = reduced(options, dataset)
    validation = dataset.validation
    dataset = some_images(dataset, options.num_images, options.num_validation_images)
    training = fitted_to(options.config.training, dataset)
    options = replace(options, config=replace(options.config, training=training))
    config, params = options.config, options.params
    num_devices, number = devices.take(options.devices), config.num_candidates
    key_search, key_final = jax.random.split(jax.random.key(options.seed))
    differences = config_difference(config, Config()) | config_difference(params, Params())
    searched, part, factor = config, dataset, 1.0
    if options.dry_run:
        searched = replace(config, workers=1)  # whose times are nobody else's
        batch_size = training.batch_size or len(dataset.train)
        work = 6 * padded_work(config, dataset.image_shape, 1)  # of all epochs
        if work * len(dataset.train) > _SHORT:
            if not config.rungs:
                searched = replace(searched, training=replace(training, num_epochs=1))
            factor = training.num_epochs / searched.training.num_epochs
            part, times = part_for_dry_run(dataset, work / factor, batch_size)
            factor *= times
    programs = programs_of(config, dataset.image_shape, len(dataset.train))
    searched = replace(searched, programs=programs)
    evolution = algorithm.build(searched, dataset.num_classes, dataset.image_shape, num_devices)
    data = make_data(searched, part)
    at_once = min(algorithm.num_workers(config, num_devices), num_devices) * jax.process_count()
    limits: dict[str, Any] = {"dry_run_factor": factor, "dry_run_at_once": at_once}
    phase = Phase("candidates", evolution, key_search, params, data, number, **limits)
    size = f"{len(dataset.train):,} images, {number} candidates"
    notes = (f"small: {size}; --scale paper for the paper's sizes",) if small else ()
    fixed = options, dataset, directory, phase, searched, validation, key_final
    return _Job(*fixed, differences=differences, notes=notes)


def search(job: _Job) -> Search:
    """Search, then train the most accurate and the smallest architecture at length, and what they
    are compared with."""
    config, dataset, phase = job.options.config, job.dataset, job.phase
    shape, num_classes = dataset.image_shape, dataset.num_classes
    loop = yield phase
    result = phase.algorithm.result(loop.state, phase.params, phase.data)
    rows = history(config, loop.state, dataset)
    write_json(job.directory / "history.json", rows)
    if job.options.dry_run:
        job = replace(job, work=_work_of_candidate(job, rows))

    def found(result: algorithm.SearchResult, place: int) -> _Model:
        genome, parameters = architectures.member(result.genomes, place), None
        if result.parameters:
            padded = jax.tree.map(lambda leaf: leaf[place], result.parameters)
            parameters = unpadded(padded_network(config, num_classes, shape), padded, genome)
        accuracy = float(result.accuracy[place])
        return _Model(architectures.to_units(genome), config, accuracy, parameters)

    def best(number: int, role: str, result: algorithm.SearchResult) -> _Training:
        """The finalist of a search that is the most accurate on the whole validation split."""
        places = result.finalists(job.options.finalists)
        models = []
        for rank, place in enumerate(places):
            models.append((yield from _trained(job, number, role, found(result, place), rank)))
        if len(models) == 1:
            return models[0]
        images = batches_of(dataset, job.validation, config.engine)
        chosen = max(models, key=lambda model: _accuracy(model, images))
        return chosen._replace(trainings=tuple(one for model in models for one in model.trainings))

    smallest = found(result, result.smallest)
    models = {"most accurate": (yield from best(0, "most accurate", result))}
    same = smallest.units == models["most accurate"].units
    models["smallest"] = (
        models["most accurate"] if same else (yield from _trained(job, 1, "smallest", smallest))
    )
    if "random" in job.options.baselines:
        other = yield _random_search(job, loop)
        randomly = phase.algorithm.result(other.state, phase.params, phase.data)
        models["random search"] = yield from best(2, "random search", randomly)
    if "hand" in job.options.baselines and config.final_epochs:
        size = _costs(models["most accurate"], shape, num_classes).parameters
        units = hand_made(int(size), shape, num_classes)
        for name, skip in (("like VGG", False), ("like ResNet", True)):
            model = _Model(units, of_hand_made(config, skip))
            models[name] = yield from _trained(job, len(models), name, model)
    return _Searched(rows, loop, models)


def _work_of_candidate(job: _Job, rows: list[dict[str, Any]]) -> float:
    """Multiplications of the training of a candidate on an image, forward, in the whole run: the
    mean of those in `rows`, a dry run's."""
    config = job.options.config
    if job.config.programs == "padded":
        return padded_work(config, job.dataset.image_shape, 1)
    times = config.training.num_epochs / job.config.training.num_epochs
    return times * float(np.mean([row["num_multiplications"] * row["num_epochs"] for row in rows]))


def of_hand_made(config: Config, skip: bool) -> Config:
    """How networks by hand are built and trained, skip connections or not."""
    plain = replace(config, programs="auto", **_ALONE)
    return replace(plain, normalization="batch", skip=skip, head="linear", dropout=0.0)


def _trained(job: _Job, number: int, role: str, model: _Model, rank: int = 0) -> _Training:
    """A network after its final training, if there is one. number: that of the role; rank: that of
    a finalist."""
    config, dataset = model.config, job.dataset
    if not config.final_epochs:
        return model
    key = jax.random.fold_in(job.key_final, number)
    key = jax.random.fold_in(key, rank) if rank else key
    name = f"{role}, {rank + 1}" if rank else role
    folder = f"training/{role.replace(' ', '_')}" + (f"_{rank + 1}" if rank else "")
    shape, num_classes, data = dataset.image_shape, dataset.num_classes, job.phase.data
    final = build_final(config, model.units, num_classes, shape)
    phase = Phase(name, final, key, model.parameters, data, config.final_epochs, folder)
    if job.options.dry_run:
        work = int(_costs(model, shape, num_classes).multiplications)
        yield replace(phase, dry_run_like=work / job.work)
        return model
    done = yield phase
    network = SearchedNetwork(
        network_of(config, model.units, num_classes),
        jax.device_get(final.result(done.state, model.parameters, data)),
        shape,
        mean=dataset.mean,
        std=dataset.std,
        class_names=dataset.class_names,
        dataset=dataset.name,
    )
    return model._replace(trainings=(done,), folder=folder, trained=network)


def _accuracy(model: _Model, images: Batches) -> float:
    """The accuracy of a network; that of its search where it was not trained at length."""
    if not (own := model.trained):
        return model.search_accuracy or 0.0
    return float(jax.jit(evaluate, static_argnums=0)(own.network, own.variables, images).accuracy)


def _costs(model: _Model, shape: tuple[int, int, int], num_classes: int) -> architectures.Costs:
    genome = architectures.from_units(model.units, len(model.units))
    return costs_of(model.config, genome, shape, num_classes)


def _random_search(job: _Job, loop: LoopResult) -> Phase:
    """Random search from the first population of a search that has ended, as many candidates in
    all."""
    phase, config = job.phase, replace(job.config, method="random", **_ALONE)
    dataset, size = job.dataset, config.population_size
    random = algorithm.build(
        config, dataset.num_classes, dataset.image_shape, devices.take(job.options.devices)
    )
    number = config.num_candidates
    if int(loop.state.num_judged) >= size:  # no dry run
        first = algorithm.first_population(config, loop.state, phase.params, dataset)
        random, number = replace(random, init=lambda *_: first), number - size
    key, folder = jax.random.fold_in(job.key_final, 1000), "random_search"
    inputs: dict[str, Any] = {"algorithm": random, "key": key, "num_steps": number}
    if not job.options.config.inherit:
        inputs["dry_run_like"] = 1.0
    return replace(phase, title="random search", folder=folder, dry_run_steps=1, **inputs)


def finish(job: _Job, searched: _Searched, test_split: Split) -> _Summary:
    """Write the networks and evaluate them on the test split."""
    dataset, rows, loop = job.dataset, searched.rows, searched.loop
    test = batches_of(dataset, test_split, job.options.config.engine)
    models = {}
    for role, model in searched.models.items():
        costs, accuracy = _costs(model, dataset.image_shape, dataset.num_classes), None
        if own := model.trained:
            accuracy = _accuracy(model, test)
            if role in FOUND:
                own.save(job.directory if role == "most accurate" else job.directory / role)
        models[role] = {
            "test_accuracy": accuracy,
            "search_accuracy": model.search_accuracy,
            "num_parameters": int(costs.parameters),
            "num_multiplications": int(costs.multiplications),
        }
    both = (searched.models[role].trainings for role in FOUND)
    trainings = {id(one): one for training in both for one in training}.values()
    compile_seconds = sum(training.compile_seconds for training in trainings)
    numbers = {
        **models["most accurate"],
        "smallest": models["smallest"],
        "num_evaluated": len(rows),
        "num_failed": loop.num_failed,
        "num_epochs": sum(row["num_epochs"] for row in rows),
        "num_parameters_largest": max(row["num_parameters"] for row in rows),
        "seconds": loop.seconds + sum(training.seconds for training in trainings),
        "search_seconds": loop.seconds,
        "candidates_per_hour": 3600 * len(rows) / loop.seconds,
        "compile_seconds": loop.stage_seconds.get("compilation", 0.0) + compile_seconds,
        **{BASELINES[role]: model for role, model in models.items() if role in BASELINES},
    }
    return _Summary(numbers, searched, models, len(test_split))


def present(job: _Job, summary: _Summary) -> Report:
    """The page: the two networks, and how the population moved."""
    config, dataset, models = job.options.config, job.dataset, summary.models
    rows, compared = summary.searched.rows, summary.searched.models
    alive = populations(config, rows, job.options.params)
    moved = plotting.population_movement(alive, f"num_{config.size}", config.size)
    caption = "Error and size of the population, by generation; a point is a network"
    figures = [Figure("search", caption, moved)]
    if config.final_epochs:
        curves = {
            role: read_lines(job.directory / model.folder / "metrics.jsonl")
            for role, model in compared.items()
            if role != "smallest" or model.units != compared["most accurate"].units
        }
        caption = "Final trainings: loss and accuracy by epoch"
        figures.append(Figure("training", caption, plotting.training_curves(curves)))

    def percent(value: float | None) -> str:
        return "not trained" if value is None else f"{100 * value:.2f}"

    header = [
        "",
        f"validation after {config.training.num_epochs} epochs (%)",
        f"test after {config.final_epochs} epochs (%)",
        "parameters",
        "multiplications",
    ]
    results, headline, accuracies, parameters = [], [], [], []
    for role, model in models.items():
        accuracies.append(percent(model["test_accuracy"]))
        parameters.append(f"{model['num_parameters']:,}")
        multiplications = f"{model['num_multiplications']:,}"
        searched = model["search_accuracy"]
        validation = "made by hand" if searched is None else percent(searched)
        results.append([role, validation, accuracies[-1], parameters[-1], multiplications])
        headline.append((f"{accuracies[-1]} %", f"test accuracy, {role}"))
        if role in FOUND:
            headline.append((parameters[-1], "parameters"))
    headline.append((str(len(rows)), "candidates"))
    lead = (
        f"Of {len(rows)} candidates the most accurate has {parameters[0]} parameters, the smallest "
        f"{parameters[1]}; {summary.numbers['candidates_per_hour']:,.0f} candidates an hour"
    )
    if config.final_epochs:
        lead += (
            f". They classify {accuracies[0]}% and {accuracies[1]}% of the "
            f"{summary.num_test_images:,} test images of {dataset.name}"
        )
        others = [f"{percent(models[r]['test_accuracy'])}% {r}" for r in models if r not in FOUND]
        lead += f"; beside them {', '.join(others)}" if others else ""
    tables = [Table("Result", header, results)]
    for role in FOUND:
        architecture = compared[role].units
        if role == "smallest" and architecture == compared["most accurate"].units:
            continue
        cells = [
            [layer.name, " x ".join(map(str, layer.shape)), f"{layer.parameters:,}"]
            for layer in layers(architecture, dataset.image_shape, dataset.num_classes, config.head)
        ]
        tables.append(Table(f"Layers of the {role}", ["", "outputs", "parameters"], cells))
    title = f"{dataset.name}, networks found by differential evolution"
    return Report(title, lead + ".", headline, tables, figures, closing=[lead])


RECOMMENDED = (
    *("--method", "surrogate"),
    *("--normalization", "batch"),
    *("--skip",),
    *("--head", "linear"),
    *("--dropout", "0"),
    *("--min-length", "5", "--max-length", "12"),
    *("--max-weights", "8000"),
    *("--kernels", "1", "3", "5"),
    *("--convolution-rate", "0.3"),
    *("--min-first-filters", "8"),
    *("--max-first-filters", "16"),
    *("--filter-step", "8"),
    *("--error-weight", "0.9", "--size-weight", "0.1"),
    *("--optimizer", "adam", "--learning-rate", "2e-2", "--schedule", "cosine"),
    *("--batch-size", "32"),
    *("--crop-padding", "1"),
    *("--num-generations", "4", "--final-epochs", "60"),
    *("--programs", "layers"),
    *("--finalists", "3"),
    *("--baselines", "hand", "random"),
)
SYSTEM = System(
    "de_nas",
    Options,
    prepare,
    search,
    finish,
    present,
    columns=Columns(
        quantities=(
            accuracy("test_accuracy", "test accuracy, most accurate"),
            Quantity("num_parameters", "parameters", digits=0),
            accuracy("smallest.test_accuracy", "test accuracy, smallest"),
            Quantity("smallest.num_parameters", "parameters, smallest", digits=0),
            accuracy("baseline_resnet.test_accuracy", "like ResNet, as large"),
            accuracy("baseline_random.test_accuracy", "random search"),
            Quantity("num_evaluated", "candidates", digits=0),
            SECONDS,
        ),
        curves=(("generation", "accuracy_best"), ("generation", "population_parameters")),
        step="candidate",
    ),
    metrics={"accuracy_best": "best accuracy", "num_parameters": "parameters"},
    recipes={"recommended": RECOMMENDED},
    essentials=(
        "--recipe",
        "--dataset",
        "--num-images",
        "--num-generations",
        "--final-epochs",
        "--max-weights",
        "--seed",
        "--resume",
    ),
    examples=("de-nas --recipe recommended --dataset fashion_mnist",),
)
