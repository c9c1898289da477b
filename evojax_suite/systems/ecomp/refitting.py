"""The part of an `ecomp` run that searches with refits: the front of sizes, the network that is
chosen from it, and the simple alternatives at the same sizes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from evojax_suite.data import normalize
from evojax_suite.reporting import plotting
from evojax_suite.reporting.formats import duration
from evojax_suite.reporting.report import Figure, Report, Table
from evojax_suite.running.system import Phase, Search
from evojax_suite.runtime.loop import LoopResult
from evojax_suite.runtime.results import write_json
from evojax_suite.systems.ecomp import (
    baselines,
    feed_forward,
    graph as graphs,
    latency,
    mask_search,
    refit,
)
from evojax_suite.systems.ecomp.artifact import CompressedNetwork
from evojax_suite.systems.ecomp.baselines import Mask
from evojax_suite.systems.ecomp.config import RefitConfig, RefitParams
from evojax_suite.systems.ecomp.feed_forward import Network
from evojax_suite.systems.ecomp.graph import Graph
from evojax_suite.types import Array, Dataset, Split

_MOST_VALIDATION_IMAGES = 10_000
_AT_ONCE = 8  # masks of a compiled call of the final fits

Accuracies = dict[str, float]


@dataclass(frozen=True)
class Setting:
    """What the search has of its run."""

    directory: Path
    config: RefitConfig
    params: RefitParams
    seed: int
    dataset: Dataset
    places: np.ndarray  # of evolution's images among the training images
    mean: np.ndarray  # by which the parent's inputs are normalised
    std: np.ndarray
    pooling: feed_forward.Pooling
    simple_rules: bool  # whether networks by simple rules are made for comparison
    fine_tuning_seconds: float | None  # None: as many as the search took

    @property
    def order(self) -> np.ndarray:
        """The training images, those of evolution first, both parts in a fixed random order."""
        order = np.random.RandomState(0).permutation(len(self.dataset.train))
        return np.concatenate([order[np.isin(order, self.places, invert=bool(i))] for i in (0, 1)])

    def inputs(self, images: np.ndarray, parent: Graph) -> Array:
        """Images as the parent takes them."""
        values = normalize(images, self.mean, self.std)
        if not parent[0].is_convolution:
            values = values.reshape(len(images), -1)
        return jnp.asarray(values, jnp.float32)

    def targets(self, labels: np.ndarray) -> Array:
        """Labels as probabilities."""
        return jax.nn.one_hot(labels, self.dataset.num_classes)


@dataclass(frozen=True)
class Found:
    """What the search leaves to the end of the run."""

    parent: Graph
    parent_seconds: float
    data: mask_search.Data
    loop: LoopResult


def search(setting: Setting, network: Network | Graph, parent_seconds: float) -> Search:
    """Look for the front of sizes of a trained network."""
    config, params = setting.config, setting.params
    parent = graphs.as_graph(network, setting.pooling)
    places = setting.order[: len(setting.places)]
    train = setting.dataset.train
    inputs, targets = (
        setting.inputs(train.images[places], parent),
        setting.targets(train.labels[places]),
    )
    # The same for all seeds, which may then share a program.
    shape = setting.dataset.image_shape
    tables: tuple[latency.Table, ...] = ()
    if by_latency := config.size == "latency":
        path = setting.directory / "latency.json"
        tables = latency.measured(parent, shape, config.num_timed_images, path)
    key_fit, images = jax.random.key(0), (inputs, targets, shape)
    data = mask_search.make_data(key_fit, config, params, parent, *images, tables)
    algorithm, key = mask_search.build(config), jax.random.key(setting.seed)
    pace: dict[str, Any] = {"members_per_step": config.population_size}
    pace["same_for_seeds"] = not by_latency  # it is measured anew for each
    loop = yield Phase("refitting", algorithm, key, params, data, config.num_generations, **pace)
    return Found(parent, parent_seconds, data, loop)


class Evaluator:
    """Fits networks to masks, on all images of evolution, and counts what they predict."""

    def __init__(self, setting: Setting, parent: Graph, test_split: Split):
        self.parent, train = parent, setting.dataset.train
        fitted, others = np.split(setting.order, [len(setting.places)])
        others = others[:_MOST_VALIDATION_IMAGES]
        inputs = partial(setting.inputs, parent=self.parent)
        self.labels = np.concatenate([train.labels[others], test_split.labels])
        self.num_validation = len(others)
        self.inputs = jnp.concatenate([inputs(train.images[others]), inputs(test_split.images)])
        self.arranged = refit.arranged(self.parent, self.inputs)
        fitted_inputs, targets = inputs(train.images[fitted]), setting.targets(train.labels[fitted])
        key, positions = jax.random.key(0), setting.config.num_positions
        self.fit = refit.make_fit(key, self.parent, fitted_inputs, targets, positions)
        function = partial(mask_search.fitted_networks, setting.config, setting.params)
        self.fitted = jax.jit(function)

    def refitted(self, masks: Sequence[Mask]) -> list[tuple[Graph, Accuracies]]:
        """The network of each mask, and its accuracies."""
        networks = []
        for start in range(0, len(masks), _AT_ONCE):
            some = [*masks[start : start + _AT_ONCE]]
            padded = some + some[-1:] * (min(_AT_ONCE, len(masks)) - len(some))
            stacked = tuple(jnp.stack(each) for each in zip(*padded, strict=True))
            whole, classes = self.fitted(self.parent, self.fit, stacked, self.arranged)
            leaves, structure = jax.tree.flatten(jax.device_get(whole))
            for mask, predicted, *arrays in zip(some, classes, *leaves, strict=False):
                network = jax.tree.unflatten(structure, arrays)
                cut = graphs.part(network, [*map(np.flatnonzero, mask)])
                networks.append((cut, self.accuracies(predicted)))
        return networks

    def unfitted(self, network: Graph, inputs_kept: np.ndarray) -> Accuracies:
        """The accuracies of a network as it is."""
        logits = jax.jit(mask_search.logits_of)(network, self.inputs[..., inputs_kept])
        return self.accuracies(logits.argmax(-1))

    def accuracies(self, classes: Array) -> Accuracies:
        """The accuracies of predictions of the validation and test images."""
        right = np.asarray(classes) == self.labels
        parts = np.split(right, [self.num_validation])
        names = "validation_accuracy", "test_accuracy"
        return {name: float(part.mean()) for name, part in zip(names, parts, strict=True)}


@dataclass(frozen=True)
class Summary:
    """The numbers of a run, its front, and the alternatives at the size of the network."""

    numbers: dict[str, Any]
    front: list[dict[str, Any]]
    num_test_images: int


def finish(
    setting: Setting,
    found: Found,
    test_split: Split,
    wrap: Callable[[Graph, dict[str, Any], tuple[int, ...] | None], CompressedNetwork],
) -> Summary:
    """Write the front and the network that is chosen from it. wrap: a network, its lineage and the
    inputs that it takes -> what is written."""
    config, parent, state = setting.config, found.parent, found.loop.state
    directory = setting.directory
    evaluator, whole = Evaluator(setting, parent, test_split), graphs.group_sizes(parent)
    members = mask_search.front_of(config, state)
    by_latency = config.size == "latency"
    masks: list[Mask] = [tuple(np.asarray(mask[m]) for mask in state.masks) for m in members]

    def sizes_of(mask: Mask):
        return tuple(int(each.sum()) for each in mask)

    def relative(sizes: Sequence[int]):
        return float(mask_search.relative_size(config, found.data, jnp.array([sizes]))[0])

    def milliseconds(network: Graph):
        """Returns the measured milliseconds of a batch."""
        shape = found.data.image_shape
        return 1000 * latency.measured_whole(network, shape, config.num_timed_images)

    l1, order = baselines.incoming_l1(parent), jax.device_get(found.data.priorities)
    rules = {"l1_refit": (l1, True), "elimination": (order, not config.prune_inputs)}

    def by_rule(rule: str, most: float) -> Mask | None:
        scores, whole_inputs = rules[rule]
        whole_inputs |= parent[0].is_convolution
        sizes = baselines.equal_shares(whole, relative, most, whole_inputs)
        return None if sizes is None else baselines.masks_of(scores, sizes)

    rows = []
    for mask, (network, scores) in zip(masks, evaluator.refitted(masks), strict=True):
        sizes = sizes_of(mask)
        rows.append({"mask": mask, "network": network} | _size(found, sizes) | scores)
        if by_latency:
            rows[-1]["milliseconds"] = milliseconds(network)
    for rule in rules:
        chosen = [by_rule(rule, row[f"relative_{config.size}"]) for row in rows]
        present = [mask for mask in chosen if mask is not None]
        fitted = iter(evaluator.refitted(present))
        for row, mask in zip(rows, chosen, strict=True):
            row[rule] = None
            if mask is not None:
                row[rule] = _size(found, sizes_of(mask)) | next(fitted)[1]

    parents = evaluator.unfitted(parent, np.arange(whole[0]))
    enough = [
        row
        for row in rows
        if row["validation_accuracy"] >= parents["validation_accuracy"] - config.tolerance
    ]
    best = enough[0] if enough else max(rows, key=lambda row: row["validation_accuracy"])
    sizes, results = (best["num_inputs"], *best["hidden_units"]), {}
    if setting.simple_rules:
        orders, seconds = {"elimination": order}, found.loop.seconds
        results = alternatives(setting, evaluator, sizes, seconds, orders)

    (directory / "front").mkdir(exist_ok=True)
    for index, row in enumerate(rows):
        network, mask = row.pop("network"), row.pop("mask")
        inputs = None if mask[0].all() else tuple(np.flatnonzero(mask[0]).tolist())
        name = f"front/{index:03d}-{'-'.join(map(str, row['hidden_units']))}.safetensors"
        graphs.save(directory / name, network)
        row |= {"file": name, "inputs_kept": inputs}
        if row is best:
            lineage = {"units_kept": [*map(np.flatnonzero, mask[1:])]}
            wrap(network, lineage, inputs).save(directory)
    write_json(directory / "front.json", rows)

    numbers = {name: value for name, value in best.items() if name not in ("file", "inputs_kept")}
    numbers |= {f"parent_{name}": value for name, value in parents.items()}
    numbers |= {
        "parent_num_parameters": graphs.num_parameters(parent, whole),
        "alternatives": results,
        "size": config.size,
        "front_size": len(rows),
        "num_generations": config.num_generations,
        "num_failed": found.loop.num_failed,
        "seconds": found.loop.seconds,
        "compile_seconds": found.loop.compile_seconds,
        "parent_seconds": found.parent_seconds,
    }
    if by_latency:
        numbers["parent_milliseconds"] = milliseconds(parent)
    return Summary(numbers, rows, len(test_split))


def _size(found: Found, sizes: Sequence[int]) -> dict[str, Any]:
    """What the files say of a network's size."""
    parent, whole = found.parent, graphs.group_sizes(found.parent)
    shape = found.data.image_shape
    parameters = graphs.num_parameters(parent, sizes)
    multiplications = graphs.num_multiplications(parent, sizes, shape)
    size = {
        "num_inputs": sizes[0],
        "hidden_units": [*sizes[1:]],
        "num_parameters": parameters,
        "relative_parameters": parameters / graphs.num_parameters(parent, whole),
        "relative_multiplications": multiplications
        / graphs.num_multiplications(parent, whole, shape),
    }
    if tables := found.data.tables:
        seconds, most = (latency.seconds_of(parent, tables, each) for each in (sizes, whole))
        size["relative_latency"] = float(seconds / most)
    return size


def alternatives(
    setting: Setting,
    evaluator: Evaluator,
    sizes: tuple[int, ...],
    seconds: float,
    orders: dict[str, baselines.Scores] | None = None,
) -> dict[str, Any]:
    """What simple rules reach with so many units of each group. seconds: those of the search.
    orders: the scores of further rules, by name."""
    parent, random = evaluator.parent, np.random.default_rng(setting.seed)
    scores = {
        "random": tuple(random.random(size) for size in graphs.group_sizes(parent)),
        "l1": baselines.incoming_l1(parent),
        "activity": baselines.activity_times_outgoing(parent, evaluator.inputs[:1000]),
    }
    masks = {
        name: baselines.masks_of(each, sizes) for name, each in (scores | (orders or {})).items()
    }
    everything = tuple(np.ones(size, bool) for size in graphs.group_sizes(parent))
    fitted = evaluator.refitted([everything, *masks.values()])
    names = "parent, logits to labels", *(f"{name}, refitted" for name in masks)
    results = {name: found for name, (_, found) in zip(names, fitted, strict=True)}
    for name in scores:
        places = [*map(np.flatnonzero, masks[name])]
        results[name] = evaluator.unfitted(graphs.part(parent, places), places[0])
    if setting.fine_tuning_seconds is not None:
        seconds = setting.fine_tuning_seconds
    if seconds:
        places, train = [*map(np.flatnonzero, masks["l1"])], setting.dataset.train
        network = graphs.part(parent, places)
        inputs = setting.inputs(train.images, parent)[..., places[0]]
        tuned, epochs = baselines.fine_tuned(
            jax.random.key(setting.seed), network, inputs, jnp.asarray(train.labels), seconds
        )
        found = evaluator.unfitted(tuned, places[0])
        results["l1, trained by gradients"] = found | {"seconds": seconds, "epochs": epochs}
    return results


def table_of_rules(units: str, networks: dict[str, dict[str, Any]]) -> Table:
    """The accuracies of networks of equal size by name."""
    titles = {"test_accuracy": "test images (%)", "validation_accuracy": "validation images (%)"}
    columns = [column for column in titles if all(column in row for row in networks.values())]
    rows = [
        [name.replace("l1", "L1"), *(f"{100 * row[column]:.2f}" for column in columns)]
        for name, row in networks.items()
    ]
    header = ["units", *(titles[column] for column in columns)]
    return Table(f"Networks of {units} units", header, rows)


def present(dataset: str, directory: Path, summary: Summary) -> Report:
    """The network beside its parent, the front beside the simple rules' networks."""
    numbers, front, size = summary.numbers, summary.front, summary.numbers["size"]

    def percent(value: float):
        return f"{100 * value:.2f}"

    units = "-".join(map(str, (numbers["num_inputs"], *numbers["hidden_units"])))
    tested, parent_tested = (percent(numbers[f"{of}test_accuracy"]) for of in ("", "parent_"))
    share = percent(numbers["relative_parameters"])
    lead = (
        f"{share} % of the parent's parameters ({units} inputs and hidden units) classify "
        f"{tested} % of the {summary.num_test_images:,} test images of {dataset}; the parent "
        f"classifies {parent_tested} %. No gradient was computed."
    )
    parent = {name: numbers[f"parent_{name}"] for name in ("test_accuracy", "validation_accuracy")}
    shown = {"parent": parent, "evolved, refitted": numbers} | numbers["alternatives"]
    tables = [table_of_rules(units, shown), _front_table(front, size)]
    caption = "Accuracy on the test split against size: evolved, and chosen by simple rules"
    charts = plotting.size_fronts(front, numbers, size)
    headline = [
        (f"{tested} %", "test accuracy"),
        (f"{parent_tested} %", "of the parent"),
        (f"{share} %", "of the parent's parameters"),
        (duration(numbers["seconds"]), "of evolution"),
    ]
    times = {"seconds": "search", "compile_seconds": "compilation", "parent_seconds": "parent"}
    details = [[title, f"{numbers[name]:.1f} s"] for name, title in times.items()]
    details.append(["failed evaluations", str(numbers["num_failed"])])
    closing = [lead, f"front: {directory / 'front.json'}"]
    title = f"Networks for {dataset}, pruned by evolution and refitted in closed form"
    return Report(
        title, lead, headline, tables, [Figure("front", caption, charts)], details, closing
    )


def _front_table(front: list[dict[str, Any]], size: str) -> Table:
    rows = []
    for row in front:
        others = (row[rule] for rule in ("l1_refit", "elimination"))
        cells = ["-".join(map(str, (row["num_inputs"], *row["hidden_units"])))]
        cells += [f"{100 * row[f'relative_{kind}']:.1f}" for kind in _shown_sizes(size)]
        cells += [f"{row['milliseconds']:.2f}"] if size == "latency" else []
        cells += [
            f"{100 * each['test_accuracy']:.2f}" if each else "none so small"
            for each in (row, *others)
        ]
        rows.append(cells)
    header = ["units", *(f"{kind} (%)" for kind in _shown_sizes(size))]
    header += ["measured (ms)"] if size == "latency" else []
    header += ["evolved (%)", "L1, refitted (%)", "elimination (%)"]
    return Table("The front, on the test split", header, rows)


def _shown_sizes(size: str) -> tuple[str, ...]:
    return ("parameters",) if size == "parameters" else ("parameters", size)
