"""The extended EComp's Pareto front beside the faithful runs' final networks.

    python experiments/ecomp/study.py     # first: the faithful runs, weightings.json
    python experiments/ecomp/pareto.py

Five runs of NSGA-II with unbalanced networks, shrinking and aligned crossover. Of each run, and of
the seven faithful ones of the same number, the network that is most accurate on training images
that evolution did not see is taken at each size; only then the test images are opened.
"""

from __future__ import annotations

import json
import time
from dataclasses import dataclass
from pathlib import Path

import jax
import numpy as np
import tyro
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from study import evolve, set_up

from evojax_suite import ecomp
from evojax_suite.runtime.results import write_atomically
from evojax_suite.systems.ecomp import compression

FRACTIONS = (0.1, 0.25, 0.5, 0.75)
CONFIG = ecomp.Config(balanced=False, shrinking=True, crossover="aligned", selection="nsga2")


@dataclass(frozen=True)
class Options:
    num_runs: int = 5
    num_generations: int = 100
    dataset: str = "fashion_mnist"
    data_dir: Path | None = None
    runs_dir: Path = Path("runs/ecomp-study")
    output: Path = Path("experiments/ecomp")


def main(options: Options) -> None:
    setting = set_up(options.dataset, options.data_dir, options.runs_dir)
    config = ecomp.Config(**(vars(CONFIG) | {"num_generations": options.num_generations}))
    algorithm = ecomp.build(config)
    data, params = setting.data, ecomp.Params()
    num_steps = ecomp.num_steps(config, len(data.labels))
    whole = sum(array.size for layer in setting.parent for array in layer)

    @jax.jit
    def run(key, params, data):
        return evolve(key, algorithm, num_steps, params, data)[0]

    compiled = run.lower(jax.random.key(0), params, data).compile()
    rows = []
    for number in range(options.num_runs):
        start = time.perf_counter()
        state = jax.block_until_ready(compiled(jax.random.key(number), params, data))
        seconds = time.perf_counter() - start
        for index in range(config.population_size):
            network = compression.trimmed(
                jax.device_get(compression.member(state.population, index)),
                np.asarray(state.population.sizes[index]),
            )
            rows.append(
                {
                    "run": number,
                    "hidden_units": state.population.sizes[index].tolist(),
                    "num_parameters": sum(array.size for layer in network for array in layer),
                    "seconds": seconds,
                    **setting.judge(network),
                }
            )
        print(f"run {number}: {seconds:.1f} s", flush=True)
    write_atomically(options.output / "pareto.json", json.dumps({"rows": rows}) + "\n")
    faithful = json.loads((options.output / "weightings.json").read_text())
    report(options, rows, faithful, whole)


def best_of(rows: list[dict], number: int, most: float) -> dict | None:
    """The best network of a run by validation, with at most `most` parameters."""
    small = [row for row in rows if row["run"] == number and row["num_parameters"] <= most]
    return max(small, key=lambda row: row["other_training_accuracy"], default=None)


def report(options: Options, rows: list[dict], faithful: dict, whole: int) -> None:
    print("| parameters, % of the parent's | faithful | extended | extended no worse in |")
    print("|---|---|---|---|")
    for fraction in FRACTIONS:
        pairs = [
            tuple(best_of(found, n, fraction * whole) for found in (faithful["rows"], rows))
            for n in range(options.num_runs)
        ]

        def spread(side, pairs=pairs):
            values = [100 * pair[side]["test_accuracy"] for pair in pairs if pair[side]]
            missing = f", none in {len(pairs) - len(values)}" if len(values) < len(pairs) else ""
            return f"{np.mean(values):.1f} ± {np.std(values):.1f}{missing}" if values else "none"

        no_worse = sum(
            b is not None and (a is None or b["test_accuracy"] >= a["test_accuracy"])
            for a, b in pairs
        )
        print(
            f"| {100 * fraction:.0f} | {spread(0)} | {spread(1)} | "
            f"{no_worse} of {len(pairs)} runs |"
        )
    figure = Figure(figsize=(7, 4.2))
    axes = figure.add_subplot()
    for weighting in dict.fromkeys(row["weighting"] for row in faithful["rows"]):
        mine = [row for row in faithful["rows"] if row["weighting"] == weighting]
        axes.scatter(
            [100 * row["num_parameters"] / whole for row in mine],
            [100 * row["other_training_accuracy"] for row in mine],
            s=14,
            label=f"faithful, weights {weighting}",
        )
    for number in range(options.num_runs):
        front, highest = [], 0.0
        mine = [row for row in rows if row["run"] == number]
        for row in sorted(mine, key=lambda row: row["num_parameters"]):
            if row["other_training_accuracy"] > highest:
                highest = row["other_training_accuracy"]
                front.append((100 * row["num_parameters"] / whole, 100 * highest))
        axes.step(
            *zip(*front, strict=True),
            where="post",
            color="black",
            lw=0.9,
            alpha=0.7,
            label="extended, a front a run" if number == 0 else None,
        )
    axes.set(xlabel="parameters (% of the parent's)", ylabel="validation accuracy (%)")
    axes.grid(alpha=0.3)
    axes.legend(frameon=False, fontsize=7)
    FigureCanvasAgg(figure)
    figure.savefig(options.output / "pareto.png", dpi=110, bbox_inches="tight")


if __name__ == "__main__":
    main(tyro.cli(Options))
