"""The paper's general scheme (section II; CEST): predators are a population too.

    python experiments/cest/general.py

Four predators train on a quarter of the images in each generation, so 30 generations compute as
many gradients as one network on all images in 30 epochs (`table.py`, rule `full`). Runs are
written as they come (`general.json`); the same command goes on after an interruption. Needs the
dataset in --data-dir or EVOJAX_SUITE_DATA.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, replace
from pathlib import Path

import jax
import tyro
from matplotlib.figure import Figure

from evojax_suite import cest, networks
from evojax_suite.data import load, some_images
from evojax_suite.networks import NetworkConfig
from evojax_suite.runtime.results import Rows, spread, to_jsonable
from evojax_suite.systems.cest import predator_prey
from evojax_suite.systems.cest.predator_prey import Params
from evojax_suite.training import TrainingConfig, batches_of, evaluate

# Changes of Config, and Params.
VARIANTS = {
    "the scheme": ({}, Params()),
    "without crossover": ({}, Params(crossover_rate=0.0)),
    "predators start apart": ({"shared_start": False}, Params()),
    "prey not augmented": (
        {"training": TrainingConfig(num_epochs=1, batch_size=64)},
        Params(),
    ),
}


@dataclass(frozen=True)
class Options:
    seeds: tuple[int, ...] = (0, 1, 2)
    dataset: str = "fashion_mnist"
    data_dir: Path | None = None
    num_images: int = 3000
    """Training images, balanced."""
    num_validation_images: int = 1000
    width: int = 16
    num_predators: int = 4
    num_generations: int = 30
    output: Path = Path("experiments/cest")


def main(options: Options) -> None:
    dataset = load(options.dataset, options.data_dir)
    dataset = some_images(dataset, options.num_images, options.num_validation_images)
    base = predator_prey.Config(
        num_predators=options.num_predators,
        num_generations=options.num_generations,
        network=NetworkConfig(network="VGG10", width=options.width),
    )
    data = cest.make_data(cest.Config(network=base.network), dataset)
    network = networks.create(base.network, dataset.num_classes, dataset.image_shape)
    test = batches_of(dataset, dataset.test, base.engine)
    judge = jax.jit(lambda variables: evaluate(network, variables, test))

    rows = Rows(options.output / "general.json", options, "seeds", "data_dir", "output")
    done = {(row["variant"], row["seed"]) for row in rows}
    for variant, (changes, params) in VARIANTS.items():
        algorithm = predator_prey.build(
            replace(base, **changes), dataset.num_classes, dataset.image_shape
        )
        step = jax.jit(algorithm.step, donate_argnums=1)
        for seed in options.seeds:
            if (variant, seed) in done:
                continue
            key_init, key_steps = jax.random.split(jax.random.key(seed))
            state = jax.jit(algorithm.init)(key_init, params, data)
            compiled = step.lower(key_steps, state, params, data).compile()
            clock, lines = time.perf_counter(), []
            for generation in range(1, options.num_generations + 1):
                key = jax.random.fold_in(key_steps, generation)
                state, metrics = compiled(key, state, params, data)
                lines.append(to_jsonable(metrics._asdict()))
            seconds = time.perf_counter() - clock
            accuracy = float(judge(algorithm.result(state, params, data)).accuracy)
            row = {"variant": variant, "seed": seed, "test_accuracy": accuracy}
            rows.add(row | {"seconds": seconds, "lines": lines})
            print(f"{variant}, seed {seed}: {accuracy:.4f}, {seconds:.0f} s", flush=True)
    print(table(rows))
    first = {row["variant"]: row["lines"] for row in rows if row["seed"] == options.seeds[0]}
    figure(options.output / "general.png", first)


def table(rows: Rows) -> str:
    """Each variant at its end."""
    lines = [
        "| | test accuracy, best predator | validation: best | mean of the predators | predators "
        "that misclassify a prey | an example of the whole set |",
        "|---" * 6 + "|",
    ]
    for variant in dict.fromkeys(row["variant"] for row in rows):
        mine = [row for row in rows if row["variant"] == variant]
        last = [row["lines"][-1] for row in mine]
        cells = [
            spread([100 * row["test_accuracy"] for row in mine]),
            spread([100 * x["validation_accuracy"] for x in last]),
            spread([100 * x["validation_accuracy_mean"] for x in last]),
            spread([x["prey_fitness_mean"] for x in last], 2),
            spread([x["wrong_mean"] for x in last], 2),
        ]
        lines.append(f"| {variant} | {' | '.join(cells)} |")
    return "\n".join(lines)


def figure(path: Path, runs: dict[str, list[dict]]) -> None:
    """Draw the validation accuracy of one seed, and how many predators misclassify an example."""
    drawn = Figure(figsize=(9, 3.6))
    panels = drawn.subplots(1, 2)
    for index, (variant, lines) in enumerate(runs.items()):
        generations = [line["generation"] for line in lines]
        for panel, solid, dashed in (
            (panels[0], "validation_accuracy", "validation_accuracy_mean"),
            (panels[1], "prey_fitness_mean", "wrong_mean"),
        ):
            panel.plot(generations, [x[solid] for x in lines], lw=1.2, color=f"C{index}")
            panel.plot(generations, [x[dashed] for x in lines], "--", lw=0.9, color=f"C{index}")
        panels[0].lines[-2].set_label(variant)
    panels[0].set(xlabel="generation", ylabel="validation accuracy", title="best, dashed: mean")
    panels[1].set(
        xlabel="generation",
        ylabel="predators that misclassify",
        title="the next prey, dashed: all examples",
    )
    for panel in panels:
        panel.grid(alpha=0.3)
    drawn.tight_layout(rect=(0, 0.12, 1, 1))
    drawn.legend(loc="lower center", ncols=2, frameon=False, fontsize=8)
    drawn.savefig(path, dpi=150)


if __name__ == "__main__":
    main(tyro.cli(Options))
