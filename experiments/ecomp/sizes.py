"""Networks pruned by evolution and refitted, beside simple rules at the same sizes: five parents.

    python experiments/ecomp/sizes.py

Two runs for each parent: the recommended setting, and one that uses no label (`--search.error
divergence --search.label-rounds 0`). The run's own front is read, in which the test images were
opened last; at each size its largest network that is no larger is shown.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import tyro

from evojax_suite.cli.main import main as run_command
from evojax_suite.reporting import plotting
from evojax_suite.reporting.charts import Chart, Series, save_png
from evojax_suite.runtime.results import Rows, spread

SIZES = (0.02, 0.03, 0.05, 0.08, 0.12, 0.16, 0.25)
SETTINGS = {
    "labels": [],
    "no labels": ["--search.error", "divergence", "--search.label-rounds", "0"],
}
RULES = plotting.RULES


@dataclass(frozen=True)
class Options:
    num_parents: int = 5
    num_generations: int = 16
    dataset: str = "fashion_mnist"
    runs_dir: Path = Path("runs/ecomp-sizes")
    output: Path = Path("experiments/ecomp/sizes.json")


def main(options: Options) -> None:
    rows = Rows(options.output, options, "runs_dir", "output", "num_parents")
    for seed in range(options.num_parents):
        for setting, more in SETTINGS.items():
            if any(row["seed"] == seed and row["setting"] == setting for row in rows):
                continue
            name = f"{setting.replace(' ', '-')}-{seed}"
            command = ["ecomp", "--recipe", "recommended", "--dataset", options.dataset, *more]
            command += ["--search.num-generations", str(options.num_generations)]
            seeds = ["--seed", str(seed), "--parent-seed", str(seed)]
            place = ["--name", name, "--runs-dir", str(options.runs_dir)]
            tuning = [] if setting == "labels" else ["--fine-tuning-seconds", "0"]
            directory = options.runs_dir / name
            goes_on = ["--resume"] if (directory / "config.json").exists() else []
            if run_command([*command, *seeds, *tuning, *place, *goes_on]):
                raise SystemExit(f"the run {name} failed")
            summary = json.loads((directory / "summary.json").read_text())
            front = json.loads((directory / "front.json").read_text())
            for row in front:
                del row["inputs_kept"]
            rows.add({"seed": seed, "setting": setting, "summary": summary, "front": front})
    report(list(rows))
    draw(list(rows), options.output.with_suffix(".png"))


def largest(front: list[dict], size: float) -> dict | None:
    """The largest network of a front with at most `size` of the parent's parameters."""
    fits = [row for row in front if row["relative_parameters"] <= size]
    return max(fits, key=lambda row: row["relative_parameters"], default=None)


def report(rows: list[dict]) -> None:
    for setting in SETTINGS:
        mine = [row for row in rows if row["setting"] == setting]
        parents = spread(100 * row["summary"]["parent_test_accuracy"] for row in mine)
        print(f"\n{setting}: parents {parents}\n")
        print(f"| parameters | evolved | below the parent | {' | '.join(RULES.values())} | ahead |")
        print("|---|---|---|" + "---|" * (len(RULES) + 1))
        for size in SIZES:
            found = [largest(row["front"], size) for row in mine]
            if not all(found):
                continue
            ours = np.array([100 * row["test_accuracy"] for row in found])
            gaps = [100 * row["summary"]["parent_test_accuracy"] for row in mine] - ours
            cells, ahead = [], []
            for rule in RULES:
                theirs = [row[rule] and 100 * row[rule]["test_accuracy"] for row in found]
                cells.append(spread(theirs) if all(theirs) else "none so small")
                wins = sum(b is None or a > b for a, b in zip(ours, theirs, strict=True))
                ahead.append(f"{wins} of {len(mine)}")
            gap = spread(gaps)
            row = [f"{100 * size:.0f} %", spread(ours), gap, *cells, ", ".join(ahead)]
            print(f"| {' | '.join(row)} |")
        names = mine[0]["summary"]["alternatives"]
        sizes = spread(100 * row["summary"]["relative_parameters"] for row in mine)
        seconds = spread(row["summary"]["seconds"] for row in mine)
        print(f"\nthe run's network, {sizes} % of the parameters, search {seconds} s\n")
        chosen = spread(100 * row["summary"]["test_accuracy"] for row in mine)
        print(f"| units | test accuracy |\n|---|---|\n| evolved | {chosen} |")
        for name in names:
            values = (100 * row["summary"]["alternatives"][name]["test_accuracy"] for row in mine)
            print(f"| {name} | {spread(values)} |")


def draw(rows: list[dict], path: Path) -> None:
    """The chart of the first run's page, and how far evolution is ahead of elimination, as a
    picture."""
    gains = []
    for setting in SETTINGS:
        fronts = [row["front"] for row in rows if row["setting"] == setting]
        chosen = {size: [largest(front, size) for front in fronts] for size in SIZES}
        chosen = {
            size: [
                100 * (row["test_accuracy"] - row["elimination"]["test_accuracy"]) for row in each
            ]
            for size, each in chosen.items()
            if all(each)
        }
        mean, std = np.array([(np.mean(each), np.std(each)) for each in chosen.values()]).T
        sizes = [100 * size for size in chosen]
        gains.append(Series(setting, sizes, mean, mean - std, mean + std, "joined points"))
    titles = "parameters (% of the parent's)", "evolved less elimination (points)"
    gain = Chart(*titles, gains, log_x=True, levels={"level": 0.0})
    first = plotting.size_fronts(rows[0]["front"], rows[0]["summary"], "parameters")
    save_png(path, [*first, gain])


if __name__ == "__main__":
    main(tyro.cli(Options))
