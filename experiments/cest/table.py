"""CEST and what it competes with on equal budgets: every rule in the same trainer.

    python experiments/cest/table.py                  # Table I and Figs. 2 to 7, the rules compared
    python experiments/cest/table.py --study noise    # 10% of the training labels flipped
    python experiments/cest/table.py --study options  # cheaper passes, stability, repair

Runs are written as they come (`<study>.json`); the same command goes on after an interruption.
Needs the dataset in --data-dir or EVOJAX_SUITE_DATA. Let nothing else run: times are compared.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import jax
import numpy as np
import tyro

from evojax_suite import cest, networks
from evojax_suite.data import load, some_images
from evojax_suite.networks import NetworkConfig
from evojax_suite.reporting import plotting
from evojax_suite.reporting.charts import save_png
from evojax_suite.runtime.results import Rows, spread, to_jsonable
from evojax_suite.training import TrainingConfig, batches_of, evaluate
from evojax_suite.types import Dataset, Split

STUDIES = {
    "rules": {
        "cest": {},
        "top_k": {"selection": "top_k"},
        "loss_proportional": {"selection": "loss_proportional"},
        "random": {"selection": "random"},
        "full": {"selection": "full"},
    },
    "noise": {
        "cest": {},
        "top_k": {"selection": "top_k"},
        "loss_proportional": {"selection": "loss_proportional"},
        "random": {"selection": "random"},
        "cest, give up after 3": {"give_up_after": 3},
        "top_k, give up after 3": {"selection": "top_k", "give_up_after": 3},
        "cest, half random": {"random_share": 0.5},
    },
    "options": {
        "cest": {},
        "repair": {"repair": True},
        "balanced": {"balanced": True},
        "half random": {"random_share": 0.5},
        "difficulty averaged, 0.5": {"difficulty_decay": 0.5},
        "error rate as difficulty": {"difficulty": "error"},
        "200 generations of prey": {"prey_generations": 200},
        "a quarter measured anew": {"pass_fraction": 0.25},
        "losses of training alone": {"pass_fraction": 0.0, "reuse_training_losses": True},
    },
}


@dataclass(frozen=True)
class Options:
    study: Literal["rules", "noise", "options"] = "rules"
    seeds: tuple[int, ...] = (0, 1, 2, 3, 4)
    dataset: str = "fashion_mnist"
    data_dir: Path | None = None
    num_images: int = 3000
    """Training images, balanced."""
    num_validation_images: int = 1000
    width: int = 16
    num_epochs: int = 30
    output: Path = Path("experiments/cest")


def parts(options: Options) -> Dataset:
    dataset = load(options.dataset, options.data_dir)
    return some_images(dataset, options.num_images, options.num_validation_images)


def with_flipped_labels(dataset: Dataset, share: float) -> tuple[Dataset, np.ndarray]:
    """A share of the training labels replaced by another class, and which."""
    random = np.random.default_rng(0)
    labels = dataset.train.labels.copy()
    flipped = random.random(len(labels)) < share
    other = random.integers(1, dataset.num_classes, len(labels))
    labels[flipped] = (labels + other)[flipped] % dataset.num_classes
    return replace(dataset, train=Split(dataset.train.images, labels)), flipped


class Trainer:
    """All seeds of one rule, compiled once."""

    def __init__(self, config: cest.Config, dataset: Dataset):
        self.config = config
        self.algorithm = cest.build(config, dataset.num_classes, dataset.image_shape, timed=True)
        self.data = cest.make_data(config, dataset)
        network = networks.create(config.network, dataset.num_classes, dataset.image_shape)
        test = batches_of(dataset, dataset.test, config.engine)
        self.judge = jax.jit(lambda variables: evaluate(network, variables, test))

    def run(self, seed: int, stops: tuple[int, ...], flipped: np.ndarray | None) -> dict:
        """Metrics and times of each epoch; test accuracy after the epochs in `stops`."""
        params, key = cest.Params(), jax.random.key(seed)
        key_init, key_steps = jax.random.split(key)
        state = jax.jit(self.algorithm.init)(key_init, params, self.data)
        lines, kept = [], {}
        for epoch in range(1, self.config.training.num_epochs + 1):
            step_key = jax.random.fold_in(key_steps, epoch)
            state, metrics = self.algorithm.step(step_key, state, params, self.data)
            line = to_jsonable(metrics._asdict())
            if flipped is not None:
                chosen = np.asarray(state.chosen)[: int(state.num_chosen)]
                line["flipped"] = float(flipped[chosen].mean())
            lines.append(line)
            if epoch in stops:
                kept[epoch] = self.algorithm.result(state, params, self.data)
        tests = {epoch: float(self.judge(variables).accuracy) for epoch, variables in kept.items()}
        return {"lines": lines, "test_accuracy": tests}


def main(options: Options) -> None:
    dataset, flipped = parts(options), None
    if options.study == "noise":
        dataset, flipped = with_flipped_labels(dataset, 0.1)
    base = cest.Config(
        network=NetworkConfig(network="VGG10", width=options.width),
        training=TrainingConfig(num_epochs=options.num_epochs, batch_size=64),
    )
    path = options.output / f"{options.study}.json"
    rows = Rows(path, options, "seeds", "data_dir", "output")
    done = {(row["rule"], row["seed"]) for row in rows}
    equal = cest.epochs_of_equal_gradients(base, len(dataset.train))
    trainers: dict[str, Trainer] = {}
    for seed in options.seeds:
        for rule, changes in STUDIES[options.study].items():
            if (rule, seed) in done:
                continue
            if rule not in trainers:
                trainers[rule] = Trainer(replace(base, **changes), dataset)
            stops = (equal, options.num_epochs) if rule == "full" else (options.num_epochs,)
            found = trainers[rule].run(seed, stops, flipped)
            rows.add({"rule": rule, "seed": seed, **found})
            print(f"{rule}, seed {seed}: {found['test_accuracy']}", flush=True)
    print(table(rows, options, equal))
    if options.study == "rules":
        first = {row["rule"]: row["lines"] for row in rows if row["seed"] == options.seeds[0]}
        for name, shown in (
            ("figure-2-3", ("full",)),
            ("figure-4-5", ("cest",)),
            ("figure-6-7", ("full", "cest")),
            ("rules", tuple(first)),
        ):
            curves = plotting.training_curves({rule: first[rule] for rule in shown})
            save_png(options.output / f"{name}.png", curves)


def table(rows: Rows, options: Options, equal: int) -> str:
    """Table of each rule, at its end and when the fastest rule of the same seed has ended."""
    clocks = {
        (r["rule"], r["seed"]): np.cumsum(
            [cest.cost_seconds(x["stage_seconds"]) for x in r["lines"]]
        )
        for r in rows
    }
    shortest = {
        seed: min(clock[-1] for (_, own), clock in clocks.items() if own == seed)
        for seed in options.seeds
    }
    lines = [
        "| rule | epochs | gradient examples | training accuracy | validation accuracy | test "
        "accuracy | validation accuracy at equal time | seconds: training | pass | evolution | "
        "distinct examples of a subset | std of validation accuracy, last 10 epochs |",
        "|---" * 12 + "|",
    ]
    noisy = options.study == "noise"
    if noisy:
        lines[0] += " flipped labels among the chosen, last selection |"
        lines[1] += "---|"
    for rule in STUDIES[options.study]:
        mine = [row for row in rows if row["rule"] == rule]
        for end in dict.fromkeys((equal, options.num_epochs) if rule == "full" else ()) or (
            options.num_epochs,
        ):
            last = [row["lines"][end - 1] for row in mine]
            within = [
                np.flatnonzero(clocks[rule, row["seed"]] <= shortest[row["seed"]] * (1 + 1e-9))
                for row in mine
            ]
            stages = {
                name: [
                    sum(x["stage_seconds"].get(name, 0.0) for x in row["lines"][:end])
                    for row in mine
                ]
                for name in ("training", "pass", "evolution")
            }
            cells = [
                str(end),
                f"{last[0]['gradient_examples']:,.0f}",
                spread([100 * x["accuracy"] for x in last]),
                spread([100 * x["validation_accuracy"] for x in last]),
                spread([100 * row["test_accuracy"][str(end)] for row in mine]),
                spread(
                    [
                        100 * row["lines"][index[-1]]["validation_accuracy"]
                        for row, index in zip(mine, within, strict=True)
                    ]
                ),
                *(spread(stages[name], 2 if name == "evolution" else 1) for name in stages),
                spread([x["distinct"] for x in last], 0),
                spread(
                    [
                        100 * np.std([x["validation_accuracy"] for x in row["lines"][:end][-10:]])
                        for row in mine
                    ]
                ),
            ]
            if noisy:
                cells.append(spread([100 * x["flipped"] for x in last]) + " %")
            lines.append(f"| {rule} | {' | '.join(cells)} |")
    return "\n".join(lines)


if __name__ == "__main__":
    main(tyro.cli(Options))
