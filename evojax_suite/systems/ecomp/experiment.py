"""A run that compresses a trained network by evolution and evaluates it on the test split."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Literal, cast

import jax
import jax.numpy as jnp
import numpy as np
import tyro
from annotated_types import Ge
from pydantic import PositiveInt

from evojax_suite.configuration import configuration
from evojax_suite.data import with_whole_training_set
from evojax_suite.networks import NetworkConfig
from evojax_suite.operators import non_dominated_ranks
from evojax_suite.reporting import plotting
from evojax_suite.reporting.comparison import SECONDS, Columns, Quantity, accuracy
from evojax_suite.reporting.formats import duration, short
from evojax_suite.reporting.report import Figure, Report, Table
from evojax_suite.running.options import (
    RunOptions,
    Seed,
    config_difference,
    option_difference,
)
from evojax_suite.running.system import Job, Phase, Search, System
from evojax_suite.runtime.loop import LoopResult
from evojax_suite.runtime.results import read_lines, write_json
from evojax_suite.systems.ecomp import (
    algorithm,
    artifact,
    compression,
    feed_forward,
    graph as graphs,
    mask_search,
    parent,
    refitting,
)
from evojax_suite.systems.ecomp.artifact import CompressedNetwork
from evojax_suite.systems.ecomp.config import Config, Params, RefitConfig, RefitParams
from evojax_suite.systems.ecomp.feed_forward import Network
from evojax_suite.systems.ecomp.graph import Graph
from evojax_suite.types import AnyAlgorithm, Dataset, Split

_STEPS_PER_CALL = 10  # half a second on two cores


@configuration
class Options(RunOptions):
    """Compress a trained network by evolution (van den Beemt et al. 2021).

    Without `--parent` a network of two hidden layers is trained first, the paper's: 256 units, 4
    epochs of Adam 1e-3 in batches of 100. Networks are fully connected or begin with convolutions
    that keep the size, each followed by 2x2 pooling.
    """

    dataset: str = "fashion_mnist"
    recipe: Literal["paper", "recommended"] = "paper"
    """The paper's evolution of weights; or --refit."""
    refit: bool = False
    """Search for the units, and pixels, to keep, with the network that follows in closed form
    inside the fitness, for a whole front of sizes; the options of --search are its own."""
    parent: Path | None = None
    """Your own network: .safetensors or .npz with <layer>.weight (PyTorch) or .kernel (flax) and
    <layer>.bias; ReLU between its layers."""
    inputs: artifact.Inputs = "unit"
    """The parent's inputs: pixels in [0, 1] as in the paper, or normalised."""
    pooling: feed_forward.Pooling = "average"
    """Pooling after each convolution of a parent that has any."""
    parent_network: Literal["MLP", "ConvNet"] = "MLP"
    """The network that is trained where no parent is given; a ConvNet has three convolutions."""
    parent_units: PositiveInt | None = None
    """Units of each of its hidden layers; by default 256, as in the paper, or 32 filters."""
    parent_epochs: PositiveInt = 4
    """Epochs of its training on the whole training set."""
    parent_seed: Seed = 0
    """Seed of the parent's training, so that runs of different seeds compress the same parent."""
    num_images: int | None = None
    """Images that evolution uses, equally many of each class; by default the paper's 10,000, or as
    many whole batches as there are."""
    simple_rules: bool = True
    """Compare with networks of the same size whose units simple rules choose, as they are, refitted
    and trained by gradients."""
    fine_tuning_seconds: Annotated[float, Ge(0)] | None = None
    """Seconds of that training by gradients; by default as many as the search took."""
    search: RefitConfig = field(default_factory=RefitConfig)
    search_params: Annotated[RefitParams, tyro.conf.arg(name="search")] = field(
        default_factory=RefitParams
    )
    config: tyro.conf.OmitArgPrefixes[Config] = field(default_factory=Config)
    params: tyro.conf.OmitArgPrefixes[Params] = field(default_factory=Params)

    @property
    def trained_parent(self) -> NetworkConfig:
        """The network that is trained where no parent is given."""
        if self.parent_network == "MLP":
            return NetworkConfig(network="MLP", width=self.parent_units or 256)
        width = self.parent_units or 32
        return NetworkConfig(
            width=width, normalization="none", pooling=self.pooling, first_padding=1
        )


@dataclass(frozen=True)
class _Job(Job[Options]):
    algorithm: AnyAlgorithm
    places: np.ndarray  # of evolution's images among the training images
    parent: Network | Graph | None  # None where it is to be trained

    def compressed(
        self,
        network: Graph,
        lineage: dict[str, Any],
        inputs_kept: tuple[int, ...] | None = None,
    ) -> CompressedNetwork:
        dataset = self.dataset
        mean, std = artifact.constants(dataset, self.options.inputs)
        about = (dataset.image_shape, mean, std, dataset.class_names, dataset.name)
        return CompressedNetwork(network, *about, lineage, inputs_kept)

    @property
    def refits(self) -> refitting.Setting:
        """The setting of the search with refits."""
        options, constants = self.options, artifact.constants(self.dataset, self.options.inputs)
        return refitting.Setting(
            directory=self.directory,
            config=options.search,
            params=options.search_params,
            seed=options.seed,
            dataset=self.dataset,
            places=self.places,
            mean=constants[0],
            std=constants[1],
            pooling=options.pooling,
            simple_rules=options.simple_rules,
            fine_tuning_seconds=options.fine_tuning_seconds,
        )

    @property
    def evolution(self) -> tuple[np.ndarray, np.ndarray]:
        """The images of evolution and their labels."""
        train = self.dataset.train
        return train.images[self.places], train.labels[self.places]


@dataclass(frozen=True)
class _Summary:
    numbers: dict[str, Any]
    front: list[dict[str, Any]]
    num_test_images: int


def prepare(options: Options, dataset: Dataset, directory: Path) -> _Job:
    """Read the parent, or check the shapes of the one that will be trained."""
    config, params = options.config, options.params
    dataset = with_whole_training_set(dataset)
    places = parent.evolution_images(dataset, options.num_images, config.batch_size)
    network = _given_parent(options, dataset)
    either = network or parent.untrained(options.trained_parent, dataset)
    if options.refit:
        mask_search.check(options.search_params, len(places))
    else:
        algorithm.check(config, params, cast(Network, either), len(places))
    differences = config_difference(config, Config()) | config_difference(params, Params())
    differences |= option_difference(options, "refit")
    notes = (f"evolution sees {len(places):,} of the training images",)
    fixed = options, dataset, directory, algorithm.build(config), places, network
    return _Job(*fixed, differences=differences, notes=notes)


def _given_parent(options: Options, dataset: Dataset) -> Network | Graph | None:
    """The parent that the options name, if any."""
    path, shape = options.parent, dataset.image_shape
    if path is None:
        return None
    classes, is_graph = dataset.num_classes, path.suffix == ".safetensors"
    graph = graphs.load(path, shape, classes) if is_graph else None
    if graph is None:
        return feed_forward.load(path, shape, classes, options.pooling)
    if not options.refit:
        raise ValueError(f"{path} is a graph of layers, which only --refit compresses")
    return graph


def search(job: _Job) -> Search:
    """Train the parent where none is given, then compress it. Returns the parent, the seconds of
    its training, the best network and the loop of the compression."""
    options, params, dataset = job.options, job.options.params, job.dataset
    network, seconds = job.parent, 0.0
    if network is None:
        module, epochs = options.trained_parent, options.parent_epochs
        trainer, data = parent.parent_training(dataset, options.inputs, module, epochs)
        key = jax.random.key(options.parent_seed)
        trained = yield Phase("parent", trainer, key, None, data, epochs, "parent")
        network = parent.from_flax(trained.state.fit.parameters, module, dataset)
        seconds = trained.seconds + trained.compile_seconds
        feed_forward.save(job.directory / "parent.safetensors", network)
    if options.refit:
        return (yield from refitting.search(job.refits, network, seconds))
    network, (mean, std) = cast(Network, network), artifact.constants(dataset, options.inputs)
    data = algorithm.make_data(network, *job.evolution, mean, std, options.pooling)
    key, members = jax.random.key(options.seed), options.config.population_size
    steps = algorithm.num_steps(options.config, len(job.places))
    pace: dict[str, Any] = {"steps_per_call": _STEPS_PER_CALL, "members_per_step": members}
    loop = yield Phase(
        "compressing", job.algorithm, key, params, data, steps, same_for_seeds=True, **pace
    )
    best = jax.device_get(jax.jit(job.algorithm.result)(loop.state, params, data))
    return network, seconds, best, loop


def likeness_to_parent(network: Network, parent: Network, units: list[np.ndarray]) -> float:
    """Cosine between a trimmed network's weights and the parent's between the same units; units:
    their places in the parent, for each hidden layer."""
    original = compression.part(parent, [slice(None), *units, slice(None)])
    ours, theirs = (
        np.concatenate([np.ravel(layer.weight) for layer in one]).astype(np.float64)
        for one in (network, original)
    )
    return float(ours @ theirs / (np.linalg.norm(ours) * np.linalg.norm(theirs)))


def save_front(
    directory: Path,
    config: Config,
    state: algorithm.State,
    parts: dict[str, tuple[np.ndarray, np.ndarray]],
    wrap: Callable[[Network], CompressedNetwork],
) -> list[dict[str, Any]]:
    """Write the front of the last population: the networks that no other beats in accuracy,
    similarity loss and parameters together. Returns what front.json holds of each, smallest first.

    parts: images and labels by name; wrap: makes a CompressedNetwork of a network.
    """
    scores = jax.device_get(algorithm.final_scores(config, state))
    objectives = algorithm.objectives(scores)
    on_front = (non_dominated_ranks(objectives) == 0) & jnp.isfinite(objectives).all(1)
    members = np.flatnonzero(on_front)
    (directory / "front").mkdir(exist_ok=True)
    rows, contents = [], set()
    for index in members[np.argsort(scores.relative_parameters[members], kind="stable")]:
        member = compression.member(state.population, index)
        network = compression.trimmed(member, np.asarray(state.population.sizes[index]))
        content = b"".join(array.tobytes() for layer in network for array in layer)
        if content in contents:  # copies of one another are all in the front
            continue
        contents.add(content)
        hidden = feed_forward.hidden_sizes(network)
        name = f"front/{len(rows):03d}-{'-'.join(map(str, hidden))}.safetensors"
        feed_forward.save(directory / name, network)
        one = wrap(network)
        row = {
            "file": name,
            "hidden_units": hidden,
            "num_parameters": one.num_parameters,
            "relative_parameters": float(scores.relative_parameters[index]),
            "similarity_loss": float(scores.similarity_loss[index]),
        }
        for part, (images, labels) in parts.items():
            row[f"{part}_accuracy"] = float(np.mean(one.logits(images).argmax(-1) == labels))
        rows.append(row)
    write_json(directory / "front.json", rows)
    return rows


def _wrapped(
    job: _Job, network: Network, lineage: dict[str, Any] | None = None
) -> CompressedNetwork:
    return job.compressed(graphs.from_network(network, job.options.pooling), lineage or {})


def finish(
    job: _Job,
    result: refitting.Found | tuple[Network, float, algorithm.Compressed, LoopResult],
    test_split: Split,
) -> _Summary | refitting.Summary:
    """Write the compressed network, and count how often it agrees with its parent."""
    if isinstance(result, refitting.Found):
        return refitting.finish(job.refits, result, test_split, job.compressed)
    options, (parent, parent_seconds, best, loop) = job.options, result
    sizes, parent_sizes = np.asarray(best.sizes), feed_forward.hidden_sizes(parent)
    network = compression.trimmed(best.network, sizes)
    units = [np.asarray(kept[:size]) for kept, size in zip(best.units, sizes, strict=True)]
    lineage = {
        "member": int(best.member),
        "num_mutations": int(best.num_mutations),
        "weights_cosine": likeness_to_parent(network, parent, units),
        "parent": str(options.parent) if options.parent else "parent.safetensors",
        "parent_hidden_units": parent_sizes,
        "units_kept": units,
    }
    wrap = partial(_wrapped, job)
    original, compressed = wrap(parent), wrap(network, lineage)
    compressed.save(job.directory)
    parts = {"evolution": job.evolution, "test": (test_split.images, test_split.labels)}
    numbers: dict[str, Any] = {}
    for part in ("test", "evolution"):
        images, labels = parts[part]
        before, after = (one.logits(images).argmax(-1) for one in (original, compressed))
        numbers[f"{part}_accuracy"] = float(np.mean(after == labels))
        numbers[f"parent_{part}_accuracy"] = float(np.mean(before == labels))
        numbers[f"{part}_agreement"] = float(np.mean(before == after))
    numbers |= {
        "relative_size": int(sizes.sum()) / sum(parent_sizes),
        "hidden_units": sizes.tolist(),
        "num_parameters": compressed.num_parameters,
        "parent_num_parameters": original.num_parameters,
        "fitness": float(best.fitness),
        "num_generations": options.config.num_generations,
        "num_mutations": lineage["num_mutations"],
        "weights_cosine": lineage["weights_cosine"],
        "num_failed": loop.num_failed,
        "seconds": loop.seconds,
        "compile_seconds": loop.compile_seconds,
        "parent_seconds": parent_seconds,
    }
    if options.simple_rules:
        parent_graph = graphs.from_network(parent, options.pooling)
        images = refitting.Images(job.refits, parent_graph, test_split)
        evaluator = refitting.Evaluator(job.refits, parent_graph, images)
        kept = (graphs.group_sizes(parent_graph)[0], *sizes.tolist())
        alternatives = refitting.alternatives(job.refits, evaluator, kept, loop.seconds)
        numbers["alternatives"] = {
            name: {"test_accuracy": row["test_accuracy"]} for name, row in alternatives.items()
        }
    front = []
    if options.config.selection == "nsga2":
        front = save_front(job.directory, options.config, loop.state, parts, wrap)
        numbers["front_size"] = len(front)
    return _Summary(numbers, front, len(test_split))


def _front_table(front: list[dict[str, Any]]) -> Table:
    """About twelve networks of the front."""
    shown = front[:: max(1, len(front) // 12)]
    formats = {"relative_parameters": ".1f", "evolution_accuracy": ".2f", "test_accuracy": ".2f"}
    rows = []
    for row in shown:
        percentages = (f"{100 * row[name]:{form}}" for name, form in formats.items())
        rows.append(["-".join(map(str, row["hidden_units"])), *percentages])
    header = ["hidden units", "parameters (%)", "evolution's images (%)", "test images (%)"]
    return Table(f"The front, {len(shown)} of {len(front)} networks", header, rows)


def present(job: _Job, summary: _Summary | refitting.Summary) -> Report:
    """The compressed network beside its parent, and the front of sizes where there is one."""
    if isinstance(summary, refitting.Summary):
        return refitting.present(job.dataset.name, job.directory, summary)
    numbers, front = summary.numbers, summary.front
    lines = [line for line in read_lines(job.directory / "metrics.jsonl") if not line["judging"]]

    def percent(name: str):
        return f"{100 * numbers[name]:.2f}"

    def seconds(name: str):
        return f"{short(numbers[name])} s"

    units, parameters = "-".join(map(str, numbers["hidden_units"])), numbers["num_parameters"]
    size, agreement = percent("relative_size"), percent("test_agreement")
    tested, parent_tested = percent("test_accuracy"), percent("parent_test_accuracy")
    lead = (
        f"{units} hidden units, {size}% of the parent's, classify {tested}% of the "
        f"{summary.num_test_images:,} test images of {job.dataset.name}; the parent classifies "
        f"{parent_tested}%. They agree on {agreement}%."
    )
    header = ["", "accuracy (%)", "agreement (%)", "parameters"]
    rows = [
        ["parent", parent_tested, "", f"{numbers['parent_num_parameters']:,}"],
        ["compressed", tested, agreement, f"{parameters:,}"],
    ]
    tables = [Table("On the test split", header, rows)]
    if alternatives := numbers.get("alternatives"):
        tables.append(
            refitting.table_of_rules(f"{units} units", {"evolved": numbers} | alternatives)
        )
    caption = "The population by generation, 1 being the initial: mean, and from worst to best"
    figures = [Figure("generations", caption, plotting.compression_curves(lines))]
    if front:
        chosen = parameters / numbers["parent_num_parameters"], numbers["evolution_accuracy"]
        charts = plotting.accuracy_front(front, numbers["parent_evolution_accuracy"], chosen)
        caption = "The front: every network is in front/, with front.json"
        figures.append(Figure("front", caption, charts))
        tables.append(_front_table(front))
    headline = [
        (f"{tested} %", "test accuracy"),
        (f"{parent_tested} %", "of the parent"),
        (f"{parameters:,}", "parameters"),
        (f"{size} %", "of the parent's hidden units"),
        (duration(numbers["seconds"]), "of evolution"),
    ]
    seen_agreement = f"{percent('evolution_agreement')} %"
    count = numbers["num_generations"]
    details = [
        ["hidden units", units],
        ["generations", f"{count:,} after the initial population, which is generation 1"],
        ["relative size (hidden units)", f"{size} %"],
        ["agreement with the parent on the images of evolution", seen_agreement],
        ["cosine of its weights and the parent's", f"{numbers['weights_cosine']:.3f}"],
        ["mutations in its line", str(numbers["num_mutations"])],
        ["time in generations", seconds("seconds")],
        ["compilation", seconds("compile_seconds")],
        ["training of the parent", seconds("parent_seconds")],
        ["failed evaluations", str(numbers["num_failed"])],
    ]
    closing = [
        lead,
        f"time: parent {seconds('parent_seconds')}, compilation {seconds('compile_seconds')}, "
        f"generations {seconds('seconds')}",
        f"network: {job.directory / 'network.safetensors'}",
    ]
    title = f"A network for {job.dataset.name}, compressed by evolution"
    return Report(title, lead, headline, tables, figures, details, closing)


_COLUMNS = Columns(
    (
        accuracy("test_accuracy", "test accuracy"),
        accuracy("parent_test_accuracy", "of the parent"),
        accuracy("test_agreement", "agreement"),
        accuracy("relative_size", "relative size"),
        Quantity("num_parameters", "parameters", digits=0),
        SECONDS,
    ),
    tuple(
        ("generation", f"{name}_mean") for name in ("accuracy", "relative_size", "similarity_loss")
    ),
)
_METRICS = {
    "accuracy_mean": "accuracy",
    "relative_size_mean": "relative size",
    "log_error": "log error along the front",
    "error_least": "least error",
    "size_least": "smallest",
    "front_size": "on the front",
}
SYSTEM = System(
    "ecomp",
    Options,
    prepare,
    search,
    finish,
    present,
    columns=_COLUMNS,
    metrics=_METRICS,
    recipes={"recommended": ("--refit", "--search.low-rank")},
    essentials=(
        "--recipe",
        "--parent",
        "--dataset",
        "--num-images",
        "--search.size",
        "--search.largest",
        "--seed",
        "--resume",
    ),
    examples=(
        "ecomp --recipe recommended --dataset fashion_mnist",
        "ecomp --recipe recommended --dataset mnist --parent mine.safetensors",
    ),
)
