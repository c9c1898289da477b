"""A population over virtual CPU devices for an hour: does any step hang, or differ?

    python experiments/benchmarks/soak.py                        # an hour on two devices
    python experiments/benchmarks/soak.py --devices 8 --seconds 600

Programs with collectives have deadlocked on virtual CPU devices (the process is then aborted after
40 s at the rendezvous). Ours have none (`evojax_suite/devices.py`). Each generation is done twice
from the same state and key: every number must be the same. A step that takes more than
`--most-seconds` ends the soak with exit code 1.
"""

from __future__ import annotations

import faulthandler
import json
import time
from dataclasses import dataclass
from pathlib import Path

import jax
import numpy as np
import tyro

from evojax_suite.data import load
from evojax_suite.networks import NetworkConfig
from evojax_suite.runtime import devices
from evojax_suite.training import TrainingConfig


@dataclass(frozen=True)
class Options:
    devices: int = 2
    seconds: float = 3600
    most_seconds: float = 40
    population_size: int = 16
    width: int = 16
    num_epochs: int = 10
    output: Path | None = None
    """Write the figures to this JSON file."""


def main(options: Options) -> None:
    number = devices.take(options.devices)
    from evojax_suite import ga_distillation as ga  # evosax starts the devices

    dataset = load("digits")
    config = ga.Config(
        population_size=options.population_size,
        network=NetworkConfig(width=options.width, depth=2),
        training=TrainingConfig(num_epochs=options.num_epochs),
    )
    algorithm = ga.build(config, dataset.num_classes, dataset.image_shape)
    algorithm = devices.over_devices(algorithm, number)
    params, data = ga.Params(), ga.make_data(dataset)
    state = algorithm.init(jax.random.key(0), params, data)
    algorithm.step(jax.random.key(1), state, params, data)  # compiles
    begin, generations, slowest, differing = time.perf_counter(), 0, 0.0, 0
    while time.perf_counter() - begin < options.seconds:
        key = jax.random.fold_in(jax.random.key(2), generations)
        faulthandler.dump_traceback_later(options.most_seconds, exit=True)
        start = time.perf_counter()
        outcomes = [jax.device_get(algorithm.step(key, state, params, data)) for _ in range(2)]
        slowest = max(slowest, (time.perf_counter() - start) / 2)
        faulthandler.cancel_dump_traceback_later()
        pairs = zip(*map(jax.tree.leaves, outcomes), strict=True)
        differing += any(not np.array_equal(a, b, equal_nan=True) for a, b in pairs)
        state, generations = outcomes[0][0], generations + 1
    found = {
        "devices": options.devices,
        "seconds": time.perf_counter() - begin,
        "steps": 2 * generations,
        "slowest_step_seconds": slowest,
        "differing_repetitions": differing,
        "jax": jax.__version__,
    }
    print(json.dumps(found))
    if options.output:
        options.output.write_text(json.dumps(found, indent=2) + "\n")
    if differing:
        raise SystemExit(1)


if __name__ == "__main__":
    main(tyro.cli(Options))
