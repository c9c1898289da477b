"""The blocks of `accelerator.py`, each in a process of its own."""

from __future__ import annotations

import contextlib
import json
import math
import os
import signal
import sys
import tarfile
import tempfile
import time
import traceback
from collections import defaultdict
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import tyro
from roofline import CARDS, H100, roofline
from turns import machine

from evojax_suite import cest, de_nas, devs, distilled, ecomp, ga_distillation, networks
from evojax_suite.data import load
from evojax_suite.networks import NetworkConfig, blocks, fused
from evojax_suite.operators import encodings
from evojax_suite.runtime.results import to_jsonable, write_json
from evojax_suite.systems.coresets import gradient_matching
from evojax_suite.systems.de_nas import architectures
from evojax_suite.systems.ecomp import feed_forward
from evojax_suite.training import (
    EngineConfig,
    TrainingConfig,
    evaluate,
    fit_population,
    make_batches,
    map_members,
)
from evojax_suite.types import Dataset, Split, training_data

HERE = Path(__file__).parent
EXPECTED = HERE / "agreement.json"
PART_BYTES = 15_000_000


@dataclass(frozen=True)
class Options:
    """What `accelerator.py` says."""

    block: tyro.conf.Positional[str]
    """A name in `MEASURE`, or expected."""
    output: Path
    deadline: float
    """Seconds since the epoch."""
    data_dir: Path | None = None
    checkpoint: Path | None = None
    searches: tuple[str, ...] = ()
    rehearse: bool = False


class Sizes(NamedTuple):
    """How much of everything."""

    width: int = 128
    steps: int = 300
    images: int = 12_000
    population: int = 300
    timed_steps: int = 30
    members_in_flight: tuple[int, ...] = (64, 128, 300)
    evaluated: int = 16
    batch_sizes: tuple[int, ...] = (2000, 4000, 12_000)
    torch_members: int = 3
    torch_batch: int = 4000
    ecomp_runs: int = 10
    ecomp_units: int = 256
    ecomp_generations: int = 100
    images_of_others: int = 48_000
    candidates: int = 2
    candidate_epochs: int = 10
    candidate_filters: int = 256
    candidate_layers: int = 15
    cest_width: int = 256
    devs_epochs: int = 20
    devs_least_steps: int = 200
    kernel_population: int = 256
    kernel_images: int = 2000
    kernel_steps: int = 50
    judges: int = 10
    checked: dict[str, tuple[str, ...]] = {}  # noqa: RUF012  systems, all by default, in a precision
    compile_seconds: float = 12.0  # of a large program, to decide whether a measurement fits


TINY = Sizes(
    width=8,
    steps=2,
    images=40,
    population=4,
    timed_steps=2,
    members_in_flight=(2,),
    evaluated=2,
    batch_sizes=(20,),
    torch_members=1,
    torch_batch=20,
    ecomp_runs=1,
    ecomp_units=16,
    ecomp_generations=3,
    images_of_others=200,
    candidates=1,
    candidate_epochs=1,
    candidate_filters=12,
    candidate_layers=7,
    cest_width=4,
    devs_epochs=1,
    devs_least_steps=0,
    kernel_population=4,
    kernel_images=40,
    kernel_steps=2,
    judges=1,
    checked={"bfloat16": ("ga_distillation", "gradient_matching")},
    compile_seconds=1.0,
)


class Results:
    """What a block has measured, on disk after every measurement."""

    def __init__(self, options: Options):
        options.output.mkdir(parents=True, exist_ok=True)
        self.path = options.output / f"{options.block}.json"
        self.deadline = options.deadline
        self.found: dict[str, Any] = {"machine": machine()}

    @property
    def seconds_left(self) -> float:
        return self.deadline - time.time()

    def measure(self, name: str, needs: float, run: Callable[[], Any]) -> Any:
        """What `run` gives, kept; None where the time left is less than the seconds it needs, or
        where it fails."""
        if self.seconds_left < needs:
            value = {"not run": f"needs about {needs:.0f} s, {self.seconds_left:.0f} s were left"}
        else:
            start = time.time()
            try:
                value = {**run(), "measured in seconds": round(time.time() - start, 1)}
            except Exception as error:
                last = traceback.format_exc().splitlines()[-12:]
                value = {"error": f"{type(error).__name__}: {str(error)[:500]}", "traceback": last}
        self.found[name] = value
        write_json(self.path, to_jsonable(self.found, non_finite=str))
        print(f"{name}: {json.dumps(to_jsonable(value, non_finite=str))[:300]}", flush=True)
        return value if "error" not in value and "not run" not in value else None


def timed(run: Callable[[], Any], least_seconds: float = 0.5, most: int = 5) -> dict[str, float]:
    """Seconds of a call: the first, with its compilation; the fastest and the median of others."""

    def once() -> float:
        start = time.perf_counter()
        jax.block_until_ready(run())
        return time.perf_counter() - start

    first, turns = once(), [once()]
    while sum(turns) < least_seconds and len(turns) < most:
        turns.append(once())
    return {"first": first, "fastest": min(turns), "median": float(np.median(turns))}


# --- agreement


def digits() -> Dataset:
    """scikit-learn's digits as grey images of 28x28, 300 to train and 100 to judge."""
    dataset = load("digits")

    def enlarged(part: Split, number: int) -> Split:
        large = np.kron(part.images[:number, ..., 0], np.ones((3, 3), np.uint8))
        return Split(np.pad(large, ((0, 0), (2, 2), (2, 2)))[..., None], part.labels[:number])

    return replace(
        dataset,
        train=enlarged(dataset.train, 300),
        validation=enlarged(dataset.validation, 100),
        test=enlarged(dataset.test, 100),
    )


def first_steps(algorithm, params, data, number: int) -> dict[str, float]:
    """The metrics of the last of some steps."""
    step = jax.jit(algorithm.step) if algorithm.scannable else algorithm.step
    init = jax.jit(algorithm.init) if algorithm.scannable else algorithm.init
    state, metrics = init(jax.random.key(0), params, data), None
    for index in range(number):
        state, metrics = step(jax.random.fold_in(jax.random.key(1), index), state, params, data)
    return numbers_of(metrics)


def numbers_of(metrics: Any) -> dict[str, float]:
    """The metrics that are one number; seconds are none."""
    return {
        name: float(value)
        for name, value in jax.device_get(metrics)._asdict().items()
        if not isinstance(value, dict) and np.ndim(value) == 0
    }


SHAPE = (28, 28, 1)


def ga_steps(dataset: Dataset, dtype: str) -> dict[str, float]:
    config = ga_distillation.Config(
        population_size=6,
        fitness="cross_entropy",
        network=NetworkConfig(width=16, compute_dtype=dtype),
        training=TrainingConfig(num_epochs=20),
    )
    algorithm = ga_distillation.build(config, 10, SHAPE)
    return first_steps(algorithm, ga_distillation.Params(), ga_distillation.make_data(dataset), 1)


def matching_steps(dataset: Dataset, dtype: str) -> dict[str, float]:
    network = NetworkConfig(width=8, depth=2, compute_dtype=dtype)
    config = gradient_matching.Config(real_batch_size=16, network=network)
    algorithm = gradient_matching.build(config, 10, SHAPE)
    return first_steps(algorithm, None, gradient_matching.make_data(dataset), 2)


def devs_steps(dataset: Dataset, dtype: str) -> dict[str, float]:
    config = devs.Config(
        target_sizes=(30,),
        clustering="jax",
        feature_epochs=3,
        min_training_steps=0,
        network=replace(devs.NETWORK, width=8, compute_dtype=dtype),
    )
    return first_steps(devs.build(config, 10, SHAPE), None, training_data(dataset), 1)


def cest_steps(dataset: Dataset, dtype: str) -> dict[str, float]:
    config = cest.Config(
        initial_epochs=1,
        epochs_per_selection=1,
        prey_generations=2,
        network=NetworkConfig(network="VGG10", width=4, compute_dtype=dtype),
        training=TrainingConfig(num_epochs=3, batch_size=64),
    )
    data = cest.make_data(config, dataset)
    return first_steps(cest.build(config, 10, SHAPE), cest.Params(), data, 2)


def parent_of(units: int) -> feed_forward.Network:
    """Random, 784-units-units-10."""
    random = np.random.default_rng(0)
    return tuple(
        layer._replace(
            weight=random.normal(0, (2 / layer.weight.shape[1]) ** 0.5, layer.weight.shape).astype(
                np.float32
            )
        )
        for layer in feed_forward.zeros((784, units, units, 10))
    )


def ecomp_steps(dataset: Dataset, dtype: str) -> dict[str, float]:
    del dtype  # EComp has float32 alone
    config = ecomp.Config(batch_size=100, population_size=10)
    data = ecomp.make_data(parent_of(32), dataset.train.images, dataset.train.labels)
    return first_steps(ecomp.build(config), ecomp.Params(), data, 2)


def de_nas_steps(dataset: Dataset, dtype: str) -> dict[str, float]:
    config = de_nas.Config(
        programs="separate",
        compute_dtype=dtype,
        space=replace(de_nas.Config().space, max_filters=16),
        training=replace(de_nas.Config().training, num_epochs=2),
    )
    data = de_nas.make_data(config, dataset)
    genome = jax.jit(architectures.random_genome, static_argnums=(1, 2))(
        jax.random.key(0), config.space, SHAPE
    )
    judged = de_nas.make_evaluator(config, 10, SHAPE)(genome, jax.random.key(1), data, np.zeros(0))
    found = judged.evaluation
    return {"accuracy": float(found.accuracy), "cross_entropy": float(found.cross_entropy)}


class Checked(NamedTuple):
    """First steps of a system, and how far its metrics may be from a CPU's: a fraction of the
    value, or of 1 where it is smaller, in float32 (products too) and in bfloat16."""

    steps: Callable[[Dataset, str], dict[str, float]]
    float32: float
    bfloat16: float
    dtypes: tuple[str, ...] = ("float32", "bfloat16")


# Trained networks part where rounding does: of accuracies on 100 images, one or two may turn.
CHECKED = {
    "ga_distillation": Checked(ga_steps, 0.03, 0.10),
    "gradient_matching": Checked(matching_steps, 0.03, 0.10),
    "devs": Checked(devs_steps, 0.05, 0.15),
    "cest": Checked(cest_steps, 0.05, 0.15),
    "ecomp": Checked(ecomp_steps, 0.02, 0.02, ("float32",)),
    "de_nas": Checked(de_nas_steps, 0.05, 0.15),
}


def agreement(results: Results, options: Options, sizes: Sizes) -> None:
    dataset, expected = digits(), json.loads(EXPECTED.read_text())
    for dtype in ("float32", "bfloat16"):
        for name, checked in CHECKED.items():
            if dtype not in checked.dtypes or name not in sizes.checked.get(dtype, CHECKED):
                continue

            def compare(name=name, checked=checked, dtype=dtype) -> dict[str, Any]:
                # Products in float32, where a GPU would take TF32.
                with jax.default_matmul_precision("highest" if dtype == "float32" else None):
                    own, theirs = checked.steps(dataset, dtype), expected[name][dtype]
                tolerance = getattr(checked, dtype)
                apart = {
                    key: abs(own[key] - value) / max(1.0, abs(value))
                    for key, value in theirs.items()
                    if value is not None and math.isfinite(value)
                }
                largest = max(apart, key=lambda key: apart[key])
                return {
                    "agrees": apart[largest] <= tolerance,
                    "largest difference": apart[largest],
                    "of": largest,
                    "tolerance": tolerance,
                    "metrics": own,
                }

            results.measure(f"{name}, {dtype}", sizes.compile_seconds / 2, compare)


def write_expected() -> None:
    """The numbers of this machine, which should be a CPU."""
    dataset = digits()
    found = {
        name: {dtype: checked.steps(dataset, dtype) for dtype in checked.dtypes}
        for name, checked in CHECKED.items()
    }
    write_json(EXPECTED, to_jsonable({"machine": machine(), **found}))


# --- the engine


def card() -> Any:
    """What the roofline assumes of this card."""
    kind = jax.devices()[0].device_kind
    return next((one for one in CARDS.values() if one.name == kind), H100)


def predicted(compiled) -> dict[str, Any]:
    """By the roofline, of the program as it was compiled here."""
    model = roofline(compiled.as_text())
    return {
        "predicted": model.seconds(card()),
        "kernels": model.launches,
        "gigabytes": model.total("bytes") / 1e9,
        "teraflop": model.total("flop") / 1e12,
        "shares": model.shares(card()),
        "largest kernels": [
            [one.name, one.times, 1e6 * one.seconds(card()), one.bound(card())]
            for one in model.largest(card(), 8)
        ],
        "temporary gigabytes": compiled.memory_analysis().temp_size_in_bytes / 1e9,
    }


def measured(function: Callable, arguments: tuple, options: dict | None = None) -> dict[str, Any]:
    """Seconds of a jitted function, compiled under these options, beside the roofline's."""
    start = time.perf_counter()
    compiled = jax.jit(function).lower(*arguments).compile(options)
    seconds = time.perf_counter() - start
    return {"compilation": seconds, **timed(lambda: compiled(*arguments)), **predicted(compiled)}


def kernel_by_kernel(function: Callable, arguments: tuple, rows: int = 40) -> dict[str, Any]:
    """The device's own times of a program's kernels beside those of the roofline.

    Command buffers are off, since what runs inside one is not told apart.
    """
    options = {"xla_gpu_enable_command_buffer": ""} if jax.default_backend() == "gpu" else None
    compiled = jax.jit(function).lower(*arguments).compile(options)
    jax.block_until_ready(compiled(*arguments))
    with tempfile.TemporaryDirectory() as folder:
        with jax.profiler.trace(folder):
            jax.block_until_ready(compiled(*arguments))
        (path,) = Path(folder).rglob("*.xplane.pb")
        profile = jax.profiler.ProfileData.from_file(str(path))
    times: dict[str, list[float]] = defaultdict(list)
    kinds: dict[str, str] = {}
    for plane in profile.planes:
        if not plane.name.startswith("/device:GPU"):
            continue
        for line in plane.lines:
            if not line.name.startswith("Stream"):
                continue
            for event in line.events:
                name = str(dict(event.stats).get("hlo_op", event.name))
                times[name].append(event.duration_ns / 1e3)
                kinds[name] = event.name
    expected = {kernel.name: kernel for kernel in roofline(compiled.as_text()).kernels}
    table = []
    for name, own in sorted(times.items(), key=lambda item: -sum(item[1]))[:rows]:
        model = expected.get(name)
        guess = [1e6 * model.seconds(card()), model.bound(card())] if model else [None, None]
        shape = model.shape[:60] if model else ""
        table.append([name, kinds[name][:80], len(own), float(np.mean(own)), *guess, shape])
    return {
        "busy microseconds": sum(map(sum, times.values())),
        "launches": sum(map(len, times.values())),
        "columns": ["operation", "kernel", "launches", "us", "predicted us", "bound", "shape"],
        "kernels": table,
    }


def convnet(sizes: Sizes, lowering: str, dtype: str):
    config = NetworkConfig(width=sizes.width, compute_dtype=dtype, convolution=lowering)  # type: ignore[arg-type]
    return networks.create(config, 10, SHAPE)


def noise(sizes: Sizes, members: int):
    """Sets of one image a class, images and labels to be judged on, on the device."""
    random = np.random.default_rng(0)
    sets = random.normal(size=(members, 10, *SHAPE)).astype(np.float32)
    images = random.normal(size=(sizes.images, *SHAPE)).astype(np.float32)
    labels = random.integers(0, 10, sizes.images).astype(np.int32)
    return jax.device_put((sets, images, labels))


def training_program(sizes: Sizes, lowering: str, dtype: str, in_flight: int):
    """A number of training steps of members that are all in flight, with its arguments."""
    network, config = (
        convnet(sizes, lowering, dtype),
        TrainingConfig(num_epochs=sizes.timed_steps),
    )
    sets, _, _ = noise(sizes._replace(images=1), in_flight)
    targets = jnp.tile(jnp.eye(10), (in_flight, 1, 1))

    def run(key, sets, targets):
        keys = jax.random.split(key, in_flight)
        engine = EngineConfig(members_in_flight=in_flight)
        found = fit_population(keys, network, config, sets, targets, engine)
        return jax.tree.map(jnp.sum, found)  # the networks themselves need not leave

    return run, (jax.random.key(0), sets, targets)


def training(sizes: Sizes, lowering: str, dtype: str, in_flight: int, options: dict | None = None):
    """What such steps take."""
    row = measured(*training_program(sizes, lowering, dtype, in_flight), options)
    row["microseconds a step of a member"] = 1e6 * row["median"] / sizes.timed_steps / in_flight
    return row


def evaluation_program(sizes: Sizes, lowering: str, dtype: str, batch_size: int, at_once: int):
    """Some networks on all images, with its arguments."""
    network = convnet(sizes, lowering, dtype)
    _, images, labels = noise(sizes, 1)
    keys = jax.random.split(jax.random.key(0), sizes.evaluated)
    variables = jax.vmap(lambda key: network.init(key, jnp.zeros((1, *SHAPE))))(keys)

    def run(variables, images, labels):
        batches = make_batches(images, labels, batch_size)
        return map_members(lambda own: evaluate(network, own, batches), (variables,), at_once)

    return run, (variables, images, labels)


def evaluation(sizes: Sizes, lowering: str, dtype: str, batch_size: int, at_once: int):
    """What such networks take."""
    row = measured(*evaluation_program(sizes, lowering, dtype, batch_size, at_once))
    row["milliseconds a member"] = 1e3 * row["median"] / sizes.evaluated
    return row


def generation(sizes: Sizes, engine: EngineConfig, dtype: str, lowering: str = "auto"):
    """A whole step of the algorithm, selection and crossover included."""
    config = ga_distillation.Config(
        population_size=sizes.population,
        network=NetworkConfig(width=sizes.width, compute_dtype=dtype, convolution=lowering),  # type: ignore[arg-type]
        training=TrainingConfig(num_epochs=sizes.steps),
        engine=engine,
    )
    dataset = of_noise(1000, sizes.images, SHAPE)
    algorithm = ga_distillation.build(config, 10, SHAPE)
    params, data = ga_distillation.Params(), ga_distillation.make_data(dataset)
    state = jax.jit(algorithm.init)(jax.random.key(0), params, data)
    row = measured(algorithm.step, (jax.random.key(1), state, params, data))
    row["members a second"] = sizes.population / row["median"]
    return row


COMPILER_OPTIONS = {
    "no command buffers": {"xla_gpu_enable_command_buffer": ""},
    "no Triton products": {"xla_gpu_enable_triton_gemm": False},
    "while loops unrolled twice": {"xla_gpu_enable_while_loop_double_buffering": True},
    "exhaustive tiling": {"xla_gpu_exhaustive_tiling_search": True},
}


def measure_kernels(
    results: Results, sizes: Sizes, programs: dict[str, tuple[Callable, tuple]]
) -> None:
    """Measure each kernel of these programs, functions with their arguments."""
    for name, program in programs.items():
        results.measure(
            f"kernels of {name}",
            sizes.compile_seconds,
            lambda program=program: kernel_by_kernel(*program),
        )


def engine(results: Results, options: Options, sizes: Sizes) -> None:
    measure, compile_seconds = results.measure, sizes.compile_seconds
    middle = sizes.members_in_flight[len(sizes.members_in_flight) // 2]
    measure(
        "a generation, bfloat16",
        2 * compile_seconds,
        lambda: generation(sizes, EngineConfig(), "bfloat16"),
    )
    programs = {
        "training": training_program(sizes, "adaptive", "bfloat16", middle),
        "evaluation": evaluation_program(sizes, "adaptive", "bfloat16", sizes.torch_batch, 1),
    }
    measure_kernels(results, sizes, programs)
    plans = [("adaptive", "bfloat16", count) for count in sizes.members_in_flight]
    plans += [("patches", "bfloat16", middle)]
    if not options.rehearse:
        plans += [("adaptive", "float32", middle), ("native", "bfloat16", middle)]
    for lowering, dtype, count in plans:
        measure(
            f"training, {lowering}, {dtype}, {count} in flight",
            compile_seconds,
            lambda lowering=lowering, dtype=dtype, count=count: training(
                sizes, lowering, dtype, count
            ),
        )
    batches = [("adaptive", size, 1) for size in sizes.batch_sizes]
    if not options.rehearse:
        batches += [("patches", 500, sizes.evaluated)]
    for lowering, size, at_once in batches:
        measure(
            f"evaluation, {lowering}, batches of {size}, {at_once} at once",
            compile_seconds / 2,
            lambda lowering=lowering, size=size, at_once=at_once: evaluation(
                sizes, lowering, "bfloat16", size, at_once
            ),
        )
    if options.rehearse:
        return
    measure(
        "a generation, float32",
        2 * compile_seconds,
        lambda: generation(sizes, EngineConfig(), "float32"),
    )
    for name, own in COMPILER_OPTIONS.items():
        measure(
            f"training, adaptive, bfloat16, {middle} in flight, {name}",
            compile_seconds,
            lambda own=own: training(sizes, "adaptive", "bfloat16", middle, own),
        )


# --- kernels of our own


def beside_blocks(number: int, side: int, channels: int, filters: int, dtype: str):
    """The largest differences of a block and its gradients from those of `networks.blocks`, as
    shares of the largest values, for two members."""
    keys, half = jax.random.split(jax.random.key(side), 5), jnp.dtype(dtype)
    shapes = (number, side, side, channels), (3, 3, channels, filters), (filters,), (filters,)
    images, kernel, scale, bias = (
        jax.random.normal(key, (2, *shape)) for key, shape in zip(keys, shapes, strict=False)
    )
    arguments = images.astype(half), kernel / (9 * channels) ** 0.5, 1 + 0.2 * scale, 0.2 * bias
    weights = jax.random.normal(keys[4], (number, side // 2, side // 2, filters))

    def found(block: Callable) -> Any:
        def weighted(*arrays):
            outputs = block(*arrays, 1)
            return (outputs * weights).sum(), outputs

        def gradients(*arrays):
            return jax.value_and_grad(weighted, (0, 1, 2, 3), has_aux=True)(*arrays)

        (_, outputs), gradient = jax.jit(jax.vmap(gradients))(*arguments)
        return [np.asarray(leaf, np.float32) for leaf in (outputs, *gradient)]

    names = "outputs", "images", "kernel", "scale", "bias"
    pairs = zip(found(fused.block), found(blocks.block), strict=True)
    differences = [float(np.abs(one - other).max() / np.abs(other).max()) for one, other in pairs]
    return {
        "largest differences": dict(zip(names, differences, strict=True)),
        "agrees": max(differences) < (0.1 if dtype == "bfloat16" else 0.01),
    }


def kernels(results: Results, options: Options, sizes: Sizes) -> None:
    """Those of `networks.fused`: whether they agree with the layers, and what they take."""
    measure, compile_seconds = results.measure, sizes.compile_seconds
    shapes = [(4, 16, 1, 16), (4, 8, 16, 16)] if options.rehearse else []
    for shape in shapes or [(10, 32, 3, 128), (10, 16, 128, 128), (10, 8, 128, 128)]:
        for dtype in ("float32", "bfloat16"):
            measure(
                f"a block of {shape}, {dtype}",
                compile_seconds,
                lambda shape=shape, dtype=dtype: beside_blocks(*shape, dtype),
            )
    measure(
        "a generation, fused, bfloat16",
        2 * compile_seconds,
        lambda: generation(sizes, EngineConfig(), "bfloat16", "fused"),
    )
    most, images = sizes.members_in_flight[-1], sizes.batch_sizes[-1]
    whole = EngineConfig(members_in_flight=most, evaluation_batch_size=images)
    measure(
        f"a generation, fused, bfloat16, {most} in flight, batches of {images}",
        2 * compile_seconds,
        lambda: generation(sizes, whole, "bfloat16", "fused"),
    )
    programs = {
        "training": training_program(sizes, "fused", "bfloat16", most),
        "evaluation": evaluation_program(sizes, "fused", "bfloat16", images, 1),
    }
    measure_kernels(results, sizes, programs)
    for dtype in ("bfloat16", "float32"):
        measure(
            f"training, fused, {dtype}, {most} in flight",
            compile_seconds,
            lambda dtype=dtype: training(sizes, "fused", dtype, most),
        )


# --- PyTorch


def pytorch(results: Results, options: Options, sizes: Sizes) -> None:
    import torch
    from pytorch_loops import channels_first
    from pytorch_on_gpu import VARIANTS

    on_gpu = torch.cuda.is_available()
    device = "cuda" if on_gpu else "cpu"
    torch.backends.cudnn.benchmark = True
    members = {"bfloat16, vmap": 10 * sizes.torch_members}
    sets, images, labels = (
        np.asarray(array) for array in noise(sizes, max(members.values(), default=1))
    )
    judged = channels_first(images, device), torch.from_numpy(labels).long().to(device)
    for name, run in VARIANTS.items():
        if not on_gpu and ("graph" in name.lower() or "compile" in name):
            results.found[name] = {"not run": "needs a GPU"}
            continue
        number = members.get(name, sizes.torch_members)
        own = channels_first(sets[:number], device)

        def once(run=run, own=own) -> None:
            run(sizes.width, own, sizes.steps, *judged, sizes.torch_batch)
            if on_gpu:
                torch.cuda.synchronize()

        def members_a_second(once=once, number=number) -> dict[str, Any]:
            seconds = timed(once, least_seconds=2.0, most=3)
            memory = torch.cuda.max_memory_allocated() / 1e9 if on_gpu else math.nan
            return {
                **seconds,
                "members a second": number / seconds["median"],
                "peak gigabytes": memory,
            }

        results.measure(
            name, (2 if "compile" in name else 0.5) * sizes.compile_seconds, members_a_second
        )
        if on_gpu:
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()


# --- the other systems


def of_noise(number: int, validation: int, shape: tuple[int, int, int]) -> Dataset:
    """A dataset of random images of ten classes."""
    random = np.random.default_rng(0)

    def part(count: int) -> Split:
        images = random.integers(0, 256, (count, *shape)).astype(np.uint8)
        return Split(images, np.arange(count, dtype=np.int32) % 10)

    names, half = tuple("0123456789"), (0.5,) * shape[-1]
    return Dataset("noise", part(number), part(validation), part(10), names, half, half)


def runs_of_ecomp(sizes: Sizes, keys_each: int, at_once: int) -> dict[str, Any]:
    """Seven weightings of EComp, each with some keys, as one program: an epoch of generations."""
    dataset = of_noise(sizes.images_of_others, 10, SHAPE)
    config = ecomp.Config(
        population_size=min(100, sizes.images_of_others // 20),
        batch_size=min(500, sizes.images_of_others // 4),
        num_generations=sizes.ecomp_generations,
    )
    algorithm = ecomp.build(config)
    steps = ecomp.num_steps(config, len(dataset.train))
    data = ecomp.make_data(parent_of(sizes.ecomp_units), dataset.train.images, dataset.train.labels)
    weights = jnp.array(ecomp.WEIGHTINGS, jnp.float32).repeat(keys_each, 0)
    params = jax.vmap(
        lambda own: ecomp.Params(
            accuracy_weight=own[0], similarity_weight=own[1], compression_weight=own[2]
        )
    )(weights)

    def one(run):
        key, own = run
        key_init, key_steps = jax.random.split(key)

        def step(state, index):
            key = jax.random.fold_in(key_steps, index)
            return algorithm.step(key, state, own, data)

        state, metrics = jax.lax.scan(step, algorithm.init(key_init, own, data), jnp.arange(steps))
        return algorithm.result(state, own, data).fitness, metrics.accuracy_best

    keys = jax.random.split(jax.random.key(0), len(weights))
    run = jax.jit(lambda keys, params: jax.lax.map(one, (keys, params), batch_size=at_once))
    return {"runs": len(weights), "generations": steps, **timed(lambda: run(keys, params), most=1)}


def stepped(algorithm, params, data, most: int) -> dict[str, Any]:
    """Seconds of each of some steps, the first one with compilation."""
    step = jax.jit(algorithm.step) if algorithm.scannable else algorithm.step
    state = algorithm.init(jax.random.key(0), params, data)
    seconds: list[float] = []
    for index in range(most):
        start = time.perf_counter()
        key = jax.random.fold_in(jax.random.key(1), index)
        state, metrics = jax.block_until_ready(step(key, state, params, data))
        seconds.append(time.perf_counter() - start)
    return {"seconds of steps": seconds, "metrics": numbers_of(metrics)}


def candidates(sizes: Sizes) -> dict[str, Any]:
    dataset = of_noise(sizes.images_of_others, sizes.images_of_others // 10, (32, 32, 3))
    training = replace(de_nas.Config().training, num_epochs=sizes.candidate_epochs)
    space = replace(
        de_nas.Config().space,
        max_filters=sizes.candidate_filters,
        max_length=sizes.candidate_layers,
    )
    config = de_nas.Config(programs="separate", training=training, space=space)
    algorithm = de_nas.build(config, 10, (32, 32, 3), 1)
    found = stepped(algorithm, de_nas.Params(), de_nas.make_data(config, dataset), sizes.candidates)
    found["candidates an hour"] = 3600 / float(np.mean(found["seconds of steps"]))
    return found


def reduction(sizes: Sizes) -> dict[str, Any]:
    """DEvS reduces as many images as CIFAR-10 has to a tenth: training, features and clusters."""
    dataset = of_noise(sizes.images_of_others, 10, (32, 32, 3))
    size = sizes.images_of_others // 10
    config = devs.Config(
        target_sizes=(size,),
        sizes=(size,),
        clustering="jax",
        feature_epochs=sizes.devs_epochs,
        min_training_steps=sizes.devs_least_steps,
        network=replace(devs.NETWORK, width=sizes.width),
    )
    algorithm, data = devs.build(config, 10, (32, 32, 3)), training_data(dataset)
    state, number, stages = algorithm.init(jax.random.key(0), None, data), 0, {}
    start = time.perf_counter()
    while not bool(algorithm.finished(state)):
        number += 1
        state, metrics = algorithm.step(jax.random.key(number), state, None, data)
        for name, seconds in metrics.stage_seconds.items():
            stages[name] = stages.get(name, 0.0) + seconds
    return {"seconds": time.perf_counter() - start, "calls": number, "stages": stages}


def epochs_of_cest(sizes: Sizes) -> dict[str, Any]:
    dataset = of_noise(sizes.images_of_others, sizes.images_of_others // 10, SHAPE)
    config = cest.Config(
        initial_epochs=0, network=NetworkConfig(network="VGG10", width=sizes.cest_width)
    )
    data = cest.make_data(config, dataset)
    return stepped(cest.build(config, 10, SHAPE), cest.Params(), data, 3)


def systems(results: Results, options: Options, sizes: Sizes) -> None:
    compile_seconds = sizes.compile_seconds
    results.measure("CEST, epochs", compile_seconds, lambda: epochs_of_cest(sizes))
    results.measure("DEvS, a reduction", compile_seconds, lambda: reduction(sizes))
    for name, keys_each, at_once in (
        (f"EComp, {7 * sizes.ecomp_runs} runs together", sizes.ecomp_runs, 7 * sizes.ecomp_runs),
        ("EComp, 7 runs one after the other", 1, 1),
    )[: 1 if options.rehearse else 2]:
        results.measure(
            name,
            2 * compile_seconds,
            lambda own=(sizes, keys_each, at_once): runs_of_ecomp(*own),
        )
    # Last: a program for each architecture took more than a minute to compile on an H100.
    results.measure("DE-NAS, candidates", compile_seconds, lambda: candidates(sizes))


# --- a few images by kernel regression


FOUR = {"factor": 2, "start": "k_means", "num_cosines": 10}
TEN = {
    "images_per_class": 10,
    "start": "k_means",
    "num_cosines": 10,
    "strategy_std": 0.2,
}
SEARCHES: dict[str, tuple[str, dict[str, Any], float]] = {
    "mnist": ("mnist", {}, 1),
    "fashion_mnist": ("fashion_mnist", {}, 1),
    "cifar10": ("cifar10", {}, 2),
    "mnist-four": ("mnist", FOUR, 2),
    "fashion_mnist-four": ("fashion_mnist", FOUR, 4),
    "cifar10-four": ("cifar10", FOUR, 6),
    "cifar10-soft": ("cifar10", {"evolve_labels": True}, 2),
    "cifar10-four-soft": ("cifar10", FOUR | {"evolve_labels": True}, 6),
    "cifar10-100": ("cifar10", TEN, 6),
    "cifar10-500": ("cifar10", TEN | {"images_per_class": 50, "population_size": 64}, 10),
}
"""By name: the dataset, what a search differs in from the others, and its share of the seconds."""


class Search(NamedTuple):
    """A search for a few images, compiled."""

    config: ga_distillation.Config
    dataset: Dataset
    state: ga_distillation.State
    some: Callable
    """(state, key, data) to the state after `kernel_steps` generations, and their mean metrics."""
    result: Callable
    data: ga_distillation.Data


def search(options: Options, sizes: Sizes, name: str) -> Search:
    """Compiles the search `name` of SEARCHES."""
    assert options.data_dir is not None or options.rehearse
    of, changes, _ = SEARCHES[name]
    of = "digits" if options.rehearse else of
    file = (options.data_dir or Path()) / f"{of}.npz"
    dataset = load(str(file) if file.exists() else of, options.data_dir)
    width = min(128, 4 * sizes.width)
    depth = 1 if options.rehearse else 3
    kernel = {"kernel_width": width, "kernel_images": sizes.kernel_images}
    config = replace(
        ga_distillation.RECOMMENDED,
        **{
            "population_size": sizes.kernel_population,
            "networks_per_member": 1,
            "network": NetworkConfig(width=width, compute_dtype="bfloat16", depth=depth),
            "training": TrainingConfig(num_epochs=sizes.steps),
            **changes,
            "kernel": ga_distillation.KernelConfig(**kernel),
        },
    )
    algorithm = ga_distillation.build(config, dataset.num_classes, dataset.image_shape)
    params, data = ga_distillation.Params(), ga_distillation.make_data(dataset)

    @jax.jit
    def some(state, key, data):
        def step(state, key):
            state, metrics = algorithm.step(key, state, params, data)
            return state, (metrics.fitness_mean, metrics.accuracy_best)

        state, found = jax.lax.scan(step, state, jax.random.split(key, sizes.kernel_steps))
        return state, jax.tree.map(jnp.mean, found)

    state = jax.jit(algorithm.init)(jax.random.key(0), params, data)
    compiled = some.lower(state, jax.random.key(0), data).compile()
    jax.block_until_ready(compiled(state, jax.random.key(0), data))  # the first loads its kernels
    return Search(
        config, dataset, state, compiled, lambda s: algorithm.result(s, params, data), data
    )


def searched(found: Search, seconds: float) -> tuple[ga_distillation.Individual, dict[str, Any]]:
    """The images after some seconds, and how it went."""
    state, curve, start = found.state, [], time.perf_counter()
    while not curve or time.perf_counter() - start < seconds:
        state, metrics = found.some(state, jax.random.key(1 + len(curve)), found.data)
        curve.append([*(float(value) for value in metrics), time.perf_counter() - start])
    spent = curve[-1][-1]
    generations = int(state.generation)
    return found.result(state), {
        "training images": len(found.dataset.train),
        "population": found.config.population_size,
        "width": found.config.kernel.kernel_width,
        "generations": generations,
        "seconds": spent,
        "candidates a second": generations * found.config.population_size / spent,
        "curve": curve[:: max(1, len(curve) // 50)],
    }


def save(found: Search, individual: ga_distillation.Individual, name: str, path: Path) -> None:
    """The images with their recipe, as `evaluate` takes them."""
    dataset, config = found.dataset, found.config
    distilled.DistilledDataset(
        images=np.asarray(individual.images),
        labels=np.asarray(individual.labels),
        dataset=name,
        class_names=dataset.class_names,
        mean=dataset.mean,
        std=dataset.std,
        network=replace(config.network, compute_dtype="float32"),
        training=config.training,
        seed=0,
        factor=config.factor,
    ).save(path)


def judged(found: Search, individual: ga_distillation.Individual, judges: int) -> dict[str, Any]:
    """Accuracy of networks trained on the images by the paper's recipe."""
    images, labels = encodings.unpacked(*individual, found.config.factor)
    row = {}
    for name, part in (("validation", found.dataset.validation), ("test", found.dataset.test)):
        accuracies = distilled.accuracies_on(
            part,
            jax.random.key(2),
            images,
            labels,
            found.dataset,
            replace(found.config.network, compute_dtype="float32"),
            found.config.training,
            judges,
            found.config.engine,
        )
        row[f"{name} images"] = len(part)
        row[f"{name} accuracy"] = [float(accuracies.mean()), float(accuracies.std())]
    return row


def distillation(results: Results, options: Options, sizes: Sizes) -> None:
    """Searches one after the other; the next ones and the judges of the last ones compile beside
    them. What is found is kept as OUT/<search>.npz."""
    names = [*(options.searches or SEARCHES)]
    if unknown := sorted(set(names) - set(SEARCHES)):
        raise SystemExit(f"searches must be of {', '.join(SEARCHES)}, got {unknown[0]!r}")
    for_judges = 0 if options.rehearse else 3 * sizes.compile_seconds
    with ThreadPoolExecutor(2) as threads, ThreadPoolExecutor(2) as others:
        compiled = {name: threads.submit(search, options, sizes, name) for name in names}
        judges = {}
        for place, name in enumerate(names):
            found = compiled[name].result()
            shares = sum(SEARCHES[later][2] for later in names[place:])
            left = max(1.0, results.seconds_left - for_judges)
            seconds = 0.2 if options.rehearse else left * SEARCHES[name][2] / shares

            def run(name=name, found=found, seconds=seconds) -> dict[str, Any]:
                individual, row = searched(found, seconds)
                of = "digits" if options.rehearse else SEARCHES[name][0]
                save(found, individual, of, options.output / f"{name}.npz")
                judges[name] = others.submit(judged, found, individual, sizes.judges)
                return row

            results.measure(name, -math.inf, run)
        for name, judge in judges.items():
            results.measure(f"judges of {name}", -math.inf, judge.result)


# --- the sets that were found, judged by other networks


def transfer(results: Results, options: Options, sizes: Sizes) -> None:
    sys.path.append(str(HERE.parent / "ga_distillation"))
    import transfer

    sets = HERE.parent / "ga_distillation/sets"
    files = sorted((options.output if options.rehearse else sets).glob("*.npz"))
    shapes = {distilled.DistilledDataset.load(file).unpacked().images.shape: file for file in files}
    few = {"widths": (sizes.width,), "networks": ("MLP",), "num_epochs": sizes.steps}
    changes = {"num_networks": sizes.judges, "data_dir": options.data_dir}
    changes |= few if options.rehearse else {}
    wanted = transfer.Options(tuple(files), output=options.output / "table.json", **changes)

    def compiled() -> dict[str, Any]:
        """Programs are those of a shape and a network, whatever the set."""
        firsts = transfer.judged_sets(replace(wanted, sets=tuple(shapes.values())))
        cells = [
            (data, dataset, *cell[1:])
            for _, dataset, data in firsts
            for cell in transfer.columns(wanted, data)
        ]
        with ThreadPoolExecutor(4) as threads:
            judging = [threads.submit(one, *cell) for cell in cells]
        return {"programs": len([judge.result() for judge in judging])}

    def one(data, dataset, network, training) -> None:
        key = jax.random.key(wanted.seed)
        own = data.images, data.labels, dataset, network, training, wanted.num_networks
        with contextlib.suppress(ValueError):  # a network that images are too small for
            distilled.accuracies_on(dataset.test, key, *own)

    def judged() -> dict[str, Any]:
        transfer.main(wanted)
        return {"sets": len(files), "networks": wanted.num_networks}

    results.measure("programs of the transfer table", 4 * sizes.compile_seconds, compiled)
    results.measure("the transfer table", -math.inf, judged)


# --- hard labels and a teacher's


def labels(results: Results, options: Options, sizes: Sizes) -> None:
    sys.path.append(str(HERE.parent / "ga_distillation"))
    import labels

    file = (options.data_dir or Path()) / "cifar10.npz"
    changes: dict[str, Any] = {"dataset": str(file) if file.exists() else "cifar10"}
    if options.rehearse:
        few = {"dataset": "digits", "sizes": (20,), "teacher_epochs": 2}
        changes = few | {"width": sizes.width, "num_networks": sizes.judges, "num_epochs": 100}
    sets = sorted(options.output.glob("cifar10-[15]00.npz"))
    wanted = labels.Options(
        tuple(sets), data_dir=options.data_dir, output=options.output / "by-labels.json", **changes
    )

    def judged() -> dict[str, Any]:
        labels.main(wanted)
        return {"sets": len(sets), "networks": wanted.num_networks}

    results.measure("the table of labels", 4 * sizes.compile_seconds, judged)


# --- the paper's run


def paper(results: Results, options: Options, sizes: Sizes) -> None:
    from evojax_suite.runtime import loop

    folder = options.output / "paper-run"
    parts = sorted(options.checkpoint.glob("paper-run.tar.*")) if options.checkpoint else []
    if parts:
        whole = options.output / "paper-run.tar"
        whole.write_bytes(b"".join(part.read_bytes() for part in parts))
        with tarfile.open(whole) as archive:
            archive.extractall(options.output, filter="data")
        whole.unlink()
    name = "digits" if options.rehearse else "mnist"
    config = ga_distillation.Config(network=NetworkConfig(compute_dtype="bfloat16"))
    if options.rehearse:
        network = NetworkConfig(width=sizes.width, depth=2)
        training = TrainingConfig(num_epochs=sizes.steps)
        config = replace(
            config, population_size=sizes.population, network=network, training=training
        )

    def go_on() -> dict[str, Any]:
        dataset = load(name, options.data_dir)
        algorithm = ga_distillation.build(config, dataset.num_classes, dataset.image_shape)
        params, data = ga_distillation.Params(), ga_distillation.make_data(dataset)
        seconds = 60.0 if options.rehearse else results.seconds_left - 30
        signal.setitimer(signal.ITIMER_REAL, max(1.0, seconds))
        signal.signal(signal.SIGALRM, lambda *_: os.kill(os.getpid(), signal.SIGTERM))
        steps = 3 if options.rehearse else 1000
        key = jax.random.key(0)
        try:
            loop.run(algorithm, key, params, data, steps, folder, checkpoint_seconds=60)
        except loop.Interrupted:
            pass
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)
        lines = (folder / "metrics.jsonl").read_text().splitlines()
        return {"generations": len(lines), "last": json.loads(lines[-1])}

    results.measure(f"ga-distillation on {name}", sizes.compile_seconds + 30, go_on)
    if folder.exists():
        whole = options.output / "paper-run.tar"
        with tarfile.open(whole, "w") as archive:
            archive.add(folder, folder.name)
        packed = whole.read_bytes()
        whole.unlink()
        for number, start in enumerate(range(0, len(packed), PART_BYTES)):
            part = options.output / f"paper-run.tar.{number:03d}"
            part.write_bytes(packed[start : start + PART_BYTES])


MEASURE: dict[str, Callable[[Results, Options, Sizes], None]] = {
    "agreement": agreement,
    "engine": engine,
    "kernels": kernels,
    "pytorch": pytorch,
    "systems": systems,
    "distillation": distillation,
    "transfer": transfer,
    "labels": labels,
    "paper": paper,
}


def main(options: Options) -> None:
    if options.block == "expected":
        write_expected()
        return
    results = Results(options)
    print(f"{options.block}: {results.found['machine']}", flush=True)
    MEASURE[options.block](results, options, TINY if options.rehearse else Sizes())


if __name__ == "__main__":
    main(tyro.cli(Options))
