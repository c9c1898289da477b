"""Members per second: our engine against PyTorch, in one run on one machine.

A member is Sato et al.'s evaluation of one individual: a fresh ConvNet-3, trained full batch with
Adam on 10 images of 28x28 and evaluated on held images. The plain PyTorch loop trains one member
after the other; its variants are what an informed user would try: bfloat16, channels_last,
torch.compile, a process on every core. All take turns; a ratio is the median over the turns.
Compilation and the start of processes are apart. Ours runs as by default, on all cores in float32.

    pip install evojax-suite[bench]
    python experiments/benchmarks/throughput.py
    python experiments/benchmarks/throughput.py --devices 1 --no-variants
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import numpy as np
import torch
import tyro
from pytorch_loops import GaDistillation, Processes, channels_first
from turns import PLAIN, compared, machine, table_of_variants

from evojax_suite import networks
from evojax_suite.data.errors import first_line
from evojax_suite.networks import NetworkConfig
from evojax_suite.runtime import devices
from evojax_suite.runtime.devices import Devices
from evojax_suite.runtime.resources import cores
from evojax_suite.runtime.results import write_json
from evojax_suite.training import (
    EngineConfig,
    Evaluation,
    TrainingConfig,
    fit_and_evaluate_population,
    make_batches,
)


@dataclass(frozen=True)
class Options:
    """Time them."""

    widths: tuple[int, ...] = (16, 32, 128)
    """Filters of each block."""
    members: tuple[int, ...] = (8, 8, 2)
    """Members that our engine trains in one turn, for each width (or one number for all)."""
    torch_members: int | None = None
    """Members of the PyTorch loop in one turn; as many as ours if None."""
    steps: int = 60
    """Full-batch Adam steps of a member."""
    images: int = 1000
    """Images that a member is evaluated on."""
    repeats: int = 5
    """Turns."""
    variants: bool = True
    """Compare with all variants of the PyTorch loop; else with the plain one alone."""
    compute_dtype: str = "float32"
    """Precision of our engine: float32 or bfloat16."""
    convolution: str = "auto"
    """Lowering of our engine's convolutions."""
    devices: Devices = "auto"
    """Devices of our engine; on a CPU this many are made, by default as many as it has cores."""
    engine: tyro.conf.OmitArgPrefixes[EngineConfig] = EngineConfig()
    output: Path | None = None
    """Write the figures to this JSON file."""


def useful_flop(width: int, steps: int, images: int) -> float:
    """FLOP of one member's three convolutions, a training step counted as three forward passes."""
    forward = 2 * 9 * (1024 * width + 256 * width**2 + 64 * width**2)
    return forward * (3 * 10 * steps + images)


def noise(members: int, num_images: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Sets (members, 10, 28, 28, 1) of one image a class, images and labels to be judged on."""
    random = np.random.default_rng(0)
    sets = random.normal(size=(members, 10, 28, 28, 1)).astype(np.float32)
    images = random.normal(size=(num_images, 28, 28, 1)).astype(np.float32)
    return sets, images, random.integers(0, 10, num_images).astype(np.int32)


def population(
    network: NetworkConfig,
    steps: int,
    engine: EngineConfig,
    num_devices: int,
    sets: np.ndarray,
    images: np.ndarray,
    labels: np.ndarray,
    targets: np.ndarray | None = None,
) -> Callable[[], Evaluation]:
    """Trains and judges a network for each of the sets (members, n, H, W, C) with its `targets`
    (members, n, 10), by default one image a class."""
    members, shape = len(sets), images.shape[1:]
    module, training = networks.create(network, 10, shape), TrainingConfig(num_epochs=steps)
    if targets is None:
        targets = np.tile(np.eye(10, dtype=np.float32), (members, 1, 1))

    def evaluate(own, data):
        keys, sets, targets = own
        batches = make_batches(*data, engine.resolved_evaluation_batch_size(shape))
        (found,) = fit_and_evaluate_population(
            keys, module, training, sets, targets, (batches,), engine
        )
        return found

    data = jax.device_put((images, labels))
    sets, targets = jax.device_put((sets, targets))

    def run() -> Evaluation:
        keys = jax.random.split(jax.random.key(0), members)
        return devices.map_population(evaluate, (keys, sets, targets), data, num_devices)

    return run


def torch_arguments(width: int, steps: int, sets, images, labels) -> tuple:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    batch_size = 100 if device == "cpu" else min(len(images), 4000)
    own = channels_first(images, device), torch.from_numpy(labels).to(device), batch_size
    return width, channels_first(sets, device), steps, *own


def torch_population(width: int, steps: int, sets, images, labels) -> Callable[[], float]:
    """The plain loop over the same sets."""
    return GaDistillation(*torch_arguments(width, steps, sets, images, labels))


@contextmanager
def torch_variants(
    width: int, steps: int, sets, images, labels
) -> Iterator[tuple[dict[str, Callable[[], float]], dict[str, str]]]:
    """Ways to do the same in PyTorch, the plain loop first; and why others cannot be had here."""
    arguments = torch_arguments(width, steps, sets, images, labels)
    found: dict[str, Any] = {
        PLAIN: GaDistillation(*arguments),
        "bfloat16": GaDistillation(*arguments, bfloat16=True),
        "channels_last": GaDistillation(*arguments, channels_last=True),
    }
    missing = {}
    try:
        compiled = GaDistillation(*arguments, compiled=True)
        compiled()
        found["torch.compile"] = compiled
    except Exception as error:  # a compiler is missing, or whatever else it meets
        missing["torch.compile"] = first_line(error)
        print(f"PyTorch without torch.compile: {missing['torch.compile']}", flush=True)
    number = min(cores(), len(sets))
    if not torch.cuda.is_available() and number > 1:
        ways: dict[str, dict] = {"": {}, ", bfloat16": {"bfloat16": True}}
        if not missing:
            ways[", torch.compile"] = {"compiled": True}
        for way, settings in ways.items():
            found[f"{number} processes{way}"] = Processes(number, *arguments, **settings)
    try:
        yield found, missing
    finally:
        for run in found.values():
            if isinstance(run, Processes):
                run.close()


def compare(options: Options, width: int, members: int, num_devices: int) -> dict:
    """Time all at one width."""
    network = NetworkConfig(
        width=width, compute_dtype=options.compute_dtype, convolution=options.convolution
    )
    sets, images, labels = noise(members, options.images)
    theirs = options.torch_members or members
    ours = population(network, options.steps, options.engine, num_devices, sets, images, labels)
    work = width, options.steps, sets[:theirs], images, labels
    if options.variants:
        with torch_variants(*work) as (variants, missing):
            row = compared(ours, variants, members, theirs, options.repeats)
        row["torch_missing"] = missing
    else:
        row = compared(ours, torch_population(*work), members, theirs, options.repeats)
    flop = useful_flop(width, options.steps, options.images) / 1e9
    return {
        "width": width,
        "members": members,
        **row,
        "gflops": flop * row["units_per_second"],
        "torch_gflops": flop * row["torch_units_per_second"],
    }


def main(options: Options) -> None:
    num_devices = devices.take(options.devices)
    members = options.members
    if len(members) == 1:
        members *= len(options.widths)
    if len(members) != len(options.widths):
        raise SystemExit(f"members needs 1 or {len(options.widths)} numbers, got {len(members)}")
    header = ("width", f"ours on {num_devices} devices, members/s", "PyTorch's plain loop")
    header += (
        "ratio (min-max)",
        "fastest PyTorch",
        "ratio to it",
        "GFLOP/s",
        "plain loop, GFLOP/s",
    )
    header += ("compile, s", "peak memory, MB")
    print(f"| {' | '.join(header)} |\n{'|---' * len(header)}|")
    results = []
    for width, count in zip(options.widths, members, strict=True):
        row = compare(options, width, count, num_devices)
        best = row["torch"][row["torch_best"]]
        results.append(row)
        print(
            f"| {width} | {row['units_per_second']:.2f} | {row['torch_units_per_second']:.2f} | "
            f"{row['ratio_median']:.2f} ({row['ratio_min']:.2f}-{row['ratio_max']:.2f}) | "
            f"{row['torch_best']}, {best['torch_units_per_second']:.2f} | "
            f"{best['ratio_median']:.2f} | {row['gflops']:.0f} | {row['torch_gflops']:.0f} | "
            f"{row['compile_seconds']:.1f} | {row['peak_megabytes']:.0f} |",
            flush=True,
        )
    if options.variants:
        titles = [f"width {row['width']}" for row in results]
        print(f"\n{table_of_variants(titles, results)}")
    if options.output:
        about = {**machine(), **vars(options), "engine": None, "output": None}
        about["devices"] = num_devices
        write_json(options.output, {**about, "results": results})


if __name__ == "__main__":
    main(tyro.cli(Options))
