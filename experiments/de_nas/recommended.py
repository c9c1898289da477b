"""The recommended search on Fashion-MNIST beside random search and networks by hand.

    python experiments/de_nas/recommended.py

For each seed `evojax-suite de-nas --recipe recommended`, whose summary.json has what stands beside
it: the best of as many candidates by random search from the same first population, and networks
like VGG and ResNet with as many parameters, all after the same final training. Runs that are there
already are not made again.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import tyro

from evojax_suite.cli.main import main as run_command
from evojax_suite.runtime.results import spread, write_json
from evojax_suite.systems.de_nas.experiment import BASELINES

KEPT = (
    "test_accuracy",
    "num_parameters",
    "num_multiplications",
    "num_evaluated",
    "seconds",
    "search_seconds",
    "smallest",
    *BASELINES.values(),
)


@dataclass(frozen=True)
class Options:
    seeds: tuple[int, ...] = (0, 1, 2, 3, 4)
    dataset: str = "fashion_mnist"
    data_dir: Path | None = None
    runs_dir: Path = Path("runs/de-nas-recommended")
    output: Path = Path("experiments/de_nas/recommended.json")


def main(options: Options) -> None:
    where = ["--runs-dir", str(options.runs_dir), "--dataset", options.dataset]
    where += ["--data-dir", str(options.data_dir)] if options.data_dir else []
    rows = []
    for seed in options.seeds:
        name = f"seed-{seed}"
        command = ["de-nas", "--recipe", "recommended", "--seed", str(seed), "--name", name]
        path = options.runs_dir / name / "summary.json"
        goes_on = ["--resume"] if path.with_name("config.json").exists() else []
        if not path.exists() and run_command([*command, *where, *goes_on]):
            raise SystemExit(f"seed {seed} failed")
        summary = json.loads(path.read_text())
        rows.append({"seed": seed, **{name: summary[name] for name in KEPT}})
        write_json(options.output, rows)
    print(table(rows))


def table(rows: list[dict]) -> str:
    """Test accuracies and parameters, and the paired differences of the recommended search's."""
    found = {"recommended": rows}
    found |= {role: [row[key] for row in rows] for role, key in BASELINES.items()}
    lines = [
        "| network | seeds | test accuracy (%) | parameters | recommended less this, paired "
        "| ahead in |",
        "|---" * 6 + "|",
    ]
    own = np.array([100 * row["test_accuracy"] for row in rows])
    for name, models in found.items():
        accuracy = np.array([100 * model["test_accuracy"] for model in models])
        more = own - accuracy
        error = more.std(ddof=1) / np.sqrt(len(more)) if len(more) > 1 else np.nan
        compared = f"{more.mean():+.1f} ± {error:.1f} | {(more > 0).sum()} of {len(more)}"
        cells = [
            name,
            str(len(rows)),
            spread(accuracy),
            spread([model["num_parameters"] for model in models], 0),
            " | " if name == "recommended" else compared,
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


if __name__ == "__main__":
    main(tyro.cli(Options))
