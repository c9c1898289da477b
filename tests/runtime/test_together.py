"""Runs of several seeds in one program: each is what it is alone."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import struct

from evojax_suite.cli import main as cli
from evojax_suite.cli.main import main
from evojax_suite.running import runner
from evojax_suite.running.options import RunOptions
from evojax_suite.running.system import Job, Phase, Search, System
from evojax_suite.runtime import loop, program
from evojax_suite.types import Algorithm, Dataset, Split

KEYS = jax.random.split(jax.random.key(0), 4)
DATA = jnp.arange(1.0, 4)
STEPS = 30
ROOT = Path(__file__).parents[2]
TINY = [
    "ga-distillation", "--generations", "3", "--population-size", "4", "--network", "MLP",
    "--width", "8", "--num-epochs", "2", "--num-networks", "1", "--strong-random-repeats", "1",
]  # fmt: skip


@struct.dataclass
class State:
    best: jax.Array
    found: jax.Array
    generation: jax.Array


class Metrics(NamedTuple):
    generation: jax.Array
    best: jax.Array
    num_failed: jax.Array


def waiting(patience: int = 6) -> Algorithm:
    """Draws numbers until none was larger for `patience` steps: keys end at different steps."""

    def init(key, params, data):
        return State(jax.random.uniform(key, data.shape), jnp.int32(0), jnp.int32(0))

    def step(key, state, params, data):
        new = params * data * jax.random.uniform(key, data.shape)
        better, generation = new.max() > state.best.max(), state.generation + 1
        state = State(
            jnp.where(better, new, state.best),
            jnp.where(better, generation, state.found),
            generation,
        )
        return state, Metrics(generation, state.best.max(), better.astype(jnp.int32))

    return Algorithm(
        init,
        step,
        result=lambda state, params, data: state.best,
        finished=lambda state: state.generation - state.found >= patience,
    )


def alone(folder: Path, number: int, num_steps: int = STEPS, **settings) -> loop.LoopResult:
    return loop.run(
        waiting(), KEYS[number], jnp.float32(2), DATA, num_steps, folder / str(number), **settings
    )


def all_of(folder: Path, num_steps: int = STEPS, **settings) -> list[loop.LoopResult]:
    directories = [folder / str(number) for number in range(len(KEYS))]
    return loop.run_together(
        waiting(), KEYS, jnp.float32(2), DATA, num_steps, directories, **settings
    )


def assert_as_alone(found: list[loop.LoopResult], folder: Path, other: Path, **settings) -> None:
    assert len(found) == len(KEYS)
    for number, outcome in enumerate(found):
        expected = alone(other, number, **settings)
        jax.tree.map(np.testing.assert_array_equal, outcome.state, expected.state)
        assert outcome.num_failed == expected.num_failed > 0
        assert outcome.seconds > 0
        one, two = (path / f"{number}/metrics.jsonl" for path in (folder, other))
        assert one.read_bytes() == two.read_bytes()


@pytest.mark.parametrize("steps_per_call", [1, 4])
def test_each_is_what_it_is_alone(steps_per_call, tmp_path):
    """Four keys that end at different steps, fewer than the most."""
    seen = []
    folders = tmp_path / "all", tmp_path / "alone"
    found = all_of(folders[0], steps_per_call=steps_per_call, on_report=seen.append)
    ends = [int(outcome.state.generation) for outcome in found]
    assert len(set(ends)) > 1
    assert max(ends) < STEPS
    for number, end in enumerate(ends):
        steps = [reports[number].step for reports in seen if number in reports]
        assert steps == [*range(steps_per_call, end + 1, steps_per_call)]
    assert_as_alone(found, *folders, steps_per_call=steps_per_call)
    again = all_of(folders[0], steps_per_call=steps_per_call)  # nothing is left to do
    assert_as_alone(again, *folders, steps_per_call=steps_per_call)


@pytest.mark.parametrize("num_devices", [2, 4])
def test_divided_over_devices_each_is_what_it_is_alone(num_devices, tmp_path):
    """Two runs on each of two devices; or one on each of four, which is then interrupted."""
    script = (
        "from pathlib import Path; from tests.runtime.test_together import all_of; "
        f"all_of(Path({str(tmp_path / 'all')!r}), {STEPS if num_devices == 2 else 3}, "
        f"num_devices={num_devices}, steps_per_call=3)"
    )
    environment = os.environ | {"JAX_NUM_CPU_DEVICES": "4"}
    subprocess.run([sys.executable, "-c", script], env=environment, cwd=ROOT, check=True)
    found = all_of(tmp_path / "all", steps_per_call=3)
    assert_as_alone(found, tmp_path / "all", tmp_path / "alone", steps_per_call=3)


def test_those_that_are_behind_catch_up(tmp_path):
    """Runs that were begun alone, each ended somewhere else, one by a checkpoint in the middle."""
    for number, steps in ((0, 2), (1, 5), (3, 1)):
        alone(tmp_path / "all", number, num_steps=steps)
    steps = []
    found = all_of(
        tmp_path / "all",
        steps_per_call=3,
        on_report=lambda reports: steps.append({n: one.step for n, one in reports.items()}),
    )
    assert steps[:4] == [{2: 1}, {2: 2, 3: 2}, {0: 5, 2: 5, 3: 5}, {0: 8, 1: 8, 2: 8, 3: 8}]
    for number in range(4):
        lines = (tmp_path / f"all/{number}/metrics.jsonl").read_text().splitlines()
        generations = [json.loads(line)["generation"] for line in lines]
        assert generations == [*range(1, len(lines) + 1)]
    chunked = [alone(tmp_path / "one", number, steps_per_call=3) for number in range(4)]
    longest = max(range(4), key=lambda number: int(chunked[number].state.generation))
    jax.tree.map(
        np.testing.assert_array_equal, found[longest].state.best, chunked[longest].state.best
    )


def test_a_signal_saves_all(tmp_path):
    def stop(reports):
        if reports[0].step == 3:
            os.kill(os.getpid(), signal.SIGTERM)

    with pytest.raises(loop.Interrupted, match="SIGTERM after step 3"):
        all_of(tmp_path / "all", on_report=stop)
    for number in range(4):
        assert (tmp_path / f"all/{number}/checkpoints/3").is_dir()
    alone(tmp_path / "all", 2)  # goes on without the others
    assert_as_alone(all_of(tmp_path / "all"), tmp_path / "all", tmp_path / "alone")


def test_halves_follow_one_another_where_memory_is_short(tmp_path, monkeypatch):
    asked = []

    def free() -> float:
        asked.append(None)
        return -1 if len(asked) == 1 else 1e9

    monkeypatch.setattr(program, "free_bytes", free)
    seen = []
    found = all_of(tmp_path / "all", on_report=lambda reports: seen.append([*reports]))
    assert len(asked) == 5  # all, then each half for its states and for a step
    assert seen[0] == [0, 1]
    assert [2, 3] in seen
    assert_as_alone(found, tmp_path / "all", tmp_path / "alone")
    monkeypatch.setattr(program, "free_bytes", lambda: -1)  # not even for a run alone
    with pytest.raises(program.ProgramTooLarge, match="the population needs"):
        all_of(tmp_path / "small")


def test_a_device_that_is_full_halves_what_it_does(tmp_path, monkeypatch):
    """Out of memory in the middle: the halves go on from what is saved."""
    tried, drive = [], loop._drive

    def full(*arguments):
        tried.append(len(arguments[1]))
        if len(tried) == 1:
            drive(*arguments[:2], 3, *arguments[3:])
            raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory")
        if len(tried) == 4:
            raise jax.errors.JaxRuntimeError("INTERNAL: another fault")
        return drive(*arguments)

    monkeypatch.setattr(loop, "_drive", full)
    found = all_of(tmp_path / "all")
    assert tried == [4, 2, 2]
    monkeypatch.undo()
    assert_as_alone(found, tmp_path / "all", tmp_path / "alone")
    monkeypatch.setattr(loop, "_drive", full)
    with pytest.raises(jax.errors.JaxRuntimeError, match="another fault"):
        all_of(tmp_path / "all")


@dataclass(frozen=True)
class Options(RunOptions):
    bad: int | None = None
    other: int | None = None


@dataclass(frozen=True)
class Summary:
    numbers: dict


def prepare(options: Options, dataset: Dataset, directory: Path) -> Job[Options]:
    assert len(dataset.test) == 0
    if options.seed == options.bad:
        raise ValueError("a bad seed")
    return Job(options, dataset, directory)


def search(job: Job[Options]) -> Search:
    """Two loops for all seeds, but the first of them not for seed 2; between them one for each."""
    key, data = jax.random.key(job.options.seed), DATA + (job.options.seed == job.options.other)
    common = (waiting(), key, jnp.float32(2), data)
    if job.options.seed != 2:
        yield Phase("first", *common, 4, "first", same_for_seeds=True)
    yield Phase("own", *common, 2, "own")
    found = yield Phase("last", *common, 6, "last", same_for_seeds=True)
    return found.state.best


def finish(job: Job[Options], best: jax.Array, test_split: Split) -> Summary:
    assert len(test_split) == 359
    return Summary({"best": best})


SYSTEM = System("waiting", Options, prepare, search, finish, lambda job, summary: None)


def run_all(folder: Path, seeds: str, **more) -> list[Path]:
    return runner.run(SYSTEM, *Options(runs_dir=folder, seeds=seeds, **more).each())


def assert_runs_alike(one: Path, other: Path) -> None:
    assert (one / "summary.json").read_bytes() == (other / "summary.json").read_bytes()
    for file in one.rglob("metrics.jsonl"):
        assert file.read_bytes() == (other / file.relative_to(one)).read_bytes()


def test_searches_of_several_seeds_go_on_side_by_side(tmp_path, capsys):
    folders = run_all(tmp_path, "1:4")
    assert folders == [tmp_path / f"waiting-digits-seed{seed}" for seed in (1, 2, 3)]
    said = capsys.readouterr().err
    assert "first, 2 seeds 4/4" in said
    assert "last, 3 seeds 6/6" in said
    for seed, folder in zip((1, 2, 3), folders, strict=True):
        (alone,) = runner.run(SYSTEM, Options(runs_dir=tmp_path / "alone", seed=seed))
        assert_runs_alike(alone, folder)


def test_runs_with_other_data_go_on_by_themselves(tmp_path, capsys):
    folders = run_all(tmp_path, "3:6", other=4)
    said = capsys.readouterr().err
    assert "last, 2 seeds 6/6" in said
    assert "last, 1 seeds" not in said
    (alone,) = runner.run(SYSTEM, Options(runs_dir=tmp_path / "alone", seed=4, other=4))
    assert_runs_alike(alone, folders[1])


def test_what_is_wrong_with_one_ends_all(tmp_path):
    with pytest.raises(ValueError, match="a bad seed"):
        run_all(tmp_path, "1:4", bad=2)


def test_seeds_in_flight_on_the_command_line(tmp_path, capsys):
    """Two of three seeds at once, the second as it is alone; loggers write where they belong."""
    command = [*TINY, "--runs-dir", str(tmp_path), "--quiet"]
    several = ["--seeds", "0:3", "--seeds-in-flight", "2", "--loggers", "tensorboard"]
    assert main([*command, *several]) == 0
    assert main([*command, "--seed", "1", "--name", "alone"]) == 0
    assert capsys.readouterr().err == ""
    name = "ga_distillation-digits-seed"
    assert all([*(tmp_path / f"{name}{seed}/tensorboard").iterdir()] for seed in range(3))
    assert (tmp_path / "ga_distillation-digits-all-seeds/report.html").exists()
    one, other = tmp_path / f"{name}1", tmp_path / "alone"
    assert (one / "config.json").read_bytes() == (other / "config.json").read_bytes()
    for part, count in ((".", 3), ("strong_random", 1)):
        found, expected = (
            [json.loads(line)["fitness_mean"] for line in (run / part / "metrics.jsonl").open()]
            for run in (one, other)
        )
        assert len(found) == len(expected) == count
        np.testing.assert_allclose(found, expected, atol=0.02)


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        (["--seeds-in-flight", "2"], "--seeds-in-flight needs --seeds, got 2"),
        (["--seeds", "0:2", "--seeds-in-flight", "0"], "must be >= 1 or auto, got 0"),
    ],
)
def test_seeds_in_flight_that_cannot_be(flags, says, tmp_path, capsys):
    assert main([*TINY, *flags, "--runs-dir", str(tmp_path)]) == 2
    assert says in capsys.readouterr().err
    assert not [*tmp_path.iterdir()]


def test_the_second_run_of_a_program_compiles_nothing():
    hits = []
    listen = lambda event, **_: hits.append(event)  # noqa: E731
    before = jax.config.jax_compilation_cache_dir
    jax.config.update("jax_compilation_cache_dir", None)
    jax.monitoring.register_event_listener(listen)
    try:
        with cli._compiled_once():
            folder = Path(jax.config.jax_compilation_cache_dir)
            for _ in range(2):
                assert jax.jit(lambda x: x * 3 + 1)(jnp.arange(3)).tolist() == [1, 4, 7]
                jax.clear_caches()
        assert "/jax/compilation_cache/cache_hits" in hits
        assert jax.config.jax_compilation_cache_dir is None
        assert not folder.exists()
    finally:
        jax.monitoring.unregister_event_listener(listen)
        jax.config.update("jax_compilation_cache_dir", before)
        from jax.experimental.compilation_cache import compilation_cache

        compilation_cache.reset_cache()
