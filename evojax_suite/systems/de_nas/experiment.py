"""Search a small network for a dataset of images by differential evolution."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from pathlib import Path

import jax
import numpy as np
import tyro

from evojax_suite.data import load
from evojax_suite.reporting import plotting, report
from evojax_suite.reporting.progress import console
from evojax_suite.reporting.report import Figure, Table
from evojax_suite.running.options import RunOptions, Scale, differing, is_small, some_images
from evojax_suite.running.small_sets import fitted_to
from evojax_suite.runtime import devices, loop
from evojax_suite.runtime.results import open_run, read_lines, write_json
from evojax_suite.systems import de_nas
from evojax_suite.systems.de_nas import architectures
from evojax_suite.systems.de_nas.architectures import Unit
from evojax_suite.systems.de_nas.artifact import SearchedNetwork
from evojax_suite.systems.de_nas.networks import layers
from evojax_suite.training import batches_of, evaluate
from evojax_suite.types import Dataset

_SMALL_SPACE = {"max_filters": 16, "max_features": 256}
_SMALL = {
    "final_epochs": 50,
    "dropout": 0.2,
    "initialization": "kaiming",
}
_SMALL_TRAINING = {"optimizer": "adam", "learning_rate": 2e-3}
_SMALL_IMAGES = 1000


@dataclass(frozen=True)
class Options(RunOptions):
    """Search a network that is accurate for its size (Pei, Chang & Tian 2022).

    Candidates are judged on a validation part after a short training; the most accurate and the
    smallest of the last generation are trained at length and judged on the test part.
    """

    num_images: int | None = None
    """Training images, equally many of each class; all by default, 1,000 where small."""
    scale: Scale = "auto"
    """small makes what is left at the paper's setting small, and lets networks learn in the few
    steps that remain; the run says what it sets. auto is small without accelerator."""
    config: tyro.conf.OmitArgPrefixes[de_nas.Config] = field(default_factory=de_nas.Config)
    params: tyro.conf.OmitArgPrefixes[de_nas.Params] = field(default_factory=de_nas.Params)


def reduced(options: Options, num_images: int) -> Options:
    """What the user left at the paper's size, made small; num_images: that there are."""

    def left(value, default, smaller):
        kept = {k: v for k, v in smaller.items() if getattr(value, k) == getattr(default, k)}
        return replace(value, **kept)

    default = de_nas.Config()
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


def history(config: de_nas.Config, state: de_nas.State, dataset: Dataset) -> list[dict]:
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


def populations(config: de_nas.Config, rows: list[dict], params: de_nas.Params) -> list[list[dict]]:
    """The survivors of each generation, from the first population on, told from the history."""
    alive, found = [], []
    for generation in range(config.num_generations + 1):
        start, end = config.candidates_of(generation)
        alive = alive + rows[start:end]
        order = de_nas.best_first(
            np.array([row["accuracy"] for row in alive]),
            np.array([row[f"num_{config.size}"] for row in alive]),
            params,
            config.survival,
        )
        alive = [alive[place] for place in order[: config.population_size]]
        found.append(alive)
    return found


def run(options: Options) -> Path:
    """The whole run, in the folder that is returned. Raises ValueError, DataError or OSError, each
    with one line to show."""
    options.params.check()
    dataset = load(options.dataset, options.data_dir, cache=options.cache_data)
    small = is_small(options.scale)
    if small:
        options = reduced(options, len(dataset.train))
    dataset = some_images(dataset, options.num_images)
    training = fitted_to(options.config.training, dataset)
    options = replace(options, config=replace(options.config, training=training))
    config, params = options.config, options.params
    shape, num_classes = dataset.image_shape, dataset.num_classes
    num_devices = devices.take(options.devices)
    if options.plan is not None:  # workers end together: a step of each, after the first
        at_once = de_nas.num_workers(config, num_devices) * jax.process_count()
        options.plan.most_steps = max(options.plan.most_steps, 1 + at_once)
    algorithm = de_nas.build(config, num_classes, shape, num_devices)
    data = de_nas.make_data(config, dataset)
    directory = options.directory("de-nas", dataset)
    open_run(directory, options.settings(), options.resume)
    beyond = differing(config, de_nas.Config()) | differing(params, de_nas.Params())
    shown = ", ".join(f"{name}={value}" for name, value in beyond.items()) or "none"
    console.say(
        f"{dataset.name}: {len(dataset.train):,} training, {len(dataset.validation):,} validation, "
        f"{len(dataset.test):,} test images; run in {directory}"
    )
    if small:
        console.say(
            f"small: {len(dataset.train):,} images, {config.num_candidates} candidates; --scale "
            "paper for the paper's sizes"
        )
    console.say(f"settings that differ from the paper's: {shown}")

    key_search, key_final = jax.random.split(jax.random.key(options.seed))
    searched = options.drive(
        "candidates",
        algorithm,
        key_search,
        params,
        data,
        config.num_candidates,
        directory,
    )
    found = algorithm.result(searched.state, params, data)
    rows = history(config, searched.state, dataset)
    write_json(directory / "history.json", rows)

    places = {"most accurate": found.most_accurate, "smallest": found.smallest}
    units = {
        role: architectures.to_units(architectures.member(found.genomes, place))
        for role, place in places.items()
    }
    outcomes: dict[str, loop.Outcome] = {}
    trained: dict[str, SearchedNetwork] = {}
    for number, (role, own) in enumerate(units.items() if config.final_epochs else ()):
        if role == "smallest" and own == units["most accurate"]:
            trained[role] = trained["most accurate"]
            continue
        final = de_nas.build_final(config, own, num_classes, shape)
        outcomes[role] = options.drive(
            role,
            final,
            jax.random.fold_in(key_final, number),
            None,
            data,
            config.final_epochs,
            directory / "training" / role.replace(" ", "_"),
        )
        trained[role] = SearchedNetwork(
            network=de_nas.network_of(config, own, num_classes),
            variables=jax.device_get(final.result(outcomes[role].state, None, data)),
            image_shape=shape,
            mean=dataset.mean,
            std=dataset.std,
            class_names=dataset.class_names,
            dataset=dataset.name,
        )

    options.end_dry_run()
    # Selection is over: only here is the test part opened.
    test = batches_of(dataset, dataset.test, config.engine)
    judge = jax.jit(evaluate, static_argnums=0)
    tests = {
        role: float(judge(own.network, own.variables, test).accuracy)
        for role, own in trained.items()
    }
    for role, own in trained.items():
        own.save(directory if role == "most accurate" else directory / "smallest")

    sizes = [row["num_parameters"] for row in rows]
    models = {}
    for role, place in places.items():
        costs = architectures.costs(architectures.member(found.genomes, place), shape, num_classes)
        models[role] = {
            "test_accuracy": tests.get(role),
            "search_accuracy": float(found.accuracy[place]),
            "num_parameters": int(costs.parameters),
            "num_multiplications": int(costs.multiplications),
        }
    seconds = searched.seconds + sum(outcome.seconds for outcome in outcomes.values())
    summary = {
        "system": "de_nas",
        "dataset": dataset.name,
        **models["most accurate"],
        "smallest": models["smallest"],
        "num_evaluated": len(rows),
        "num_failed": searched.num_failed,
        "num_epochs": sum(row["num_epochs"] for row in rows),
        "num_parameters_largest": max(sizes),
        "seconds": seconds,
        "search_seconds": searched.seconds,
        "candidates_per_hour": 3600 * len(rows) / searched.seconds,
        "compile_seconds": searched.stage_seconds.get("compilation", 0.0)
        + sum(outcome.compile_seconds for outcome in outcomes.values()),
        "seed": options.seed,
        "options": beyond,
    }
    write_json(directory / "summary.json", summary)
    _present(directory, options, dataset, rows, units, models, searched, outcomes, summary, shown)
    return directory


def _layer_rows(units: tuple[Unit, ...], dataset: Dataset) -> list[list[str]]:
    rows = layers(units, dataset.image_shape, dataset.num_classes)
    return [
        [layer.name, " x ".join(map(str, layer.shape)), f"{layer.parameters:,}"] for layer in rows
    ]


def _present(
    directory: Path,
    options: Options,
    dataset: Dataset,
    rows: list[dict],
    units: dict[str, tuple[Unit, ...]],
    models: dict[str, dict],
    searched: loop.Outcome,
    outcomes: dict[str, loop.Outcome],
    summary: dict,
    shown: str,
) -> None:
    """Figures, report and the closing lines on the terminal."""
    config = options.config
    alive = populations(config, rows, options.params)
    figures = [
        Figure(
            "search",
            "Error and size of the population, by generation; a point is a network",
            plotting.population_movement(alive, f"num_{config.size}", config.size),
        )
    ]
    if outcomes:
        curves = {
            role: read_lines(directory / "training" / role.replace(" ", "_") / "metrics.jsonl")
            for role in outcomes
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
    hourly = 3600 * len(rows) / searched.seconds
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
    if outcomes:
        lead += (
            f". They classify {percent(best['test_accuracy'])}% and "
            f"{percent(smallest['test_accuracy'])}% of the {len(dataset.test):,} test images of "
            f"{dataset.name}"
        )
    tables = [Table("Result", header, results)]
    for role, own in units.items():
        if role == "smallest" and own == units["most accurate"]:
            continue
        heading = f"Layers of the {role}"
        tables.append(Table(heading, ["", "outputs", "parameters"], _layer_rows(own, dataset)))
    report.write(
        directory / "report.html",
        f"{dataset.name}, networks found by differential evolution",
        lead + ".",
        headline,
        tables,
        figures,
        [["unlike the paper", shown]],
        report.commands(directory, "de-nas", options.typed, options.data_dir),
        {"config.json": options.settings(), "summary.json": summary},
    )
    console.say(lead)
    console.say(f"report: {directory / 'report.html'}")
