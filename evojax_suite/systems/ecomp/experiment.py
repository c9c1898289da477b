"""Compress a trained network by evolution and judge what it still does on the test part."""

from __future__ import annotations

import time
from dataclasses import dataclass, field, replace
from itertools import pairwise
from pathlib import Path
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
import tyro

from evojax_suite import networks, proxy_network
from evojax_suite.data import load, with_whole_training_set
from evojax_suite.data.splits import balanced_subset
from evojax_suite.networks import NetworkConfig
from evojax_suite.operators import non_dominated_ranks
from evojax_suite.reporting import plotting, report
from evojax_suite.reporting.progress import console
from evojax_suite.reporting.report import Figure, Table
from evojax_suite.running.options import RunOptions, check_seed, differing, duration
from evojax_suite.runtime.results import open_run, read_lines, write_json
from evojax_suite.systems import ecomp
from evojax_suite.systems.ecomp import artifact as compressed
from evojax_suite.systems.ecomp import compression, feed_forward
from evojax_suite.systems.ecomp.artifact import CompressedNetwork
from evojax_suite.systems.ecomp.feed_forward import Network
from evojax_suite.training import TrainingConfig
from evojax_suite.types import Dataset, PyTree, TrainingData, training_data

_PAPER_IMAGES = 10_000
_STEPS_PER_CALL = 10  # half a second on two cores


@dataclass(frozen=True)
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
    inputs: compressed.Inputs = "unit"
    """What the parent takes: pixels in [0, 1] as in the paper, or normalised."""
    pooling: feed_forward.Pooling = "average"
    """Pooling after each convolution of a parent that has any."""
    parent_network: Literal["MLP", "ConvNet"] = "MLP"
    """What is trained where no parent is given; a ConvNet has three convolutions."""
    parent_units: int | None = None
    """Units of each of its hidden layers; by default 256, the paper's, or 32 filters."""
    parent_epochs: int = 4
    """Epochs of its training on the whole training set."""
    parent_seed: int = 0
    """Seed of the parent's training, so that runs of different seeds compress the same parent."""
    num_images: int | None = None
    """Images that evolution sees, equally many of each class; by default the paper's 10,000, or as
    many whole batches as there are."""
    config: tyro.conf.OmitArgPrefixes[ecomp.Config] = field(default_factory=ecomp.Config)
    params: tyro.conf.OmitArgPrefixes[ecomp.Params] = field(default_factory=ecomp.Params)

    def __post_init__(self):
        super().__post_init__()
        check_seed("parent_seed", self.parent_seed)
        for name, least in (("parent_units", 1), ("parent_epochs", 1)):
            value = getattr(self, name)
            if value is not None and value < least:
                raise ValueError(f"{name} must be >= {least}, got {value}")

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


def evolution_images(dataset: Dataset, num_images: int | None, batch_size: int) -> np.ndarray:
    """Positions of the training images that evolution sees."""
    labels = dataset.train.labels
    if num_images is None:
        most = dataset.num_classes * int(np.bincount(labels, minlength=dataset.num_classes).min())
        num_images = min(_PAPER_IMAGES, min(most, len(labels) - 1) // batch_size * batch_size)
        if not num_images:
            raise ValueError(
                f"{dataset.name} has {most} images of balanced classes, fewer than batch_size "
                f"{batch_size}"
            )
    return balanced_subset(labels, num_images, dataset.num_classes)


def parent_data(dataset: Dataset, inputs: compressed.Inputs) -> TrainingData:
    """The training part, as a network of these inputs takes it."""
    mean, std = compressed.constants(dataset, inputs)
    return training_data(replace(dataset, mean=tuple(mean), std=tuple(std)))


def train_parent(
    dataset: Dataset,
    inputs: compressed.Inputs,
    network: NetworkConfig,
    epochs: int,
    seed: int,
    directory: Path,
    options: RunOptions,
) -> Network:
    """Train the parent, an epoch a step, kept and resumed in `directory`."""
    config = proxy_network.Config(
        network=network,
        training=TrainingConfig(num_epochs=epochs, batch_size=100, learning_rate=1e-3),
    )
    algorithm = proxy_network.build(config, dataset.num_classes, dataset.image_shape)
    data = parent_data(dataset, inputs)
    outcome = options.drive(
        "parent", algorithm, jax.random.key(seed), None, data, epochs, directory
    )
    return as_plain(outcome.state.fit.parameters, network, dataset)


def untrained(network: NetworkConfig, dataset: Dataset) -> Network:
    """A parent of zeros, with the shapes of the trained one. Raises ValueError where the images do
    not fit."""
    module = networks.create(network, dataset.num_classes, dataset.image_shape)
    images = np.zeros((1, *dataset.image_shape), np.float32)
    shapes = jax.eval_shape(module.init, jax.random.key(0), images)["params"]
    zeros = jax.tree.map(lambda leaf: np.zeros(leaf.shape, leaf.dtype), shapes)
    return as_plain(zeros, network, dataset)


def as_plain(parameters: PyTree, network: NetworkConfig, dataset: Dataset) -> Network:
    """What `network` has learned, as plain arrays."""
    arrays = {
        f"{layer}.{role}": np.asarray(array)
        for layer, parts in parameters.items()
        for role, array in parts.items()
    }
    return feed_forward.from_arrays(
        arrays, dataset.image_shape, dataset.num_classes, network.pooling
    )


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
    directory: Path, config: ecomp.Config, state: ecomp.State, parts: dict, wrap
) -> list[dict]:
    """Write the networks of the last population that no other beats in accuracy, similarity loss
    and parameters together, and what is known of each, smallest first.

    parts: images and labels by name; wrap: makes a CompressedNetwork of a network.
    """
    scores = jax.device_get(ecomp.final_scores(config, state))
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


def run(options: Options) -> Path:
    """The whole run, in the folder that is returned. Raises ValueError, DataError or OSError, each
    with one line to show."""
    config, params = options.config, options.params
    dataset = with_whole_training_set(
        load(options.dataset, options.data_dir, cache=options.cache_data)
    )
    places = evolution_images(dataset, options.num_images, config.batch_size)
    parent = None
    if options.parent is not None:
        parent = feed_forward.load(
            options.parent, dataset.image_shape, dataset.num_classes, options.pooling
        )
    ecomp.check(config, params, parent or untrained(options.trained_parent, dataset), len(places))
    directory = options.directory("ecomp", dataset)
    open_run(directory, options.settings(), options.resume)
    beyond = differing(config, ecomp.Config()) | differing(params, ecomp.Params())
    shown = ", ".join(f"{name}={value}" for name, value in beyond.items()) or "none"
    console.say(
        f"{dataset.name}: {len(places):,} of {len(dataset.train):,} training, "
        f"{len(dataset.test):,} test images; run in {directory}"
    )
    console.say(f"settings that differ from the paper's: {shown}")

    start = time.perf_counter()
    if parent is None:
        parent = train_parent(
            dataset,
            options.inputs,
            options.trained_parent,
            options.parent_epochs,
            options.parent_seed,
            directory / "parent",
            options,
        )
        feed_forward.save(directory / "parent.safetensors", parent)
    parent_seconds = time.perf_counter() - start

    mean, std = compressed.constants(dataset, options.inputs)
    images, labels = dataset.train.images[places], dataset.train.labels[places]
    data = ecomp.make_data(parent, images, labels, mean, std, options.pooling)
    algorithm = ecomp.build(config)
    num_steps = ecomp.num_steps(config, len(places))
    outcome = options.drive(
        "compressing",
        algorithm,
        jax.random.key(options.seed),
        params,
        data,
        num_steps,
        directory,
        steps_per_call=_STEPS_PER_CALL,
        members_per_step=config.population_size,
        same_for_seeds=True,
    )
    options.end_dry_run()
    best = jax.device_get(jax.jit(algorithm.result)(outcome.state, params, data))
    network = compression.trimmed(best.network, best.sizes)
    units = [u[:size] for u, size in zip(best.units, best.sizes, strict=True)]
    lineage = {
        "member": int(best.member),
        "num_mutations": int(best.num_mutations),
        "weights_cosine": likeness_to_parent(network, parent, units),
        "parent": str(options.parent) if options.parent else "parent.safetensors",
        "parent_hidden_units": feed_forward.hidden_sizes(parent),
        "units_kept": units,
    }
    about = (dataset.image_shape, mean, std, dataset.class_names, dataset.name)
    result = CompressedNetwork(network, *about, lineage, options.pooling)
    result.save(directory)

    # Selection is over: only here is the test part opened.
    before = CompressedNetwork(parent, *about, {}, options.pooling)
    agreement, accuracy = {}, {}
    parts = {
        "evolution": (images, labels),
        "test": (dataset.test.images, dataset.test.labels),
    }
    for part, (split_images, split_labels) in parts.items():
        predictions = [one.logits(split_images).argmax(-1) for one in (before, result)]
        accuracy[part] = [float(np.mean(p == split_labels)) for p in predictions]
        agreement[part] = float(np.mean(predictions[0] == predictions[1]))
    sizes = [int(size) for size in best.sizes]
    summary = {
        "system": "ecomp",
        "dataset": dataset.name,
        "test_accuracy": accuracy["test"][1],
        "parent_test_accuracy": accuracy["test"][0],
        "test_agreement": agreement["test"],
        "evolution_accuracy": accuracy["evolution"][1],
        "parent_evolution_accuracy": accuracy["evolution"][0],
        "evolution_agreement": agreement["evolution"],
        "relative_size": sum(sizes) / sum(feed_forward.hidden_sizes(parent)),
        "hidden_units": sizes,
        "num_parameters": result.num_parameters,
        "parent_num_parameters": before.num_parameters,
        "fitness": float(best.fitness),
        "num_generations": config.num_generations,
        "num_mutations": lineage["num_mutations"],
        "weights_cosine": lineage["weights_cosine"],
        "num_failed": outcome.num_failed,
        "seconds": outcome.seconds,
        "compile_seconds": outcome.compile_seconds,
        "parent_seconds": parent_seconds,
        "seed": options.seed,
        "options": beyond,
    }
    front = []
    if config.selection == "nsga2":

        def wrap(network):
            return CompressedNetwork(network, *about, {}, options.pooling)

        front = save_front(directory, config, outcome.state, parts, wrap)
        summary["front_size"] = len(front)
    write_json(directory / "summary.json", summary)
    _present(directory, options, dataset, summary, shown, front)
    return directory


def _present(
    directory: Path,
    options: Options,
    dataset: Dataset,
    summary: dict,
    shown: str,
    front: list[dict],
) -> None:
    """Figure, report and the closing lines on the terminal."""
    lines = [line for line in read_lines(directory / "metrics.jsonl") if not line["judging"]]

    def percent(name):
        return f"{100 * summary[name]:.2f}"

    units = "-".join(map(str, summary["hidden_units"]))
    lead = (
        f"{units} hidden units, {percent('relative_size')}% of the parent's, classify "
        f"{percent('test_accuracy')}% of the {len(dataset.test):,} test images of {dataset.name}; "
        f"the parent classifies {percent('parent_test_accuracy')}%. They agree on "
        f"{percent('test_agreement')}%."
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
        ["unlike the paper", shown],
    ]
    tables = [
        Table("On the test part", ["", "accuracy (%)", "agreement (%)", "parameters"], rows),
    ]
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
    report.write(
        directory / "report.html",
        f"A network for {dataset.name}, compressed by evolution",
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
        report.commands(directory, "ecomp", options.typed, options.data_dir),
        {"config.json": options.settings(), "summary.json": summary},
    )
    console.say(lead)
    console.say(
        f"time: parent {summary['parent_seconds']:.1f} s, compilation "
        f"{summary['compile_seconds']:.1f} s, generations {summary['seconds']:.1f} s"
    )
    console.say(
        f"report: {directory / 'report.html'}, network: {directory / 'network.safetensors'}"
    )
