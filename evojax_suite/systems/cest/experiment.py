"""Train a network on examples that coevolve with it, and on the whole set beside it."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from pathlib import Path

import jax
import tyro

from evojax_suite import networks
from evojax_suite.data import load
from evojax_suite.networks import NetworkConfig
from evojax_suite.reporting import plotting, report
from evojax_suite.reporting.progress import console
from evojax_suite.reporting.report import Figure, Table
from evojax_suite.running.options import (
    RunOptions,
    Scale,
    differing,
    duration,
    is_small,
    some_images,
)
from evojax_suite.runtime import loop
from evojax_suite.runtime.resources import recorded
from evojax_suite.runtime.results import (
    load_variables,
    open_run,
    read_lines,
    save_variables,
    write_json,
)
from evojax_suite.systems import cest
from evojax_suite.training import batches_of, evaluate
from evojax_suite.types import Dataset, PyTree

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
    config: tyro.conf.OmitArgPrefixes[cest.Config] = field(default_factory=cest.Config)
    params: tyro.conf.OmitArgPrefixes[cest.Params] = field(default_factory=cest.Params)


def trainer(config: cest.Config, dataset: Dataset, options: Options, directory: Path):
    """A function of a title and a number of epochs that trains so far, in `directory`, and gives
    the network's variables and how it went; a later call goes on."""
    algorithm = cest.build(config, dataset.num_classes, dataset.image_shape, timed=True)
    data = cest.make_data(config, dataset)

    def train(title: str, num_epochs: int) -> tuple[PyTree, loop.Outcome]:
        directory.mkdir(parents=True, exist_ok=True)
        with recorded(directory / "resources.jsonl"):  # Figs. 8 and 9
            outcome = options.drive(
                title,
                algorithm,
                jax.random.key(options.seed),
                options.params,
                data,
                num_epochs,
                directory,
            )
        return algorithm.result(outcome.state, options.params, data), outcome

    return train


def times(outcome: loop.Outcome) -> dict[str, float]:
    """Seconds of a run: the cost of the rule, without compilation and validation, and those of
    compilation and of each stage."""
    stages = outcome.stage_seconds
    return {
        "seconds": cest.cost_seconds(stages),
        "compile_seconds": outcome.compile_seconds + stages.get("compilation", 0.0),
        "training_seconds": stages.get("training", 0.0),
        "pass_seconds": stages.get("pass", 0.0),
        "evolution_seconds": stages.get("evolution", 0.0),
        "validation_seconds": stages.get("validation", 0.0),
    }


def of_epoch(directory: Path, epoch: int) -> dict[str, float]:
    """What the metrics say of an epoch, and what it cost to come so far."""
    line = next(x for x in read_lines(directory / "metrics.jsonl") if x["generation"] == epoch)
    timings = [x for x in read_lines(directory / "timing.jsonl") if x["generation"] <= epoch]
    seconds = sum(cest.cost_seconds(x["stages"]) for x in timings)
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


def run(options: Options) -> Path:
    """The whole run, in the folder that is returned. Raises ValueError, DataError or OSError, each
    with one line to show."""
    options.params.check()
    dataset = some_images(
        load(options.dataset, options.data_dir, cache=options.cache_data), options.num_images
    )
    if is_small(options.scale) and options.config.network == cest.Config().network:
        network = replace(options.config.network, width=_NARROW)
        options = replace(options, config=replace(options.config, network=network))
    config = options.config
    num_epochs = config.training.num_epochs
    network = networks.create(config.network, dataset.num_classes, dataset.image_shape)
    directory = options.directory("cest", dataset)
    train = trainer(config, dataset, options, directory)
    open_run(directory, options.settings(), options.resume)
    beyond = differing(config, cest.Config()) | differing(options.params, cest.Params())
    shown = ", ".join(f"{name}={value}" for name, value in beyond.items()) or "none"
    console.say(
        f"{dataset.name}: {len(dataset.train):,} training, {len(dataset.validation):,} validation, "
        f"{len(dataset.test):,} test images; run in {directory}"
    )
    console.say(f"settings that differ from the paper's: {shown}")
    if config.network == NetworkConfig(network="VGG10", width=_NARROW):
        console.say(f"small: width {_NARROW} instead of the paper's 256 (--scale, --width)")

    baseline = options.baseline and config.selection != "full"
    variables, outcome = train(config.selection, num_epochs)
    trained = {config.selection: variables}
    taken = {config.selection: times(outcome)}
    ends = {config.selection: (directory, num_epochs)}
    if baseline:
        below = directory / "full"
        train = trainer(replace(config, selection="full"), dataset, options, below)
        few = min(cest.epochs_of_equal_gradients(config, len(dataset.train)), num_epochs)
        file = below / f"network-{few}.safetensors"
        if not file.exists() and options.plan is None:
            save_variables(file, train(f"full, {few} epochs", few)[0])
        after_all, outcome_full = train("full", num_epochs)
        options.end_dry_run()
        trained |= {"full, equal gradients": load_variables(file), "full": after_all}
        ends |= {"full, equal gradients": (below, few), "full": (below, num_epochs)}
        taken["full"] = times(outcome_full)
        save_variables(below / "network.safetensors", after_all)
    options.end_dry_run()
    rows = {name: of_epoch(folder, epoch) for name, (folder, epoch) in ends.items()}
    save_variables(directory / "network.safetensors", variables)

    # Selection is over: only here is the test part opened.
    test = batches_of(dataset, dataset.test, config.engine)
    judge = jax.jit(lambda variables: evaluate(network, variables, test))
    for name, row in rows.items():
        found = judge(trained[name])
        row |= {
            "test_accuracy": float(found.accuracy),
            "test_loss": float(found.cross_entropy),
        }
    summary = {
        "system": "cest",
        "dataset": dataset.name,
        "selection": config.selection,
        **rows[config.selection],
        **taken[config.selection],
        "num_failed": outcome.num_failed,
        "seed": options.seed,
        "width": config.network.width,
        "options": beyond,
    }
    if len(rows) > 1:
        summary["baseline"] = rows["full"] | taken["full"]
        summary["baseline_equal_gradients"] = rows["full, equal gradients"]
    write_json(directory / "summary.json", summary)
    _present(directory, options, dataset, rows, taken, summary, shown)
    return directory


def _present(
    directory: Path,
    options: Options,
    dataset: Dataset,
    rows: dict[str, dict],
    taken: dict[str, dict],
    summary: dict,
    shown: str,
) -> None:
    """Figures, report and the closing lines on the terminal."""
    selection = options.config.selection
    folders = {selection: directory} | ({"full": directory / "full"} if len(rows) > 1 else {})
    lines = {name: read_lines(folder / "metrics.jsonl") for name, folder in folders.items()}
    used = {name: read_lines(folder / "resources.jsonl") for name, folder in folders.items()}

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
    costs = [
        [name, *(f"{of[kind]:.1f}" for kind in (
            "seconds", "training_seconds", "pass_seconds", "evolution_seconds",
            "validation_seconds", "compile_seconds",
        ))]
        for name, of in taken.items()
    ]  # fmt: skip
    mine = rows[selection]
    lead = (
        f"Trained on {mine['gradient_examples']:,.0f} gradient examples in {mine['seconds']:.1f} s "
        f"({selection}), the network classifies {percent(mine['test_accuracy'])}% of the "
        f"{len(dataset.test):,} test images of {dataset.name}"
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
    header = [
        "",
        "epochs",
        "gradient examples",
        "seconds",
        "train (%)",
        "validation (%)",
        "test (%)",
    ]
    stages = ["", "seconds", "training", "pass", "evolution", "validation", "compilation apart"]
    report.write(
        directory / "report.html",
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
        [["unlike the paper", shown]],
        report.commands(directory, "cest", options.typed, options.data_dir),
        {"config.json": options.settings(), "summary.json": summary},
    )
    console.say(lead)
    of = taken[selection]
    console.say(
        f"time: training {of['training_seconds']:.1f} s, passes {of['pass_seconds']:.1f} s, "
        f"evolution {of['evolution_seconds']:.2f} s, validation {of['validation_seconds']:.1f} s; "
        f"compilation {of['compile_seconds']:.1f} s apart"
    )
    console.say(f"report: {directory / 'report.html'}")
