"""Compress a trained network by evolution and tell what it still does on the test split."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
import tyro
from pydantic import PositiveInt

from evojax_suite.configuration import configuration
from evojax_suite.data import with_whole_training_set
from evojax_suite.networks import NetworkConfig
from evojax_suite.operators import non_dominated_ranks
from evojax_suite.reporting import plotting
from evojax_suite.reporting.comparison import SECONDS, Columns, Quantity, accuracy
from evojax_suite.reporting.formats import duration
from evojax_suite.reporting.report import Figure, Report, Table
from evojax_suite.running.options import RunOptions, Seed, config_difference
from evojax_suite.running.system import Job, Phase, Search, System
from evojax_suite.runtime.loop import LoopResult
from evojax_suite.runtime.results import read_lines, write_json
from evojax_suite.systems.ecomp import artifact, compression, feed_forward
from evojax_suite.systems.ecomp.algorithm import (
    Compressed,
    State,
    build,
    check,
    final_scores,
    make_data,
    num_steps,
)
from evojax_suite.systems.ecomp.artifact import CompressedNetwork
from evojax_suite.systems.ecomp.config import Config, Params
from evojax_suite.systems.ecomp.feed_forward import Network
from evojax_suite.systems.ecomp.parent import (
    evolution_images,
    from_flax,
    parent_training,
    untrained,
)
from evojax_suite.types import Algorithm, Dataset, Split

_STEPS_PER_CALL = 10  # half a second on two cores


@configuration
class Options(RunOptions):
    """Compress a trained network by evolution (van den Beemt et al. 2021).

    Without `--parent` a network of two hidden layers is trained first, the paper's: 256 units, 4
    epochs of Adam 1e-3 in batches of 100. Networks are fully connected or begin with convolutions
    that keep the size, each followed by 2x2 pooling.
    """

    dataset: str = "fashion_mnist"
    parent: Path | None = None
    """Your own network: .safetensors or .npz with <layer>.weight (PyTorch) or .kernel (flax) and
    <layer>.bias; ReLU between its layers."""
    inputs: artifact.Inputs = "unit"
    """What the parent takes: pixels in [0, 1] as in the paper, or normalised."""
    pooling: feed_forward.Pooling = "average"
    """Pooling after each convolution of a parent that has any."""
    parent_network: Literal["MLP", "ConvNet"] = "MLP"
    """What is trained where no parent is given; a ConvNet has three convolutions."""
    parent_units: PositiveInt | None = None
    """Units of each of its hidden layers; by default 256, the paper's, or 32 filters."""
    parent_epochs: PositiveInt = 4
    """Epochs of its training on the whole training set."""
    parent_seed: Seed = 0
    """Seed of the parent's training, so that runs of different seeds compress the same parent."""
    num_images: int | None = None
    """Images that evolution sees, equally many of each class; by default the paper's 10,000, or as
    many whole batches as there are."""
    config: tyro.conf.OmitArgPrefixes[Config] = field(default_factory=Config)
    params: tyro.conf.OmitArgPrefixes[Params] = field(default_factory=Params)

    @property
    def trained_parent(self) -> NetworkConfig:
        """The network that is trained where no parent is given."""
        if self.parent_network == "MLP":
            return NetworkConfig(network="MLP", width=self.parent_units or 256)
        return NetworkConfig(
            width=self.parent_units or 32,
            normalization="none",
            pooling=self.pooling,
            first_padding=1,
        )


@dataclass(frozen=True)
class _Job(Job[Options]):
    algorithm: Algorithm
    places: np.ndarray  # of the training images that evolution sees
    parent: Network | None  # None where it is to be trained

    def compressed(self, network: Network, lineage: dict[str, Any]) -> CompressedNetwork:
        dataset = self.dataset
        mean, std = artifact.constants(dataset, self.options.inputs)
        about = (dataset.image_shape, mean, std, dataset.class_names, dataset.name)
        return CompressedNetwork(network, *about, lineage, self.options.pooling)

    @property
    def seen(self) -> tuple[np.ndarray, np.ndarray]:
        """Images and labels that evolution sees."""
        train = self.dataset.train
        return train.images[self.places], train.labels[self.places]


@dataclass(frozen=True)
class _Found:
    parent: Network
    parent_seconds: float
    best: Compressed
    loop: LoopResult


@dataclass(frozen=True)
class _Summary:
    numbers: dict[str, Any]
    front: list[dict[str, Any]]
    num_test_images: int


def prepare(options: Options, dataset: Dataset, directory: Path) -> _Job:
    """Read the parent, or check the shapes of the one that will be trained."""
    config, params = options.config, options.params
    dataset = with_whole_training_set(dataset)
    places = evolution_images(dataset, options.num_images, config.batch_size)
    parent = None
    if options.parent is not None:
        parent = feed_forward.load(
            options.parent, dataset.image_shape, dataset.num_classes, options.pooling
        )
    check(config, params, parent or untrained(options.trained_parent, dataset), len(places))
    differences = config_difference(config, Config()) | config_difference(params, Params())
    notes = (f"evolution sees {len(places):,} of the training images",)
    return _Job(
        options,
        dataset,
        directory,
        build(config),
        places,
        parent,
        differences=differences,
        notes=notes,
    )


def search(job: _Job) -> Search:
    """Train the parent where none is given, then compress it."""
    options, config, dataset = job.options, job.options.config, job.dataset
    parent, parent_seconds = job.parent, 0.0
    if parent is None:
        network = options.trained_parent
        trainer, data = parent_training(dataset, options.inputs, network, options.parent_epochs)
        key = jax.random.key(options.parent_seed)
        trained = yield Phase("parent", trainer, key, None, data, options.parent_epochs, "parent")
        parent = from_flax(trained.state.fit.parameters, network, dataset)
        parent_seconds = trained.seconds + trained.compile_seconds
        feed_forward.save(job.directory / "parent.safetensors", parent)
    mean, std = artifact.constants(dataset, options.inputs)
    data = make_data(parent, *job.seen, mean, std, options.pooling)
    found = yield Phase(
        "compressing",
        job.algorithm,
        jax.random.key(options.seed),
        options.params,
        data,
        num_steps(config, len(job.places)),
        steps_per_call=_STEPS_PER_CALL,
        members_per_step=config.population_size,
        same_for_seeds=True,
    )
    best = jax.device_get(jax.jit(job.algorithm.result)(found.state, options.params, data))
    return _Found(parent, parent_seconds, best, found)


def likeness_to_parent(network: Network, parent: Network, units: list[np.ndarray]) -> float:
    """Cosine between a trimmed network's weights and the parent's between the same units; units:
    of each hidden layer, their places in the parent."""
    places = [np.arange(parent[0].weight.shape[1]), *units, np.arange(len(parent[-1].bias))]
    originals = [
        np.asarray(layer.weight)[after][:, before]
        for layer, (before, after) in zip(parent, pairwise(places), strict=True)
    ]
    own, original = (
        np.concatenate([np.ravel(weight) for weight in weights]).astype(np.float64)
        for weights in ([layer.weight for layer in network], originals)
    )
    return float(own @ original / (np.linalg.norm(own) * np.linalg.norm(original)))


def save_front(
    directory: Path,
    config: Config,
    state: State,
    parts: dict[str, tuple[np.ndarray, np.ndarray]],
    wrap: Callable[[Network], CompressedNetwork],
) -> list[dict]:
    """Write the networks of the last population that no other beats in accuracy, similarity loss
    and parameters together, and what is known of each, smallest first.

    parts: images and labels by name; wrap: makes a CompressedNetwork of a network.
    """
    scores = jax.device_get(final_scores(config, state))
    objectives = np.stack(
        [1 - scores.accuracy, scores.similarity_loss, scores.relative_parameters], 1
    )
    ranks = np.asarray(non_dominated_ranks(jnp.asarray(objectives)))
    members = np.flatnonzero((ranks == 0) & np.isfinite(objectives).all(1))
    folder = directory / "front"
    folder.mkdir(exist_ok=True)
    rows, seen = [], set()
    for index in members[np.argsort(scores.relative_parameters[members], kind="stable")]:
        network = compression.trimmed(
            jax.device_get(compression.member(state.population, index)),
            np.asarray(state.population.sizes[index]),
        )
        content = b"".join(np.asarray(array).tobytes() for layer in network for array in layer)
        if content in seen:  # copies of one another are all in the front
            continue
        seen.add(content)
        name = f"{len(rows):03d}-{'-'.join(map(str, feed_forward.hidden_sizes(network)))}"
        feed_forward.save(folder / f"{name}.safetensors", network)
        one = wrap(network)
        rows.append(
            {
                "file": f"front/{name}.safetensors",
                "hidden_units": feed_forward.hidden_sizes(network),
                "num_parameters": one.num_parameters,
                "relative_parameters": float(scores.relative_parameters[index]),
                "similarity_loss": float(scores.similarity_loss[index]),
                **{
                    f"{part}_accuracy": float(np.mean(one.logits(images).argmax(-1) == labels))
                    for part, (images, labels) in parts.items()
                },
            }
        )
    write_json(directory / "front.json", rows)
    return rows


def finish(job: _Job, found: _Found, test_split: Split) -> _Summary:
    """Write the compressed network, and tell how often it agrees with its parent."""
    options, best, parent = job.options, found.best, found.parent
    sizes = np.asarray(best.sizes)
    network = compression.trimmed(best.network, sizes)
    units = [np.asarray(own[:size]) for own, size in zip(best.units, sizes, strict=True)]
    lineage = {
        "member": int(best.member),
        "num_mutations": int(best.num_mutations),
        "weights_cosine": likeness_to_parent(network, parent, units),
        "parent": str(options.parent) if options.parent else "parent.safetensors",
        "parent_hidden_units": feed_forward.hidden_sizes(parent),
        "units_kept": units,
    }
    before, result = job.compressed(parent, {}), job.compressed(network, lineage)
    result.save(job.directory)
    agreement, accuracies = {}, {}
    parts = {"evolution": job.seen, "test": (test_split.images, test_split.labels)}
    for part, (images, labels) in parts.items():
        predictions = [one.logits(images).argmax(-1) for one in (before, result)]
        accuracies[part] = [float(np.mean(p == labels)) for p in predictions]
        agreement[part] = float(np.mean(predictions[0] == predictions[1]))
    numbers = {
        "test_accuracy": accuracies["test"][1],
        "parent_test_accuracy": accuracies["test"][0],
        "test_agreement": agreement["test"],
        "evolution_accuracy": accuracies["evolution"][1],
        "parent_evolution_accuracy": accuracies["evolution"][0],
        "evolution_agreement": agreement["evolution"],
        "relative_size": int(sizes.sum()) / sum(feed_forward.hidden_sizes(parent)),
        "hidden_units": sizes.tolist(),
        "num_parameters": result.num_parameters,
        "parent_num_parameters": before.num_parameters,
        "fitness": float(best.fitness),
        "num_generations": options.config.num_generations,
        "num_mutations": lineage["num_mutations"],
        "weights_cosine": lineage["weights_cosine"],
        "num_failed": found.loop.num_failed,
        "seconds": found.loop.seconds,
        "compile_seconds": found.loop.compile_seconds,
        "parent_seconds": found.parent_seconds,
    }
    front = []
    if options.config.selection == "nsga2":
        state = found.loop.state
        front = save_front(
            job.directory, options.config, state, parts, lambda one: job.compressed(one, {})
        )
        numbers["front_size"] = len(front)
    return _Summary(numbers, front, len(test_split))


def present(job: _Job, found: _Summary) -> Report:
    """The compressed network beside its parent, and the front of sizes where there is one."""
    summary, front = found.numbers, found.front
    lines = [line for line in read_lines(job.directory / "metrics.jsonl") if not line["judging"]]

    def percent(name):
        return f"{100 * summary[name]:.2f}"

    units = "-".join(map(str, summary["hidden_units"]))
    lead = (
        f"{units} hidden units, {percent('relative_size')}% of the parent's, classify "
        f"{percent('test_accuracy')}% of the {found.num_test_images:,} test images of "
        f"{job.dataset.name}; the parent classifies {percent('parent_test_accuracy')}%. They agree "
        f"on {percent('test_agreement')}%."
    )
    rows = [
        ["parent", percent("parent_test_accuracy"), "", f"{summary['parent_num_parameters']:,}"],
        [
            "compressed",
            percent("test_accuracy"),
            percent("test_agreement"),
            f"{summary['num_parameters']:,}",
        ],
    ]
    numbers = [
        ["hidden units", units],
        ["relative size (hidden units)", f"{percent('relative_size')} %"],
        [
            "agreement with the parent on the images of evolution",
            f"{percent('evolution_agreement')} %",
        ],
        ["cosine of its weights and the parent's", f"{summary['weights_cosine']:.3f}"],
        ["mutations in its line", str(summary["num_mutations"])],
        ["time in generations", f"{summary['seconds']:.1f} s"],
        ["compilation", f"{summary['compile_seconds']:.1f} s"],
        ["training of the parent", f"{summary['parent_seconds']:.1f} s"],
        ["failed evaluations", str(summary["num_failed"])],
    ]
    tables = [Table("On the test split", ["", "accuracy (%)", "agreement (%)", "parameters"], rows)]
    figures = [
        Figure(
            "generations",
            "The population by generation: mean, and from worst to best",
            plotting.compression_curves(lines),
        )
    ]
    if front:
        relative = summary["num_parameters"] / summary["parent_num_parameters"]
        shown_front = plotting.accuracy_front(
            front, summary["parent_evolution_accuracy"], (relative, summary["evolution_accuracy"])
        )
        caption = "The front: every network is in front/, with front.json"
        figures.append(Figure("front", caption, shown_front))
        shown_rows = front[:: max(1, len(front) // 12)]
        cells = [
            [
                "-".join(map(str, row["hidden_units"])),
                f"{100 * row['relative_parameters']:.1f}",
                f"{100 * row['evolution_accuracy']:.2f}",
                f"{100 * row['test_accuracy']:.2f}",
            ]
            for row in shown_rows
        ]
        header = ["hidden units", "parameters (%)", "evolution's images (%)", "test images (%)"]
        title = f"The front, {len(shown_rows)} of {len(front)} networks"
        tables.insert(1, Table(title, header, cells))
    return Report(
        f"A network for {job.dataset.name}, compressed by evolution",
        lead,
        [
            (f"{percent('test_accuracy')} %", "test accuracy"),
            (f"{percent('parent_test_accuracy')} %", "of the parent"),
            (f"{summary['num_parameters']:,}", "parameters"),
            (f"{percent('relative_size')} %", "of the parent's hidden units"),
            (duration(summary["seconds"]), "of evolution"),
        ],
        tables,
        figures,
        numbers,
        [
            lead,
            f"time: parent {summary['parent_seconds']:.1f} s, compilation "
            f"{summary['compile_seconds']:.1f} s, generations {summary['seconds']:.1f} s",
            f"network: {job.directory / 'network.safetensors'}",
        ],
    )


SYSTEM = System(
    "ecomp",
    Options,
    prepare,
    search,
    finish,
    present,
    columns=Columns(
        quantities=(
            accuracy("test_accuracy", "test accuracy"),
            accuracy("parent_test_accuracy", "of the parent"),
            accuracy("test_agreement", "agreement"),
            accuracy("relative_size", "relative size"),
            Quantity("num_parameters", "parameters", digits=0),
            SECONDS,
        ),
        curves=tuple(
            ("generation", f"{name}_mean")
            for name in ("accuracy", "relative_size", "similarity_loss")
        ),
    ),
    metrics={"accuracy_mean": "accuracy", "relative_size_mean": "relative size"},
)
