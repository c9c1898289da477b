"""What DEvS's time depends on: image size at equal feature size, and where k-means runs.

    python experiments/devs/cost.py images     # 16, 32 and 64 pixels; gradient matching beside it
    python experiments/devs/cost.py clustering # scikit-learn against JAX, to 50,000 points

Prints Markdown and writes JSON to --output. Let nothing else run.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
import tyro

from evojax_suite import devs
from evojax_suite.data import load, with_whole_training_set
from evojax_suite.networks import NetworkConfig
from evojax_suite.runtime.results import write_json
from evojax_suite.systems.coresets import gradient_matching
from evojax_suite.systems.devs import clustering
from evojax_suite.types import Dataset, Split, training_data

STAGES = ("training", "features", "clustering", "averaging")
DEPTHS = {16: 2, 32: 3, 64: 4}  # maps of 4x4 after the last block: equal feature sizes


@dataclass(frozen=True)
class Options:
    study: tyro.conf.Positional[Literal["images", "clustering"]]
    dataset: str = "cifar10"
    data_dir: Path | None = None
    num_images: int = 2000
    """Images in the study of image sizes."""
    width: int = 32
    repeats: int = 3
    """The median of so many counts, after one that compiles."""
    cases: tuple[tuple[int, int, int], ...] = (
        (200, 512, 100),
        (1000, 512, 500),
        (5000, 512, 2500),
        (10_000, 512, 100),
        (10_000, 512, 5000),
    )
    """Points, features, clusters of the study of clustering."""
    methods: tuple[Literal["sklearn", "jax"], ...] = ("sklearn", "jax")
    """Methods in the study of clustering; scikit-learn takes hours for the largest cases."""
    output: Path = Path("experiments/devs")


def resized(dataset: Dataset, side: int) -> Dataset:
    """Its training images at `side` pixels."""
    images = dataset.train.images
    shape = (len(images), side, side, images.shape[-1])
    floats = jax.image.resize(jnp.asarray(images, jnp.float32), shape, "bilinear")
    images = np.asarray(jnp.clip(jnp.round(floats), 0, 255)).astype(np.uint8)
    return replace(dataset, train=Split(images, dataset.train.labels))


def seconds_by_stage(config: devs.Config, dataset: Dataset, seed: int) -> dict[str, float]:
    """Seconds of each stage of one reduction of the whole set, its training included."""
    data, key = training_data(dataset), jax.random.key(seed)
    algorithm = devs.build(config, dataset.num_classes, dataset.image_shape)
    state, total, number = algorithm.init(key, None, data), dict.fromkeys(STAGES, 0.0), 0
    while not bool(algorithm.finished(state)):
        number += 1
        state, metrics = algorithm.step(jax.random.fold_in(key, number), state, None, data)
        for stage, seconds in metrics.stage_seconds.items():
            total[stage] += seconds
    return total


def seconds_of_an_iteration(width: int, depth: int, dataset: Dataset, repeats: int) -> float:
    """Median seconds of an iteration of gradient matching, one image a class, 64 real ones."""
    network = NetworkConfig(width=width, depth=depth)
    config = gradient_matching.Config(real_batch_size=64, network=network)
    algorithm = gradient_matching.build(config, dataset.num_classes, dataset.image_shape)
    data = gradient_matching.make_data(dataset)
    state = algorithm.init(jax.random.key(0), None, data)
    step = jax.jit(algorithm.step)
    taken = []
    for number in range(repeats + 1):
        start = time.perf_counter()
        state, _ = jax.block_until_ready(step(jax.random.key(number), state, None, data))
        taken.append(time.perf_counter() - start)
    return float(np.median(taken[1:]))


def study_images(options: Options) -> list[dict]:
    dataset = with_whole_training_set(load(options.dataset, options.data_dir), options.num_images)
    header = ["pixels", "feature size", *STAGES, "gradient matching, an iteration"]
    print(f"| {' | '.join(header)} |\n{'|---' * len(header)}|")
    rows = []
    for side, depth in DEPTHS.items():
        part = resized(dataset, side)
        config = devs.Config(
            target_sizes=(options.num_images // 2,),
            clustering="sklearn",
            feature_epochs=2,
            min_training_steps=0,
            network=replace(devs.NETWORK, width=options.width, depth=depth),
        )
        taken = [seconds_by_stage(config, part, seed) for seed in range(options.repeats + 1)][1:]
        row = {
            "pixels": side,
            "depth": depth,
            "num_features": options.width * 16,
            **{stage: float(np.median([one[stage] for one in taken])) for stage in STAGES},
            "gradient_matching_iteration": seconds_of_an_iteration(
                options.width, depth, part, options.repeats
            ),
        }
        rows.append(row)
        cells = [f"{row[stage]:.2f} s" for stage in (*STAGES, "gradient_matching_iteration")]
        print(f"| {side} | {row['num_features']} |", " | ".join(cells), "|", flush=True)
    return rows


def points_like_features(num_points: int, num_features: int) -> np.ndarray:
    """Non-negative, in clusters of twenty."""
    generator = np.random.default_rng(0)
    centers = generator.normal(size=(max(10, num_points // 20), num_features))
    chosen = centers[generator.integers(0, len(centers), num_points)]
    return np.maximum(chosen + generator.normal(size=chosen.shape), 0).astype(np.float32)


def study_clustering(options: Options) -> list[dict]:
    print("| points x features, clusters | scikit-learn | JAX | its compilation | inertia, JAX |")
    print("|---|---|---|---|---|")
    rows = []
    for num_points, num_features, num_clusters in options.cases:
        points = points_like_features(num_points, num_features)

        def run(method, seed, points=points, num_clusters=num_clusters):
            start = time.perf_counter()
            found = clustering.cluster(jax.random.key(seed), points, num_clusters, method)
            return time.perf_counter() - start, found.inertia

        found, compilation = {}, 0.0
        for method in options.methods:
            if method == "jax":
                compilation = run(method, 0)[0]
            found[method] = np.array([run(method, seed) for seed in range(1, options.repeats + 1)])
        seconds = {method: float(np.median(both[:, 0])) for method, both in found.items()}
        row: dict = {"points": num_points, "features": num_features, "clusters": num_clusters}
        row |= {f"{method}_seconds": taken for method, taken in seconds.items()}
        if "jax" in found:
            row["jax_compilation_seconds"] = max(0.0, compilation - seconds["jax"])
        if len(found) == 2:
            row["inertia_ratio"] = float(found["jax"][:, 1].mean() / found["sklearn"][:, 1].mean())
        rows.append(row)

        def cell(name, unit, row=row):
            return f"{row[name]:.2f} {unit}" if name in row else "not run"

        print(
            f"| {num_points:,} x {num_features:,}, {num_clusters:,} | "
            f"{cell('sklearn_seconds', 's')} | {cell('jax_seconds', 's')} | "
            f"{cell('jax_compilation_seconds', 's')} | {cell('inertia_ratio', 'of its')} |",
            flush=True,
        )
    return rows


def main(options: Options) -> None:
    options.output.mkdir(parents=True, exist_ok=True)
    rows = {"images": study_images, "clustering": study_clustering}[options.study](options)
    device = jax.devices()[0].device_kind
    write_json(options.output / f"cost-{options.study}.json", {"device": device, "rows": rows})


if __name__ == "__main__":
    main(tyro.cli(Options))
