"""Architectures ranked on a small set instead of the whole: rank correlation and time saved.

    python experiments/composition/ranks.py

The 15 random architectures of experiments/de_nas/ranks.py train on sets of digits that other
systems made, hard-labelled; their accuracies on the validation split are compared with those
after a full training on all images, which that study has kept. Writes ranks.json as it goes, goes
on after an interruption, prints a table.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from pathlib import Path

import jax
import numpy as np
import tyro
from scipy import stats

from evojax_suite import de_nas, devs
from evojax_suite.data import denormalize, load
from evojax_suite.networks import NetworkConfig
from evojax_suite.operators import random_examples
from evojax_suite.running.small_sets import fitted_to
from evojax_suite.runtime.results import Rows, spread
from evojax_suite.systems.de_nas import architectures
from evojax_suite.systems.de_nas.architectures import Space
from evojax_suite.types import Dataset, Split, training_data

FULL = Path("experiments/de_nas/ranks.json")
RECIPE = {
    "training": replace(de_nas.TRAINING, optimizer="adam", learning_rate=2e-3),
    "dropout": 0.2,
    "initialization": "kaiming",
}


@dataclass(frozen=True)
class Options:
    sets: tuple[str, ...] = ("all", "random", "DEvS")
    sizes: tuple[int, ...] = (100, 200)
    seeds: tuple[int, ...] = (0, 1, 2)
    """Seeds of the sets and of the trainings."""
    candidates: int = 15
    steps: tuple[int, ...] = (68, 170)
    """Approximate steps of a candidate's training; 170 are ten epochs of all images."""
    output: Path = Path("experiments/composition/ranks.json")


def small(name: str, size: int, seed: int, dataset: Dataset) -> tuple[np.ndarray, np.ndarray]:
    """Images in [0, 1] and labels."""
    key = jax.random.key(seed)
    train = dataset.train
    if name == "random":
        chosen = np.asarray(random_examples(key, train.labels, size, dataset.num_classes))
        return train.images[chosen] / np.float32(255), train.labels[chosen]
    config = devs.Config(target_sizes=(size,), network=NetworkConfig(width=32))
    config = replace(config, training=fitted_to(config.training, dataset))
    images, labels = by_devs(config, dataset, key)
    return images, labels.argmax(-1).astype(np.int32)


def by_devs(config: devs.Config, dataset: Dataset, key: jax.Array) -> tuple[np.ndarray, np.ndarray]:
    """The smallest set that DEvS makes: images in [0, 1] and soft labels."""
    algorithm = devs.build(config, dataset.num_classes, dataset.image_shape)
    data = training_data(dataset)
    key_init, key_steps = jax.random.split(key)
    state = algorithm.init(key_init, None, data)
    for step in range(devs.num_steps(config, len(dataset.train))):
        state, _ = algorithm.step(jax.random.fold_in(key_steps, step), state, None, data)
    made = jax.device_get(algorithm.result(state, None, data)[-1])
    images = np.clip(denormalize(made.images, dataset.mean, dataset.std), 0, 1)
    return images.astype(np.float32), made.labels


def main(options: Options) -> None:
    dataset = load("digits")
    shape, classes = dataset.image_shape, dataset.num_classes
    space = Space(max_filters=16, max_features=256)
    make = jax.jit(jax.vmap(lambda key: architectures.random_genome(key, space, shape)))
    population = make(jax.random.split(jax.random.key(0), options.candidates))
    known = {
        row["candidate"]: row["full"]
        for row in json.loads(FULL.read_text())["rows"]
        if row["recipe"] == "Adam"
    }
    rows = Rows(options.output, options, "seeds", "sets", "sizes", "steps", "output")
    done = {(row["set"], row["size"], row["seed"], row["steps"]) for row in rows}
    whole = [("all", len(dataset.train))] if "all" in options.sets else []
    small_sets = [(name, size) for name in options.sets for size in options.sizes if name != "all"]
    for seed in options.seeds:
        for name, size in whole + small_sets:
            left = [steps for steps in options.steps if (name, size, seed, steps) not in done]
            part = dataset
            if left and name != "all":
                images, labels = small(name, size, seed, dataset)
                part = replace(dataset, train=Split(images, labels))
            config = replace(de_nas.Config(space=space, programs="padded"), **RECIPE)
            training = fitted_to(config.training, dataset)
            batches = -(-len(part.train) // training.batch_size)
            for steps in left:
                training = replace(training, num_epochs=-(-steps // batches))
                judge = de_nas.make_evaluator(replace(config, training=training), classes, shape)
                data = de_nas.make_data(config, part)
                accuracies, seconds = [], []
                for candidate in range(options.candidates):
                    genome = architectures.member(population, candidate)
                    key = jax.random.fold_in(jax.random.key(100 + seed), candidate)
                    judged = judge(genome, key, data, np.zeros(0))
                    accuracies.append(float(judged.evaluation.accuracy))
                    seconds.append(judged.seconds["training"])
                row = {"set": name, "size": size, "seed": seed, "steps": steps}
                rows.add(row | {"accuracies": accuracies, "seconds": seconds})
                full = [known[candidate] for candidate in range(options.candidates)]
                print(f"{row}: {stats.spearmanr(accuracies, full).statistic:.2f}", flush=True)
    print(table(rows, known))


def table(rows: Rows, known: dict[int, float]) -> str:
    lines = [
        "| candidates train on | images | steps | validation accuracy (%) | Spearman | Kendall | "
        "seconds a candidate |",
        "|---" * 7 + "|",
    ]
    for case in sorted({(row["set"], row["size"], row["steps"]) for row in rows}):
        mine = [row for row in rows if (row["set"], row["size"], row["steps"]) == case]
        full = [known[candidate] for candidate in range(len(mine[0]["accuracies"]))]
        orders = [
            [test(row["accuracies"], full).statistic for row in mine]
            for test in (stats.spearmanr, stats.kendalltau)
        ]
        cells = [
            *map(str, case),
            spread([100 * np.mean(row["accuracies"]) for row in mine]),
            *(spread(values, 2) for values in orders),
            spread([np.median(row["seconds"]) for row in mine], 2),
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


if __name__ == "__main__":
    main(tyro.cli(Options))
