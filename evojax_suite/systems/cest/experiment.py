"""Train a network on examples that coevolve with it, and on the whole set beside it."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import jax
import tyro

from evojax_suite import networks
from evojax_suite.configuration import configuration
from evojax_suite.data import some_images
from evojax_suite.networks import NetworkConfig
from evojax_suite.reporting import plotting
from evojax_suite.reporting.comparison import SECONDS, Columns, Quantity, accuracy
from evojax_suite.reporting.formats import duration, short
from evojax_suite.reporting.report import Figure, Report, Table
from evojax_suite.running.options import RunOptions, Scale, config_difference, is_small
from evojax_suite.running.system import Job, Phase, Search, System, part_for_dry_run
from evojax_suite.runtime.loop import LoopResult
from evojax_suite.runtime.results import load_variables, read_lines, save_variables
from evojax_suite.systems.cest import algorithm
from evojax_suite.systems.cest.config import Config, Params
from evojax_suite.training import batches_of, evaluate, forward_work
from evojax_suite.types import Dataset, PyTree, Split

_NARROW = 16


@configuration
class Options(RunOptions):
    """Train on subsets of hard examples that coevolve with the network (Ryan et al. 2024).

    For comparison the same network trains on the whole set, for equally many epochs and for equally
    many gradient examples; where the rule is not the paper's, on random subsets too.
    """

    recipe: Literal["paper", "recommended"] = "paper"
    """The paper's evolution of the hardest subsets; or, in each step, the examples whose loss can
    be reduced most, 60 % of the set an epoch, under a cosine."""
    num_images: int | None = None
    """Number of training images, equally many of each class; all by default."""
    num_validation_images: int | None = None
    """Validation images, which the curves alone need; all by default, at most as many as training
    images where small."""
    baseline: bool = True
    """Train on the whole set as well, and on random subsets."""
    scale: Scale = "auto"
    """small reduces the network to width 16, unless another than the paper's (VGG10, width 256) is
    given; auto is small without accelerator."""
    config: tyro.conf.OmitArgPrefixes[Config] = Config()
    params: tyro.conf.OmitArgPrefixes[Params] = Params()


@dataclass(frozen=True)
class _Job(Job[Options]):
    phase: Phase  # of the rule of selection
    programs: algorithm.Programs  # that the trainings of the run share


@dataclass(frozen=True)
class _Training:
    """A network that was trained to the end of an epoch."""

    variables: PyTree
    folder: Path
    num_epochs: int
    times: dict[str, float] | None = None
    """Seconds of the whole training, where this is its end."""
    num_failed: int = 0


@dataclass(frozen=True)
class _Summary:
    numbers: dict[str, Any]
    rows: dict[str, dict[str, float]]
    trainings: dict[str, _Training]
    num_test_images: int


def prepare(options: Options, dataset: Dataset, directory: Path) -> _Job:
    """Check the options; the paper's width is reduced where the scale is small."""
    options.params.check()
    small, number = is_small(options.scale), options.num_validation_images
    dataset = some_images(dataset, options.num_images)
    if small and number is None:
        number = min(len(dataset.train), len(dataset.validation))
    dataset = some_images(dataset, None, number)
    if small and _is(options.config.network, Config().network.width):
        network = replace(options.config.network, width=_NARROW)
        options = replace(options, config=replace(options.config, network=network))
    config = options.config
    programs: algorithm.Programs = {}
    about = options, dataset, config.training.num_epochs, ".", programs
    phase = _phase(config.selection, config, *about)
    differences = config_difference(config, Config()) | config_difference(options.params, Params())
    notes = ()
    if _is(config.network, _NARROW):
        notes = (f"small: width {_NARROW} instead of the paper's 256 (--scale, --width)",)
    fixed = options, dataset, directory, phase, programs
    return _Job(*fixed, differences=differences, notes=notes)


def _is(network: NetworkConfig, width: int) -> bool:
    """Whether a network is the paper's of this width, however it is computed."""
    return (network.network, network.width) == (Config().network.network, width)


def _phase(
    title: str,
    config: Config,
    options: Options,
    dataset: Dataset,
    num_epochs: int,
    folder: str,
    programs: algorithm.Programs,
) -> Phase:
    shape, factor = (dataset.num_classes, dataset.image_shape), 1.0
    trainer = algorithm.build(config, *shape, timed=True, programs=programs)
    if options.dry_run:
        work = 3 * forward_work(networks.create(config.network, *shape), dataset.image_shape)
        batch_size = config.training.batch_size or len(dataset.train)
        dataset, factor = part_for_dry_run(dataset, work, batch_size)
    inputs = jax.random.key(options.seed), options.params, algorithm.make_data(config, dataset)
    # Figs. 8 and 9 need the resources.
    about = title, trainer, *inputs, num_epochs, folder
    steps = 1 if factor > 1 and config.selection == "full" else 3
    limits: dict[str, Any] = {"dry_run_factor": factor, "dry_run_steps": steps}
    return Phase(*about, records_resources=True, **limits)


def search(job: _Job) -> Search:
    """Train by the rule of selection, then on the whole set."""
    options, config, directory = job.options, job.options.config, job.directory
    num_epochs = config.training.num_epochs

    def variables(phase: Phase, result: LoopResult) -> PyTree:
        return phase.algorithm.result(result.state, options.params, phase.data)

    def finished(phase: Phase, result: LoopResult, folder: Path) -> _Training:
        times = _times(result)
        return _Training(variables(phase, result), folder, num_epochs, times, result.num_failed)

    def phase_of(title: str, config: Config, num_epochs: int, folder: str) -> Phase:
        about = options, job.dataset, num_epochs, folder, job.programs
        return _phase(title, config, *about)

    own = yield job.phase
    trainings = {config.selection: finished(job.phase, own, directory)}
    if not options.baseline or config.selection == "full":
        return trainings
    if config.selection not in ("cest", "random"):
        other = replace(config, selection="random")
        random = phase_of("random", other, num_epochs, "random")
        trainings["random"] = finished(random, (yield random), directory / "random")
    below, whole = directory / "full", replace(config, selection="full")
    few = _epochs_of_equal_gradients(job, own)
    # The training on the whole set has computed as many gradients on its way, except where its
    # rates fall towards another end.
    on_the_way = config.training.schedule == "constant"
    if not on_the_way:
        below = directory / "full_equal_gradients"
        whole = replace(whole, training=replace(config.training, num_epochs=few))
    file = below / f"network-{few}.safetensors"
    if not (file.exists() or (options.dry_run and on_the_way)):
        passing = phase_of(f"full, {few} epochs", whole, few, below.name)
        passed = yield passing
        if not options.dry_run:
            save_variables(file, variables(passing, passed))
    whole = replace(config, selection="full")
    full = phase_of("full", whole, num_epochs, "full")
    result = yield full
    if not options.dry_run:
        trainings["full, equal gradients"] = _Training(load_variables(file), below, few)
        trainings["full"] = finished(full, result, directory / "full")
    return trainings


def _epochs_of_equal_gradients(job: _Job, result: LoopResult) -> int:
    """Epochs on the whole set with as many gradients as the run by the rule computed, or a few
    more; before its end, as many as it may compute."""
    config, num_images = job.options.config, len(job.dataset.train)
    epochs = algorithm.epochs_of_equal_gradients(config, num_images)
    if config.selection == "infobatch" and not job.options.dry_run:
        epochs = math.ceil(float(result.state.gradient_examples) / num_images)
    return min(epochs, config.training.num_epochs)


def _times(result: LoopResult) -> dict[str, float]:
    """Seconds of a run: the cost of the rule, without compilation and validation, and those of
    compilation and of each stage."""
    stages = result.stage_seconds
    named = ("training", "pass", "evolution", "reference", "validation")
    return {
        "seconds": algorithm.cost_seconds(stages),
        "compile_seconds": result.compile_seconds + stages.get("compilation", 0.0),
        **{f"{name}_seconds": stages.get(name, 0.0) for name in named},
    }


def _at_epoch(directory: Path, epoch: int) -> dict[str, float]:
    """The metrics of an epoch, and the cost of all epochs up to it."""
    line = next(x for x in read_lines(directory / "metrics.jsonl") if x["generation"] == epoch)
    timings = [x for x in read_lines(directory / "timing.jsonl") if x["generation"] <= epoch]
    kept = ("validation_loss", "validation_accuracy", "gradient_examples", "measured_examples")
    return {
        "epochs": epoch,
        "train_loss": line["loss"],
        "train_accuracy": line["accuracy"],
        **{name: line[name] for name in kept},
        "seconds": sum(algorithm.cost_seconds(x["stages"]) for x in timings),
    }


def finish(job: _Job, trainings: dict[str, _Training], test_split: Split) -> _Summary:
    """Write the networks and evaluate each on the test split."""
    config, dataset = job.options.config, job.dataset
    network = networks.create(config.network, dataset.num_classes, dataset.image_shape)
    test = batches_of(dataset, test_split, config.engine)
    evaluated = jax.jit(lambda variables: evaluate(network, variables, test))
    rows = {}
    for name, training in trainings.items():
        if training.times:
            save_variables(training.folder / "network.safetensors", training.variables)
        on_test = evaluated(training.variables)
        rows[name] = _at_epoch(training.folder, training.num_epochs) | {
            "test_accuracy": float(on_test.accuracy),
            "test_loss": float(on_test.cross_entropy),
        }
    selected = trainings[config.selection]
    numbers = {
        "selection": config.selection,
        **rows[config.selection],
        **(selected.times or {}),
        "num_failed": selected.num_failed,
        "width": config.network.width,
    }
    if len(rows) > 1:
        numbers["baseline"] = rows["full"] | (trainings["full"].times or {})
        numbers["baseline_equal_gradients"] = rows["full, equal gradients"]
    if "random" in trainings and config.selection != "random":
        numbers["baseline_random"] = rows["random"] | (trainings["random"].times or {})
    return _Summary(numbers, rows, trainings, len(test_split))


def present(job: _Job, summary: _Summary) -> Report:
    """The accuracies and costs of each training."""
    selection, name, rows = job.options.config.selection, job.dataset.name, summary.rows
    whole = {title: training for title, training in summary.trainings.items() if training.times}

    def lines_of(file: str) -> dict[str, list[dict[str, Any]]]:
        return {title: read_lines(training.folder / file) for title, training in whole.items()}

    def percent(row: dict[str, float], part: str = "test") -> str:
        return f"{100 * row[f'{part}_accuracy']:.2f}"

    def gradients(row: dict[str, float]) -> str:
        return f"{row['gradient_examples']:,.0f}"

    accuracies = [
        [title, str(row["epochs"]), gradients(row), short(row["seconds"])]
        + [percent(row, part) for part in ("train", "validation", "test")]
        for title, row in rows.items()
    ]
    stages = ("training", "pass", "evolution", "reference", "validation")
    kinds = ("seconds", *(f"{stage}_seconds" for stage in stages), "compile_seconds")
    costs = [
        [title, *(short(training.times[kind]) for kind in kinds)]
        for title, training in whole.items()
        if training.times
    ]
    row = rows[selection]
    lead = (
        f"Trained on {gradients(row)} gradient examples in {short(row['seconds'])} s "
        f"({selection}), the network classifies {percent(row)}% of the "
        f"{summary.num_test_images:,} test images of {name}"
    )
    headline = [(f"{percent(row)} %", f"test accuracy, {selection}")]
    if len(rows) > 1:
        few, full = rows["full, equal gradients"], rows["full"]
        headline += [
            (f"{percent(few)} %", "whole set, equally many gradients"),
            (f"{percent(full)} %", "whole set, equally many epochs"),
        ]
        if selection != "random" and "random" in rows:
            headline.append((f"{percent(rows['random'])} %", "random subsets"))
        lead += (
            f"; on the whole set {percent(few)}% after as many ({short(few['seconds'])} s) and "
            f"{percent(full)}% after as many epochs ({short(full['seconds'])} s)"
        )
    headline += [
        (gradients(row), "gradient examples"),
        (duration(row["seconds"]), "of training and selection"),
    ]
    header = ["", "epochs", "gradient examples", "seconds"]
    header += ["train (%)", "validation (%)", "test (%)"]
    trained = "Accuracy; train: of the examples trained on, in the last epoch"
    curves = plotting.training_curves(lines_of("metrics.jsonl"))
    resources = plotting.resource_curves(lines_of("resources.jsonl"))
    about_curves = "Loss and accuracy by epoch, and accuracy by gradient examples"
    about_resources = "Processor (100 % is one core) and memory over time"
    took = {name: short(summary.numbers[f"{name}_seconds"]) for name in (*stages, "compile")}
    each = ", ".join(f"{stage} {took[stage]} s" for stage in stages)
    time = f"time: {each}; compilation {took['compile']} s apart"
    return Report(
        f"{name}, trained on selected examples",
        lead + ".",
        headline,
        [
            Table(trained, header, accuracies),
            Table("Time", ["", "seconds", *stages, "compilation apart"], costs),
        ],
        [Figure("curves", about_curves, curves), Figure("resources", about_resources, resources)],
        [],
        [lead, time],
    )


COLUMNS = Columns(
    quantities=(
        accuracy("test_accuracy", "test accuracy"),
        accuracy("baseline_equal_gradients.test_accuracy", "whole set, equally many gradients"),
        accuracy("baseline.test_accuracy", "whole set, equally many epochs"),
        accuracy("baseline_random.test_accuracy", "random subsets"),
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
)
RECOMMENDED = (
    *("--selection", "reducible_loss"),
    *("--temperature", "0.5"),
    *("--fraction", "0.6"),
    *("--schedule", "cosine"),
)
SYSTEM = System(
    "cest",
    Options,
    prepare,
    search,
    finish,
    present,
    columns=COLUMNS,
    recipes={"recommended": RECOMMENDED},
    essentials=(
        "--recipe",
        "--dataset",
        "--num-images",
        "--num-epochs",
        "--fraction",
        "--selection",
        "--seed",
        "--resume",
    ),
    examples=("cest --recipe recommended --dataset fashion_mnist --num-images 3000",),
)
