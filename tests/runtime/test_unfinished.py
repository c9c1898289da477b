"""Runs that are stopped within a step, whose population is evaluated in groups."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import struct

from evojax_suite.runtime import devices, loop
from evojax_suite.runtime.results import read_lines
from evojax_suite.runtime.unfinished import Unfinished
from evojax_suite.types import Algorithm, Generation, StepKeys

SIZE, STEPS, GROUP = 19, 4, 4
GROUPS = [(0, 4), (4, 8), (8, 12), (12, 16), (16, 19)]
DATA = jnp.arange(3.0)


@struct.dataclass
class State:
    population: jax.Array  # (SIZE, 3)
    generation: jax.Array


class Metrics(NamedTuple):
    generation: jax.Array
    score: jax.Array
    num_failed: jax.Array


def evolving(work) -> Algorithm:
    """Mutates members that it scores by their distance from the data, disturbed."""

    def init(key, params, data):
        return State(jax.random.normal(key, (SIZE, 3)), jnp.int32(0))

    def evaluate(key, population, params, data, members):
        noise = jax.vmap(lambda member: jax.random.normal(jax.random.fold_in(key, member)))(members)
        return {"scores": -jnp.square(population[members] - data).sum(1) + noise, "none": None}

    def tell(key, state, population, evaluations, params, data):
        best = population[evaluations["scores"].argmax()]
        children = best + params * jax.random.normal(key, population.shape)
        generation = state.generation + 1
        score = evaluations["scores"].max()
        return State(children, generation), Metrics(generation, score, jnp.int32(0))

    generation = Generation(
        SIZE,
        split_key=lambda key: StepKeys(None, *jax.random.split(key)),
        ask=lambda key, state, params, data: state.population,
        evaluate=evaluate,
        tell=tell,
        work=work,
    )
    return Algorithm(
        init,
        generation.step,
        result=lambda state, params, data: state.population,
        finished=lambda state: jnp.bool_(False),
        generation=generation,
    )


def run(folder: Path, **settings) -> loop.LoopResult:
    """Runs the algorithm in groups of four members, which follow from the work of one."""
    work = devices._GROUP_SECONDS * devices._OPERATIONS_A_SECOND["cpu"] / (GROUP + 0.5)
    algorithm = evolving(lambda data: work)
    key, params = jax.random.key(1), jnp.float32(0.3)
    return loop.run(algorithm, key, params, DATA, STEPS, folder, num_devices=1, **settings)


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> tuple[loop.LoopResult, Path]:
    folder, parts = tmp_path_factory.mktemp("whole"), []
    outcome = run(folder, on_part=parts.append)
    each = [(part.step, part.num_members) for part in parts]
    assert each == [(step, end) for step in range(STEPS) for _, end in GROUPS]
    assert not (folder / "unfinished").exists()
    assert all(part.seconds_left >= 0 for part in parts)
    assert parts[-1].seconds_left == 0
    return outcome, folder


def assert_same(outcome: loop.LoopResult, folder: Path, whole) -> None:
    jax.tree.map(np.testing.assert_array_equal, outcome.state, whole[0].state)
    metrics = [(each / "metrics.jsonl").read_bytes() for each in (folder, whole[1])]
    assert metrics[0] == metrics[1]
    assert not (folder / "unfinished").exists()


@pytest.mark.parametrize(("step", "members"), [(0, 4), (2, 8)])
def test_a_signal_between_two_groups(whole, tmp_path, step, members):
    def stop(part):
        if (part.step, part.num_members) == (step, members):
            os.kill(os.getpid(), signal.SIGTERM)

    with pytest.raises(loop.Interrupted) as stopped:
        run(tmp_path, on_part=stop)
    said = f"stopped by SIGTERM after step {step} and {members} members of the next; "
    assert str(stopped.value).startswith(said)
    kept = sorted(path.name for path in (tmp_path / f"unfinished/{step + 1}").iterdir())
    assert kept == [f"{end - 4}-{end}.npz" for end in range(4, members + 1, 4)]
    before = sum(line["seconds"] for line in read_lines(tmp_path / "timing.jsonl"))
    assert len(read_lines(tmp_path / "metrics.jsonl")) == step
    outcome = run(tmp_path)
    assert_same(outcome, tmp_path, whole)
    assert outcome.seconds > before


def test_killed_within_a_step_it_goes_on_there_though_the_checkpoint_is_older(whole, tmp_path):
    class Killed(Exception):
        pass

    def kill(part):
        if (part.step, part.num_members) == (2, 8):
            raise Killed

    with pytest.raises(Killed):
        run(tmp_path, on_part=kill, checkpoint_seconds=1000)
    folders = sorted(path.name for path in (tmp_path / "unfinished").iterdir())
    assert folders == ["1", "2", "3"]  # no checkpoint counts the first two
    evaluated = []
    original = Unfinished.add
    with pytest.MonkeyPatch.context() as patch:

        def add(self, first, end, evaluations):
            evaluated.append((first, end))
            original(self, first, end, evaluations)

        patch.setattr(Unfinished, "add", add)
        outcome = run(tmp_path)
    assert evaluated == [*GROUPS[2:], *GROUPS]
    assert_same(outcome, tmp_path, whole)


@pytest.mark.parametrize("damage", ["torn", "of another shape", "empty"])
def test_what_is_damaged_is_evaluated_again(whole, tmp_path, damage):
    def stop(part):
        if part.num_members == 8:
            os.kill(os.getpid(), signal.SIGTERM)

    with pytest.raises(loop.Interrupted):
        run(tmp_path, on_part=stop)
    file = tmp_path / "unfinished/1/0-4.npz"
    if damage == "of another shape":
        np.savez(file, np.zeros(3, np.float32), seconds=1.0)
    else:
        os.truncate(file, file.stat().st_size // 2 if damage == "torn" else 0)
    assert_same(run(tmp_path), tmp_path, whole)


@pytest.mark.parametrize(
    ("seconds", "size"), [(0.024, 1000), (0.025, 240), (0.05, 120), (1.0, 4), (100.0, 4)]
)
def test_the_size_of_a_group_follows_from_the_work_alone(seconds, size):
    """A thousand members take so many seconds each on a core; there are two devices."""
    work = seconds * devices._OPERATIONS_A_SECOND["cpu"]
    generation = Generation(1000, *[lambda: None] * 4, work=lambda data: work, members_at_once=2)
    assert devices.group_size(generation, 2, DATA) == size
