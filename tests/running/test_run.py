"""Whole runs through the command line: interruption, resume, artefacts, evaluation, errors."""

from __future__ import annotations

import json
import os
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


def start_and_signal(arguments, environment, metrics: Path, lines: int, number: int):
    process = subprocess.Popen(
        [sys.executable, "-m", "evojax_suite", *arguments],
        env=environment,
        stderr=subprocess.PIPE,
        text=True,
    )
    deadline = time.monotonic() + 120
    while count_lines(metrics) < lines and process.poll() is None:
        assert time.monotonic() < deadline, "the run did not come that far"
        time.sleep(0.002)
    process.send_signal(number)
    grace = 10 if lines > 1 else 120  # seconds, as clusters give; the first step compiles
    _, said = process.communicate(timeout=grace)
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
        (["--population-size", "1"], "population_size must be >= 2, got 1"),
        (["--survival-ratio", "1"], "survival_ratio must be in (0, 1), got 1.0"),
        (["--holdout-ratio", "1.5"], "holdout_ratio must be in [0, 1), got 1.5"),
        (["--patience", "3"], "patience needs a holdout_ratio > 0"),
        (["--generations", "0"], "num_generations must be >= 1, got 0"),
        (["--learning-rate", "0"], "learning_rate must be > 0, got 0.0"),
        (["--members-in-flight", "0"], "members_in_flight must be >= 1, got 0"),
        (["--seed", "x"], "invalid literal for int"),
        (["--network", "ResNet99"], "network must be one of ConvNet, MLP, "),
        (["--poplation-size", "3"], "--population-size"),
        (["--strategy", "SNEZ"], "did you mean SNES?"),
        (["--strategy", "SNES", "--survival-ratio", "0.4"], "survival_ratio belongs to LaplaceGA"),
        (["--strategy", "PSO", "--strategy-std", "1"], "PSO has no strategy_std, got 1.0"),
        (["--strategy", "Open_ES", "--population-size", "7"], "Population size must be even"),
        (["--depth", "9"], "does not fit images of (8, 8, 1)"),
        (["--network", "VGG11"], "VGG11 does not fit images of (8, 8, 1)"),
        (["--images-per-class", "900"], "has only"),
        (["--fitness-subset-size", "9999"], "fitness_subset_size must be <= 360"),
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


def test_a_taken_directory_is_refused(finished, capsys):
    run = ["ga-distillation", "--runs-dir", str(finished.parent), "--name", "run"]
    assert main([*run, "--generations", str(GENERATIONS), *TINY]) == 2
    assert "--resume goes on with it" in capsys.readouterr().err
    assert main([*run, "--generations", str(GENERATIONS), *TINY, "--resume", "--seed", "5"]) == 2
    assert "seed was 0 and is 5" in capsys.readouterr().err
    assert main([*run, "--generations", "10", *TINY, "--resume"]) == 2
    assert "num_generations was 40 and is 10" in capsys.readouterr().err


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
