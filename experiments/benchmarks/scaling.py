"""What a generation of Sato et al.'s strategy costs: predicted, measured, and the least it could.

    python experiments/benchmarks/scaling.py
    python experiments/benchmarks/scaling.py --devices 2 --output experiments/benchmarks/scaling-2

Fits a model of the seconds that a member takes to short trainings and evaluations of a few shapes,
predicts whole generations of other shapes and measures them, all in one run: a machine's speed is
not the same from hour to hour. Then what the operations and the bytes of a training step and of an
evaluated batch would take at the speeds measured for products and copies, and, from the model,
sizes that this machine is too small for. Prints tables; writes `<output>.json`. Let nothing else
run.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import tyro
from scipy.optimize import nnls
from throughput import population
from turns import machine, seconds_of

from evojax_suite import networks
from evojax_suite.networks import NetworkConfig
from evojax_suite.runtime import devices
from evojax_suite.runtime.results import write_json
from evojax_suite.training import EngineConfig, TrainingConfig, fit_step, start_fit
from evojax_suite.types import Dataset, Split


class Size(NamedTuple):
    """A generation, or a part of one."""

    width: int
    members: int = 1
    steps: int = 0
    images: int = 0
    set_size: int = 10
    side: int = 28
    channels: int = 1
    depth: int = 3

    @property
    def shape(self) -> tuple[int, int, int]:
        return self.side, self.side, self.channels

    def __str__(self) -> str:
        return (
            f"{self.members} x ConvNet-{self.depth} of {self.width}, {self.side}x{self.side}x"
            f"{self.channels}, {self.steps} steps of {self.set_size}, {self.images:,} images"
        )


TRAININGS = (
    Size(16, steps=60),
    Size(48, steps=40),
    Size(128, steps=15),
    Size(32, steps=20, set_size=50),
    Size(32, steps=30, side=32, channels=3),
    Size(64, steps=60, side=16, depth=2),
    Size(24, steps=5, side=64, channels=3, depth=4),
)
EVALUATIONS = (
    Size(16, images=1500),
    Size(48, images=1000),
    Size(128, images=400),
    Size(32, images=800, side=32, channels=3),
    Size(64, images=1500, side=16, depth=2),
    Size(24, images=200, side=64, channels=3, depth=4),
)
CHECKS = (
    Size(32, members=16, steps=60, images=1000),
    Size(96, members=4, steps=100, images=1000),
    Size(128, members=2, steps=300, images=12_000),
    Size(40, members=4, steps=60, images=500, side=64, channels=3, depth=4),
)
PLANS = {
    "Sato et al., MNIST": Size(128, 300, 300, 12_000),
    "the same, a tenth of the images in each generation": Size(128, 300, 300, 1_200),
    "CIFAR-10": Size(128, 300, 300, 10_000, side=32, channels=3),
    "MedMNIST, 224 pixels, 8 classes, ConvNet-6": Size(128, 300, 300, 2_400, 8, 224, 3, 6),
    "ImageNet subset, 10 classes, 224 pixels, ConvNet-6": Size(128, 300, 300, 2_600, 10, 224, 3, 6),
}


@dataclass(frozen=True)
class Options:
    devices: int = 1
    """Number of devices; on a CPU this many are made."""
    repeats: int = 3
    """The median of so many counts."""
    teraflops: float = 181.0
    """What the accelerator of the plans computes in a second: an H200's generation of Sato et al.
    2026 (accelerator/h200.json)."""
    output: Path = Path(__file__).parent / "scaling"
    """Without a suffix."""


def forward_flop(size: Size) -> float:
    """FLOP of one image: the convolutions' multiplications and additions, and the last layer's."""
    side, channels, total = _first_side(size), size.channels, 0.0
    for _ in range(size.depth):
        total += 2 * 9 * channels * size.width * side**2
        side, channels = side // 2, size.width
    return total + 2 * 10 * size.width * side**2


def _first_side(size: Size) -> int:
    return 32 if size.side == 28 else size.side


def elements(size: Size) -> float:
    """Elements that the convolutions put out for one image, over which all else runs."""
    return sum(size.width * (_first_side(size) // 2**block) ** 2 for block in range(size.depth))


def num_parameters(size: Size) -> float:
    inputs = [size.channels] + [size.width] * (size.depth - 1)
    return sum(9 * one * size.width for one in inputs)


def training_terms(size: Size) -> np.ndarray:
    """What the seconds of a member's training are linear in."""
    flop, maps = 3 * size.set_size * forward_flop(size), size.set_size * elements(size)
    return size.steps * np.array([flop / 1e9, maps / 1e6, num_parameters(size) / 1e6, 1e-3])


def evaluation_terms(size: Size) -> np.ndarray:
    return size.images * np.array([forward_flop(size) / 1e9, elements(size) / 1e6, 1e-3])


class Model(NamedTuple):
    """Seconds a term."""

    training: np.ndarray
    evaluation: np.ndarray

    def seconds(self, size: Size, num_devices: int) -> float:
        """Seconds of a generation: no device waits for another but at its end."""
        one = training_terms(size) @ self.training + evaluation_terms(size) @ self.evaluation
        return math.ceil(size.members / num_devices) * float(one)


def fitted(terms: list[np.ndarray], seconds: list[float]) -> np.ndarray:
    """Non-negative coefficients with the least sum of squared relative errors."""
    taken = np.array(seconds)[:, None]
    return nnls(np.array(terms) / taken, np.ones(len(taken)))[0]


def arrays_of(size: Size, members: int):
    random = np.random.default_rng(0)
    sets = random.normal(size=(members, size.set_size, *size.shape)).astype(np.float32)
    targets = np.eye(10, dtype=np.float32)[random.integers(0, 10, (members, size.set_size))]
    number = max(1, size.images)
    images = random.normal(size=(number, *size.shape)).astype(np.float32)
    return sets, images, random.integers(0, 10, number).astype(np.int32), targets


def network_of(size: Size) -> NetworkConfig:
    return NetworkConfig(width=size.width, depth=size.depth)


def median_seconds(run: Callable, repeats: int) -> float:
    seconds_of(run)  # compiles
    return float(np.median([seconds_of(run) for _ in range(repeats)]))


def seconds_of_a_member(size: Size, num_devices: int, repeats: int) -> float:
    """With every device at work on two members."""
    members = 2 * num_devices
    run = population(
        network_of(size), size.steps, EngineConfig(), num_devices, *arrays_of(size, members)
    )
    return median_seconds(run, repeats) / 2


def calibrated(options: Options) -> tuple[Model, list[dict]]:
    coefficients, rows = [], []
    for kind, terms, sizes in (
        ("training", training_terms, TRAININGS),
        ("evaluation", evaluation_terms, EVALUATIONS),
    ):
        seconds = [seconds_of_a_member(size, options.devices, options.repeats) for size in sizes]
        coefficients.append(fitted([terms(size) for size in sizes], seconds))
        for size, taken in zip(sizes, seconds, strict=True):
            predicted = float(terms(size) @ coefficients[-1])
            rows.append({"part": kind, "size": size._asdict(), "seconds": taken, "fit": predicted})
            print(f"{kind}: {size}: {taken:.3f} s, fit {predicted / taken - 1:+.0%}", flush=True)
    return Model(*coefficients), rows


def seconds_of_a_generation(size: Size, num_devices: int, repeats: int) -> float:
    """A step of the algorithm as users run it."""
    from evojax_suite import ga_distillation  # evosax starts the devices

    _, images, labels, _ = arrays_of(size, 1)
    images = np.clip((images * 0.2 + 0.5) * 255, 0, 255).astype(np.uint8)
    random = np.random.default_rng(1)
    classes = size.set_size
    train = Split(
        random.integers(0, 256, (20 * classes, *size.shape)).astype(np.uint8),
        np.repeat(np.arange(classes, dtype=np.int32), 20),
    )
    part = Split(images, labels % classes)
    names = tuple(str(label) for label in range(classes))
    half = (0.5,) * size.channels
    dataset = Dataset("noise", train, part, part, names, half, half)
    config = ga_distillation.Config(
        population_size=size.members,
        network=network_of(size),
        training=TrainingConfig(num_epochs=size.steps),
    )
    algorithm = ga_distillation.build(config, classes, size.shape)
    algorithm = devices.over_devices(algorithm, num_devices)
    step = jax.jit(algorithm.step) if algorithm.scannable else algorithm.step
    params, data = ga_distillation.Params(), ga_distillation.make_data(dataset)
    state = algorithm.init(jax.random.key(0), params, data)
    return median_seconds(lambda: step(jax.random.key(1), state, params, data), repeats)


def checked(model: Model, options: Options) -> list[dict]:
    print("\n| generation | predicted, s | measured, s | difference |\n|---|---|---|---|")
    rows = []
    for size in CHECKS:
        repeats = 1 if size.images > 5000 else options.repeats
        predicted = model.seconds(size, options.devices)
        taken = seconds_of_a_generation(size, options.devices, repeats)
        rows.append({"size": size._asdict(), "predicted": predicted, "measured": taken})
        print(
            f"| {size} | {predicted:.2f} | {taken:.2f} | {predicted / taken - 1:+.0%} |", flush=True
        )
    return rows


def peaks(repeats: int) -> tuple[float, float, float]:
    """On one device, GFLOP/s of a product of two matrices, and GB/s, read and written, of adding to
    arrays of 2 MB, which stay in the cache as a member's maps do, and of 256 MB."""
    side = 3000
    matrix = jnp.ones((side, side))
    product = jax.jit(lambda a: a @ a)
    gflops = 2 * side**3 / median_seconds(lambda: product(matrix), repeats) / 1e9
    gigabytes = []
    for size, loops in ((500_000, 400), (64_000_000, 3)):
        array = jnp.ones(size)
        add = jax.jit(partial(jax.lax.fori_loop, 0, loops, lambda _, a: a + 1.0))
        taken = median_seconds(lambda: add(array), repeats) / loops  # noqa: B023
        gigabytes.append(2 * array.nbytes / taken / 1e9)
    return gflops, *gigabytes


def floor(repeats: int) -> dict:
    """Floors of the phases of Sato et al.'s member: what they count and take, in a loop."""
    gflops, gigabytes, from_memory = peaks(repeats)
    print(
        f"\nproducts {gflops:.0f} GFLOP/s, {gigabytes:.1f} GB/s in the cache, "
        f"{from_memory:.1f} GB/s beyond"
    )
    print("| width | phase | GFLOP | GB | floor, ms | measured, ms | floor / measured |")
    print("|---" * 7 + "|")
    rows = []
    for width in (16, 32, 128):
        network = networks.create(NetworkConfig(width=width), 10, (28, 28, 1))
        training, loops = TrainingConfig(num_epochs=1), max(4, 640 // width)
        state = start_fit(jax.random.key(0), network, training, (28, 28, 1))
        random = np.random.default_rng(0)

        def trained(state, images, network=network, training=training):
            targets = jnp.eye(10)
            step = partial(fit_step, jax.random.key(0), network, training, 1)
            return step(state, images, targets, jnp.ones(10))[0]

        def judged(variables, images, network=network):
            return network.apply(variables, images)

        def train_loop(state, images, loops=loops, trained=trained):
            return jax.lax.fori_loop(0, loops, lambda _, state: trained(state, images), state)

        def judge_loop(variables, images, loops=loops, judged=judged):
            def body(_, total):
                return total + judged(variables, images * (1 + 1e-12 * total)).sum()

            return jax.lax.fori_loop(0, loops, body, 0.0)

        for phase, one, loop, first, number in (
            ("a step on 10 images", trained, train_loop, state, 10),
            ("a batch of 25 images", judged, judge_loop, state.variables, 25),
        ):
            images = jnp.asarray(random.normal(size=(number, 28, 28, 1)), jnp.float32)
            cost = jax.jit(one).lower(first, images).compile().cost_analysis()
            assert isinstance(cost, dict)
            run = jax.jit(loop)
            taken = median_seconds(lambda: run(first, images), repeats) / loops  # noqa: B023
            passes = 3 if number == 10 else 1
            flop = passes * number * forward_flop(Size(width)) / 1e9
            read = cost["bytes accessed"] / 1e9
            least = max(flop / gflops, read / gigabytes)
            row = {"width": width, "phase": phase, "gflop": flop, "gigabytes": read}
            rows.append(row | {"floor_seconds": least, "seconds": taken})
            print(
                f"| {width} | {phase} | {flop:.3f} | {read:.3f} | {1e3 * least:.2f} | "
                f"{1e3 * taken:.2f} | {least / taken:.0%} |",
                flush=True,
            )
    return {
        "gflops": gflops,
        "gigabytes_per_second": gigabytes,
        "beyond_the_cache": from_memory,
        "rows": rows,
    }


def planned(model: Model, options: Options) -> list[dict]:
    own = f"{options.devices} device{'s' if options.devices > 1 else ''} here"
    rate = options.teraflops
    print(
        f"\n| size | TFLOP a generation | {own}, h | 1 accelerator at {rate:.0f} TFLOP/s, s | 8, s "
        f"| 64, s | 1,000 generations on 64, min |\n|---|---|---|---|---|---|---|"
    )
    rows = []
    for name, size in PLANS.items():
        flop = forward_flop(size) * (3 * size.set_size * size.steps + size.images) / 1e12
        seconds = {n: math.ceil(size.members / n) * flop / rate for n in (1, 8, 64)}
        hours = model.seconds(size, options.devices) / 3600
        rows.append({"name": name, "teraflop": flop * size.members, "hours": hours, **seconds})
        print(
            f"| {name} | {flop * size.members:,.0f} | {hours:,.1f} | {seconds[1]:,.1f} | "
            f"{seconds[8]:,.1f} | {seconds[64]:,.2f} | {seconds[64] * 1000 / 60:,.1f} |"
        )
    return rows


def main(options: Options) -> None:
    devices.take(options.devices)
    start = time.perf_counter()
    model, calibration = calibrated(options)
    found = {
        **machine(),
        "devices": options.devices,
        "model": {name: value.tolist() for name, value in model._asdict().items()},
        "calibration": calibration,
        "checks": checked(model, options),
        "floor": floor(options.repeats) if options.devices == 1 else None,
        "plans": planned(model, options),
    }
    found["seconds"] = time.perf_counter() - start
    write_json(options.output.with_suffix(".json"), found)


if __name__ == "__main__":
    main(tyro.cli(Options))
