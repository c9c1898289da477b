"""Networks that were trained on small sets, compressed: does EComp need the whole training set?

    python experiments/composition/compress.py

A fully connected network of 784-64-64-10 learns Fashion-MNIST from all its training images, from a
random 1,000, or from 1,000 that DEvS made; evolution then compresses it, on 10,000 training images
or on the set that it was trained on. Writes compress.json as it goes, goes on after an
interruption, prints a table.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import tyro
from ranks import by_devs

from evojax_suite import devs, ecomp
from evojax_suite.data import load, with_whole_training_set
from evojax_suite.networks import NetworkConfig, create
from evojax_suite.operators import random_examples
from evojax_suite.runtime.results import Rows, spread
from evojax_suite.systems.ecomp import compression, feed_forward
from evojax_suite.systems.ecomp.parent import from_flax
from evojax_suite.training import TrainingConfig, fit
from evojax_suite.types import Dataset

NETWORK = NetworkConfig(network="MLP", width=64)
STEPS = 2400  # the paper's four epochs of 60,000 images


@dataclass(frozen=True)
class Options:
    dataset: str = "fashion_mnist"
    data_dir: Path | None = None
    seeds: tuple[int, ...] = (0, 1, 2)
    size: int = 1000
    """Images of the small sets."""
    num_images: int = 10_000
    """DEvS begins with so many, and evolution sees so many where it sees the training set."""
    output: Path = Path("experiments/composition/compress.json")


def made_by_devs(options: Options, dataset: Dataset, key: jax.Array):
    """Images in [0, 1] and soft labels."""
    config = devs.Config(target_sizes=(options.size,), network=NetworkConfig(width=16))
    return by_devs(config, with_whole_training_set(dataset, options.num_images), key)


def compressed(parent, images, labels, key: jax.Array, test: tuple[np.ndarray, np.ndarray]) -> dict:
    """What is left of a parent: accuracy on the test split, and units."""
    config = ecomp.Config()
    data = ecomp.make_data(parent, images, labels)
    algorithm = ecomp.build(config)
    key_init, key_steps = jax.random.split(key)
    state = jax.jit(algorithm.init)(key_init, ecomp.Params(), data)
    step = jax.jit(algorithm.step)
    for number in range(ecomp.num_steps(config, len(labels))):
        state, _ = step(jax.random.fold_in(key_steps, number), state, ecomp.Params(), data)
    best = jax.device_get(algorithm.result(state, ecomp.Params(), data))
    network = compression.trimmed(best.network, best.sizes)
    return {"test": accuracy(network, *test), "units": [int(size) for size in best.sizes]}


def accuracy(network, images, labels) -> float:
    logits = feed_forward.forward(network, jnp.asarray(images.reshape(len(images), -1)))[-1]
    return float((logits.argmax(-1) == labels).mean())


def main(options: Options) -> None:
    dataset = with_whole_training_set(load(options.dataset, options.data_dir))
    train, classes = dataset.train, dataset.num_classes
    everything = train.images / np.float32(255), train.labels
    test = dataset.test.images / np.float32(255), dataset.test.labels
    module = create(NETWORK, classes, dataset.image_shape)
    rows = Rows(options.output, options, "seeds", "data_dir", "output")
    done = {(row["set"], row["seed"]) for row in rows}
    for seed in options.seeds:
        for name in ("all", "random", "DEvS"):
            if (name, seed) in done:
                continue
            images, labels = everything
            key_set, key_parent, key_evolution = jax.random.split(jax.random.key(seed), 3)
            if name == "random":
                chosen = np.asarray(random_examples(key_set, labels, options.size, classes))
                images, labels = images[chosen], labels[chosen]
            elif name == "DEvS":
                images, labels = made_by_devs(options, dataset, key_set)
            batches = -(-len(images) // 100)
            training = TrainingConfig(
                num_epochs=-(-STEPS // batches), batch_size=100, learning_rate=1e-3
            )
            variables = fit(key_parent, module, training, images, jnp.asarray(labels))
            parent = from_flax(jax.device_get(variables["params"]), NETWORK, dataset)
            hard = labels if labels.ndim == 1 else labels.argmax(-1).astype(np.int32)
            part = np.asarray(
                random_examples(jax.random.key(99), train.labels, options.num_images, classes)
            )
            row = {"set": name, "seed": seed, "parent_test": accuracy(parent, *test)}
            row["on training images"] = compressed(
                parent, everything[0][part], everything[1][part], key_evolution, test
            )
            if name != "all":
                row["on its own set"] = compressed(parent, images, hard, key_evolution, test)
            rows.add(row)
            print(row, flush=True)
    print(table(rows))


def table(rows: Rows) -> str:
    lines = [
        "| parent trained on | test accuracy (%) | evolution sees | test accuracy (%) | "
        "hidden units of 128 |",
        "|---" * 5 + "|",
    ]
    for name in dict.fromkeys(row["set"] for row in rows):
        mine = [row for row in rows if row["set"] == name]
        for sees in ("on training images", "on its own set"):
            if sees in mine[0]:
                cells = [
                    name,
                    spread([100 * row["parent_test"] for row in mine]),
                    sees.removeprefix("on "),
                    spread([100 * row[sees]["test"] for row in mine]),
                    spread([sum(row[sees]["units"]) for row in mine]),
                ]
                lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


if __name__ == "__main__":
    main(tyro.cli(Options))
