"""Train a network on examples that coevolve with it, and on the whole set beside it."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import jax
import tyro

from evojax_suite import networks
from evojax_suite.data import some_images
from evojax_suite.networks import NetworkConfig
from evojax_suite.reporting import plotting
from evojax_suite.reporting.comparison import SECONDS, Columns, Quantity, accuracy
from evojax_suite.reporting.formats import duration
from evojax_suite.reporting.report import Figure, Report, Table
from evojax_suite.running.options import RunOptions, Scale, config_difference, is_small
from evojax_suite.running.system import Job, Phase, Search, System
from evojax_suite.runtime.loop import LoopResult
from evojax_suite.runtime.results import load_variables, read_lines, save_variables
from evojax_suite.systems.cest.algorithm import (
    build,
    cost_seconds,
    epochs_of_equal_gradients,
    make_data,
)
from evojax_suite.systems.cest.config import Config, Params
from evojax_suite.training import batches_of, evaluate
from evojax_suite.types import Dataset, PyTree, Split

_NARROW = 16


@dataclass(frozen=True)
class Options(RunOptions):
    """Train on subsets of hard examples that coevolve with the network (Ryan et al. 2024).

    Beside it the same network trains on the whole set, for equally many epochs and, in passing, for
    equally many gradient examples.
    """

    num_images: int | None = None
    """Training images, equally many of each class; all by default."""
    baseline: bool = True
    """Train on the whole set as well."""
    scale: Scale = "auto"
    """small makes a width that is left at the paper's 256 16; auto is small without accelerator."""
    config: tyro.conf.OmitArgPrefixes[Config] = field(default_factory=Config)
    params: tyro.conf.OmitArgPrefixes[Params] = field(default_factory=Params)


@dataclass(frozen=True)
class _Job(Job[Options]):
    phase: Phase  # of the rule of selection


@dataclass(frozen=True)
class _Training:
    """A network that was trained to the end of an epoch."""

    variables: PyTree
    folder: Path
    num_epochs: int
    times: dict[str, float] | None = None
    """Seconds of the whole training, where this is its end."""


@dataclass(frozen=True)
class _Trainings:
    of: dict[str, _Training]
    num_failed: int


@dataclass(frozen=True)
class _Summary:
    numbers: dict[str, Any]
    rows: dict[str, dict[str, float]]
    trainings: dict[str, _Training]
    num_test_images: int


def prepare(options: Options, dataset: Dataset, directory: Path) -> _Job:
    """Check the options; the paper's width is reduced where the scale is small."""
    options.params.check()
    dataset = some_images(dataset, options.num_images)
    if is_small(options.scale) and options.config.network == Config().network:
        network = replace(options.config.network, width=_NARROW)
        options = replace(options, config=replace(options.config, network=network))
    config = options.config
    num_epochs = config.training.num_epochs
    phase = _phase(config.selection, config, options, dataset, num_epochs, ".")
    differences = config_difference(config, Config()) | config_difference(options.params, Params())
    notes = ()
    if config.network == NetworkConfig(network="VGG10", width=_NARROW):
        notes = (f"small: width {_NARROW} instead of the paper's 256 (--scale, --width)",)
    return _Job(options, dataset, directory, phase, differences=differences, notes=notes)


def _phase(
    title: str, config: Config, options: Options, dataset: Dataset, num_epochs: int, folder: str
) -> Phase:
    return Phase(
        title,
        build(config, dataset.num_classes, dataset.image_shape, timed=True),
        jax.random.key(options.seed),
        options.params,
        make_data(config, dataset),
        num_epochs,
        folder,
        records_resources=True,  # Figs. 8 and 9
    )


def search(job: _Job) -> Search:
    """Train by the rule of selection, then on the whole set."""
    options, config, directory = job.options, job.options.config, job.directory
    num_epochs = config.training.num_epochs

    def trained(phase: Phase, found: LoopResult) -> PyTree:
        return phase.algorithm.result(found.state, options.params, phase.data)

    found = yield job.phase
    variables = trained(job.phase, found)
    ends = {config.selection: _Training(variables, directory, num_epochs, times(found))}
    if options.baseline and config.selection != "full":
        below = directory / "full"
        whole = replace(config, selection="full")
        few = min(epochs_of_equal_gradients(config, len(job.dataset.train)), num_epochs)
        file = below / f"network-{few}.safetensors"
        if not file.exists() and not options.dry_run:
            passing = _phase(f"full, {few} epochs", whole, options, job.dataset, few, "full")
            save_variables(file, trained(passing, (yield passing)))
        full = _phase("full", whole, options, job.dataset, num_epochs, "full")
        found_full = yield full
        if not options.dry_run:
            after_few = _Training(load_variables(file), below, few)
            after_all = _Training(trained(full, found_full), below, num_epochs, times(found_full))
            ends |= {"full, equal gradients": after_few, "full": after_all}
    return _Trainings(ends, found.num_failed)


def times(found: LoopResult) -> dict[str, float]:
    """Seconds of a run: the cost of the rule, without compilation and validation, and those of
    compilation and of each stage."""
    stages = found.stage_seconds
    return {
        "seconds": cost_seconds(stages),
        "compile_seconds": found.compile_seconds + stages.get("compilation", 0.0),
        "training_seconds": stages.get("training", 0.0),
        "pass_seconds": stages.get("pass", 0.0),
        "evolution_seconds": stages.get("evolution", 0.0),
        "validation_seconds": stages.get("validation", 0.0),
    }


def _of_epoch(directory: Path, epoch: int) -> dict[str, float]:
    """What the metrics say of an epoch, and what it cost to come so far."""
    line = next(x for x in read_lines(directory / "metrics.jsonl") if x["generation"] == epoch)
    timings = [x for x in read_lines(directory / "timing.jsonl") if x["generation"] <= epoch]
    seconds = sum(cost_seconds(x["stages"]) for x in timings)
    return {
        "epochs": epoch,
        "train_loss": line["loss"],
        "train_accuracy": line["accuracy"],
        "validation_loss": line["validation_loss"],
        "validation_accuracy": line["validation_accuracy"],
        "gradient_examples": line["gradient_examples"],
        "measured_examples": line["measured_examples"],
        "seconds": seconds,
    }


def finish(job: _Job, found: _Trainings, test_split: Split) -> _Summary:
    """Write the networks and evaluate each on the test split."""
    config, dataset = job.options.config, job.dataset
    save_variables(job.directory / "network.safetensors", found.of[config.selection].variables)
    if "full" in found.of:
        file = found.of["full"].folder / "network.safetensors"
        save_variables(file, found.of["full"].variables)
    network = networks.create(config.network, dataset.num_classes, dataset.image_shape)
    test = batches_of(dataset, test_split, config.engine)
    evaluated = jax.jit(lambda variables: evaluate(network, variables, test))
    rows = {}
    for name, one in found.of.items():
        on_test = evaluated(one.variables)
        rows[name] = _of_epoch(one.folder, one.num_epochs) | {
            "test_accuracy": float(on_test.accuracy),
            "test_loss": float(on_test.cross_entropy),
        }
    numbers = {
        "selection": config.selection,
        **rows[config.selection],
        **(found.of[config.selection].times or {}),
        "num_failed": found.num_failed,
        "width": config.network.width,
    }
    if len(rows) > 1:
        numbers["baseline"] = rows["full"] | (found.of["full"].times or {})
        numbers["baseline_equal_gradients"] = rows["full, equal gradients"]
    return _Summary(numbers, rows, found.of, len(test_split))


def present(job: _Job, summary: _Summary) -> Report:
    """The accuracies and costs of each training."""
    selection, dataset, rows = job.options.config.selection, job.dataset, summary.rows
    whole = {name: one for name, one in summary.trainings.items() if one.times is not None}
    lines = {name: read_lines(one.folder / "metrics.jsonl") for name, one in whole.items()}
    used = {name: read_lines(one.folder / "resources.jsonl") for name, one in whole.items()}

    def percent(value):
        return f"{100 * value:.2f}"

    accuracies = [
        [
            name,
            str(row["epochs"]),
            f"{row['gradient_examples']:,.0f}",
            f"{row['seconds']:.1f}",
            percent(row["train_accuracy"]),
            percent(row["validation_accuracy"]),
            percent(row["test_accuracy"]),
        ]
        for name, row in rows.items()
    ]
    kinds = ("seconds", "training_seconds", "pass_seconds", "evolution_seconds")
    kinds += ("validation_seconds", "compile_seconds")
    costs = [
        [name, *(f"{one.times[kind]:.1f}" for kind in kinds)]
        for name, one in whole.items()
        if one.times
    ]
    mine = rows[selection]
    lead = (
        f"Trained on {mine['gradient_examples']:,.0f} gradient examples in {mine['seconds']:.1f} s "
        f"({selection}), the network classifies {percent(mine['test_accuracy'])}% of the "
        f"{summary.num_test_images:,} test images of {dataset.name}"
    )
    headline = [(f"{percent(mine['test_accuracy'])} %", f"test accuracy, {selection}")]
    if len(rows) > 1:
        few, full = rows["full, equal gradients"], rows["full"]
        headline += [
            (f"{percent(few['test_accuracy'])} %", "whole set, equally many gradients"),
            (f"{percent(full['test_accuracy'])} %", "whole set, equally many epochs"),
        ]
        lead += (
            f"; on the whole set {percent(few['test_accuracy'])}% after as many "
            f"({few['seconds']:.1f} s) and {percent(full['test_accuracy'])}% after as many epochs "
            f"({full['seconds']:.1f} s)"
        )
    headline += [
        (f"{mine['gradient_examples']:,.0f}", "gradient examples"),
        (duration(mine["seconds"]), "of training and selection"),
    ]
    header = ["", "epochs", "gradient examples", "seconds"]
    header += ["train (%)", "validation (%)", "test (%)"]
    stages = ["", "seconds", "training", "pass", "evolution", "validation", "compilation apart"]
    took = summary.numbers
    return Report(
        f"{dataset.name}, trained on selected examples",
        lead + ".",
        headline,
        [
            Table(
                "Accuracy; train: of the examples trained on, in the last epoch", header, accuracies
            ),
            Table("Time", stages, costs),
        ],
        [
            Figure(
                "curves",
                "Loss and accuracy by epoch, and accuracy by gradient examples",
                plotting.training_curves(lines),
            ),
            Figure(
                "resources",
                "Processor (100 % is one core) and memory over time",
                plotting.resource_curves(used),
            ),
        ],
        [],
        [
            lead,
            f"time: training {took['training_seconds']:.1f} s, passes {took['pass_seconds']:.1f} "
            f"s, evolution {took['evolution_seconds']:.2f} s, validation "
            f"{took['validation_seconds']:.1f} s; compilation {took['compile_seconds']:.1f} s "
            "apart",
        ],
    )


SYSTEM = System(
    "cest",
    Options,
    prepare,
    search,
    finish,
    present,
    columns=Columns(
        quantities=(
            accuracy("test_accuracy", "test accuracy"),
            accuracy("baseline_equal_gradients.test_accuracy", "whole set, equally many gradients"),
            accuracy("baseline.test_accuracy", "whole set, equally many epochs"),
            Quantity("gradient_examples", "gradient examples", digits=0),
            SECONDS,
            Quantity("baseline.seconds", "seconds, whole set"),
        ),
        curves=(
            ("generation", "validation_loss"),
            ("generation", "validation_accuracy"),
            ("gradient_examples", "validation_accuracy"),
        ),
        step="epoch",
    ),
)
