"""What ten epochs say of a full training (DE-NAS): rank correlation over random architectures.

    python experiments/de_nas/ranks.py
    python experiments/de_nas/ranks.py --max-filters 16 --max-features 256 --full-epochs 50 \\
        --num-validation-images 359                         # what is committed

Each architecture trains for ten epochs and, anew, for 200, by the paper's recipe and by that of the
command's small scale, constant or with a cosine over its epochs; accuracies are of the validation
part. Written as they come (`ranks.json`); the same command goes on after an interruption.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass, replace
from pathlib import Path

import jax
import numpy as np
import tyro
from scipy import stats

from evojax_suite import de_nas
from evojax_suite.data import load, some_images
from evojax_suite.running.small_sets import fitted_to
from evojax_suite.runtime.results import Rows, spread
from evojax_suite.systems.de_nas import architectures
from evojax_suite.systems.de_nas.architectures import Space

ADAM = replace(de_nas.TRAINING, optimizer="adam", learning_rate=2e-3)
RECIPES = {
    "paper": {},
    "Adam": {"training": ADAM, "dropout": 0.2, "initialization": "kaiming"},
    "Adam, cosine": {
        "training": replace(ADAM, schedule="cosine"),
        "dropout": 0.2,
        "initialization": "kaiming",
    },
}


@dataclass(frozen=True)
class Options:
    recipes: tuple[str, ...] = tuple(RECIPES)
    candidates: int = 15
    """Random architectures."""
    dataset: str = "digits"
    data_dir: Path | None = None
    num_images: int | None = None
    """Training images, balanced; all by default."""
    num_validation_images: int = 1000
    max_filters: int = 32
    max_features: int = 512
    few_epochs: int = 10
    full_epochs: int = 200
    output: Path = Path("experiments/de_nas/ranks.json")


def main(options: Options) -> None:
    dataset = load(options.dataset, options.data_dir)
    dataset = some_images(dataset, options.num_images, options.num_validation_images)
    shape, classes = dataset.image_shape, dataset.num_classes
    space = Space(max_filters=options.max_filters, max_features=options.max_features)
    make = jax.jit(jax.vmap(lambda key: architectures.random_genome(key, space, shape)))
    population = make(jax.random.split(jax.random.key(0), options.candidates))
    rows = Rows(options.output, options, "recipes", "candidates", "data_dir", "output")
    done = {(row["recipe"], row["candidate"]) for row in rows}
    configs = {}
    for recipe in options.recipes:
        config = replace(de_nas.Config(space=space, programs="separate"), **RECIPES[recipe])
        configs[recipe] = replace(config, training=fitted_to(config.training, dataset))
    data = de_nas.make_data(configs[options.recipes[0]], dataset)  # the same for all
    for candidate, (recipe, config) in itertools.product(
        range(options.candidates), configs.items()
    ):
        if (recipe, candidate) in done:
            continue
        genome = architectures.member(population, candidate)
        row = {"recipe": recipe, "candidate": candidate}
        for seed, (name, epochs) in enumerate(
            (("few", options.few_epochs), ("full", options.full_epochs))
        ):
            training = replace(config.training, num_epochs=epochs)
            judge = de_nas.make_evaluator(replace(config, training=training), classes, shape)
            key = jax.random.fold_in(jax.random.key(candidate), seed)
            judged = judge(genome, key, data, np.zeros(0))
            row[name] = float(judged.evaluation.accuracy)
            row[f"{name}_seconds"] = judged.seconds["training"]
        rows.add(row)
        print(f"{candidate}, {recipe}: {row['few']:.4f}, {row['full']:.4f}", flush=True)
    print(table(rows))


def table(rows: Rows) -> str:
    """Table of each recipe's accuracies, and of how alike few epochs and a full training order."""
    lines = [
        "| recipe | architectures | few epochs | full training | Spearman | Kendall |",
        "|---" * 6 + "|",
    ]
    for recipe in dict.fromkeys(row["recipe"] for row in rows):
        mine = [row for row in rows if row["recipe"] == recipe]
        few, full = (np.array([row[name] for row in mine]) for name in ("few", "full"))
        cells = [recipe, str(len(mine)), *(spread(100 * x) for x in (few, full))]
        for correlation in (stats.spearmanr, stats.kendalltau):
            defined = np.ptp(few) > 0 and np.ptp(full) > 0
            cells.append(f"{correlation(few, full).statistic:.2f}" if defined else "all alike")
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


if __name__ == "__main__":
    main(tyro.cli(Options))
