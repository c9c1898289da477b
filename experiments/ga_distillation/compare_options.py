"""The options beyond Sato et al. against its setting, on equal budgets of trained networks.

Every variant distils digits with the same number of networks trained, over several seeds; ten fresh
networks judge each result on the test split. The size is reduced (see `Options`), so the figures
compare variants with each other and not with the paper.

    python experiments/ga_distillation/compare_options.py --output runs/options.json
"""

from __future__ import annotations

import dataclasses
import json
import time
from dataclasses import dataclass, field
from pathlib import Path

import jax
import numpy as np
import tyro

from evojax_suite import distilled, ga_distillation, load
from evojax_suite.networks import NetworkConfig
from evojax_suite.systems.ga_distillation import strong_random
from evojax_suite.systems.ga_distillation.algorithm import Config, Params
from evojax_suite.training import EngineConfig, TrainingConfig


@dataclass(frozen=True)
class Options:
    """Budget and sizes."""

    seeds: tuple[int, ...] = (0, 1, 2)
    """Runs of each variant."""
    generations: int = 40
    """Generations of a variant that trains one network a member; with more networks, fewer."""
    config: tyro.conf.OmitArgPrefixes[Config] = field(
        default_factory=lambda: Config(
            population_size=32,
            network=NetworkConfig(width=32, depth=2, convolution="patches"),
            training=TrainingConfig(num_epochs=60, learning_rate=2e-3),
            engine=EngineConfig(members_in_flight=4, evaluation_batch_size=400),
        )
    )
    """What all variants share."""
    only: tuple[str, ...] = ()
    """Names of the variants to run; all by default."""
    output: Path | None = None
    """Write the figures to this JSON file."""


CROSS_ENTROPY = {"fitness": "cross_entropy"}
COMMON = {"common_random_numbers": True, "best_of": "last_generation"}
VARIANTS: dict[str, tuple[dict, dict]] = {
    "paper's setting": ({}, {}),
    "DL-EA, no crossover": ({"crossover": "none"}, {}),
    "shared sign (Eq. 4)": ({"laplace_sign": "shared"}, {}),
    "image bounds": ({"clip": "image"}, {}),
    "noise 0.3/g": ({}, {"mutation_scale": 0.3}),
    "cross-entropy": (CROSS_ENTROPY, {}),
    "common random numbers": (COMMON, {}),
    "two networks a member": ({"networks_per_member": 2}, {}),
    "fresh half of the fitness images": ({"fitness_subset_size": 180}, {}),
    "held-out fifth chooses": ({"holdout_ratio": 0.2}, {}),
    "soft labels": ({"evolve_labels": True}, {}),
    "cross-entropy, common": (CROSS_ENTROPY | COMMON, {}),
    "cross-entropy, common, image bounds": (CROSS_ENTROPY | COMMON | {"clip": "image"}, {}),
    "the same, SNES": (CROSS_ENTROPY | COMMON | {"strategy": "SNES", "strategy_std": 0.3}, {}),
    "the same, Sep_CMA_ES": (
        CROSS_ENTROPY | COMMON | {"strategy": "Sep_CMA_ES", "strategy_std": 0.3},
        {},
    ),
    "the same, DifferentialEvolution": (
        CROSS_ENTROPY | COMMON | {"strategy": "DifferentialEvolution"},
        {},
    ),
}


def run_algorithm(algorithm, key, params, data, num_steps):
    """The state after `num_steps` steps, as `loop.run` would have it."""
    key_init, key_steps = jax.random.split(key)
    state = jax.jit(algorithm.init)(key_init, params, data)
    step = jax.jit(algorithm.step)
    for index in range(num_steps):
        state, _ = step(jax.random.fold_in(key_steps, index), state, params, data)
    return state


def main(options: Options) -> None:
    dataset = load("digits")
    data = ga_distillation.make_data(dataset)

    def judge(seed, config, individual):
        return 100 * distilled.accuracies_on(
            dataset.test,
            jax.random.key(1000 + seed),
            individual.images,
            individual.labels,
            dataset,
            config.network,
            config.training,
            10,
            config.engine,
        )

    def report(name, rows, seconds):
        means = [np.mean(row) for row in rows]
        line = {
            "variant": name,
            "test_accuracy_mean": float(np.mean(means)),
            "std_over_seeds": float(np.std(means)),
            "seconds_per_seed": seconds / len(rows),
        }
        print(
            f"| {name} | {line['test_accuracy_mean']:.1f} ± {line['std_over_seeds']:.1f} | "
            f"{line['seconds_per_seed']:.0f} |",
            flush=True,
        )
        return line

    print("| variant | test accuracy, % (mean ± std over seeds) | s a seed |\n|---|---|---|")
    lines = []
    start = time.perf_counter()
    baseline = strong_random.build(
        options.config, len(options.seeds), dataset.num_classes, dataset.image_shape
    )
    state = run_algorithm(baseline, jax.random.key(99), Params(), data, len(options.seeds))
    chosen = baseline.result(state, Params(), data)
    rows = [
        judge(seed, options.config, jax.tree.map(lambda leaf, i=i: leaf[i], chosen))
        for i, seed in enumerate(options.seeds)
    ]
    lines.append(report("strong random", rows, time.perf_counter() - start))
    for name, (settings, scalars) in VARIANTS.items():
        if options.only and name not in options.only:
            continue
        config = dataclasses.replace(options.config, **settings)
        params = Params(**scalars)
        algorithm = ga_distillation.build(config, dataset.num_classes, dataset.image_shape)
        start, rows = time.perf_counter(), []
        for seed in options.seeds:
            state = run_algorithm(
                algorithm,
                jax.random.key(seed),
                params,
                data,
                options.generations // config.networks_per_member,
            )
            rows.append(judge(seed, config, algorithm.result(state, params, data)))
        lines.append(report(name, rows, time.perf_counter() - start))
    if options.output:
        options.output.parent.mkdir(parents=True, exist_ok=True)
        options.output.write_text(json.dumps(lines, indent=2) + "\n")


if __name__ == "__main__":
    main(tyro.cli(Options))
