"""Compiles the programs of all systems for a GPU that is not there, and says what they would take.

    make gpu-check    # writes gpu-model.json and gpu-model.md beside this file
    .venv-gpu/bin/python experiments/benchmarks/gpu_check.py --systems ga_distillation \\
        --cards h100 --output /tmp/model --convolution patches --members-in-flight 64 \\
        --members-evaluated-at-once 64 --evaluation-batch-size 500

Needs `jax[cuda13]` in an environment of its own, but neither a card nor a driver: XLA compiles for
the description of a card (targets/), and `roofline.py` reads the optimised program. The sizes are
those of the papers. Ends with exit code 1 where a program does not compile, or needs more memory
than the card has.
"""

from __future__ import annotations

import os

os.environ["JAX_PLATFORMS"] = "cpu"  # the CUDA plugin still registers, for compilation alone

import contextlib
import datetime
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import tyro
from jax.experimental import topologies
from roofline import CARDS, Card, Roofline, roofline, table

from evojax_suite import cest, de_nas, devs, ecomp, ga_distillation, networks
from evojax_suite.networks import NetworkConfig
from evojax_suite.runtime.devices import evaluator
from evojax_suite.runtime.results import write_json
from evojax_suite.systems.coresets import gradient_matching
from evojax_suite.systems.de_nas import architectures
from evojax_suite.systems.de_nas.networks import fresh
from evojax_suite.systems.ecomp import feed_forward
from evojax_suite.training import EngineConfig, extract_features, fit_epochs, start_fit
from evojax_suite.types import Dataset, PyTree, Split

HERE = Path(__file__).parent


@dataclass(frozen=True)
class Options:
    """Compile and count."""

    systems: tuple[str, ...] = ()
    """Some of the systems, or ga_distillation_64; all but that by default."""
    cards: tuple[str, ...] = ("h100", "h200")
    """Cards to compile for, of those in targets/."""
    output: Path = HERE / "gpu-model"
    """Without a suffix."""
    compute_dtype: str = "bfloat16"
    """Precision of ga_distillation's networks; the other systems have float32, their default."""
    convolution: str = "auto"
    """How ga_distillation's convolutions are lowered."""
    engine: tyro.conf.OmitArgPrefixes[EngineConfig] = field(default_factory=EngineConfig)
    """How many members ga_distillation runs at once."""
    hlo: Path | None = None
    """Keep the optimised programs in this folder."""


class Program(NamedTuple):
    """A function of a system, its arguments as shapes, and how many calls a unit of work takes."""

    function: Callable
    arguments: tuple
    calls: int = 1
    cards: int = 1
    turns: tuple[tuple[str, int], ...] = ()  # of loops whose length depends on what they find


class System(NamedTuple):
    """What one unit of a system's work is, and the programs that it runs."""

    unit: str
    programs: dict[str, Program]


def noise(train: int, validation: int, shape: tuple[int, int, int]) -> Dataset:
    """A dataset of that size, of ten classes, black."""

    def part(number: int) -> Split:
        labels = np.arange(number, dtype=np.int32) % 10
        return Split(np.zeros((number, *shape), np.uint8), labels)

    names, half = tuple("0123456789"), (0.5,) * shape[-1]
    return Dataset("noise", part(train), part(validation), part(10), names, half, half)


MNIST = (28, 28, 1)
CIFAR = (32, 32, 3)


def shapes_of(tree: PyTree) -> PyTree:
    return jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(jnp.shape(leaf), jnp.result_type(leaf)), tree
    )


def a_key() -> PyTree:
    return jax.eval_shape(lambda: jax.random.key(0))


def one_step(
    algorithm,
    params: PyTree,
    make_data: Callable[[], PyTree],
    turns: tuple[tuple[str, int], ...] = (),
) -> Program:
    """The whole step of a scannable algorithm."""
    data = jax.eval_shape(make_data)
    state = jax.eval_shape(algorithm.init, a_key(), params, data)
    arguments = (a_key(), state, shapes_of(params), data)
    return Program(algorithm.step, arguments, turns=turns)


def of_ga_distillation(options: Options) -> System:
    """Sato et al. on MNIST: 300 individuals, ConvNet-3 of 128, 300 steps, 12,000 fitness images."""
    network = NetworkConfig(compute_dtype=options.compute_dtype, convolution=options.convolution)
    config = ga_distillation.Config(network=network, engine=options.engine)
    algorithm = ga_distillation.build(config, 10, MNIST)
    dataset = noise(48_000, 12_000, MNIST)
    step = one_step(algorithm, ga_distillation.Params(), lambda: ga_distillation.make_data(dataset))
    return System("a generation of 300 members", {"step": step})


def of_many_cards(options: Options) -> System:
    """10,000 individuals, ConvNet-6 on 2,600 fitness images of 224x224x3, on 64 cards; selection
    and variation on the first of them."""
    members, cards, shape = 10_000, 64, (224, 224, 3)
    network = NetworkConfig(
        depth=6, compute_dtype=options.compute_dtype, convolution=options.convolution
    )
    engine = EngineConfig(members_in_flight=8, evaluation_batch_size=50)
    config = ga_distillation.Config(population_size=members, network=network, engine=engine)
    algorithm, params = ga_distillation.build(config, 10, shape), ga_distillation.Params()
    generation, dataset = algorithm.generation, noise(10, 2_600, shape)
    assert generation

    def evaluate(key, candidates, params, data):
        over_cards = evaluator(generation.evaluate, members, cards)
        return over_cards.program(key, candidates, params, data, jnp.int32(0))

    data = jax.eval_shape(lambda: ga_distillation.make_data(dataset))
    state = jax.eval_shape(algorithm.init, a_key(), params, data)
    keys = jax.eval_shape(generation.split_key, a_key())
    asked = keys.ask, state, shapes_of(params), data
    candidates = jax.eval_shape(generation.ask, *asked)
    evaluated = keys.evaluate, candidates, shapes_of(params), data
    everyone = np.arange(members)
    evaluations = jax.eval_shape(lambda *all: generation.evaluate(*all, everyone), *evaluated)
    told = keys.tell, state, candidates, evaluations, shapes_of(params), data
    programs = {
        "evaluation": Program(evaluate, evaluated, cards=cards),
        "ask": Program(generation.ask, asked),
        "tell": Program(generation.tell, told),
    }
    return System(f"a generation of {members:,} members on {cards} cards", programs)


def of_gradient_matching(options: Options) -> System:
    """DC on CIFAR-10, one image a class."""
    config, dataset = gradient_matching.Config(), noise(50_000, 10, CIFAR)
    algorithm = gradient_matching.build(config, 10, CIFAR)
    step = one_step(algorithm, None, lambda: gradient_matching.make_data(dataset))
    return System("an iteration", {"step": step})


def of_devs(options: Options) -> System:
    """DEvS on CIFAR-10: the first reduction's network, 20 epochs on 50,000 images, and what it
    sees."""
    config = devs.Config()
    number, training = 50_000, config.feature_training
    network = networks.create(config.network, 10, CIFAR).clone(bottleneck=config.bottleneck)
    fit = jax.eval_shape(lambda key: start_fit(key, network, training, CIFAR), a_key())
    images = jax.ShapeDtypeStruct((number, *CIFAR), jnp.float32)
    labels = jax.ShapeDtypeStruct((number, 10), jnp.float32)
    batch_size = config.engine.resolved_evaluation_batch_size(CIFAR)
    steps = training.num_batches(number) * config.feature_epochs

    def epoch(key, fit, images, labels):
        return fit_epochs(key, network, training, steps, fit, images, labels, number, 1)

    def features(variables, images):
        return extract_features(network, variables, images, number, batch_size)

    programs = {
        "training": Program(epoch, (a_key(), fit, images, labels), config.feature_epochs),
        "features": Program(features, (fit.variables, images)),
    }
    return System("a reduction of 50,000 images, clustering apart", programs)


def of_cest(options: Options) -> System:
    """CEST: VGG10 of width 256, Fashion-MNIST, batches of 64 of a quarter of 48,000 images."""
    config, dataset = cest.Config(), noise(48_000, 12_000, MNIST)
    algorithm = cest.build(config, 10, MNIST)
    batches = config.training.num_batches(round(config.fraction * len(dataset.train)))
    step = one_step(
        algorithm,
        cest.Params(),
        lambda: cest.make_data(config, dataset),
        (("fit_epochs", batches),),
    )
    return System("an epoch that begins with a selection", {"step": step})


def of_ecomp(options: Options) -> System:
    """EComp: 100 children of 784-256-256-10."""
    config, dataset = ecomp.Config(), noise(60_000, 10, MNIST)
    parent = feed_forward.zeros((784, 256, 256, 10))
    step = one_step(
        ecomp.build(config),
        ecomp.Params(),
        lambda: ecomp.make_data(parent, dataset.train.images, dataset.train.labels),
        (("while", 6),),  # Newton's steps for the perplexity; mutations are one or two
    )
    return System("a generation of 100 networks", {"step": step})


def of_de_nas(options: Options) -> System:
    """DE-NAS on CIFAR-10: ten epochs of the candidate of median work among 21 random ones."""
    config, dataset = de_nas.Config(), noise(45_000, 5_000, CIFAR)
    keys = jax.random.split(jax.random.key(0), 21)
    genomes = jax.vmap(lambda key: architectures.random_genome(key, config.space, CIFAR))(keys)
    work = np.asarray(architectures.costs(genomes, CIFAR, 10).multiplications)
    middle = jax.tree.map(lambda leaf: leaf[np.argsort(work)[10]], genomes)
    network = de_nas.network_of(config, architectures.to_units(middle), 10)

    def start(key, genome):
        del genome
        return fresh(key, network, CIFAR, config.initialization)

    judge = de_nas.candidate_evaluator(config, 10, network, start)
    data = jax.eval_shape(lambda: de_nas.make_data(config, dataset))
    bars = jax.ShapeDtypeStruct((len(config.rungs),), jnp.float32)
    judging = Program(judge, (a_key(), shapes_of(middle), data, bars))
    return System(
        f"a candidate of {work[np.argsort(work)[10]] / 1e6:.0f} million products an image",
        {"judging": judging},
    )


SYSTEMS: dict[str, Callable[[Options], System]] = {
    "ga_distillation": of_ga_distillation,
    "gradient_matching": of_gradient_matching,
    "devs": of_devs,
    "cest": of_cest,
    "ecomp": of_ecomp,
    "de_nas": of_de_nas,
}
ON_REQUEST = {"ga_distillation_64": of_many_cards}
"""What is compiled only where it is named."""


def compiling_for(card: str) -> contextlib.AbstractContextManager[None]:
    """Where Pallas asks for which card it compiles, as it does from jax 0.11 on."""
    if not hasattr(jax.sharding, "AbstractDevice"):
        return contextlib.nullcontext()
    device = jax.sharding.AbstractDevice(
        device_kind=CARDS[card].name, num_cores=132, platform="gpu"
    )
    nowhere = jax.sharding.AbstractMesh((), (), (), abstract_device=device)
    return jax.sharding.use_abstract_mesh(nowhere)


def compiled_for(card: str, program: Program) -> Any:
    """The executable of a program for a card of targets/."""
    description = (HERE / "targets" / f"{card}.txtpb").read_text()
    topology = topologies.get_topology_desc(
        platform="cuda", target_config=description, topology=f"1x1x{program.cards}"
    )
    mesh = jax.sharding.Mesh(topology.devices, ("device",))
    everywhere = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
    arguments = jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=everywhere),
        program.arguments,
    )
    local = mock.patch.object(jax, "local_devices", return_value=[*topology.devices])
    with local, compiling_for(card):
        lowered = jax.jit(program.function).trace(*arguments).lower(lowering_platforms=("cuda",))
    return lowered.compile()


def counted(name: str, card: str, system: System, options: Options) -> tuple[dict[str, Any], str]:
    """What one unit of a system's work takes on a card, and a table of its kernels."""
    seconds, memory, programs, whole, tables = 0.0, 0.0, {}, Roofline(), []
    reach = CARDS[card]
    for part, program in system.programs.items():
        clock = time.perf_counter()
        executable = compiled_for(card, program)
        text, bytes_of = executable.as_text(), executable.memory_analysis()
        if options.hlo:
            options.hlo.mkdir(parents=True, exist_ok=True)
            (options.hlo / f"{name}-{part}-{card}.txt").write_text(text)
        model = roofline(text, dict(program.turns))
        temporary = bytes_of.temp_size_in_bytes
        own = (
            bytes_of.argument_size_in_bytes
            + bytes_of.output_size_in_bytes
            - bytes_of.alias_size_in_bytes
        )
        memory = max(memory, temporary + own)
        seconds += program.calls * model.seconds(reach)
        for kernel in model.kernels:
            whole.kernels.append(
                type(kernel)(**{**vars(kernel), "times": program.calls * kernel.times})
            )
        programs[part] = {
            "calls": program.calls,
            "seconds": model.seconds(reach),
            "temporary_bytes": temporary,
            "compile_seconds": time.perf_counter() - clock,
            "loops": loops(model, reach),
        }
        tables.append(f"### {name}, {part}, {card}\n\n{table(model, reach)}\n")
    return {
        "unit": system.unit,
        "seconds_per_generation": seconds,
        "temporary_bytes": max(part["temporary_bytes"] for part in programs.values()),
        "memory_bytes": memory,
        "bytes": whole.total("bytes"),
        "flop": whole.total("flop"),
        "operations": whole.total("operations"),
        "kernels": whole.launches,
        "shares": whole.shares(reach),
        "programs": programs,
    }, "\n".join(tables)


def loops(model: Roofline, card: Card) -> list[dict[str, Any]]:
    """Kernels and microseconds a turn of each loop body, outermost first."""
    return [
        {
            "turns": times,
            "kernels": len(kernels),
            "microseconds": 1e6 * sum(kernel.seconds(card) for kernel in kernels),
            "bytes": sum(kernel.bytes for kernel in kernels),
            "flop": sum(kernel.flop for kernel in kernels),
        }
        for times, kernels in model.loops().items()
    ]


def summary(found: dict[str, dict[str, dict[str, Any]]]) -> str:
    """The table of all systems, in Markdown."""
    header = "system", "unit", "card", "predicted, s", "bytes", "products", "operations", "cache"
    header += "launches", "kernels", "GB", "TFLOP", "temporary memory, GB"
    lines = [f"| {' | '.join(header)} |", "|---" * len(header) + "|"]
    for name, by_card in found.items():
        for card, row in by_card.items():
            shares = [f"{100 * share:.0f} %" for share in row["shares"].values()]
            cells = [name, row["unit"], card, f"{row['seconds_per_generation']:.3g}", *shares]
            cells += [
                f"{row['kernels']:,}",
                f"{row['bytes'] / 1e9:,.1f}",
                f"{row['flop'] / 1e12:,.2f}",
            ]
            cells += [f"{row['temporary_bytes'] / 1e9:.2f}"]
            lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def main(options: Options) -> None:
    systems = SYSTEMS | ON_REQUEST
    for given, known in ((options.systems, systems), (options.cards, CARDS)):
        unknown = sorted(set(given) - set(known))
        if unknown:
            raise SystemExit(f"must be of {', '.join(known)}, got {unknown[0]!r}")
    found: dict[str, dict[str, dict[str, Any]]] = {}
    tables, failures = [], []
    for name in options.systems or SYSTEMS:
        for card in options.cards:
            clock = time.perf_counter()
            try:
                # So that the package chooses what it would choose there.
                with mock.patch.object(jax, "default_backend", return_value="gpu"):
                    row, kernels = counted(name, card, systems[name](options), options)
            except Exception as error:
                failures.append(f"{name} does not compile for {card}: {str(error).splitlines()[0]}")
                continue
            found.setdefault(name, {})[card] = row
            tables.append(kernels)
            if row["memory_bytes"] > CARDS[card].memory_bytes:
                failures.append(
                    f"{name} needs {row['memory_bytes'] / 1e9:.1f} GB on {card}, which has "
                    f"{CARDS[card].memory_bytes / 1e9:.0f}"
                )
            print(
                f"{name}, {card}: {row['seconds_per_generation']:.3g} s {row['unit']} "
                f"({time.perf_counter() - clock:.0f} s to compile)",
                flush=True,
            )
    print(f"\n{summary(found)}")
    about = {"date": datetime.date.today().isoformat(), "jax": jax.__version__}
    about |= {"cards": {card: asdict(CARDS[card]) for card in options.cards}}
    write_json(options.output.with_suffix(".json"), {"about": about, **found})
    options.output.with_suffix(".md").write_text(f"{summary(found)}\n\n" + "\n".join(tables))
    for failure in failures:
        print(failure, file=sys.stderr)
    if failures:
        raise SystemExit(1)


if __name__ == "__main__":
    main(tyro.cli(Options))
