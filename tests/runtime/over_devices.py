"""What `test_devices.py` runs in a process with eight devices: each population on up to 8.

Writes, for every algorithm and number of devices, what was found of its members and the metrics and
state after a whole step, and what a run notes that goes on over other devices, as one .npz.
"""

import sys
import tempfile
from dataclasses import replace
from pathlib import Path

import jax
import numpy as np
import pytest

from evojax_suite.runtime import devices, loop

devices.take(8)  # before evosax is imported

from evojax_suite import cest, ga_distillation  # noqa: E402
from evojax_suite.data import load  # noqa: E402
from evojax_suite.distilled import accuracies_on  # noqa: E402
from evojax_suite.networks import NetworkConfig  # noqa: E402
from evojax_suite.runtime.results import read_lines  # noqa: E402
from evojax_suite.systems.cest import predator_prey  # noqa: E402
from evojax_suite.systems.ga_distillation import strong_random  # noqa: E402
from evojax_suite.training import TrainingConfig  # noqa: E402

DIGITS = load("digits")
SHAPE = DIGITS.image_shape
NETWORK = NetworkConfig(width=4, depth=1)
GENETIC = ga_distillation.Config(
    population_size=6,  # over 4 and 8 devices some have fewer members
    networks_per_member=2,
    network=NETWORK,
    training=TrainingConfig(num_epochs=2),
)
PREDATORS = predator_prey.Config(
    num_predators=4,
    network=NETWORK,
    # Adam would make much of the rounding of small gradients.
    training=TrainingConfig(num_epochs=1, batch_size=64, optimizer="sgd", learning_rate=0.05),
)


def cases():
    data, params = ga_distillation.make_data(DIGITS), ga_distillation.Params()
    yield "ga_distillation", ga_distillation.build(GENETIC, 10, SHAPE), params, data
    config = replace(
        GENETIC,
        strategy="BlockES",
        fitness="kernel_regression",
        encoding="cosines",
        best_of="mean",
    )
    yield "kernel_regression", ga_distillation.build(config, 10, SHAPE), params, data
    yield "strong_random", strong_random.build(GENETIC, 2, 10, SHAPE), params, data
    data = cest.make_data(cest.Config(network=NETWORK), DIGITS)
    yield "predator_prey", predator_prey.build(PREDATORS, 10, SHAPE), predator_prey.Params(), data


def keep(found: dict, name: str, tree) -> None:
    found |= {f"{name}/{i}": np.asarray(leaf) for i, leaf in enumerate(jax.tree.leaves(tree))}


def main(output: str) -> None:
    found = {}
    few = DIGITS.train.images[:20] / 255, np.eye(10)[DIGITS.train.labels[:20]]
    training = TrainingConfig(num_epochs=2)
    for number in (1, 4):
        judged = accuracies_on(
            DIGITS.test, jax.random.key(0), *few, DIGITS, NETWORK, training, 6, num_devices=number
        )
        keep(found, f"accuracies_on/{number}", judged)
    for name, algorithm, params, data in cases():
        state = jax.jit(algorithm.init)(jax.random.key(0), params, data)
        for number in (1, 2, 4, 8) if name == "ga_distillation" else (1, 4):
            if number in (1, 4):
                many = devices.over_devices(algorithm, number)
                assert many.scannable == (number == 1)
                step = jax.jit(many.step) if many.scannable else many.step
                result = step(jax.random.key(1), state, params, data)
                keep(found, f"{name}/{number}/step", result)
            if name != "strong_random":
                generation = algorithm.generation
                keys = generation.split_key(jax.random.key(1))
                candidates = generation.ask(keys.ask, state, params, data)
                evaluate = devices.evaluator(
                    generation.evaluate, generation.population_size, number
                )
                members = evaluate(keys.evaluate, candidates, params, data, 0)
                keep(found, f"{name}/{number}/members", members)
    found |= gone_on() | in_groups()
    np.savez(output, **found)


def in_groups() -> dict:
    """A step whose members are evaluated in groups, of 1, 2 and 4 members."""
    data, params, found = ga_distillation.make_data(DIGITS), ga_distillation.Params(), {}
    algorithm = ga_distillation.build(GENETIC, 10, SHAPE)
    state = jax.jit(algorithm.init)(jax.random.key(0), params, data)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(devices, "_GROUP_SECONDS", 1e-9)
        for number in (1, 2, 4):  # over 4 the last group is half empty
            divided = devices.over_devices(algorithm, number, data)
            assert divided.in_groups
            result = divided.step(jax.random.key(1), state, params, data)
            keep(found, f"in_groups/{number}/step", result)
    keep(
        found,
        "in_groups/whole/step",
        jax.jit(algorithm.step)(jax.random.key(1), state, params, data),
    )
    return found


def gone_on() -> dict:
    """What a run over 2, 2 and then 4 devices reports: the notes, and the devices and the seconds
    of compilation of each step."""
    data, params = ga_distillation.make_data(DIGITS), ga_distillation.Params()
    algorithm, notes = ga_distillation.build(GENETIC, 10, SHAPE), []
    with tempfile.TemporaryDirectory() as folder:
        for number, steps in ((2, 2), (2, 3), (4, 3), (4, 4)):
            loop.run(
                algorithm,
                jax.random.key(0),
                params,
                data,
                steps,
                Path(folder) / "run",
                num_devices=number,
                on_note=notes.append,
            )
        timings = read_lines(Path(folder) / "run/timing.jsonl")
    found = {"notes": [note.replace(folder, "") for note in notes]}
    for name in ("devices", "compile_seconds"):
        found[name] = [line[name] for line in timings]
    return found


if __name__ == "__main__":
    main(sys.argv[1])
