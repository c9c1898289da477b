"""Options of DEvS on equal training, judged on training images that no set was made from.

    python experiments/devs/choices.py                  # all variants, one seed
    python experiments/devs/choices.py --only default --seeds 0 1 2

5,000 training images shrink to 500, 100 and 10; 3,000 others judge them, so that no choice of a
default has seen the test split.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, replace
from pathlib import Path

import jax
import numpy as np
import tyro

from evojax_suite import devs, distilled
from evojax_suite.data import load, normalize, with_whole_training_set
from evojax_suite.operators import random_examples
from evojax_suite.types import Dataset, Split, training_data

VARIANTS = {
    "default": {},
    "reductions by 3": {"reduction_factor": 3.0},
    "reductions by 3, originals count alike": {"reduction_factor": 3.0, "average": "originals"},
    "learning rate 0.01": {"feature_learning_rate": 0.01},
    "no bottleneck": {"bottleneck": 0},
    "continued": {"feature_network": "continued"},
    "first": {"feature_network": "first"},
    "labels in the clustering, weight 1": {"label_weight": 1.0},
}


@dataclass(frozen=True)
class Options:
    dataset: str = "cifar10"
    data_dir: Path | None = None
    only: tuple[str, ...] = tuple(VARIANTS)
    seeds: tuple[int, ...] = (0,)
    num_images: int = 5000
    num_judging_images: int = 3000
    width: int = 32
    num_networks: int = 2


def parts(options: Options) -> Dataset:
    """A stratified part of the training set; `test` is other training images."""
    whole = with_whole_training_set(load(options.dataset, options.data_dir))
    part = with_whole_training_set(whole, options.num_images)
    used = {image.tobytes() for image in part.train.images}
    order = np.random.default_rng(0).permutation(len(whole.train))
    others = [i for i in order if whole.train.images[i].tobytes() not in used]
    others = others[: options.num_judging_images]
    return replace(part, test=Split(whole.train.images[others], whole.train.labels[others]))


def main(options: Options) -> None:
    dataset = parts(options)
    data = training_data(dataset)
    base = devs.Config(
        min_training_steps=150,
        network=replace(devs.NETWORK, width=options.width),
    )

    def judge(name, seed, sets, seconds):
        cells = []
        for images, labels in sets:
            found = distilled.accuracies_on(
                dataset.test,
                jax.random.key(seed),
                images,
                labels,
                dataset,
                base.network,
                replace(base.training, num_epochs=max(50, 300 * 100 // max(100, len(images)))),
                options.num_networks,
            )
            cells.append(f"{100 * found.mean():.1f}")
        print(f"| {name} | {seed} | {' | '.join(cells)} | {seconds:.0f} s |", flush=True)

    print(f"| variant | seed | {' | '.join(map(str, base.target_sizes))} | made in |")
    print("|---" * (len(base.target_sizes) + 3) + "|")
    for seed in options.seeds:
        key = jax.random.key(seed)
        chosen = [
            np.asarray(random_examples(jax.random.fold_in(key, size), data.labels, size, 10))
            for size in base.target_sizes
        ]
        images = normalize(dataset.train.images, dataset.mean, dataset.std)
        labels = np.eye(10, dtype=np.float32)[dataset.train.labels]
        judge("random", seed, [(images[places], labels[places]) for places in chosen], 0)
        for name in options.only:
            start, number = time.perf_counter(), 0
            config = replace(base, **VARIANTS[name])
            algorithm = devs.build(config, dataset.num_classes, dataset.image_shape)
            state = algorithm.init(key, None, data)
            while not bool(algorithm.finished(state)):
                number += 1
                state, _ = algorithm.step(jax.random.fold_in(key, number), state, None, data)
            reached = algorithm.result(state, None, data)
            seconds = time.perf_counter() - start
            judge(name, seed, [(one.images, one.labels) for one in reached], seconds)


if __name__ == "__main__":
    main(tyro.cli(Options))
