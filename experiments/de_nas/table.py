"""Fig. 6 and Table 3 of DE-NAS at a size for two cores, random search at equal budget beside it.

    python experiments/de_nas/table.py                  # five seeds of both
    python experiments/de_nas/table.py --seeds 0 --methods evolution
    python experiments/de_nas/table.py --methods nsga2 known batch

A search makes 70 candidates of ten epochs each (with halving 90, some stop early); its most
accurate and its smallest survivor train at length and are judged on the test split. Searches are
written as they come; the same command goes on after an interruption.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, replace
from pathlib import Path

import jax
import numpy as np
import tyro

from evojax_suite import de_nas
from evojax_suite.data import load, some_images
from evojax_suite.reporting import plotting
from evojax_suite.reporting.charts import save_png
from evojax_suite.running.small_sets import fitted_to
from evojax_suite.runtime.results import Rows, spread, to_jsonable
from evojax_suite.systems.de_nas import architectures
from evojax_suite.systems.de_nas.architectures import Space
from evojax_suite.systems.de_nas.experiment import history, populations
from evojax_suite.training import batches_of, evaluate
from evojax_suite.types import Dataset

METHODS = {
    "evolution": {},
    "random": {"method": "random"},
    "compare units": {"compare": "unit"},
    "nsga2": {"survival": "nsga2"},
    "known": {"num_known": 4},
    "batch": {"normalization": "batch"},
    "skip": {"skip": True},
    "evosax": {"method": "evosax"},
    "halving": {"rungs": (3,), "num_generations": 7},  # as many epochs, or fewer
}
OBJECTIVES = "accuracy", "num_parameters"


@dataclass(frozen=True)
class Options:
    methods: tuple[str, ...] = ("evolution", "random")
    seeds: tuple[int, ...] = (0, 1, 2, 3, 4)
    dataset: str = "fashion_mnist"
    data_dir: Path | None = None
    num_images: int = 1000
    """Training images, balanced."""
    num_validation_images: int = 1000
    max_filters: int = 32
    max_features: int = 512
    num_generations: int = 5
    num_epochs: int = 10
    final_epochs: int = 50
    output: Path = Path("experiments/de_nas/search.json")


def parts(options: Options) -> Dataset:
    dataset = load(options.dataset, options.data_dir)
    return some_images(dataset, options.num_images, options.num_validation_images)


def base(options: Options, dataset: Dataset) -> de_nas.Config:
    """The recipe of the command's small scale: the paper's learns nothing in so few steps."""
    training = replace(
        de_nas.TRAINING, num_epochs=options.num_epochs, optimizer="adam", learning_rate=2e-3
    )
    return de_nas.Config(
        num_generations=options.num_generations,
        space=Space(max_filters=options.max_filters, max_features=options.max_features),
        training=fitted_to(training, dataset),
        dropout=0.2,
        initialization="kaiming",
        final_epochs=options.final_epochs,
    )


def searched(config: de_nas.Config, dataset: Dataset, seed: int) -> dict:
    """One search and its final trainings."""
    shape, classes = dataset.image_shape, dataset.num_classes
    params = de_nas.Params()
    algorithm = de_nas.build(config, classes, shape)
    data = de_nas.make_data(config, dataset)
    key_init, key_steps, key_final = jax.random.split(jax.random.key(seed), 3)
    start = time.perf_counter()
    state = algorithm.init(key_init, params, data)
    for step in range(config.num_candidates):
        key = jax.random.fold_in(key_steps, step)
        state, _ = algorithm.step(key, state, params, data)
    seconds = time.perf_counter() - start
    found = algorithm.result(state, params, data)
    test = batches_of(dataset, dataset.test, config.engine)
    models, start = {}, time.perf_counter()
    for role in ("most_accurate", "smallest"):
        place = getattr(found, role)
        genome = architectures.member(found.genomes, place)
        units = architectures.to_units(genome)
        network = de_nas.network_of(config, units, classes)
        key_start, key_fit = jax.random.split(jax.random.fold_in(key_final, place))
        final = de_nas.build_final(config, units, classes, shape)
        trained = jax.jit(final.init)(key_start, None, data)
        step, curve = jax.jit(final.step, compiler_options=de_nas.COMPILER_OPTIONS), []
        for epoch in range(config.final_epochs):
            key = jax.random.fold_in(key_fit, epoch)
            trained, metrics = step(key, trained, None, data)
            curve.append(to_jsonable(metrics._asdict()))
        accuracy = jax.jit(evaluate, static_argnums=0)(network, trained.fit.variables, test)
        models[role] = {
            "test_accuracy": float(accuracy.accuracy),
            "search_accuracy": float(found.accuracy[place]),
            "num_parameters": int(de_nas.costs_of(config, genome, shape, classes).parameters),
            "units": [unit._asdict() for unit in units],
            "curve": curve,
        }
    return {
        "history": history(config, state, dataset),
        "seconds": seconds,
        "final_seconds": time.perf_counter() - start,
        **models,
    }


def main(options: Options) -> None:
    dataset = parts(options)
    setting = base(options, dataset)
    rows = Rows(options.output, options, "methods", "seeds", "data_dir", "output")
    done = {(row["method"], row["seed"]) for row in rows}
    for seed in options.seeds:
        for method in options.methods:
            if (method, seed) in done:
                continue
            config = replace(setting, **METHODS[method])
            row = {"method": method, "seed": seed, **searched(config, dataset, seed)}
            rows.add(row)
            best = row["most_accurate"]
            print(
                f"{method}, seed {seed}: {best['test_accuracy']:.4f} with "
                f"{best['num_parameters']:,}, search {row['seconds']:.0f} s, "
                f"final {row['final_seconds']:.0f} s",
                flush=True,
            )
    print(table(rows, setting), beside_random(rows, setting), sep="\n")
    shown = [row for row in rows if row["method"] == "evolution"]
    if shown:
        folder = options.output.parent
        # The first search whose two models are not the same.
        differing = max(
            shown, key=lambda row: row["most_accurate"]["units"] != row["smallest"]["units"]
        )
        lines = populations(setting, shown[0]["history"], de_nas.Params())
        save_png(
            folder / "figure-6.png",
            plotting.population_movement(lines, "num_parameters", "parameters"),
        )
        curves = {r.replace("_", " "): differing[r]["curve"] for r in ("most_accurate", "smallest")}
        save_png(folder / "figure-7-9.png", plotting.training_curves(curves))


def table(rows: Rows, config: de_nas.Config) -> str:
    lines = [
        "| search | seeds | epochs | best score | hypervolume | model 1: validation in the search "
        "| test | parameters | model 2: test | parameters | search, s | final, s |",
        "|---" * 12 + "|",
    ]
    for method in dict.fromkeys(row["method"] for row in rows):
        mine = [row for row in rows if row["method"] == method]
        first, second = ([row[role] for row in mine] for role in ("most_accurate", "smallest"))
        cells = [
            method,
            str(len(mine)),
            spread([sum(one["num_epochs"] for one in row["history"]) for row in mine], 0),
            spread([score(config, row["history"]) for row in mine], 3),
            spread([hypervolume(config, row["history"]) for row in mine], 3),
            spread([100 * model["search_accuracy"] for model in first]),
            spread([100 * model["test_accuracy"] for model in first]),
            spread([model["num_parameters"] for model in first], 0),
            spread([100 * model["test_accuracy"] for model in second]),
            spread([model["num_parameters"] for model in second], 0),
            spread([row["seconds"] for row in mine], 0),
            spread([row["final_seconds"] for row in mine], 0),
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def beside_random(rows: Rows, config: de_nas.Config) -> str:
    """Lines that say in how many common seeds each other method is ahead of random search."""
    found = {(row["method"], row["seed"]): row for row in rows}
    lines = []
    for method in dict.fromkeys(row["method"] for row in rows):
        seeds = [seed for name, seed in found if name == method and ("random", seed) in found]
        pairs = [(found[method, seed], found["random", seed]) for seed in seeds]
        if method == "random" or not pairs:
            continue
        lower = sum(score(config, a["history"]) < score(config, b["history"]) for a, b in pairs)
        larger = sum(
            hypervolume(config, a["history"]) > hypervolume(config, b["history"]) for a, b in pairs
        )
        better, bulkier = (
            sum(a["most_accurate"][name] > b["most_accurate"][name] for a, b in pairs)
            for name in ("test_accuracy", "num_parameters")
        )
        lines.append(
            f"{method} beside random, of {len(pairs)} seeds: lower score in {lower}, larger "
            f"hypervolume in {larger}, model 1 more accurate in {better}, larger in {bulkier}"
        )
    return "\n".join(lines)


def score(config: de_nas.Config, rows: list[dict]) -> float:
    """The paper's score of the best candidate, on the scale of the first population, which searches
    share where the seed is the same."""
    accuracy, sizes = (np.array([row[name] for row in rows], float) for name in OBJECTIVES)
    return de_nas.scores(accuracy, sizes, de_nas.Params(), config.population_size).min()


def hypervolume(config: de_nas.Config, rows: list[dict]) -> float:
    """What all candidates dominate in accuracy and decades of parameters, from accuracy 0 and the
    largest network of the first population on."""
    accuracy, sizes = (np.array([row[name] for row in rows], float) for name in OBJECTIVES)
    largest = sizes[: config.population_size].max()
    kept = np.flatnonzero((sizes < largest) & np.isfinite(accuracy))
    kept = kept[np.argsort(sizes[kept])]
    decades = np.diff(np.log10([*sizes[kept], largest]))
    return float(decades @ np.maximum.accumulate(accuracy[kept]))


if __name__ == "__main__":
    main(tyro.cli(Options))
