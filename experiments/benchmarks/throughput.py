"""Members per second: our engine against a plain PyTorch loop, in one run on one machine.

A member is paper 002's evaluation of one individual: a fresh ConvNet-3, trained full batch with
Adam on 10 images of 28x28 and evaluated on held images. The PyTorch loop trains one member after
the other. The two take turns; a ratio is the median over the turns. Compilation is timed apart.

    pip install evojax-suite[bench]
    python experiments/benchmarks/throughput.py --output experiments/benchmarks/cpu.json
    python experiments/benchmarks/throughput.py --widths 128 --members 300 --torch-members 3 \\
        --steps 300 --images 12000 --repeats 3 --output experiments/benchmarks/h200.json
"""

from __future__ import annotations

import datetime
import json
import os
import platform
import time
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import torch
import torch.nn.functional as F
import tyro

from evojax_suite import devices, networks
from evojax_suite.networks import NetworkConfig
from evojax_suite.training import (
    EngineConfig,
    TrainingConfig,
    fit_and_evaluate_population,
    make_batches,
)
from evojax_suite.types import Divided


@dataclass(frozen=True)
class Options:
    """Time both."""

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
    repeats: int = 7
    """Turns."""
    compute_dtype: str = "float32"
    """Of our engine: float32 or bfloat16."""
    convolution: str = "auto"
    """Lowering of our engine's convolutions."""
    devices: int = 1
    """Of ours; of a CPU so many are made."""
    engine: tyro.conf.OmitArgPrefixes[EngineConfig] = EngineConfig()
    output: Path | None = None
    """Write the figures to this JSON file."""


class TorchConvNet(torch.nn.Module):
    def __init__(self, width: int):
        super().__init__()
        layers, channels = [], 1
        for block in range(3):
            layers += [
                torch.nn.Conv2d(channels, width, 3, padding=1 if block else 3),
                torch.nn.GroupNorm(width, width, affine=True),
                torch.nn.ReLU(),
                torch.nn.AvgPool2d(2, 2),
            ]
            channels = width
        self.features = torch.nn.Sequential(*layers)
        self.classifier = torch.nn.Linear(width * 16, 10)

    def forward(self, images):
        return self.classifier(self.features(images).flatten(1))


def torch_turn(width, members, steps, batch_size, sets, images, labels) -> float:
    """Seconds for `members` members, one after the other."""
    device = images.device
    targets = torch.arange(10, device=device)
    start = time.perf_counter()
    for member in range(members):
        network = TorchConvNet(width).to(device)
        optimizer = torch.optim.Adam(network.parameters(), 1e-3)
        for _ in range(steps):
            loss = F.cross_entropy(network(sets[member]), targets)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        correct = torch.zeros((), device=device)
        with torch.no_grad():
            for first in range(0, len(images), batch_size):
                logits = network(images[first : first + batch_size])
                correct += (logits.argmax(1) == labels[first : first + batch_size]).sum()
        float(correct)
    return time.perf_counter() - start


def useful_flop(width: int, steps: int, images: int) -> float:
    """Of one member: the three convolutions, a training step counted as three forward passes."""
    forward = 2 * 9 * (1024 * width + 256 * width**2 + 64 * width**2)
    return forward * (3 * 10 * steps + images)


def compare(options: Options, width: int, members: int) -> dict:
    """Time both at one width."""
    random = np.random.default_rng(0)
    torch_members = options.torch_members or members
    sets = random.normal(size=(members, 10, 28, 28, 1)).astype(np.float32)
    images = random.normal(size=(options.images, 28, 28, 1)).astype(np.float32)
    labels = random.integers(0, 10, options.images).astype(np.int32)

    config = NetworkConfig(
        width=width, compute_dtype=options.compute_dtype, convolution=options.convolution
    )
    network = networks.create(config, 10, (28, 28, 1))
    training, engine = TrainingConfig(num_epochs=options.steps), options.engine
    targets = np.tile(np.eye(10, dtype=np.float32), (members, 1, 1))

    def evaluate(key, state, params, data, chosen):
        del state, params
        sets, targets, images, labels = data
        batches = make_batches(images, labels, engine.resolved_evaluation_batch_size((28, 28, 1)))
        keys = jax.random.split(key, members)[chosen]
        own = sets[chosen], targets[chosen]
        return fit_and_evaluate_population(keys, network, training, *own, (batches,), engine)

    arguments = jax.random.key(0), None, None, jax.device_put((sets, targets, images, labels))
    start, memory = time.perf_counter(), None
    if options.devices > 1:
        divided = Divided(members, lambda key: (key, None), evaluate, lambda *found: found)
        run = devices.evaluator(divided, options.devices)
        run(*arguments)  # compilation with the first turn
    else:
        run = jax.jit(partial(evaluate, chosen=jnp.arange(members))).lower(*arguments).compile()
        memory = run.memory_analysis()
    compile_seconds = time.perf_counter() - start

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")

    def channels_first(array):
        return torch.tensor(
            array.transpose(0, 1, 4, 2, 3) if array.ndim == 5 else array.transpose(0, 3, 1, 2)
        ).to(device)

    torch_sets, torch_images = channels_first(sets), channels_first(images)
    torch_labels = torch.tensor(labels).to(device)
    batch_size = 100 if device.type == "cpu" else min(options.images, 4000)

    def torch_loop(count):
        return torch_turn(
            width, count, options.steps, batch_size, torch_sets, torch_images, torch_labels
        )

    jax.block_until_ready(run(*arguments))
    torch_loop(1)
    ours, theirs = [], []
    for _ in range(options.repeats):
        start = time.perf_counter()
        jax.block_until_ready(run(*arguments))
        ours.append((time.perf_counter() - start) / members)
        theirs.append(torch_loop(torch_members) / torch_members)
    ratios = np.array(theirs) / np.array(ours)
    flop = useful_flop(width, options.steps, options.images)
    return {
        "width": width,
        "members": members,
        "members_per_second": 1 / float(np.median(ours)),
        "torch_members_per_second": 1 / float(np.median(theirs)),
        "ratio_median": float(np.median(ratios)),
        "ratio_min": float(ratios.min()),
        "ratio_max": float(ratios.max()),
        "gflops": flop / float(np.median(ours)) / 1e9,
        "torch_gflops": flop / float(np.median(theirs)) / 1e9,
        "compile_seconds": compile_seconds,
        "temporary_megabytes": memory.temp_size_in_bytes / 1e6 if memory else None,
    }


def processor() -> str:
    """Name of the processor, where the system tells."""
    cpuinfo = Path("/proc/cpuinfo")
    names = [
        line.split(":", 1)[1].strip()
        for line in (cpuinfo.read_text().splitlines() if cpuinfo.exists() else [])
        if line.startswith("model name")
    ]
    return names[0] if names else platform.processor()


def main(options: Options) -> None:
    devices.take(options.devices)
    members = options.members
    if len(members) == 1:
        members *= len(options.widths)
    if len(members) != len(options.widths):
        raise SystemExit(f"members needs 1 or {len(options.widths)} numbers, got {len(members)}")
    results = []
    print(
        "| width | ours, members/s | PyTorch, members/s | ratio (min-max) | GFLOP/s | compile, s |"
    )
    print("|---|---|---|---|---|---|")
    for width, count in zip(options.widths, members, strict=True):
        row = compare(options, width, count)
        results.append(row)
        print(
            f"| {width} | {row['members_per_second']:.2f} | "
            f"{row['torch_members_per_second']:.2f} | "
            f"{row['ratio_median']:.2f} ({row['ratio_min']:.2f}-{row['ratio_max']:.2f}) | "
            f"{row['gflops']:.0f} | {row['compile_seconds']:.1f} |",
            flush=True,
        )
    record = {
        "date": datetime.date.today().isoformat(),
        "device": jax.devices()[0].device_kind,
        "processor": processor(),
        "cores": os.cpu_count(),
        "jax": jax.__version__,
        "torch": torch.__version__,
        "steps": options.steps,
        "images": options.images,
        "devices": options.devices,
        "compute_dtype": options.compute_dtype,
        "convolution": options.convolution,
        "results": results,
    }
    if options.output:
        options.output.write_text(json.dumps(record, indent=2) + "\n")


if __name__ == "__main__":
    main(tyro.cli(Options))
