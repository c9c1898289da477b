"""What ways to ten images reach after equal seconds of search.

    python experiments/ga_distillation/equal_seconds.py --dataset mnist --seconds 10 30 100 300

Seconds are those of the steps; compilation is not counted. Populations are divided over devices,
the cores of a CPU, as commands do; a gradient's program uses all cores. All start anew for every
seed. Ways:

    evolution          as `--recipe recommended` does it
    gradient           the same error of kernel regression from the same class means in the same
                       cosines, by Adam on its gradient (`baselines/kernel_inducing_points.py`)
    gradient matching  DC as published (`baselines/gradient_matching.py`)
    trained fitness    SNES on the cross-entropy of networks trained on each candidate by the
                       paper's recipe, in the same cosines from the class means
    strong random      the best of random real images by that fitness

What the first two return is averaged over their steps alike. Networks of the paper's recipe judge
what each has at every number of seconds, on the test split, or on validation images (`--judged-on
validation`), which is where a step size is chosen. Rows are kept in equal_seconds.json beside this
file and are not run again; a chart of each dataset is drawn from all of them.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import tyro

from evojax_suite import distilled, ga_distillation as ga, load
from evojax_suite.reporting.charts import Chart, Series, save_png
from evojax_suite.reporting.formats import percent
from evojax_suite.reporting.progress import console
from evojax_suite.runtime import devices
from evojax_suite.runtime.results import Rows, spread
from evojax_suite.systems.coresets import gradient_matching, kernel_inducing_points
from evojax_suite.systems.ga_distillation import strong_random as strong_random_selection
from evojax_suite.types import Algorithm, Array, Dataset

WAYS = (
    "evolution",
    "gradient",
    "gradient matching",
    "trained fitness",
    "strong random",
)
CITED = {
    "mnist": {"gradient matching, cited": 91.7, "genetic algorithm (Sato et al.), cited": 91.23},
    "fashion_mnist": {"gradient matching, cited": 70.5},
    "cifar10": {"gradient matching, cited": 28.3},
}
OUTPUT = Path(__file__).with_name("equal_seconds.json")


@dataclass(frozen=True)
class Options:
    """What is compared."""

    dataset: str = "mnist"
    ways: tuple[str, ...] = WAYS
    step: float = 0.03
    """Adam's of the way with a gradient of the regression, in standard deviations of a
    coefficient."""
    seconds: tuple[float, ...] = (10.0, 30.0, 100.0, 300.0)
    """What a search has after each of these seconds is judged."""
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
        if not self.seconds or not min(self.seconds) > 0:
            raise ValueError(f"seconds must be > 0, got {self.seconds}")
        if self.config.images_per_class != 1 or self.config.factor != 1:
            raise ValueError("config must have one image a class and one in an image")


class Search(NamedTuple):
    """A way on one dataset."""

    state: Any
    step: Callable[[Array, Any], Any]
    """(key, state) to the next state."""
    result: Callable[[Any], ga.Individual]


def over_all_devices(algorithm: Algorithm) -> Callable[..., Any]:
    """Its step, compiled."""
    algorithm = devices.over_devices(algorithm, devices.take("auto"))
    return jax.jit(algorithm.step) if algorithm.scannable else algorithm.step


def evolution(config: ga.Config, key: Array, dataset: Dataset) -> Search:
    """The search that `config` says, whatever its fitness and strategy."""
    algorithm = ga.build(config, dataset.num_classes, dataset.image_shape)
    params, data = ga.Params(), ga.make_data(dataset)
    step = over_all_devices(algorithm)
    return Search(
        jax.jit(algorithm.init)(key, params, data),
        lambda key, state: step(key, state, params, data)[0],
        lambda state: algorithm.result(state, params, data),
    )


def trained(config: ga.Config) -> ga.Config:
    """The same search for the fitness of trained networks; few candidates, for a few minutes."""
    return replace(
        config,
        fitness="cross_entropy",
        common_random_numbers=True,
        strategy="SNES",
        population_size=8,
        networks_per_member=1,
        fitness_subset_size=1000,
    )


def strong_random(config: ga.Config, key: Array, dataset: Dataset) -> Search:
    """The best of random individuals; a step tries a population."""
    own = replace(ga.Config(), fitness="cross_entropy", population_size=8, network=config.network)
    own = replace(own, training=config.training, engine=config.engine)
    algorithm = strong_random_selection.build(own, 1, dataset.num_classes, dataset.image_shape)
    params, data = ga.Params(), ga.make_data(dataset)
    start = algorithm.init(key, params, data)
    draw = over_all_devices(algorithm)

    def step(key, state):
        new, metrics = draw(key, start, params, data)
        return (new, metrics.fitness_best) if metrics.fitness_best > state[1] else state

    return Search(
        (start, jnp.float32(-jnp.inf)),
        step,
        lambda state: jax.tree.map(lambda leaf: leaf[0], algorithm.result(state[0], params, data)),
    )


def by_gradient(module: Any, config: Any, key: Array, dataset: Dataset) -> Search:
    """A baseline that makes images by gradients: `module` with its own `config`."""
    algorithm = module.build(config, dataset.num_classes, dataset.image_shape)
    data = module.make_data(dataset)
    step = jax.jit(lambda key, state, data: algorithm.step(key, state, None, data)[0])
    return Search(
        jax.jit(algorithm.init)(key, None, data),
        lambda key, state: step(key, state, data),
        lambda state: ga.Individual(*algorithm.result(state, None, data)),
    )


def begin(options: Options, dataset: Dataset, way: str, seed: int) -> Search:
    """A way from its start."""
    key, config = jax.random.fold_in(jax.random.key(seed), 2**31), options.config
    match way:
        case "evolution":
            return evolution(config, key, dataset)
        case "trained fitness":
            return evolution(trained(config), key, dataset)
        case "strong random":
            return strong_random(config, key, dataset)
        case "gradient matching":
            own = gradient_matching.Config(network=config.network, engine=config.engine)
            return by_gradient(gradient_matching, own, key, dataset)
    own = kernel_inducing_points.Config(
        learning_rate=options.step,
        num_networks=config.networks_per_member,
        encoding=config.encoding,
        num_cosines=config.num_cosines,
        start="class_means",
        kernel=config.kernel,
        network=config.network,
        engine=config.engine,
    )
    return by_gradient(kernel_inducing_points, own, key, dataset)


def snapshots(
    search: Search, seed: int, marks: tuple[float, ...]
) -> list[tuple[float, int, ga.Individual]]:
    """What a search has at each of `marks` seconds: seconds spent, steps, ten images."""
    jax.block_until_ready(search.step(jax.random.key(0), search.state))  # compiles
    state, spent, count, found = search.state, 0.0, 0, []
    for mark in sorted(marks):
        while spent < mark:
            key = jax.random.fold_in(jax.random.key(seed), count)
            start = time.perf_counter()
            state = jax.block_until_ready(search.step(key, state))
            spent += time.perf_counter() - start
            count += 1
        found.append((spent, count, search.result(state)))
    return found


def chart(rows: Rows, dataset: str) -> Chart:
    """Accuracy on the test split by seconds, a line a way: mean and deviation over seeds."""
    series = []
    for way in WAYS:
        own = [
            row
            for row in rows
            if (row["dataset"], row["judged on"], row["way"]) == (dataset, "test", way)
        ]
        marks = sorted({row["mark"] for row in own})
        at = [[row for row in own if row["mark"] == mark] for mark in marks]
        means = [[100 * float(np.mean(row["accuracies"])) for row in group] for group in at]
        middle = np.array([np.mean(group) for group in means])
        apart = np.array([np.std(group) for group in means])
        seconds = [np.mean([row["seconds"] for row in group]) for group in at]
        if marks:
            series.append(
                Series(way, seconds, middle, middle - apart, middle + apart, "joined points")
            )
    levels = CITED.get(dataset, {})
    return Chart("seconds of search", "test accuracy, %", series, log_x=True, levels=levels)


def main(options: Options) -> None:
    without = "dataset", "ways", "step", "seconds", "seeds", "judged_on", "data_dir", "output"
    rows = Rows(options.output, options, *without)
    dataset = load(options.dataset, options.data_dir)
    if options.judged_on == "validation":
        dataset = replace(dataset, test=dataset.validation)
    for seed in options.seeds:
        for way in options.ways:
            step = options.step if way == "gradient" else None
            about = {"dataset": options.dataset, "judged on": options.judged_on}
            about |= {"way": way, "step": step, "seed": seed}
            known = {row["mark"] for row in rows if about.items() <= row.items()}
            if known >= set(options.seconds):
                continue
            search = begin(options, dataset, way, seed)
            marks = tuple(mark for mark in options.seconds if mark not in known)
            for mark, (seconds, steps, found) in zip(
                sorted(marks), snapshots(search, seed, marks), strict=True
            ):
                accuracies = distilled.accuracies_on(
                    dataset.test,
                    jax.random.key(1000 + seed),
                    found.images,
                    found.labels,
                    dataset,
                    options.config.network,
                    options.config.training,
                    options.num_networks,
                    options.config.engine,
                    "auto",
                )
                row = about | {"mark": mark, "seconds": seconds, "steps": steps}
                rows.add(row | {"accuracies": accuracies.tolist()})
                console.say(f"{way}, seed {seed}, {seconds:.0f} s: {percent(accuracies)} %")
    print("| dataset | judged on | way | step | seconds | steps | runs | accuracy, mean ± std |")
    print("|---" * 8 + "|")
    names = "dataset", "judged on", "way", "step", "mark"
    for kind in dict.fromkeys(tuple(row[name] for name in names) for row in rows):
        own = [row for row in rows if tuple(row[name] for name in names) == kind]
        means = [100 * float(np.mean(row["accuracies"])) for row in own]
        steps = round(np.mean([row["steps"] for row in own]))
        shown = [*map(str, kind), str(steps), str(len(own)), spread(means, 2)]
        print("| " + " | ".join(shown) + " |")
    drawn = chart(rows, options.dataset)
    if drawn.series:
        save_png(options.output.with_name(f"equal_seconds_{options.dataset}.png"), [drawn])


if __name__ == "__main__":
    main(tyro.cli(Options))
