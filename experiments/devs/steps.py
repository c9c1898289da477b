"""Step-wise against one-step reduction (DEvS, section 3.2): equal settings, equal judges.

    python experiments/devs/steps.py

The step-wise sets are those of `table.py`, made here where they are not there yet. The one-step
sets come from a feature network trained as its first one: the whole training set is clustered once
for each size.
"""

from __future__ import annotations

from dataclasses import replace

import jax
import numpy as np
import table
import tyro

from evojax_suite import devs, distilled
from evojax_suite.data import load, with_whole_training_set
from evojax_suite.reporting import plotting
from evojax_suite.reporting.charts import save_png
from evojax_suite.runtime.results import write_json
from evojax_suite.types import training_data


def one_step_sets(options: table.Options, setting: table.Setting, seed: int) -> dict[int, tuple]:
    """Images and labels by size, each straight from the training set."""
    dataset = load(options.dataset, options.data_dir)
    dataset = with_whole_training_set(dataset, setting.num_images)
    data = training_data(dataset)
    key, found, before, number = jax.random.key(seed), {}, None, 0
    for size in table.SIZES:  # the last step alone knows the size
        config = replace(
            table.devs_config(setting), target_sizes=(size,), reduction_factor=float("inf")
        )
        algorithm = devs.build(config, dataset.num_classes, dataset.image_shape)
        if before is None:
            before = algorithm.init(key, None, data)
            for number in range(1, devs.num_steps(config, len(dataset.train))):
                before, _ = algorithm.step(jax.random.fold_in(key, number), before, None, data)
        after, _ = algorithm.step(jax.random.fold_in(key, number + 1), before, None, data)
        (reached,) = algorithm.result(after, None, data)
        found[size] = np.asarray(reached.images), np.asarray(reached.labels)
    return found


def main(options: table.Options) -> None:
    setting = table.SETTINGS[options.setting]
    dataset = load(options.dataset, options.data_dir)
    rows = table.judge(replace(options, methods=("DEvS",)), range(options.num_seeds))
    accuracies = {("step-wise", row["num_images"]): row["accuracies"] for row in rows}
    for seed in range(options.num_seeds):
        for size, (images, labels) in one_step_sets(options, setting, seed).items():
            found = distilled.accuracies_on(
                dataset.test,
                jax.random.key(1000 + seed),
                images,
                labels,
                dataset,
                table.network_of(setting),
                table.recipe_of(options, setting, size),
                setting.num_networks,
            )
            accuracies.setdefault(("one-step", size), []).append(float(np.mean(found)))
        print(f"seed {seed} done", flush=True)
    results = {
        kind: [
            (size, np.mean(values), np.std(values))
            for (found, size), values in sorted(accuracies.items())
            if found == kind
        ]
        for kind in ("one-step", "step-wise")
    }
    save_png(options.output / f"steps-{options.setting}.png", plotting.accuracy_by_size(results))
    report = [
        {"kind": kind, "num_images": size, "accuracies": values}
        for (kind, size), values in sorted(accuracies.items())
    ]
    write_json(options.output / f"steps-{options.setting}.json", {"rows": report})
    for size in table.SIZES:
        pair = [100 * np.array(accuracies[kind, size]) for kind in ("one-step", "step-wise")]
        gain = pair[1] - pair[0]
        print(
            f"{size} images: one-step {pair[0].mean():.1f} ± {pair[0].std():.1f}, "
            f"step-wise {pair[1].mean():.1f} ± {pair[1].std():.1f}, "
            f"better in {(gain > 0).sum()} of {len(gain)} seeds: {gain.round(1).tolist()}"
        )


if __name__ == "__main__":
    main(tyro.cli(table.Options))
