"""What it could gain to train candidates of one skeleton (kinds and kernels) together.

    python experiments/de_nas/table.py        # first: its searches, search.json
    python experiments/de_nas/skeletons.py

How many candidates of a generation share their skeleton; and the time of networks that do: a
program for each, as a search runs them, against one program of the widest, mapped (one member
after the other) or vectorized. Masks, which the one program would need, are left out: what is shown
for it is the most that it could gain. Let nothing else run.
"""

from __future__ import annotations

import json
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from itertools import repeat
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import tyro
from table import Options as TableOptions, base, parts

from evojax_suite import de_nas
from evojax_suite.systems.de_nas import architectures
from evojax_suite.systems.de_nas.networks import fresh
from evojax_suite.training import map_members


@dataclass(frozen=True)
class Options:
    searches: Path = Path("experiments/de_nas/search.json")
    members: int = 4
    """Networks of one skeleton."""
    skeletons: int = 3
    num_images: int = 1000
    num_epochs: int = 10
    data_dir: Path | None = None


def sharing(rows: list[dict]) -> str:
    """Table, by method, of candidates that share their skeleton with another of their
    generation."""
    lines = ["| search | candidates | share their skeleton |", "|---" * 3 + "|"]
    for method in dict.fromkeys(row["method"] for row in rows):
        skeletons = Counter(
            (
                row["seed"],
                one["search_generation"],
                *((u["kind"], u["kernel"]) for u in one["units"]),
            )
            for row in rows
            if row["method"] == method
            for one in row["history"]
        )
        total, alone = skeletons.total(), sum(count == 1 for count in skeletons.values())
        lines.append(f"| {method} | {total} | {1 - alone / total:.1%} |")
    return "\n".join(lines)


def main(options: Options) -> None:
    print(sharing(json.loads(options.searches.read_text())["rows"]))
    setting = TableOptions(
        num_images=options.num_images, num_epochs=options.num_epochs, data_dir=options.data_dir
    )
    dataset = parts(setting)
    config = base(setting, dataset)
    shape, classes = dataset.image_shape, dataset.num_classes
    data = de_nas.make_data(config, dataset)
    keys = jax.random.split(jax.random.key(1), options.members)
    judge = de_nas.make_evaluator(replace(config, programs="separate"), classes, shape)
    for number in range(options.skeletons):
        members = of_one_skeleton(number, config, shape, options.members)
        clock = time.perf_counter()
        with ThreadPoolExecutor(2) as pool:
            genomes = [
                architectures.from_units(units, config.space.max_length) for units in members
            ]
            list(pool.map(judge, genomes, keys, repeat(data), repeat(np.zeros(0))))
        print(f"\n{number}: separate {time.perf_counter() - clock:.1f} s", flush=True)
        widest = tuple(
            replaced._replace(filters=max(units[place].filters for units in members))
            for place, replaced in enumerate(members[0])
        )
        for name, in_flight in (("mapped", 1), ("vectorized", options.members)):
            clock = time.perf_counter()
            program = together(config, widest, classes, shape, in_flight)
            compiled = jax.jit(program).lower(keys, data).compile(de_nas.COMPILER_OPTIONS)
            compilation = time.perf_counter() - clock
            jax.block_until_ready(compiled(keys, data))
            seconds = time.perf_counter() - clock
            print(f"{number}: {name} {seconds:.1f} s, {compilation:.1f} compilation", flush=True)


def of_one_skeleton(number: int, config: de_nas.Config, shape, members: int):
    """Units of each member: a random network's, with filters drawn anew."""
    genome = architectures.random_genome(jax.random.key(number), config.space, shape)
    random, found = np.random.default_rng(number), []
    while len(found) < members:
        units, filters = [], config.space.min_first_filters
        for unit in architectures.to_units(genome):
            if unit.kind == "convolution":
                filters = int(random.integers(filters, config.space.max_filters + 1))
                unit = unit._replace(filters=filters)
            units.append(unit)
        own = architectures.from_units(tuple(units), config.space.max_length)
        if architectures.num_features(own, shape) <= config.space.max_features:
            found.append(tuple(units))
    return found


def together(config, units, classes, shape, in_flight):
    """One program that trains and judges all members, each as wide as the widest."""
    network = de_nas.network_of(config, units, classes)
    judge = de_nas.candidate_evaluator(
        config, classes, network, lambda key, _: fresh(key, network, shape, config.initialization)
    )
    return lambda keys, data: map_members(
        lambda key: judge(key, None, data, jnp.zeros(0))[0], (keys,), in_flight
    )


if __name__ == "__main__":
    main(tyro.cli(Options))
