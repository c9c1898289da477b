"""Rules of selection that the literature and we propose, in one trainer on equal gradients.

    python experiments/cest/selection.py
    python experiments/cest/selection.py --datasets cifar10 --seeds 0 --rules random recommended

Every rule trains a ConvNet of width 16 on 3,000 images: one epoch on all of them, then 19
on a quarter (the rules that name another part excepted), with the labels as they are and with 10 %
of them wrong. Runs are written as they come (selection.json); the same command goes on after an
interruption. Needs the datasets in --data-dir or EVOJAX_SUITE_DATA. Seconds count only where
nothing else runs.
"""

from __future__ import annotations

import os
import tempfile
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import jax
import numpy as np
import tyro

from evojax_suite import cest, networks
from evojax_suite.data import load, some_images
from evojax_suite.networks import NetworkConfig
from evojax_suite.runtime.results import Rows, spread, to_jsonable
from evojax_suite.training import TrainingConfig, batches_of, evaluate
from evojax_suite.types import Dataset, Split

OF_CLASSES = {"balanced": True}
REDUCIBLE = {"difficulty": "reducible"}
RULES: dict[str, dict[str, Any]] = {
    "full": {"selection": "full"},
    "random": {"selection": "random"},
    "random, anew each epoch": {"selection": "random", "epochs_per_selection": 1},
    "cest": {},
    "el2n": {"selection": "top_k", "difficulty": "el2n"},
    "selective_backprop": {"selection": "selective_backprop"},
    "infobatch": {"selection": "infobatch", "num_epochs": 8},
    "craig": {"selection": "craig", **OF_CLASSES},
    "grad_match": {"selection": "grad_match", **OF_CLASSES},
    "evolved to match gradients": {"matching": True, "matching_weight": 1.0, **OF_CLASSES},
    "evolved, reducible loss": REDUCIBLE,
    "evolved, reducible loss and gradients": {"matching": True, **REDUCIBLE, **OF_CLASSES},
    "reducible_loss, highest": {"selection": "reducible_loss"},
    "recommended": {"selection": "reducible_loss", "temperature": 0.5},
    "random, 60 %": {"selection": "random", "fraction": 0.6},
    "infobatch, 20 epochs": {"selection": "infobatch"},
    "reducible_loss, highest, 60 %": {"selection": "reducible_loss", "fraction": 0.6},
    "recommended, 60 %": {"selection": "reducible_loss", "temperature": 0.5, "fraction": 0.6},
}
LONGER = (
    "full",
    "random, 60 %",
    "infobatch, 20 epochs",
    "reducible_loss, highest, 60 %",
    "recommended, 60 %",
)
"""The rules that compute more gradients than the others."""


@dataclass(frozen=True)
class Options:
    rules: tuple[str, ...] = tuple(RULES)
    datasets: tuple[str, ...] = ("fashion_mnist", "cifar10")
    wrong_labels: tuple[float, ...] = (0.0, 0.1)
    """Parts of the training labels that are replaced by another class."""
    seeds: tuple[int, ...] = (0, 1, 2, 3, 4)
    data_dir: Path | None = None
    num_images: int = 3000
    """Training images, balanced."""
    num_validation_images: int = 1000
    network: str = "ConvNet"
    width: int = 16
    num_epochs: int = 20
    learning_rate: float = 5e-3
    """The first one, of a cosine."""
    output: Path = Path("experiments/cest/selection.json")


def with_wrong_labels(dataset: Dataset, share: float) -> Dataset:
    """A share of the training labels replaced by another class, the same for all seeds."""
    random = np.random.default_rng(0)
    labels = dataset.train.labels.copy()
    wrong = random.random(len(labels)) < share
    other = random.integers(1, dataset.num_classes, len(labels))
    labels[wrong] = (labels + other)[wrong] % dataset.num_classes
    return replace(dataset, train=Split(dataset.train.images, labels))


def parts(name: str, options: Options) -> Dataset:
    """A dataset's few images, of the lossless CIFAR-10 where it lies below the others."""
    folder = options.data_dir or Path(os.environ.get("EVOJAX_SUITE_DATA", "."))
    if name == "cifar10" and (folder / "lossless").is_dir():
        folder /= "lossless"
    return some_images(load(name, folder), options.num_images, options.num_validation_images)


class Trainer:
    """All seeds of a rule on one set, compiled once."""

    def __init__(self, options: Options, rule: str, dataset: Dataset):
        changes = dict(RULES[rule])
        given = {
            name: changes.pop(name)
            for name in ("matching_weight", "temperature")
            if name in changes
        }
        self.params = replace(cest.Params(), **given)
        num_epochs = changes.pop("num_epochs", options.num_epochs)
        config = cest.Config(
            network=NetworkConfig(network=options.network, width=options.width),
            training=TrainingConfig(
                num_epochs=num_epochs,
                batch_size=64,
                learning_rate=options.learning_rate,
                schedule="cosine",
            ),
            **changes,
        )
        self.algorithm = cest.build(config, dataset.num_classes, dataset.image_shape, timed=True)
        self.config, self.data = config, cest.make_data(config, dataset)
        self.true = dataset.train.labels
        network = networks.create(config.network, dataset.num_classes, dataset.image_shape)
        test = batches_of(dataset, dataset.test, config.engine)
        self.judge = jax.jit(lambda variables: evaluate(network, variables, test))

    def run(self, seed: int) -> dict[str, Any]:
        """What a training reached, and its curves."""
        key_init, key_steps = jax.random.split(jax.random.key(seed))
        state = jax.jit(self.algorithm.init)(key_init, self.params, self.data)
        lines = []
        for epoch in range(1, self.config.training.num_epochs + 1):
            key = jax.random.fold_in(key_steps, epoch)
            state, metrics = self.algorithm.step(key, state, self.params, self.data)
            lines.append(to_jsonable(metrics._asdict()))
        variables = self.algorithm.result(state, self.params, self.data)
        stages = {name for line in lines for name in line["stage_seconds"]}
        return {
            "test_accuracy": round(float(self.judge(variables).accuracy), 5),
            "validation_accuracy": [round(line["validation_accuracy"], 4) for line in lines],
            "gradient_examples": [line["gradient_examples"] for line in lines],
            "seconds": {
                name: round(sum(line["stage_seconds"].get(name, 0.0) for line in lines), 2)
                for name in sorted(stages)
            },
            "clock": [round(cest.cost_seconds(line["stage_seconds"]), 3) for line in lines],
        }


def main(options: Options) -> None:
    rows = Rows(
        options.output, options, "rules", "datasets", "wrong_labels", "seeds", "data_dir", "output"
    )
    done = {(row["dataset"], row["wrong"], row["rule"], row["seed"]) for row in rows}
    with tempfile.TemporaryDirectory() as folder:  # rules share most of their programs
        jax.config.update("jax_compilation_cache_dir", folder)
        for name in options.datasets:
            whole = parts(name, options)
            for wrong in options.wrong_labels:
                dataset = with_wrong_labels(whole, wrong)
                for rule in options.rules:
                    left = [s for s in options.seeds if (name, wrong, rule, s) not in done]
                    if not left:
                        continue
                    trainer = Trainer(options, rule, dataset)
                    for seed in left:
                        found = trainer.run(seed)
                        about = {"dataset": name, "wrong": wrong, "rule": rule, "seed": seed}
                        rows.add(about | found)
                        print(*about.values(), found["test_accuracy"], flush=True)
                    jax.clear_caches()  # a process may map only so many programs
    print(tables(rows, options))


def tables(rows: Rows, options: Options) -> str:
    """Accuracies, paired differences, and the gradients that reach what the whole set has at half
    its epochs."""
    by_place = {(row["dataset"], row["wrong"], row["rule"], row["seed"]): row for row in rows}
    settings = [(name, wrong) for name in options.datasets for wrong in options.wrong_labels]
    titles = [f"{name}, {100 * wrong:.0f} % wrong" for name, wrong in settings]
    header = f"| rule | gradient examples | {' | '.join(titles)} |\n|---|---{'|---' * len(titles)}|"

    def seeds_of(setting: tuple[str, float], *rules: str) -> list[int]:
        return [s for s in options.seeds if all((*setting, r, s) in by_place for r in rules)]

    def accuracy(setting: tuple[str, float], rule: str) -> str:
        values = [
            100 * by_place[*setting, rule, s]["test_accuracy"] for s in seeds_of(setting, rule)
        ]
        return spread(values) if values else "not run"

    def difference(setting: tuple[str, float], rule: str) -> str:
        other = "full" if rule in LONGER else "random, anew each epoch"
        found = [
            100
            * (
                by_place[*setting, rule, s]["test_accuracy"]
                - by_place[*setting, other, s]["test_accuracy"]
            )
            for s in seeds_of(setting, rule, other)
        ]
        if len(found) < 2:
            return "not run"
        return f"{np.mean(found):+.1f} ± {np.std(found, ddof=1) / np.sqrt(len(found)):.1f}"

    def needed(setting: tuple[str, float], rule: str) -> str:
        found = []
        for seed in seeds_of(setting, rule, "full"):
            target = by_place[*setting, "full", seed]["validation_accuracy"][
                options.num_epochs // 2 - 1
            ]
            row = by_place[*setting, rule, seed]
            reached = np.flatnonzero(np.array(row["validation_accuracy"]) >= target)
            found.append(row["gradient_examples"][reached[0]] if len(reached) else np.inf)
        if not found:
            return "not run"
        return "never" if np.isinf(np.median(found)) else f"{np.median(found):,.0f}"

    def table(cell: Any, rules: list[str]) -> str:
        lines = [header]
        for rule in rules:
            counts = [row["gradient_examples"][-1] for row in rows if row["rule"] == rule]
            middle = f"{np.mean(counts):,.0f}" if counts else "not run"
            cells = " | ".join(cell(setting, rule) for setting in settings)
            lines.append(f"| {rule} | {middle} | {cells} |")
        return "\n".join(lines)

    compared = [rule for rule in options.rules if rule not in ("full", "random, anew each epoch")]
    number = {setting: len(seeds_of(setting, "full")) for setting in settings}
    return "\n\n".join(
        [
            f"Test accuracy (%), mean ± std; seeds: {number}",
            table(accuracy, list(options.rules)),
            "Against random subsets anew each epoch (the last four: the whole set), paired, "
            "mean ± standard error:",
            table(difference, compared),
            "Gradient examples to the whole set's validation accuracy at half its epochs, median:",
            table(needed, list(options.rules)),
        ]
    )


if __name__ == "__main__":
    main(tyro.cli(Options))
