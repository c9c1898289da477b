"""The part of an `ecomp` run that searches with refits: the front of sizes, the network that is
chosen from it, and the simple alternatives at the same sizes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from evojax_suite.data import normalize
from evojax_suite.reporting import plotting
from evojax_suite.reporting.formats import duration, short
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
    searched = parent
    if config.low_rank:
        fitted = inputs[: mask_search.num_fitted(config, len(inputs))]
        searched = jax.jit(graphs.decomposed)(parent, fitted)
    # The same for all seeds, which may then share a program.
    shape = setting.dataset.image_shape
    tables: tuple[latency.Table, ...] = ()
    if by_latency := config.size == "latency":
        path = setting.directory / "latency.json"
        tables = latency.measured(searched, shape, config.num_timed_images, path)
    key_fit, images = jax.random.key(0), (inputs, targets, shape)
    data = mask_search.make_data(key_fit, config, params, searched, *images, tables)
    algorithm, key = mask_search.build(config), jax.random.key(setting.seed)
    pace: dict[str, Any] = {"members_per_step": config.population_size}
    pace["same_for_seeds"] = not by_latency  # it is measured anew for each
    loop = yield Phase("refitting", algorithm, key, params, data, config.num_generations, **pace)
    return Found(parent, parent_seconds, data, loop)


class Images:
    """What networks are fitted to and judged by at the end of a run, for any graph of a parent."""

    def __init__(self, setting: Setting, parent: Graph, test_split: Split):
        train = setting.dataset.train
        fitted, others = np.split(setting.order, [len(setting.places)])
        others = others[:_MOST_VALIDATION_IMAGES]
        self.fitted = setting.inputs(train.images[fitted], parent)
        self.targets = setting.targets(train.labels[fitted])
        parts = train.images[others], test_split.images
        self.judged = jnp.concatenate([setting.inputs(part, parent) for part in parts])
        self.arranged = refit.arranged(parent, self.judged)
        self.labels = np.concatenate([train.labels[others], test_split.labels])
        self.num_validation = len(others)


class Evaluator:
    """Fits networks to masks, on all images of evolution, and counts what they predict."""

    def __init__(self, setting: Setting, parent: Graph, images: Images):
        self.parent, self.images = parent, images
        config, params = setting.config, setting.params
        fitted = images.fitted, images.targets
        self.fit = refit.make_fit(jax.random.key(0), parent, *fitted, config.num_positions)
        self.fitted = jax.jit(partial(mask_search.fitted_network, config, params))

    def refitted(self, masks: Sequence[Mask]) -> list[tuple[Graph, Accuracies]]:
        """The network of each mask, and its accuracies. One after the other: a program serves the
        masks of about its size, and there is none for a size that no mask has."""
        networks = []
        for mask in masks:
            kept = mask_search.narrowest(self.parent, mask)
            padded, classes = self.fitted(self.parent, self.fit, kept, self.images.arranged)
            network = graphs.part(jax.device_get(padded), [slice(each.sum()) for each in mask])
            networks.append((graphs.as_one(network), self.accuracies(classes)))
        return networks

    def unfitted(self, network: Graph, inputs_kept: np.ndarray) -> Accuracies:
        """The accuracies of a network as it is."""
        logits = jax.jit(mask_search.logits_of)(network, self.images.judged[..., inputs_kept])
        return self.accuracies(logits.argmax(-1))

    def accuracies(self, classes: Array) -> Accuracies:
        """The accuracies of predictions of the validation and test images."""
        right = np.asarray(classes) == self.images.labels
        parts = np.split(right, [self.images.num_validation])
        names = "validation_accuracy", "test_accuracy"
        return {name: float(part.mean()) for name, part in zip(names, parts, strict=True)}


@dataclass(frozen=True)
class _Rule:
    """A simple way to networks of some size: the best units, an equal share of each group."""

    evaluator: Evaluator
    data: mask_search.Data
    scores: baselines.Scores
    untouched: frozenset[int]  # groups that stay whole

    def mask(self, kind: str, most: float) -> Mask | None:
        """The units of the largest network whose relative size of that kind is at most `most`."""
        whole = graphs.group_sizes(self.data.parent)
        measure = partial(mask_search.relative_size, kind, self.data)
        sizes = baselines.equal_shares(whole, measure, most, self.untouched)
        return None if sizes is None else baselines.masks_of(self.scores, sizes)


def _rules(
    setting: Setting, found: Found, plain: Evaluator, evaluator: Evaluator
) -> dict[str, _Rule]:
    """plain: of the parent; evaluator: of the parent that was searched, where they differ."""
    config, data, parent = setting.config, found.data, found.parent
    prunes_inputs = config.prune_inputs and not parent[0].is_convolution
    order = jax.device_get(data.priorities)
    if config.low_rank:  # that of units is the same: components keep the error of their layer
        order = tuple(order[group] for group in _unit_groups(data))
    tables = data.tables
    if config.low_rank and tables:
        if graphs.pairs(parent):  # it has halves of its own
            path = setting.directory / "parent_latency.json"
            tables = latency.measured(parent, data.image_shape, config.num_timed_images, path)
        else:  # those of whole layers come after those of their halves
            tables = (*tables[len(data.parent) :], tables[len(data.parent) - 1])
    about, inputs = (plain, replace(data, parent=parent, tables=tables)), frozenset({0})
    rules = {
        "l1_refit": _Rule(*about, baselines.incoming_l1(parent), inputs),
        "elimination": _Rule(*about, order, frozenset() if prunes_inputs else inputs),
    }
    if config.low_rank:  # equal shares of the components, by their variance
        scores = tuple(-np.arange(float(size)) for size in graphs.group_sizes(data.parent))
        rules["components"] = _Rule(evaluator, data, scores, frozenset(_unit_groups(data)))
    return rules


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
    directory, data = setting.directory, found.data
    images = Images(setting, parent, test_split)
    evaluator = Evaluator(setting, data.parent, images)
    plain = Evaluator(setting, parent, images) if config.low_rank else evaluator
    members = mask_search.front_of(config, state)
    by_latency = config.size == "latency"
    masks: list[Mask] = [tuple(np.asarray(mask[m]) for mask in state.masks) for m in members]

    def milliseconds(network: Graph):
        """Returns the measured milliseconds of a batch."""
        return 1000 * latency.measured_whole(network, data.image_shape, config.num_timed_images)

    rules = _rules(setting, found, plain, evaluator)

    rows = []
    for mask, (network, scores) in zip(masks, evaluator.refitted(masks), strict=True):
        rows.append({"mask": mask, "network": network} | _size(data, mask) | scores)
        if by_latency:
            rows[-1]["milliseconds"] = milliseconds(network)
    for name, rule in rules.items():
        chosen = [rule.mask(config.size, row[f"relative_{config.size}"]) for row in rows]
        present = [mask for mask in chosen if mask is not None]
        fitted = iter(rule.evaluator.refitted(present))
        for row, mask in zip(rows, chosen, strict=True):
            row[name] = None
            if mask is not None:
                row[name] = _size(rule.data, mask) | next(fitted)[1]

    whole = graphs.group_sizes(parent)
    parents = plain.unfitted(parent, np.arange(whole[0]))
    enough = [
        row
        for row in rows
        if row["validation_accuracy"] >= parents["validation_accuracy"] - config.tolerance
    ]
    best = enough[0] if enough else max(rows, key=lambda row: row["validation_accuracy"])
    results = {}
    if setting.simple_rules:
        rule, size = rules["elimination"], f"relative_{config.size}"
        sizes = (best["num_inputs"], *best["hidden_units"])
        if "ranks" in best:  # it has more units than the rules can keep at its size
            mask = rule.mask(config.size, best[size])
            sizes = () if mask is None else tuple(int(each.sum()) for each in mask)
        if sizes:
            orders, seconds = {"elimination": rule.scores}, found.loop.seconds
            results = alternatives(setting, plain, sizes, seconds, orders)

    (directory / "front").mkdir(exist_ok=True)
    for index, row in enumerate(rows):
        network, mask = row.pop("network"), row.pop("mask")
        inputs = None if mask[0].all() else tuple(np.flatnonzero(mask[0]).tolist())
        name = f"front/{index:03d}-{'-'.join(map(str, row['hidden_units']))}.safetensors"
        graphs.save(directory / name, network)
        row |= {"file": name, "inputs_kept": inputs}
        if row is best:
            groups = _unit_groups(data)
            lineage = {"units_kept": [np.flatnonzero(mask[group]) for group in groups[1:]]}
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


def _unit_groups(data: mask_search.Data) -> list[int]:
    """The groups of the searched parent that are its units, the inputs first."""
    between = graphs.groups_between(data.parent)
    groups = range(len(graphs.group_sizes(data.parent)))
    return [group for group in groups if group not in between]


def _size(data: mask_search.Data, mask: Mask) -> dict[str, Any]:
    """What the files say of a network's size."""
    sizes = [int(each.sum()) for each in mask]
    first, *units = (sizes[group] for group in _unit_groups(data))
    size: dict[str, Any] = {"num_inputs": first, "hidden_units": units}
    if found := graphs.ranks(data.parent, sizes):
        size["ranks"] = found
    size["num_parameters"] = graphs.num_parameters(data.parent, sizes)
    for kind in ("parameters", "multiplications", *(["latency"] if data.tables else [])):
        size[f"relative_{kind}"] = float(mask_search.relative_size(kind, data, sizes))
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
        "activity": baselines.activity_times_outgoing(parent, evaluator.images.judged[:1000]),
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


def table_of_rules(size: str, networks: dict[str, dict[str, Any]]) -> Table:
    """The accuracies of networks of equal size by name. size: in words."""
    titles = {"test_accuracy": "test images (%)", "validation_accuracy": "validation images (%)"}
    columns = [column for column in titles if all(column in row for row in networks.values())]
    rows = [
        [name.replace("l1", "L1"), *(f"{100 * row[column]:.2f}" for column in columns)]
        for name, row in networks.items()
    ]
    header = ["units", *(titles[column] for column in columns)]
    return Table(f"Networks of {size}", header, rows)


def present(dataset: str, directory: Path, summary: Summary) -> Report:
    """The network beside its parent, the front beside the simple rules' networks."""
    numbers, front, size = summary.numbers, summary.front, summary.numbers["size"]

    def percent(value: float):
        return f"{100 * value:.2f}"

    units = _units_of(numbers)
    tested, parent_tested = (percent(numbers[f"{of}test_accuracy"]) for of in ("", "parent_"))
    share = percent(numbers["relative_parameters"])
    lead = (
        f"{share} % of the parent's parameters ({units}) classify "
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
    details = [[title, f"{short(numbers[name])} s"] for name, title in times.items()]
    details.append(["failed evaluations", str(numbers["num_failed"])])
    closing = [lead, f"front: {directory / 'front.json'}"]
    title = f"Networks for {dataset}, pruned by evolution and refitted in closed form"
    return Report(
        title, lead, headline, tables, [Figure("front", caption, charts)], details, closing
    )


def _front_table(front: list[dict[str, Any]], size: str) -> Table:
    rules = {rule: name for rule, name in plotting.RULES.items() if rule in front[0]}
    rows = []
    for row in front:
        others = (row[rule] for rule in rules)
        cells = [_units_of(row)]
        cells += [f"{100 * row[f'relative_{kind}']:.1f}" for kind in _shown_sizes(size)]
        cells += [f"{row['milliseconds']:.2f}"] if size == "latency" else []
        cells += [
            f"{100 * each['test_accuracy']:.2f}" if each else "none so small"
            for each in (row, *others)
        ]
        rows.append(cells)
    header = ["units", *(f"{kind} (%)" for kind in _shown_sizes(size))]
    header += ["measured (ms)"] if size == "latency" else []
    header += [f"{name} (%)" for name in ("evolved", *rules.values())]
    return Table("The front, on the test split", header, rows)


def _units_of(row: dict[str, Any]) -> str:
    """Inputs and hidden units, then ranks where a layer is two."""
    units = "-".join(map(str, (row["num_inputs"], *row["hidden_units"])))
    ranks = row.get("ranks", ())
    if all(rank is None for rank in ranks):
        return f"{units} units"
    shown = "-".join("whole" if rank is None else str(rank) for rank in ranks)
    return f"{units} units, ranks {shown}"


def _shown_sizes(size: str) -> tuple[str, ...]:
    return ("parameters",) if size == "parameters" else ("parameters", size)
