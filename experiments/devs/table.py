"""Table 1 of the DEvS paper: six methods, three sizes, several seeds, one evaluation for all.

    python experiments/devs/table.py                   # two CPU cores, half an hour
    python experiments/devs/table.py --setting paper   # full size: an accelerator

Each seed makes its sets (`evojax-suite devs`, `evojax-suite coreset`), resumed where they stopped;
then every set is judged by the same recipe. Writes a table (JSON) and a figure to --output.
"""

from __future__ import annotations

import json
import platform
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import jax
import numpy as np
import tyro

from evojax_suite import distilled, plotting
from evojax_suite.algorithms import devs as algorithm
from evojax_suite.baselines import gradient_matching
from evojax_suite.commands import coreset, devs
from evojax_suite.data import load
from evojax_suite.distilled import DistilledDataset
from evojax_suite.networks import NetworkConfig
from evojax_suite.results import read_lines, write_json

METHODS = ("random", "herding", "k_center", "forgetting", "gradient_matching", "DEvS")
SIZES = (10, 100, 500)
REPORTED = {  # paper 000, Table 1, CIFAR-10
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
    reduction_factor: float
    probe_epochs: int
    condensation_iterations: dict[int, int]  # by size; a size left out is not run
    real_batch_size: int
    judging_epochs: dict[int, int]  # by size
    num_networks: int  # that judge a set


SETTINGS = {
    "small": Setting(
        num_images=5000,
        width=32,
        feature_epochs=20,
        reduction_factor=3.0,
        probe_epochs=20,
        condensation_iterations={10: 100},
        real_batch_size=64,
        judging_epochs={10: 300, 100: 300, 500: 120},
        num_networks=1,
    ),
    "paper": Setting(
        num_images=None,
        width=128,
        feature_epochs=60,
        reduction_factor=2.0,
        probe_epochs=60,
        condensation_iterations={10: 1000, 100: 1000, 500: 1000},
        real_batch_size=256,
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
    augmentation: Literal["none", "shift_flip", "shift_flip_mixup"] = "shift_flip_mixup"
    """While judging: the paper's (section 4.2), or the literature's none."""
    runs_dir: Path = Path("runs/devs-table")
    output: Path = Path("experiments/devs")


def make_sets(options: Options, setting: Setting, seed: int) -> None:
    """Everything of a seed that is not there yet."""
    network = NetworkConfig(width=setting.width, initialization="kaiming", dropout=0.2)
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
            module.run(module.Options(name=name, **shared, **more))

    if "DEvS" in options.methods:
        config = algorithm.Config(
            target_sizes=SIZES[::-1],
            reduction_factor=setting.reduction_factor,
            feature_epochs=setting.feature_epochs,
            network=network,
        )
        make(devs, f"devs-{seed}", config=config, random_baseline=False)
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
    """(method, size, path, seconds to make it) of what a seed made."""
    for summary in sorted(options.runs_dir.glob(f"*-{seed}/summary.json")):
        for row in json.loads(summary.read_text())["results"]:
            if row["method"] in options.methods:
                path = summary.parent / f"{row['method']}-{row['num_images']}.npz"
                yield row["method"], row["num_images"], path, row["seconds"]


def main(options: Options) -> None:
    setting = SETTINGS[options.setting]
    recipe = distilled.with_augmentation(distilled.LITERATURE, options.augmentation)
    network = NetworkConfig(width=setting.width, initialization="kaiming", dropout=0.2)
    start = time.perf_counter()
    dataset = load(options.dataset, options.data_dir)
    accuracies: dict[tuple[str, int], list[float]] = {}
    seconds: dict[tuple[str, int], list[float]] = {}
    judged = options.runs_dir / f"judged-{options.augmentation}.jsonl"
    known = {line["path"]: line["accuracies"] for line in read_lines(judged)}
    for seed in range(options.num_seeds):
        make_sets(options, setting, seed)
        for method, size, path, taken in find_sets(options, seed):
            if str(path) not in known:
                data = DistilledDataset.load(path)
                known[str(path)] = distilled.accuracies_on_test(
                    jax.random.key(1000 + seed),
                    data.images,
                    data.labels,
                    distilled.normalized_as(dataset, data),
                    network,
                    replace(recipe, num_epochs=setting.judging_epochs[size]),
                    setting.num_networks,
                ).tolist()
                with judged.open("a") as file:
                    line = {"path": str(path), "accuracies": known[str(path)]}
                    file.write(json.dumps(line) + "\n")
            accuracies.setdefault((method, size), []).append(float(np.mean(known[str(path)])))
            seconds.setdefault((method, size), []).append(taken)
        print(f"seed {seed}: {time.perf_counter() - start:.0f} s", flush=True)

    rows = [
        {
            "method": method,
            "num_images": size,
            "test_accuracy_mean": float(np.mean(values)),
            "test_accuracy_std": float(np.std(values)),
            "num_seeds": len(values),
            "seconds": float(np.mean(seconds[method, size])),
        }
        for (method, size), values in sorted(accuracies.items())
    ]
    machine = {"device": jax.devices()[0].device_kind, "host": platform.machine()}
    write_json(
        options.output / f"table-{options.setting}-{options.augmentation}.json",
        {
            "setting": setting,
            "recipe": recipe,
            "dataset": dataset.name,
            "machine": machine,
            "seconds_of_this_call": time.perf_counter() - start,
            "rows": rows,
        },
    )
    by_method = {
        method: [
            (row["num_images"], row["test_accuracy_mean"], row["test_accuracy_std"])
            for row in rows
            if row["method"] == method
        ]
        for method in METHODS
    }
    plotting.accuracy_by_size(
        options.output / f"accuracy-{options.setting}-{options.augmentation}.png",
        {method: points for method, points in by_method.items() if points},
    )
    print("| method | " + " | ".join(f"{size} images: reported, ours" for size in SIZES), end="")
    print(" | time to make them |\n|---|" + "---|" * (len(SIZES) + 1))
    for method in METHODS:
        cells = []
        for reported, size in zip(REPORTED[method], SIZES, strict=True):
            values = accuracies.get((method, size))
            ours = (
                f"{100 * np.mean(values):.1f}±{100 * np.std(values):.1f}" if values else "not run"
            )
            cells.append(f"{reported}, {ours}")
        taken = [np.mean(seconds[method, size]) for size in SIZES if (method, size) in seconds]
        cells.append(f"{max(taken):.1f} s" if taken else "not run")
        print(f"| {method} | {' | '.join(cells)} |")


if __name__ == "__main__":
    main(tyro.cli(Options))
