"""Table 1 of the DEvS paper: six methods, three sizes, several seeds, one evaluation for all.

    python experiments/devs/table.py                   # two CPU cores, half an hour
    python experiments/devs/table.py --setting paper   # full size: an accelerator

Each seed makes its sets (`evojax-suite devs`, `evojax-suite coreset`), resumed where they stopped;
then every set is judged by the same recipe. Writes a table (JSON) and a figure to --output.
"""

from __future__ import annotations

import json
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import jax
import numpy as np
import tyro

from evojax_suite import distilled
from evojax_suite.data import load
from evojax_suite.distilled import DistilledDataset
from evojax_suite.networks import NetworkConfig
from evojax_suite.reporting import plotting
from evojax_suite.reporting.charts import save_png
from evojax_suite.running import runner
from evojax_suite.runtime.results import read_lines, write_json
from evojax_suite.systems.coresets import experiment as coreset, gradient_matching
from evojax_suite.systems.devs import NETWORK, experiment as devs
from evojax_suite.training import TrainingConfig

METHODS = ("random", "herding", "k_center", "forgetting", "gradient_matching", "DEvS")
SIZES = (10, 100, 500)
REPORTED = {  # DEvS, Table 1, CIFAR-10
    "random": ("14.4±2.0", "26.0±1.2", "43.4±1.0"),
    "herding": ("21.5±1.2", "31.6±0.7", "40.4±0.6"),
    "k_center": ("21.5±1.3", "24.7±0.9", "27.0±1.4"),
    "forgetting": ("13.5±1.2", "23.3±1.0", "23.3±1.1"),
    "gradient_matching": ("28.3±0.5", "44.9±0.5", "53.9±0.5"),
    "DEvS": ("25.77±1.1", "38.97±1.0", "52.41±1.0"),
}


@dataclass(frozen=True)
class Setting:
    num_images: int | None
    width: int
    feature_epochs: int
    min_training_steps: int
    probe_epochs: int
    condensation_iterations: dict[int, int]  # by size; a size left out is not run
    real_batch_size: int
    judging_batch_size: int
    judging_epochs: dict[int, int]  # by size
    num_networks: int  # that judge a set


SETTINGS = {
    "small": Setting(
        num_images=4000,
        width=32,
        feature_epochs=20,
        min_training_steps=150,
        probe_epochs=15,
        condensation_iterations={10: 100},
        real_batch_size=64,
        judging_batch_size=100,  # 250 steps for every size
        judging_epochs={10: 250, 100: 250, 500: 50},
        num_networks=1,
    ),
    "paper": Setting(
        num_images=None,
        width=128,
        feature_epochs=60,
        min_training_steps=600,
        probe_epochs=60,
        condensation_iterations={10: 1000, 100: 1000, 500: 1000},
        real_batch_size=256,
        judging_batch_size=256,
        judging_epochs={10: 300, 100: 300, 500: 300},
        num_networks=20,
    ),
}


@dataclass(frozen=True)
class Options:
    setting: Literal["small", "paper"] = "small"
    dataset: str = "cifar10"
    data_dir: Path | None = None
    num_seeds: int = 5
    methods: tuple[str, ...] = METHODS
    augmentation: distilled.AugmentationName = "shift_flip_mixup"
    """While judging: the paper's (section 4.2), or the literature's none."""
    runs_dir: Path = Path("runs/devs-table")
    output: Path = Path("experiments/devs")


def devs_config(setting: Setting) -> devs.Config:
    return devs.Config(
        target_sizes=SIZES[::-1],
        feature_epochs=setting.feature_epochs,
        min_training_steps=setting.min_training_steps,
        network=network_of(setting),
    )


def network_of(setting: Setting) -> NetworkConfig:
    return replace(NETWORK, width=setting.width)


def recipe_of(options: Options, setting: Setting, size: int) -> TrainingConfig:
    """How a set of this size is judged."""
    return replace(
        distilled.with_augmentation(distilled.LITERATURE, options.augmentation),
        batch_size=setting.judging_batch_size,
        num_epochs=setting.judging_epochs[size],
    )


def make_sets(options: Options, setting: Setting, seed: int) -> None:
    """Everything of a seed that is not there yet."""
    network = network_of(setting)
    shared = {
        "dataset": options.dataset,
        "data_dir": options.data_dir,
        "num_images": setting.num_images,
        "seed": seed,
        "num_networks": 0,
        "runs_dir": options.runs_dir,
        "resume": True,
    }

    def make(module, name, **more):
        if not (options.runs_dir / name / "summary.json").exists():
            runner.run(module.SYSTEM, module.Options(name=name, **shared, **more))

    if "DEvS" in options.methods:
        make(devs, f"devs-{seed}", config=devs_config(setting), random_baseline=False)
    chosen = set(options.methods) - {"DEvS", "gradient_matching"}
    if chosen:
        more = {"num_samples": SIZES[::-1], "probe_epochs": setting.probe_epochs}
        methods = tuple(method for method in METHODS if method in chosen)
        make(coreset, f"coreset-{seed}", method=methods, network=network, **more)
    if "gradient_matching" in options.methods:
        condensation = gradient_matching.Config(
            network=NetworkConfig(width=setting.width), real_batch_size=setting.real_batch_size
        )
        for size, iterations in setting.condensation_iterations.items():
            make(
                coreset,
                f"gradient_matching-{size}-{seed}",
                method=("gradient_matching",),
                num_samples=(size,),
                condensation=condensation,
                condensation_iterations=iterations,
                network=network,
            )


def find_sets(options: Options, seed: int):
    """(row of the summary, path) of each set that a seed made."""
    for summary in sorted(options.runs_dir.glob(f"*-{seed}/summary.json")):
        for row in json.loads(summary.read_text())["results"]:
            if row["method"] in options.methods:
                yield row, summary.parent / f"{row['method']}-{row['num_images']}.npz"


def judge(options: Options, seeds: range) -> list[dict]:
    """Make and judge the sets of all seeds; a row for each method and size."""
    setting = SETTINGS[options.setting]
    dataset = load(options.dataset, options.data_dir)
    start = time.perf_counter()
    judged = options.runs_dir / f"judged-{options.augmentation}.jsonl"
    known = {line["path"]: line["accuracies"] for line in read_lines(judged)}
    found: dict[tuple[str, int], list[dict]] = {}
    for seed in seeds:
        make_sets(options, setting, seed)
        for row, path in find_sets(options, seed):
            if str(path) not in known:
                data = DistilledDataset.load(path)
                known[str(path)] = distilled.accuracies_on(
                    distilled.normalized_as(dataset, data).test,
                    jax.random.key(1000 + seed),
                    data.images,
                    data.labels,
                    distilled.normalized_as(dataset, data),
                    network_of(setting),
                    recipe_of(options, setting, row["num_images"]),
                    setting.num_networks,
                ).tolist()
                with judged.open("a") as file:
                    line = {"path": str(path), "accuracies": known[str(path)]}
                    file.write(json.dumps(line) + "\n")
            key = row["method"], row["num_images"]
            found.setdefault(key, []).append(row | {"accuracy": np.mean(known[str(path)])})
        print(f"seed {seed}: {time.perf_counter() - start:.0f} s", flush=True)
    return [
        {
            "method": method,
            "num_images": size,
            "accuracies": [float(row["accuracy"]) for row in rows],
            "seconds": float(np.mean([row["seconds"] for row in rows])),
            "features": rows[0]["features"],
            "augmentation": distilled.augmentation_of(recipe_of(options, setting, size)),
            "num_networks": setting.num_networks,
        }
        for (method, size), rows in sorted(found.items())
    ]


def main(options: Options) -> None:
    start = time.perf_counter()
    options.output.mkdir(parents=True, exist_ok=True)
    rows = judge(options, range(options.num_seeds))
    name = f"{options.setting}-{options.augmentation}"
    seconds = time.perf_counter() - start
    write_json(
        options.output / f"table-{name}.json",
        {
            "setting": SETTINGS[options.setting],
            "dataset": options.dataset,
            "device": jax.devices()[0].device_kind,
            "rows": rows,
        },
    )
    cells = {(row["method"], row["num_images"]): row for row in rows}
    results = {
        method: [
            (size, np.mean(row["accuracies"]), np.std(row["accuracies"]))
            for (found, size), row in cells.items()
            if found == method
        ]
        for method in METHODS
        if any(found == method for found, _ in cells)
    }
    save_png(options.output / f"accuracy-{name}.png", plotting.accuracy_by_size(results))
    judges = f"{options.num_seeds} x {SETTINGS[options.setting].num_networks} networks"
    print("| method |", " | ".join(f"{size} images" for size in SIZES), end=" | ")
    print("time to make them | features | augmentation while judging | judged by |")
    print("|---" * (len(SIZES) + 5) + "|")
    for method in METHODS:
        shown, known = [], [cells[method, size] for size in SIZES if (method, size) in cells]
        for reported, size in zip(REPORTED[method], SIZES, strict=True):
            ours = "not run"
            if (method, size) in cells:
                values = 100 * np.array(cells[method, size]["accuracies"])
                ours = f"{values.mean():.1f} ± {values.std():.1f}"
            shown.append(f"{reported}; {ours}")
        if known:
            shown.append(f"{max(row['seconds'] for row in known):.1f} s")
            shown += [known[0]["features"], known[0]["augmentation"], judges]
        print(f"| {method} |", " | ".join(shown), "|")
    print(f"reported; ours. This call took {seconds:.0f} s")


if __name__ == "__main__":
    main(tyro.cli(Options))
