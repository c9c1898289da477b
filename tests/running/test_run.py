"""Whole runs through the command line: interruption, resume, artefacts, evaluation, errors."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from evojax_suite.cli.main import main
from evojax_suite.distilled import DistilledDataset

TINY = [
    "--population-size", "6", "--width", "4", "--depth", "1", "--num-epochs", "4",
    "--num-networks", "3", "--strong-random-repeats", "2", "--checkpoint-seconds", "0",
]  # fmt: skip
GENERATIONS = 40
DETERMINISTIC = ("distilled.npz", "metrics.jsonl", "strong_random/metrics.jsonl")


@pytest.fixture(scope="module")
def environment():
    """Runs share all compiled programs: the tests are about states, not about the compiler."""
    return os.environ | {
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "0",
    }


def distil(runs_dir: Path, *more: str) -> list[str]:
    return [
        "ga-distillation", "--runs-dir", str(runs_dir), "--name", "run",
        "--generations", str(GENERATIONS), *TINY, *more,
    ]  # fmt: skip


def count_lines(path: Path) -> int:
    return path.read_bytes().count(b"\n") if path.exists() else 0


def start_and_signal(
    arguments, environment, metrics: Path, lines: int, number: int, after=0, ready=lambda: True
):
    process = subprocess.Popen(
        [sys.executable, "-m", "evojax_suite", *arguments],
        env=environment,
        stderr=subprocess.PIPE,
        text=True,
    )
    deadline = time.monotonic() + 120
    while (count_lines(metrics) < lines or not ready()) and process.poll() is None:
        assert time.monotonic() < deadline, "the run did not come that far"
        time.sleep(0.002)
    time.sleep(after)
    process.send_signal(number)
    _, said = process.communicate(timeout=10)  # seconds, as clusters give
    return process.returncode, said


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> Path:
    """An uninterrupted run."""
    runs = tmp_path_factory.mktemp("uninterrupted")
    assert main(distil(runs)) == 0
    return runs / "run"


def test_a_run_leaves_what_its_user_needs(finished):
    summary = json.loads((finished / "summary.json").read_text())
    assert summary["system"] == "ga_distillation"
    assert summary["dataset"] == "digits"
    assert summary["num_generations"] == GENERATIONS
    assert summary["num_failed"] == 0
    assert summary["options"]["population_size"] == 6
    assert {
        "test_accuracy_mean", "test_accuracy_std", "num_networks", "fitness_best", "seconds",
        "compile_seconds", "members_per_second", "seed", "strong_random_test_accuracy_mean",
        "strong_random_test_accuracy_std",
    } <= summary.keys()  # fmt: skip
    metrics = [json.loads(line) for line in (finished / "metrics.jsonl").read_text().splitlines()]
    assert [line["generation"] for line in metrics] == list(range(1, GENERATIONS + 1))
    assert summary["fitness_best"] == max(line["fitness_best"] for line in metrics)
    for figure in ("fitness.png", "images.png", "evolution.png"):
        assert (finished / "figures" / figure).read_bytes().startswith(b"\x89PNG")
    page = (finished / "report.html").read_text()
    assert page.count('<img src="data:image/png;base64,') == 2
    assert page.count('<div class="charts one">') == 1
    assert "--config" in page
    data = DistilledDataset.load(finished / "distilled.npz")
    assert data.images.shape == (10, 8, 8, 1)
    assert data.labels.tolist() == np.eye(10).tolist()
    assert data.network.width == 4
    assert np.isclose(np.mean(data.test_accuracies), summary["test_accuracy_mean"])


@pytest.mark.parametrize("lines", [1, 20, 38])
def test_killed_and_resumed_it_ends_with_the_same_bytes(finished, environment, tmp_path, lines):
    code, _ = start_and_signal(
        distil(tmp_path), environment, tmp_path / "run/metrics.jsonl", lines, signal.SIGKILL
    )
    assert code == -signal.SIGKILL
    assert not (tmp_path / "run/distilled.npz").exists()
    assert main(distil(tmp_path, "--resume")) == 0
    for name in DETERMINISTIC:
        assert (tmp_path / "run" / name).read_bytes() == (finished / name).read_bytes(), name


def test_killed_in_the_baseline_and_resumed(finished, environment, tmp_path):
    metrics = tmp_path / "run/strong_random/metrics.jsonl"
    code, _ = start_and_signal(distil(tmp_path), environment, metrics, 1, signal.SIGKILL)
    assert code == -signal.SIGKILL
    assert main(distil(tmp_path, "--resume")) == 0
    for name in DETERMINISTIC:
        assert (tmp_path / "run" / name).read_bytes() == (finished / name).read_bytes(), name


@pytest.mark.parametrize(
    ("number", "file", "lines"),
    [
        (signal.SIGINT, "run/metrics.jsonl", 3),
        (signal.SIGTERM, "run/timing.jsonl", 3),
        (signal.SIGTERM, "run/config.json", 1),  # before the first generation
    ],
)
def test_a_signal_saves_and_says_how_to_go_on(finished, environment, tmp_path, number, file, lines):
    # No checkpoint but that of the signal; enough to do that it comes in time.
    arguments = distil(tmp_path, "--checkpoint-seconds", "1000")
    code, said = start_and_signal(arguments, environment, tmp_path / file, lines, number)
    assert code == 128 + number
    assert "Traceback" not in said
    assert said.strip().splitlines()[-1].startswith("evojax-suite: stopped")
    assert "--resume" in said.strip().splitlines()[-1]
    assert main([*arguments, "--resume"]) == 0
    for name in DETERMINISTIC:
        assert (tmp_path / "run" / name).read_bytes() == (finished / name).read_bytes(), name


LARGE = "--population-size", "2000", "--num-epochs", "200", "--width", "128", "--depth", "2"


def test_a_signal_within_a_generation_of_minutes(environment, tmp_path):
    started, unfinished = tmp_path / "run/config.json", tmp_path / "run/unfinished/1"

    def stopped(*more: str, members: int) -> int:
        """The members that are evaluated when a run is stopped which has evaluated more than
        `members`."""
        code, said = start_and_signal(
            distil(tmp_path, *LARGE, *more), environment, started, 1, signal.SIGTERM,
            ready=lambda: len(list(unfinished.glob("*.npz"))) > members,
        )  # fmt: skip
        assert code == 128 + signal.SIGTERM
        assert "evolving: some " in said
        last = said.splitlines()[-1]
        assert last.startswith("evojax-suite: stopped by SIGTERM after step 0 and ")
        assert "--resume" in last
        assert not (tmp_path / "run/metrics.jsonl").read_text()
        return int(re.search(r"and ([\d,]+) members of the next", last)[1].replace(",", ""))

    number = stopped(members=0)
    evaluated = {path: path.read_bytes() for path in unfinished.glob("*.npz")}
    assert stopped("--resume", members=len(evaluated)) > number
    assert {path: path.read_bytes() for path in evaluated} == evaluated


def test_a_signal_while_one_member_takes_minutes(environment, tmp_path):
    started, longer = tmp_path / "run/config.json", ("--num-epochs", "1000000")
    arguments = distil(tmp_path, *LARGE, *longer)
    code, said = start_and_signal(arguments, environment, started, 1, signal.SIGTERM, after=8)
    assert code == 128 + signal.SIGTERM
    last = said.splitlines()[-1]
    assert last.startswith("evojax-suite: stopped by SIGTERM within a step")
    assert "--resume" in last
    assert not (tmp_path / "run/metrics.jsonl").read_text()


def test_all_checkpoints_damaged_end_the_run_and_restart_begins_anew(finished, tmp_path, capsys):
    run = tmp_path / "run"
    shutil.copytree(finished, run)
    for file in (run / "checkpoints").rglob("*"):
        if file.is_file():
            os.truncate(file, file.stat().st_size // 2)
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    assert main(distil(tmp_path, "--resume")) == 2
    said = [line for line in capsys.readouterr().err.splitlines() if " error: " in line]
    assert len(said) == 1
    assert f"checkpoint {GENERATIONS} cannot be read" in said[0]
    assert "--restart" in said[0]
    assert {path: path.read_bytes() for path in run.rglob("*") if path.is_file()} == before
    assert main(distil(tmp_path, "--restart", "--images-per-class", "900")) == 2
    assert not (tmp_path / "run-before-1").exists()  # what cannot begin moves nothing
    assert main(distil(tmp_path, "--restart")) == 0
    assert (run / "metrics.jsonl").read_bytes() == (finished / "metrics.jsonl").read_bytes()
    aside = tmp_path / "run-before-1/metrics.jsonl"
    assert aside.read_bytes() == (finished / "metrics.jsonl").read_bytes()


def test_a_run_that_is_not_there_does_not_go_on(finished, capsys):
    run = ["ga-distillation", "--runs-dir", str(finished.parent), *TINY, "--resume"]
    assert main([*run, "--name", "rum"]) == 2
    said = capsys.readouterr().err.splitlines()
    assert said[-1].endswith("without --resume it begins (did you mean run?)")
    assert not (finished.parent / "rum").exists()
    assert main([*run, "--name", "run", "--restart"]) == 2
    assert "one of resume and restart" in capsys.readouterr().err


def test_more_generations_go_on_where_fewer_ended(finished, tmp_path):
    assert main([*distil(tmp_path), "--generations", "21"]) == 0
    assert main(distil(tmp_path, "--resume")) == 0
    for name in DETERMINISTIC:
        assert (tmp_path / "run" / name).read_bytes() == (finished / name).read_bytes(), name


def test_evaluate_reproduces_the_stored_accuracy(finished, tmp_path, capsys):
    output = tmp_path / "accuracies.json"
    code = main(
        ["evaluate", str(finished / "distilled.npz"), "--network", "ConvNet", "MLP",
         "--num-networks", "12", "--output", str(output)]
    )  # fmt: skip
    assert code == 0
    assert "ConvNet:" in capsys.readouterr().out
    accuracies = json.loads(output.read_text())["test_accuracies"]
    stored = np.array(DistilledDataset.load(finished / "distilled.npz").test_accuracies)
    assert {name: len(values) for name, values in accuracies.items()} == {"ConvNet": 12, "MLP": 12}
    spread = max(stored.std(), np.std(accuracies["ConvNet"]))
    assert abs(np.mean(accuracies["ConvNet"]) - stored.mean()) < 3 * spread


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--population-size", "1"], "--population-size must be >= 2, got 1"),
        (["--survival-ratio", "1"], "--survival-ratio must be in (0, 1), got 1.0"),
        (["--holdout-ratio", "1.5"], "--holdout-ratio must be in [0, 1), got 1.5"),
        (["--patience", "3"], "--patience needs a --holdout-ratio > 0"),
        (["--generations", "0"], "--num-generations must be >= 1, got 0"),
        (["--learning-rate", "0"], "--learning-rate must be > 0, got 0.0"),
        (["--members-in-flight", "0"], "--members-in-flight must be >= 1, got 0"),
        (["--seed", "x"], "--seed takes no value like 'x'"),
        (["--network", "ResNet99"], "--network must be one of ConvNet, MLP, "),
        (["--poplation-size", "3"], "--population-size"),
        (["--strategy", "SNEZ"], "did you mean SNES?"),
        (
            ["--strategy", "SNES", "--survival-ratio", "0.4"],
            "--survival-ratio belongs to LaplaceGA",
        ),
        (["--strategy", "PSO", "--strategy-std", "1"], "PSO has no --strategy-std, got 1.0"),
        (["--strategy", "Open_ES", "--population-size", "7"], "Population size must be even"),
        (["--depth", "9"], "does not fit images of (8, 8, 1)"),
        (["--network", "VGG11"], "VGG11 does not fit images of (8, 8, 1)"),
        (["--images-per-class", "900"], "has only"),
        (["--fitness-subset-size", "9999"], "--fitness-subset-size must be <= 360"),
        (["--dataset", "nope"], "unknown dataset 'nope'"),
        (["--dataset", "/nowhere/at/all"], "/nowhere/at/all"),
    ],
)
def test_wrong_input_is_one_line_and_exit_code_2(arguments, says, tmp_path, capsys):
    code = main(["ga-distillation", "--runs-dir", str(tmp_path / "runs"), *arguments])
    said = capsys.readouterr().err.strip().splitlines()
    assert code == 2
    assert len(said) == 1
    assert says in said[0]
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize(
    ("system", "more", "says"),
    [
        ("ga-distillation", ["--generations", "2", *TINY], "test accuracy (%)"),
        ("cest", ["--num-epochs", "2", "--width", "4", "--depth", "1"], "test accuracy (%)"),
        (
            "coreset",
            ["--method", "random", "--num-samples", "1", "--num-networks", "1", "--width", "4"],
            "the test accuracy of each set",
        ),
    ],
)
def test_a_result_that_is_none_is_an_error(system, more, says, tmp_path, capsys):
    where = ["--runs-dir", str(tmp_path), "--name", "run", "--learning-rate", "1e30"]
    assert main([system, *where, *more]) == 2
    said = capsys.readouterr().err.splitlines()
    assert f"nothing came of the run in {tmp_path}/run: {says} is not finite" in said[-1]
    summary = json.loads((tmp_path / "run/summary.json").read_text())
    if summary.get("num_failed"):
        assert f"failed evaluations, NaN or infinite: {summary['num_failed']:,}" in said
    assert not (tmp_path / "run/report.html").exists()


def test_a_population_beyond_the_memory_is_refused_before_it_is_made(tmp_path, capsys):
    arguments = ["--population-size", "1000000000", "--runs-dir", str(tmp_path), "--name", "run"]
    assert main(["ga-distillation", *arguments]) == 2
    said = capsys.readouterr().err
    assert re.search(r"population needs [\d,.]+ GiB and [\d,.]+ GiB are free", said)
    assert not [*tmp_path.iterdir()]


def test_a_taken_directory_is_refused(finished, capsys):
    run = ["ga-distillation", "--runs-dir", str(finished.parent), "--name", "run"]
    assert main([*run, "--generations", str(GENERATIONS), *TINY]) == 2
    assert "--resume goes on with it" in capsys.readouterr().err
    assert main([*run, "--generations", str(GENERATIONS), *TINY, "--resume", "--seed", "5"]) == 2
    assert "seed was 0 and is 5" in capsys.readouterr().err
    assert main([*run, "--generations", "10", *TINY, "--resume"]) == 2
    assert "--num-generations was 40 and is 10" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("content", "says"), [(None, "no such file"), (b"PK\x03\x04 torn", "not a distilled dataset")]
)
def test_evaluate_refuses_what_is_no_distilled_dataset(content, says, tmp_path, capsys):
    path = tmp_path / "distilled.npz"
    if content is not None:
        path.write_bytes(content)
    assert main(["evaluate", str(path)]) == 2
    said = capsys.readouterr().err.strip().splitlines()
    assert len(said) == 1
    assert says in said[0]
