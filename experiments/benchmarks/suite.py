"""All five systems against PyTorch loops, on one machine in one run: `make bench`.

    pip install ".[bench]"
    python experiments/benchmarks/suite.py
    python experiments/benchmarks/suite.py --cases cest ecomp

On scikit-learn's digits, enlarged to 28x28, so that nothing is fetched and what is learned can
be told. Each case is a process, so that its memory and its compilations are its own. Ours runs as
by default: on all accelerators or all cores, in float32. Theirs is a plain loop; beside that of
GA distillation, its faster variants take turns too (`throughput.torch_variants`). Writes
`<output>.json` and `<output>.png` and prints the tables. Let nothing else run.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import torch
import torch.nn.functional as F
import tyro
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from pytorch_loops import Cest, Devs, Ecomp, channels_first
from throughput import population, torch_population, torch_variants
from turns import compared, machine, seconds_of, table_of_variants

from evojax_suite import cest, devs, ecomp
from evojax_suite.data import load, normalize
from evojax_suite.networks import NetworkConfig
from evojax_suite.runtime import devices
from evojax_suite.runtime.devices import Devices
from evojax_suite.runtime.resources import cores
from evojax_suite.runtime.results import to_jsonable, write_json
from evojax_suite.systems.ecomp import compression, feed_forward
from evojax_suite.training import EngineConfig, TrainingConfig
from evojax_suite.types import Dataset, Split, training_data

HERE = Path(__file__).parent
POPULATIONS = 1, 4, 16, 64, 256
CANDIDATES = 4


@dataclass(frozen=True)
class Options:
    """Time them."""

    cases: tuple[str, ...] = ()
    """Some of them; all by default."""
    repeats: int = 5
    """Turns that ours and PyTorch take; 3 at most where it has variants, and for populations."""
    devices: Devices = "auto"
    """Devices of our programs, where their work is divided and the case is not of one device."""
    convolution: str = "auto"
    """How our convolutions are lowered; compiled is the C++ of `networks.compiled`."""
    output: Path = HERE / "suite"
    """Without a suffix."""
    only: str | None = None
    """The case that this process is for; the program sets it."""


def digits() -> Dataset:
    """1,078 training, 359 validation and 360 test images of 28x28."""
    dataset = load("digits")

    def enlarged(part: Split) -> Split:
        shape = (len(part), 28, 28, 1)
        images = jax.image.resize(jnp.asarray(part.images, jnp.float32), shape, "bilinear")
        return Split(np.asarray(jnp.clip(jnp.round(images), 0, 255)).astype(np.uint8), part.labels)

    parts = {name: enlarged(getattr(dataset, name)) for name in ("train", "validation", "test")}
    return replace(dataset, **parts)


def normalized(dataset: Dataset, part: Split) -> np.ndarray:
    return np.asarray(normalize(part.images, dataset.mean, dataset.std), np.float32)


def tensors(dataset: Dataset, part: Split) -> tuple[torch.Tensor, torch.Tensor]:
    labels = torch.from_numpy(part.labels.astype(np.int64))
    return channels_first(normalized(dataset, part)), labels


def in_bfloat16(run: Callable[[], Any], units: float, repeats: int) -> tuple[float, Any]:
    """Units a second, and what came out."""
    found = jax.device_get(run())
    taken = [seconds_of(run) for _ in range(min(repeats, 2))]
    return units / float(np.median(taken)), found


def members_of(dataset: Dataset, members: int, num_images: int):
    """Sets (members, 10, 28, 28, 1) of one training image a class, and what judges them."""
    random, images = np.random.default_rng(0), normalized(dataset, dataset.train)
    places = [np.flatnonzero(dataset.train.labels == label) for label in range(10)]
    sets = np.stack([[images[random.choice(own)] for own in places] for _ in range(members)])
    return sets, images[:num_images], dataset.train.labels[:num_images].astype(np.int32)


WIDTHS = (16, 8), (32, 8), (128, 2)
"""And members of a turn, of ours; PyTorch's turns have two or as many as there are cores."""
STEPS = 60


def of_ga_distillation(options: Options) -> list[dict]:
    """As a user gets it, against all variants of the PyTorch loop."""
    num_devices, rows, dataset = devices.take(options.devices), [], digits()
    for width, members in WIDTHS:
        arrays = members_of(dataset, members, 1000)
        runs = {
            dtype: population(
                NetworkConfig(width=width, compute_dtype=dtype, convolution=options.convolution),
                STEPS,
                EngineConfig(),
                num_devices,
                *arrays,
            )
            for dtype in ("float32", "bfloat16")
        }
        sets, *rest = arrays
        theirs = max(2, cores())
        with torch_variants(width, STEPS, sets[:theirs], *rest) as (variants, missing):
            repeats = min(options.repeats, 3)
            row = compared(runs["float32"], variants, members, len(sets[:theirs]), repeats)
        half, found = in_bfloat16(runs["bfloat16"], members, options.repeats)
        rows.append(
            {
                "system": f"ga-distillation, width {width}",
                "unit": "members/s",
                "devices": num_devices,
                **row,
                "torch_missing": missing,
                "bfloat16_units_per_second": half,
                "outcome": 100 * float(np.mean(runs["float32"]().accuracy)),
                "outcome_bfloat16": 100 * float(np.mean(found.accuracy)),
            }
        )
    return rows


def ga_distillation_on_one(options: Options) -> list[dict]:
    """The same on one device, against the plain loop."""
    rows, dataset = [], digits()
    for width, members in WIDTHS:
        arrays = members_of(dataset, members, 1000)
        network = NetworkConfig(width=width, convolution=options.convolution)
        run = population(network, STEPS, EngineConfig(), 1, *arrays)
        sets, *rest = arrays
        theirs = torch_population(width, STEPS, sets[:2], *rest)
        row = compared(run, theirs, members, 2, min(options.repeats, 3))
        rows.append(
            {
                "system": f"ga-distillation, width {width}",
                "unit": "members/s",
                "devices": 1,
                **row,
            }
        )
    return rows


def of_cest(options: Options) -> list[dict]:
    """A selection and five epochs on a quarter of the images; what comes out is of thirty."""
    dataset, epochs, width = digits(), 5, 16

    def ours(dtype):
        network = NetworkConfig(
            network="VGG10", width=width, compute_dtype=dtype, convolution=options.convolution
        )
        config = cest.Config(
            initial_epochs=0,
            epochs_per_selection=epochs,
            network=network,
            training=TrainingConfig(num_epochs=6 * epochs, batch_size=64),
        )
        algorithm = cest.build(config, dataset.num_classes, dataset.image_shape)
        params, data = cest.Params(), cest.make_data(config, dataset)
        init, step = jax.jit(algorithm.init), jax.jit(algorithm.step)

        def run(number=epochs):
            state = init(jax.random.key(0), params, data)
            for epoch in range(number):
                state, metrics = step(jax.random.key(epoch), state, params, data)
            return metrics

        return run

    def outcome(run) -> float:
        return 100 * float(run(6 * epochs).validation_accuracy)

    theirs = Cest(width, *tensors(dataset, dataset.train), *tensors(dataset, dataset.validation))
    run = ours("float32")
    row = compared(run, lambda: theirs(epochs), epochs, epochs, options.repeats)
    run_half = ours("bfloat16")
    half, _ = in_bfloat16(run_half, epochs, options.repeats)
    row |= {
        "bfloat16_units_per_second": half,
        "outcome": outcome(run),
        "outcome_bfloat16": outcome(run_half),
    }
    return [{"system": "cest", "unit": "epochs/s", "devices": 1, **row}]


def of_devs(options: Options) -> list[dict]:
    """A reduction from 1,078 images to 108, its network trained for five epochs."""
    dataset, epochs, size, width = digits(), 5, 108, 32
    data = training_data(dataset)

    def ours(dtype):
        numbers = {"width": width, "compute_dtype": dtype, "convolution": options.convolution}
        config = devs.Config(
            target_sizes=(size,),
            sizes=(size,),
            clustering="sklearn",
            feature_epochs=epochs,
            min_training_steps=0,
            network=replace(devs.NETWORK, **numbers),
        )
        algorithm = devs.build(config, dataset.num_classes, dataset.image_shape)

        def run():
            state, number = algorithm.init(jax.random.key(0), None, data), 0
            while not bool(algorithm.finished(state)):
                number += 1
                state, _ = algorithm.step(jax.random.key(number), state, None, data)
            return algorithm.result(state, None, data)

        return run

    def judged(found) -> float:
        """Mean accuracy of five networks that learn from the set."""
        (reduced,) = found
        sets = np.repeat(np.asarray(reduced.images)[None], 5, 0)
        images = normalized(dataset, dataset.validation)
        labels = dataset.validation.labels.astype(np.int32)
        run = population(
            NetworkConfig(width=width),
            60,
            EngineConfig(),
            1,
            sets,
            images,
            labels,
            np.repeat(np.asarray(reduced.labels)[None], 5, 0),
        )
        return 100 * float(np.mean(run().accuracy))

    images, labels = tensors(dataset, dataset.train)
    theirs = Devs(width, images, F.one_hot(labels, 10).float())
    run = ours("float32")
    row = compared(run, lambda: theirs(epochs, size), 1, 1, options.repeats)
    half, found = in_bfloat16(ours("bfloat16"), 1, options.repeats)
    row |= {
        "bfloat16_units_per_second": half,
        "outcome": judged(run()),
        "outcome_bfloat16": judged(found),
    }
    return [{"system": "devs", "unit": "reductions/s", "devices": 1, **row}]


def of_ecomp(options: Options) -> list[dict]:
    """Evaluation of 100 children of a network of two hidden layers of 256 units."""
    dataset, random, config = digits(), np.random.default_rng(0), ecomp.Config()
    parent = tuple(
        layer._replace(
            weight=random.normal(0, (2 / layer.weight.shape[1]) ** 0.5, layer.weight.shape).astype(
                np.float32
            )
        )
        for layer in feed_forward.zeros((784, 256, 256, 10))
    )
    data = ecomp.make_data(parent, dataset.train.images, dataset.train.labels)
    algorithm, params = ecomp.build(config), ecomp.Params()
    step = jax.jit(algorithm.step)
    start = jax.jit(algorithm.init)(jax.random.key(0), params, data)
    first, _ = step(jax.random.key(1), start, params, data)

    def ours():
        return step(jax.random.key(2), first, params, data)

    def tensors_of(network):
        return [tuple(torch.from_numpy(np.array(array)) for array in layer) for layer in network]

    networks = [
        tensors_of(compression.trimmed(compression.member(start.population, one), sizes))
        for one, sizes in enumerate(np.asarray(start.population.sizes))
    ]
    batch = np.asarray(first.order)[: config.batch_size]
    images = torch.from_numpy(np.asarray(data.images)[batch])
    labels = torch.from_numpy(np.asarray(data.labels)[batch])
    theirs = Ecomp(tensors_of(parent), networks, images, labels)
    # Both find the same, or the comparison is void.
    np.testing.assert_allclose(first.scores.fitness, theirs(), atol=0.02)
    jax.clear_caches()  # so that its compilation is told
    row = compared(ours, theirs, len(networks), len(networks), options.repeats)
    return [{"system": "ecomp", "unit": "networks/s", "devices": 1, **row}]


def of_de_nas(options: Options) -> list[dict]:
    """Four candidates of ten epochs, compilation counted; one turn."""
    num_devices, dataset = devices.take(options.devices), digits()
    with tempfile.TemporaryDirectory() as folder:
        images, found = Path(folder) / "digits28.npz", Path(folder) / "found.json"
        np.savez(
            images,
            **{
                f"{name}_{kind}": getattr(getattr(dataset, part), kind)
                for name, part in (("train", "train"), ("val", "validation"), ("test", "test"))
                for kind in ("images", "labels")
            },
        )
        speed = HERE.parent / "de_nas" / "speed.py"
        command = [sys.executable, speed, "--dataset", images, "--candidates", str(CANDIDATES)]
        command += ["--num-validation-images", "359", "--programs", "separate", "--output", found]
        subprocess.run([str(part) for part in command], check=True)
        result = json.loads(found.read_text())
    ours, theirs = (result["seconds"][name] for name in ("separate", "torch"))
    ratio = theirs["all"] / ours["all"]
    return [
        {
            "system": "de-nas",
            "unit": "candidates/h",
            "devices": num_devices,
            "units_per_second": 3600 * CANDIDATES / ours["all"],
            "torch_units_per_second": 3600 * CANDIDATES / theirs["all"],
            **dict.fromkeys(("ratio_median", "ratio_min", "ratio_max"), ratio),
            "compile_seconds": ours["compilation"],
            "peak_megabytes": result["peak_megabytes"],
        }
    ]


def of_populations(options: Options, num_devices: int, sizes: tuple[int, ...]) -> list[dict]:
    """Members a second at several population sizes: width 16, 20 steps, 200 images."""
    rows, dataset = [], digits()
    for members in sizes:
        arrays = members_of(dataset, members, 200)
        network = NetworkConfig(width=16, convolution=options.convolution)
        sets, *rest = arrays
        their_members = min(members, 4)
        row = compared(
            population(network, 20, EngineConfig(), num_devices, *arrays),
            torch_population(16, 20, sets[:their_members], *rest),
            members,
            their_members,
            min(options.repeats, 3),
        )
        rows.append({"members": members, "devices": num_devices, **row})
    return rows


def populations(options: Options) -> list[dict]:
    return of_populations(options, devices.take(options.devices), POPULATIONS)


def populations_on_one(options: Options) -> list[dict]:
    return of_populations(options, 1, POPULATIONS[:-1])


CASES = {
    "ga-distillation": of_ga_distillation,
    "ga-distillation, one device": ga_distillation_on_one,
    "devs": of_devs,
    "cest": of_cest,
    "ecomp": of_ecomp,
    "de-nas": of_de_nas,
    "populations": populations,
    "populations, one device": populations_on_one,
}


def table_of_systems(rows: list[dict]) -> str:
    header = "system", "devices", "ours", "PyTorch's plain loop", "ratio, median (min-max)"
    header += "fastest PyTorch", "ratio to it", "compile, s"
    header += "peak memory, MB", "bfloat16", "result, float32", "result, bfloat16"
    lines = [f"| {' | '.join(header)} |", "|---" * len(header) + "|"]
    for row in rows:
        ratios = [f"{row[f'ratio_{name}']:.2f}" for name in ("median", "min", "max")]
        several, name = len(row.get("torch", ())) > 1, row.get("torch_best")
        best = row["torch"][name] if several else {}
        offered = "bfloat16_units_per_second" in row
        missing = "not offered" if row["system"] == "ecomp" else "not run"
        cells = [
            row["system"],
            str(row["devices"]),
            f"{row['units_per_second']:,.2f} {row['unit']}",
            f"{row['torch_units_per_second']:,.2f}",
            f"{ratios[0]} ({ratios[1]}-{ratios[2]})",
            f"{name}, {best['torch_units_per_second']:,.2f}" if several else "no other tried",
            f"{best['ratio_median']:.2f}" if several else "",
            f"{row['compile_seconds']:.1f}",
            f"{row['peak_megabytes']:,.0f}",
            *(
                [
                    f"{row['bfloat16_units_per_second']:,.2f}",
                    f"{row['outcome']:.1f} %",
                    f"{row['outcome_bfloat16']:.1f} %",
                ]
                if offered
                else [missing] * 3
            ),
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def table_of_populations(rows: list[dict]) -> str:
    lines = [
        "| members | devices | ours, members/s | PyTorch | ratio | compile, s | peak memory, MB |",
        "|---" * 7 + "|",
    ]
    for row in rows:
        lines.append(
            f"| {row['members']} | {row['devices']} | {row['units_per_second']:.1f} | "
            f"{row['torch_units_per_second']:.1f} | {row['ratio_median']:.2f} | "
            f"{row['compile_seconds']:.1f} | {row['peak_megabytes']:,.0f} |"
        )
    return "\n".join(lines)


def plot(path: Path, systems: list[dict], sizes: list[dict]) -> None:
    figure = Figure(figsize=(10.5, 4), layout="constrained")
    FigureCanvasAgg(figure)
    axes, lines = figure.subplots(1, 2)
    names = [
        row["system"] + (f", {row['devices']} devices" if row["devices"] > 1 else "")
        for row in systems
    ]
    ratios = np.array(
        [[row[f"ratio_{name}"] for name in ("median", "min", "max")] for row in systems]
    )
    if len(systems):
        places = np.arange(len(systems))[::-1]
        errors = [ratios[:, 0] - ratios[:, 1], ratios[:, 2] - ratios[:, 0]]
        axes.barh(places, ratios[:, 0], xerr=errors, color="#2166ac", height=0.65, capsize=2)
        axes.set_yticks(places, names, fontsize=8)
        for place, row in zip(places, systems, strict=True):
            if len(row.get("torch", ())) > 1:
                best = row["torch"][row["torch_best"]]
                faster = best["torch_units_per_second"] / row["torch_units_per_second"]
                axes.plot([faster] * 2, [place - 0.4, place + 0.4], color="#b2182b", lw=2)
    axes.axvline(1, color="black", lw=1, ls="--")
    axes.set(xlabel="times the speed of PyTorch's plain loop; the mark is its fastest variant")
    axes.grid(alpha=0.3, axis="x")
    for number in sorted({row["devices"] for row in sizes}):
        own = [row for row in sizes if row["devices"] == number]
        members = [row["members"] for row in own]
        label = f"{number} device{'s' if number > 1 else ''}"
        lines.plot(members, [row["units_per_second"] for row in own], "o-", ms=4, label=label)
        if number == 1:
            theirs = [row["torch_units_per_second"] for row in own]
            lines.plot(members, theirs, "s--", ms=3, color="gray", label="PyTorch")
    lines.set(xscale="log", xlabel="members of the population", ylabel="members per second")
    lines.set_xticks(POPULATIONS, [str(size) for size in POPULATIONS])
    lines.minorticks_off()
    lines.set_ylim(bottom=0)
    lines.grid(alpha=0.3)
    if sizes:
        lines.legend(frameon=False, fontsize=8)
    figure.savefig(path, dpi=150)


def main(options: Options) -> None:
    unknown = sorted(set(options.cases) - set(CASES))
    if unknown:
        raise SystemExit(f"cases must be of {', '.join(CASES)}, got {unknown[0]!r}")
    if options.only:
        rows = CASES[options.only](options)
        options.output.write_text(json.dumps(to_jsonable({"machine": machine(), "rows": rows})))
        return
    found, about = {}, {}
    # evosax starts the devices when it is imported, before a case can take them.
    made = cores() if isinstance(options.devices, str) else options.devices
    environment = os.environ | {"JAX_NUM_CPU_DEVICES": str(made)}
    start = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        for name in options.cases or CASES:
            clock, path = time.perf_counter(), Path(folder) / "rows.json"
            command = [sys.executable, __file__, "--only", name, "--output", str(path)]
            command += ["--repeats", str(options.repeats)]
            command += ["--devices", str(options.devices), "--convolution", options.convolution]
            subprocess.run(command, check=True, env=environment)
            result = json.loads(path.read_text())
            about, found[name] = result["machine"], result["rows"]
            print(f"{name}: {time.perf_counter() - clock:.0f} s", flush=True)
    rows = [row for own in found.values() for row in own]
    systems, sizes = ([row for row in rows if key in row] for key in ("system", "members"))
    if systems:
        print(table_of_systems(systems))
        own = [row for row in systems if len(row.get("torch", ())) > 1]
        print(f"\n{table_of_variants([row['system'] for row in own], own)}\n" if own else "")
    if sizes:
        print(table_of_populations(sizes))
    about["seconds"] = time.perf_counter() - start
    write_json(options.output.with_suffix(".json"), {**about, "systems": systems, "sizes": sizes})
    plot(options.output.with_suffix(".png"), systems, sizes)


if __name__ == "__main__":
    main(tyro.cli(Options))
