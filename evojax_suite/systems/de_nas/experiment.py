"""Search a small network for a dataset of images by differential evolution."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import jax
import numpy as np
import tyro

from evojax_suite.configuration import configuration
from evojax_suite.data import some_images
from evojax_suite.reporting import plotting
from evojax_suite.reporting.comparison import SECONDS, Columns, Quantity, accuracy
from evojax_suite.reporting.report import Figure, Report, Table
from evojax_suite.running.options import RunOptions, Scale, config_difference, is_small
from evojax_suite.running.small_sets import fitted_to
from evojax_suite.running.system import Job, Phase, Search, System
from evojax_suite.runtime import devices
from evojax_suite.runtime.loop import LoopResult
from evojax_suite.runtime.results import read_lines, write_json
from evojax_suite.systems.de_nas import architectures
from evojax_suite.systems.de_nas.algorithm import (
    SearchResult,
    State,
    best_first,
    build,
    num_workers,
)
from evojax_suite.systems.de_nas.architectures import Unit
from evojax_suite.systems.de_nas.artifact import SearchedNetwork
from evojax_suite.systems.de_nas.candidates import make_data, network_of
from evojax_suite.systems.de_nas.config import Config, Params
from evojax_suite.systems.de_nas.final_training import build_final
from evojax_suite.systems.de_nas.networks import layers
from evojax_suite.training import batches_of, evaluate
from evojax_suite.types import Dataset, Split

_SMALL_SPACE = {"max_filters": 16, "max_features": 256}
_SMALL = {"final_epochs": 50, "dropout": 0.2, "initialization": "kaiming"}
_SMALL_TRAINING = {"optimizer": "adam", "learning_rate": 2e-3}
_SMALL_IMAGES = 1000


@configuration
class Options(RunOptions):
    """Search a network that is accurate for its size (Pei, Chang & Tian 2022).

    Candidates are judged on a validation split after a short training; the most accurate and the
    smallest of the last generation are trained at length and judged on the test split.
    """

    num_images: int | None = None
    """Training images, equally many of each class; all by default, 1,000 where small."""
    scale: Scale = "auto"
    """small makes what is left at the paper's setting small, and lets networks learn in the few
    steps that remain; the run says what it sets. auto is small without accelerator."""
    config: tyro.conf.OmitArgPrefixes[Config] = field(default_factory=Config)
    params: tyro.conf.OmitArgPrefixes[Params] = field(default_factory=Params)


def reduced(options: Options, num_images: int) -> Options:
    """What the user left at the paper's size, made small; num_images: that there are."""

    def left(value, default, smaller):
        kept = {k: v for k, v in smaller.items() if getattr(value, k) == getattr(default, k)}
        return replace(value, **kept)

    default = Config()
    config = options.config
    training = config.training
    if training.optimizer == "sgd" and training.learning_rate == default.training.learning_rate:
        training = replace(training, **_SMALL_TRAINING)
    config = replace(
        left(config, default, _SMALL),
        space=left(config.space, default.space, _SMALL_SPACE),
        training=training,
    )
    number = options.num_images
    if number is None:
        number = min(_SMALL_IMAGES, num_images)
    return replace(options, config=config, num_images=number)


def history(config: Config, state: State, dataset: Dataset) -> list[dict]:
    """Every candidate, in the order in which they were made."""
    number = int(state.num_judged)
    genomes = architectures.member(state.genomes, np.arange(number))
    costs = architectures.costs(genomes, dataset.image_shape, dataset.num_classes)
    accuracy = np.asarray(state.accuracy)
    survivors = set(np.asarray(state.population).tolist())
    return [
        {
            "candidate": index + 1,
            "search_generation": config.generation_of(index),
            "accuracy": float(accuracy[index]),
            "num_epochs": int(state.num_epochs[index]),
            "num_parameters": int(costs.parameters[index]),
            "num_multiplications": int(costs.multiplications[index]),
            "survived": index in survivors,
            "units": [
                unit._asdict()
                for unit in architectures.to_units(architectures.member(genomes, index))
            ],
        }
        for index in range(number)
    ]


def populations(config: Config, rows: list[dict], params: Params) -> list[list[dict]]:
    """The survivors of each generation, from the first population on, told from the history."""
    alive, found = [], []
    for generation in range(config.num_generations + 1):
        start, end = config.candidates_of(generation)
        alive = alive + rows[start:end]
        order = best_first(
            np.array([row["accuracy"] for row in alive]),
            np.array([row[f"num_{config.size}"] for row in alive]),
            params,
            config.survival,
        )
        alive = [alive[place] for place in order[: config.population_size]]
        found.append(alive)
    return found


@dataclass(frozen=True)
class _Job(Job[Options]):
    phase: Phase  # the search
    key_final: jax.Array


@dataclass(frozen=True)
class _Searched:
    found: SearchResult
    rows: list[dict]  # `history`
    units: dict[str, tuple[Unit, ...]]  # of each role
    loop: LoopResult
    trainings: dict[str, LoopResult]  # the final ones
    trained: dict[str, SearchedNetwork]


@dataclass(frozen=True)
class _Summary:
    numbers: dict[str, Any]
    searched: _Searched
    models: dict[str, dict]
    num_test_images: int


def prepare(options: Options, dataset: Dataset, directory: Path) -> _Job:
    """Reduce what was left at the paper's size where the scale is small; fit the augmentation."""
    options.params.check()
    small = is_small(options.scale)
    if small:
        options = reduced(options, len(dataset.train))
    dataset = some_images(dataset, options.num_images)
    training = fitted_to(options.config.training, dataset)
    options = replace(options, config=replace(options.config, training=training))
    config, params = options.config, options.params
    num_devices = devices.take(options.devices)
    key_search, key_final = jax.random.split(jax.random.key(options.seed))
    differences = config_difference(config, Config()) | config_difference(params, Params())
    at_once = num_workers(config, num_devices) * jax.process_count()
    phase = Phase(
        "candidates",
        build(config, dataset.num_classes, dataset.image_shape, num_devices),
        key_search,
        params,
        make_data(config, dataset),
        config.num_candidates,
        dry_run_steps=max(3, 1 + at_once),  # workers end together: a step of each, after the first
    )
    reduced_to = (
        f"small: {len(dataset.train):,} images, {config.num_candidates} candidates; --scale paper "
        "for the paper's sizes"
    )
    notes = (reduced_to,) if small else ()
    return _Job(options, dataset, directory, phase, key_final, differences=differences, notes=notes)


def search(job: _Job) -> Search:
    """Search, then train the most accurate and the smallest architecture at length."""
    config, dataset, phase = job.options.config, job.dataset, job.phase
    shape, num_classes = dataset.image_shape, dataset.num_classes
    searched = yield phase
    found = phase.algorithm.result(searched.state, phase.params, phase.data)
    rows = history(config, searched.state, dataset)
    write_json(job.directory / "history.json", rows)
    units = {
        role: architectures.to_units(architectures.member(found.genomes, place))
        for role, place in _places(found).items()
    }
    trainings: dict[str, LoopResult] = {}
    trained: dict[str, SearchedNetwork] = {}
    for number, (role, own) in enumerate(units.items() if config.final_epochs else ()):
        if role == "smallest" and own == units["most accurate"]:
            trained[role] = trained["most accurate"]
            continue
        final = build_final(config, own, num_classes, shape)
        trainings[role] = yield Phase(
            role,
            final,
            jax.random.fold_in(job.key_final, number),
            None,
            phase.data,
            config.final_epochs,
            _training_folder(role),
        )
        trained[role] = SearchedNetwork(
            network=network_of(config, own, num_classes),
            variables=jax.device_get(final.result(trainings[role].state, None, phase.data)),
            image_shape=shape,
            mean=dataset.mean,
            std=dataset.std,
            class_names=dataset.class_names,
            dataset=dataset.name,
        )
    return _Searched(found, rows, units, searched, trainings, trained)


def _places(found: SearchResult) -> dict[str, int]:
    return {"most accurate": found.most_accurate, "smallest": found.smallest}


def _training_folder(role: str) -> str:
    return f"training/{role.replace(' ', '_')}"


def finish(job: _Job, searched: _Searched, test_split: Split) -> _Summary:
    """Write the networks and evaluate them on the test split."""
    dataset, found, rows = job.dataset, searched.found, searched.rows
    test = batches_of(dataset, test_split, job.options.config.engine)
    evaluated = jax.jit(evaluate, static_argnums=0)
    accuracies = {
        role: float(evaluated(own.network, own.variables, test).accuracy)
        for role, own in searched.trained.items()
    }
    for role, own in searched.trained.items():
        own.save(job.directory if role == "most accurate" else job.directory / "smallest")
    models = {}
    for role, place in _places(found).items():
        genome = architectures.member(found.genomes, place)
        costs = architectures.costs(genome, dataset.image_shape, dataset.num_classes)
        models[role] = {
            "test_accuracy": accuracies.get(role),
            "search_accuracy": float(found.accuracy[place]),
            "num_parameters": int(costs.parameters),
            "num_multiplications": int(costs.multiplications),
        }
    trainings = searched.trainings.values()
    numbers = {
        **models["most accurate"],
        "smallest": models["smallest"],
        "num_evaluated": len(rows),
        "num_failed": searched.loop.num_failed,
        "num_epochs": sum(row["num_epochs"] for row in rows),
        "num_parameters_largest": max(row["num_parameters"] for row in rows),
        "seconds": searched.loop.seconds + sum(training.seconds for training in trainings),
        "search_seconds": searched.loop.seconds,
        "candidates_per_hour": 3600 * len(rows) / searched.loop.seconds,
        "compile_seconds": searched.loop.stage_seconds.get("compilation", 0.0)
        + sum(training.compile_seconds for training in trainings),
    }
    return _Summary(numbers, searched, models, len(test_split))


def _layer_rows(units: tuple[Unit, ...], dataset: Dataset) -> list[list[str]]:
    rows = layers(units, dataset.image_shape, dataset.num_classes)
    return [
        [layer.name, " x ".join(map(str, layer.shape)), f"{layer.parameters:,}"] for layer in rows
    ]


def present(job: _Job, summary: _Summary) -> Report:
    """The two networks, and how the population moved."""
    config, dataset = job.options.config, job.dataset
    rows, units, trainings = (
        summary.searched.rows,
        summary.searched.units,
        summary.searched.trainings,
    )
    models = summary.models
    alive = populations(config, rows, job.options.params)
    figures = [
        Figure(
            "search",
            "Error and size of the population, by generation; a point is a network",
            plotting.population_movement(alive, f"num_{config.size}", config.size),
        )
    ]
    if trainings:
        curves = {
            role: read_lines(job.directory / _training_folder(role) / "metrics.jsonl")
            for role in trainings
        }
        caption = "Final trainings: loss and accuracy by epoch"
        figures.append(Figure("training", caption, plotting.training_curves(curves)))

    def percent(value):
        return "not trained" if value is None else f"{100 * value:.2f}"

    results = [
        [
            role,
            percent(model["search_accuracy"]),
            percent(model["test_accuracy"]),
            f"{model['num_parameters']:,}",
            f"{model['num_multiplications']:,}",
        ]
        for role, model in models.items()
    ]
    header = [
        "",
        f"validation after {config.training.num_epochs} epochs (%)",
        f"test after {config.final_epochs} epochs (%)",
        "parameters",
        "multiplications",
    ]
    best, smallest = models["most accurate"], models["smallest"]
    hourly = summary.numbers["candidates_per_hour"]
    lead = (
        f"Of {len(rows)} candidates the most accurate has {best['num_parameters']:,} parameters, "
        f"the smallest {smallest['num_parameters']:,}; {hourly:,.0f} candidates an hour"
    )
    headline = []
    for role, model in models.items():
        headline += [
            (f"{percent(model['test_accuracy'])} %", f"test accuracy, {role}"),
            (f"{model['num_parameters']:,}", "parameters"),
        ]
    headline.append((str(len(rows)), "candidates"))
    if trainings:
        lead += (
            f". They classify {percent(best['test_accuracy'])}% and "
            f"{percent(smallest['test_accuracy'])}% of the {summary.num_test_images:,} test "
            f"images of {dataset.name}"
        )
    tables = [Table("Result", header, results)]
    for role, own in units.items():
        if role == "smallest" and own == units["most accurate"]:
            continue
        heading = f"Layers of the {role}"
        tables.append(Table(heading, ["", "outputs", "parameters"], _layer_rows(own, dataset)))
    return Report(
        f"{dataset.name}, networks found by differential evolution",
        lead + ".",
        headline,
        tables,
        figures,
        [],
        [lead],
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
            Quantity("num_evaluated", "candidates", digits=0),
            SECONDS,
        ),
        curves=(("generation", "accuracy_best"), ("generation", "population_parameters")),
        step="candidate",
    ),
    metrics={"accuracy_best": "best accuracy", "num_parameters": "parameters"},
)
