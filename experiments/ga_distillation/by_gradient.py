"""What doing without a gradient costs, or gains: the same error, evolved and descended.

    python experiments/ga_distillation/by_gradient.py --dataset mnist --seconds 60

Kernel regression on the same features, of as many real images, from the class means, in the same
cosines, for equal seconds of search (compilation is not counted) and over the same seeds. Ways:

    evolution     as `--recipe recommended` does it
    gradient      Adam on the gradient of the error by the images, as KIP and FRePo descend it
    own column    Adam where each image follows the gradient of its own class's column alone
    with noise    the same at images to which the noise of evolution is added, new in each step

What is returned is averaged over the steps alike. Networks of the paper's recipe judge each result
on the test part, or on validation images (`--judged-on validation`), which is where a way's step
size is chosen. Rows are kept in by_gradient.json beside this file and are not run again.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
import optax
import tyro

from evojax_suite import distilled, kernel_regression, load, networks
from evojax_suite.algorithms import ga_distillation as ga
from evojax_suite.commands.options import percent
from evojax_suite.commands.progress import console
from evojax_suite.data.transforms import normalize
from evojax_suite.results import Rows, spread
from evojax_suite.types import Array, Dataset

OUTPUT = Path(__file__).with_name("by_gradient.json")
WAYS = "evolution", "gradient", "own column", "with noise"


@dataclass(frozen=True)
class Options:
    """What is compared."""

    dataset: str = "mnist"
    ways: tuple[str, ...] = WAYS
    step: float | None = None
    """Step size of the ways with a gradient, in standard deviations of a coefficient; 0.03, 0.03
    and 0.03 by default."""
    seconds: float = 60.0
    """Of each search."""
    seeds: tuple[int, ...] = (0, 1, 2, 3, 4)
    num_networks: int = 5
    """Networks that judge each result."""
    judged_on: Literal["test", "validation"] = "test"
    data_dir: Path | None = None
    output: Path = OUTPUT
    config: ga.Config = field(default_factory=lambda: ga.RECOMMENDED)

    def __post_init__(self):
        if unknown := sorted(set(self.ways) - set(WAYS)):
            raise ValueError(f"ways must be of {', '.join(WAYS)}, got {unknown[0]!r}")
        if not self.seconds > 0:
            raise ValueError(f"seconds must be > 0, got {self.seconds}")


def evolution(config: ga.Config, dataset: Dataset, data: ga.Data) -> tuple[Any, Callable, Callable]:
    """A state, a step (key, state, data) and the code that a state stands for."""
    algorithm = ga.build(config, dataset.num_classes, dataset.image_shape)
    params = ga.Params()
    state = jax.jit(algorithm.init)(jax.random.key(0), params, data)
    step = jax.jit(lambda key, state, data: algorithm.step(key, state, params, data)[0])
    return state, step, lambda state: state.best


def descent(
    config: ga.Config, dataset: Dataset, data: ga.Data, way: str, step_size: float
) -> tuple[Any, Callable, Callable]:
    """The same, by gradients of images."""
    num_classes, shape = dataset.num_classes, dataset.image_shape
    network = networks.create(
        replace(config.network, width=config.kernel.kernel_width), num_classes, shape
    )
    optimizer = optax.adam(step_size)
    start = ga.class_means(config, num_classes, data)
    averaging, noise = 8.0, config.strategy_std if way == "with noise" else 0.0

    def losses(code: Array, key: Array, data: ga.Data) -> Array:
        """Of each class's column, (num_classes,)."""
        kernel, engine = config.kernel, config.engine
        key_networks, key_images = jax.random.split(key)
        variables = jax.vmap(lambda key: network.init(key, jnp.zeros((1, *shape))))(
            jax.random.split(key_networks, config.networks_per_member)
        )
        drawn = jax.random.randint(key_images, (kernel.kernel_images,), 0, len(data.train_images))
        real = normalize(data.train_images[drawn], data.mean, data.std)
        of_real = kernel_regression.features_of(network, variables, real, engine)
        images, labels = ga.decode(config, num_classes, shape, code, data)
        own = jax.vmap(lambda v: network.apply(v, images, features_only=True))(variables)
        own = jnp.moveaxis(jnp.asarray(own), 0, 1).reshape(len(images), -1)
        own = jnp.concatenate([own, jnp.ones((len(images), 1))], -1)
        gram = own @ own.T
        penalty = kernel.ridge * jnp.trace(gram) / len(gram)
        found = kernel_regression.predict(gram, labels - 1 / num_classes, of_real @ own.T, penalty)
        return kernel_regression.class_losses(
            found + 1 / num_classes, data.train_labels[drawn], kernel.temperature
        )

    @jax.jit
    def step(key, state, data):
        key_noise, key_losses = jax.random.split(key)
        code, average, opt_state, count = state
        at = code + noise * jax.random.normal(key_noise, code.shape)
        _, pull_back = jax.vjp(lambda code: losses(code, key_losses, data), at)
        if way == "gradient":
            (gradient,) = pull_back(jnp.ones(num_classes))
        else:  # with one image a class, image and column have the same number
            (of_columns,) = jax.vmap(pull_back)(jnp.eye(num_classes))
            each = of_columns.reshape(num_classes, num_classes, -1)
            gradient = jnp.diagonal(each).T.reshape(-1)
        updates, opt_state = optimizer.update(gradient, opt_state)
        code = jnp.asarray(optax.apply_updates(code, updates))
        average += (averaging + 1) / (averaging + count + 1) * (code - average)
        return code, average, opt_state, count + 1

    return (start, start, optimizer.init(start), 0), step, lambda state: state[1]


def search(options: Options, dataset: Dataset, way: str, seed: int) -> tuple[ga.Individual, int]:
    """Ten images after the seconds, and the number of steps that they were enough for."""
    config, data = options.config, ga.make_data(dataset)
    if way == "evolution":
        state, step, code_of = evolution(config, dataset, data)
    else:
        state, step, code_of = descent(config, dataset, data, way, options.step or 0.03)
    jax.block_until_ready(step(jax.random.key(0), state, data))  # compiles
    count, start = 0, time.perf_counter()
    while time.perf_counter() - start < options.seconds:
        key = jax.random.fold_in(jax.random.key(seed), count)
        state = jax.block_until_ready(step(key, state, data))
        count += 1
    found = code_of(state)
    return ga.decode(config, dataset.num_classes, dataset.image_shape, found, data), count


def main(options: Options) -> None:
    if options.config.images_per_class != 1 or options.config.factor != 1:
        raise ValueError("one image a class is compared")
    without = "dataset", "ways", "step", "seconds", "seeds", "judged_on", "data_dir", "output"
    rows = Rows(options.output, options, *without)
    dataset = load(options.dataset, options.data_dir)
    if options.judged_on == "validation":
        dataset = replace(dataset, test=dataset.validation)
    for seed in options.seeds:
        for way in options.ways:
            about = {
                "dataset": options.dataset,
                "judged on": options.judged_on,
                "way": way,
                "step": None if way == "evolution" else options.step or 0.03,
                "seconds": options.seconds,
                "seed": seed,
            }
            if any(about.items() <= row.items() for row in rows):
                continue
            found, steps = search(options, dataset, way, seed)
            accuracies = distilled.accuracies_on_test(
                jax.random.key(1000 + seed),
                found.images,
                found.labels,
                dataset,
                options.config.network,
                options.config.training,
                options.num_networks,
                options.config.engine,
            )
            rows.add(about | {"steps": steps, "accuracies": accuracies.tolist()})
            console.say(f"{way}, seed {seed}: {percent(accuracies)} %, {steps} steps")
    names = "dataset", "judged on", "way", "step", "seconds"
    print("| " + " | ".join([*names, "steps", "runs", "accuracy, mean ± std over runs"]) + " |")
    print("|---" * (len(names) + 3) + "|")
    for kind in dict.fromkeys(tuple(row[name] for name in names) for row in rows):
        own = [row for row in rows if tuple(row[name] for name in names) == kind]
        means = [100 * float(np.mean(row["accuracies"])) for row in own]
        steps = round(np.mean([row["steps"] for row in own]))
        shown = [*map(str, kind), str(steps), str(len(own)), spread(means, 2)]
        print("| " + " | ".join(shown) + " |")


if __name__ == "__main__":
    main(tyro.cli(Options))
