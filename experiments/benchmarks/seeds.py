"""Runs of several seeds one after the other, and in one program.

    python experiments/benchmarks/seeds.py

Every seed takes the same steps on digits, with `loop.run` and with `loop.run_together`, in turns.
Prints a table; writes seeds.json. Let nothing else run.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import tyro
from turns import machine

from evojax_suite import NetworkConfig, TrainingConfig, ecomp, ga_distillation, load, proxy_network
from evojax_suite.runtime import loop
from evojax_suite.runtime.results import spread, write_json
from evojax_suite.systems.coresets import gradient_matching
from evojax_suite.systems.ecomp.feed_forward import Layer
from evojax_suite.types import Algorithm, Dataset, training_data

Case = tuple[Algorithm, Any, Any]


@dataclass(frozen=True)
class Options:
    num_seeds: int = 4
    repeats: int = 3
    output: Path = Path("experiments/benchmarks/seeds.json")


def distilling(dataset: Dataset, network: NetworkConfig) -> Case:
    config = ga_distillation.Config(
        population_size=8, network=network, training=TrainingConfig(num_epochs=20)
    )
    algorithm = ga_distillation.build(config, dataset.num_classes, dataset.image_shape)
    return algorithm, ga_distillation.Params(), ga_distillation.make_data(dataset)


def compressing(dataset: Dataset, units: int) -> Case:
    """A parent of random weights: the work is that of a trained one."""
    random, sizes = np.random.default_rng(0), (dataset.train.images[0].size, units, units, 10)
    parent = tuple(
        Layer(random.normal(0, before**-0.5, (after, before)).astype(np.float32), np.zeros(after))
        for before, after in pairwise(sizes)
    )
    images, labels = dataset.train.images[:1000], dataset.train.labels[:1000]
    data = ecomp.make_data(jax.tree.map(jnp.float32, parent), images / np.float32(255), labels)
    return ecomp.build(ecomp.Config()), ecomp.Params(), data


def condensing(dataset: Dataset) -> Case:
    config = gradient_matching.Config(images_per_class=1, network=NetworkConfig(width=16))
    algorithm = gradient_matching.build(config, dataset.num_classes, dataset.image_shape)
    return algorithm, None, gradient_matching.make_data(dataset)


def training(dataset: Dataset) -> Case:
    config = proxy_network.Config(NetworkConfig(width=16), TrainingConfig(num_epochs=1000))
    algorithm = proxy_network.build(config, dataset.num_classes, dataset.image_shape)
    return algorithm, None, training_data(dataset)


CASES: dict[str, tuple[int, Callable[[Dataset], Case]]] = {
    "ga-distillation, MLP 32": (
        30,
        lambda dataset: distilling(dataset, NetworkConfig(network="MLP", width=32)),
    ),
    "ga-distillation, ConvNet 16": (
        30,
        lambda dataset: distilling(dataset, NetworkConfig(width=16, depth=2)),
    ),
    "gradient matching, ConvNet 16": (4, condensing),
    "training on all, ConvNet 16": (30, training),
    "ecomp, 2 x 64": (30, lambda dataset: compressing(dataset, 64)),
    "ecomp, 2 x 256": (30, lambda dataset: compressing(dataset, 256)),
}
"""Steps, and what takes them."""


def main(options: Options) -> None:
    dataset = load("digits")
    keys = jax.random.split(jax.random.key(0), options.num_seeds)
    rows = []
    for name, (num_steps, make) in CASES.items():
        algorithm, params, data = make(dataset)
        row: dict[str, Any] = {"case": name, "apart": [], "together": []}
        for _ in range(options.repeats):
            with tempfile.TemporaryDirectory() as folder:
                shared = (params, data, num_steps)
                apart = [
                    loop.run(algorithm, key, *shared, Path(folder) / f"apart{number}")
                    for number, key in enumerate(keys)
                ]
                directories = [Path(folder) / f"{number}" for number in range(len(keys))]
                together = loop.run_together(algorithm, keys, *shared, directories)
            for way, outcomes in (("apart", apart), ("together", together)):
                row[way].append(1000 * np.mean([one.seconds for one in outcomes]) / num_steps)
                row[f"{way}_compile_seconds"] = np.mean([one.compile_seconds for one in outcomes])
        rows.append(row)
        write_json(options.output, {"machine": machine(), "rows": rows, "options": options})
    columns = ("ms a step of a run, apart", "together", "times as fast")
    columns += ("compilation of one run, s", "of all together, s")
    print(f"| | {' | '.join(columns)} |")
    print("|---" * 6 + "|")
    for row in rows:
        gain = np.divide(row["apart"], row["together"])
        compiling = [row["apart_compile_seconds"], row["together_compile_seconds"] * len(keys)]
        cells = [spread(row["apart"]), spread(row["together"]), spread(gain, 2)]
        cells += [f"{seconds:.1f}" for seconds in compiling]
        print(f"| {row['case']} | {' | '.join(cells)} |")


if __name__ == "__main__":
    main(tyro.cli(Options))
