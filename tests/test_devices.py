"""Populations over several devices and processes: the same results, and what becomes of a run."""

from __future__ import annotations

import os
import re
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from evojax_suite.cli import main
from evojax_suite.commands.options import Placement
from evojax_suite.results import read_lines


@pytest.fixture(scope="module")
def over_devices(tmp_path_factory):
    path = tmp_path_factory.mktemp("devices") / "found.npz"
    script = Path(__file__).with_name("over_devices.py")
    subprocess.run([sys.executable, str(script), str(path)], check=True, timeout=300)
    return dict(np.load(path))


@pytest.mark.parametrize(
    ("name", "number"),
    [
        ("ga_distillation", 2),
        ("ga_distillation", 4),
        ("ga_distillation", 8),
        ("predator_prey", 4),
        ("strong_random", 4),
        ("accuracies_on_test", 4),
    ],
)
def test_on_several_devices_every_member_is_as_on_one(over_devices, name, number):
    here = {key: leaf for key, leaf in over_devices.items() if key.startswith(f"{name}/{number}/")}
    assert here
    for key, leaf in here.items():
        expected = over_devices[key.replace(f"/{number}/", "/1/", 1)]
        assert leaf.shape == expected.shape
        np.testing.assert_allclose(leaf, expected, rtol=1e-4, atol=1e-5, err_msg=key)


RUN = [
    "ga-distillation", "--population-size", "6", "--width", "4", "--depth", "1", "--num-epochs",
    "2", "--num-networks", "2", "--strong-random-repeats", "0", "--checkpoint-seconds", "0",
    "--num-generations", "40", "--name", "run",
]  # fmt: skip
SEARCH = [
    "de-nas", "--num-images", "200", "--population-size", "4", "--num-children", "3",
    "--num-generations", "1", "--num-best", "2", "--min-length", "3", "--max-length", "5",
    "--kernels", "1", "3", "--min-first-filters", "2", "--max-first-filters", "3",
    "--max-filters", "4", "--max-features", "256", "--num-epochs", "1", "--final-epochs", "0",
    "--checkpoint-seconds", "0", "--name", "run",
]  # fmt: skip


def free_port() -> int:
    with socket.socket() as open_socket:
        open_socket.bind(("localhost", 0))
        return open_socket.getsockname()[1]


def start(arguments, number, runs_dir):
    """The processes of one run."""
    coordinator = f"localhost:{free_port()}"
    return [
        subprocess.Popen(
            [
                sys.executable, "-m", "evojax_suite", *arguments, "--runs-dir", str(runs_dir),
                "--distributed", "--coordinator", coordinator,
                "--num-processes", str(number), "--process-id", str(index),
            ],
            stderr=subprocess.PIPE,
            text=True,
        )
        for index in range(number)
    ]  # fmt: skip


def ended(processes, seconds) -> list[str]:
    """What each said, once all have ended."""
    try:
        return [process.communicate(timeout=seconds)[1] for process in processes]
    finally:
        for process in processes:
            process.kill()


def await_steps(processes, metrics: Path):
    """Return after two steps of a run that goes on."""
    deadline = time.monotonic() + 240
    while not metrics.exists() or metrics.read_bytes().count(b"\n") < 2:
        assert all(process.poll() is None for process in processes)
        assert time.monotonic() < deadline
        time.sleep(0.1)


def assert_same_metrics(found: Path, expected: Path):
    for here, there in zip(read_lines(found), read_lines(expected), strict=True):
        assert here.keys() == there.keys()
        for name, value in there.items():
            if value is not None:
                value = pytest.approx(value, rel=1e-4, abs=1e-5)
            assert here[name] == value, name


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    runs = tmp_path_factory.mktemp("alone")
    assert main([*RUN, "--runs-dir", str(runs)]) == 0
    assert main([*SEARCH, "--name", "search", "--runs-dir", str(runs)]) == 0
    return runs


def test_four_processes_find_what_one_does(alone, tmp_path):
    processes = start(RUN, 4, tmp_path)
    said = ended(processes, 240)
    assert [process.returncode for process in processes] == [0] * 4, said
    assert_same_metrics(tmp_path / "run/metrics.jsonl", alone / "run/metrics.jsonl")
    assert "report:" in said[0]
    assert all("report:" not in own for own in said[1:])


def test_several_processes_search_as_one_does(alone, tmp_path):
    processes = start(SEARCH, 2, tmp_path)
    said = ended(processes, 240)
    assert [process.returncode for process in processes] == [0, 0], said
    assert_same_metrics(tmp_path / "run/metrics.jsonl", alone / "search/metrics.jsonl")
    histories = [
        (runs / "history.json").read_text() for runs in (tmp_path / "run", alone / "search")
    ]
    assert histories[0] == histories[1]


@pytest.mark.parametrize("lost", [0, 1], ids=["the first", "another"])
def test_when_a_process_is_killed_the_others_end_and_the_run_goes_on(alone, lost, tmp_path):
    processes = start(RUN, 2, tmp_path)
    metrics = tmp_path / "run/metrics.jsonl"
    await_steps(processes, metrics)
    processes[lost].kill()
    killed = time.monotonic()
    said = ended([processes[1 - lost]], 60)[0]
    assert time.monotonic() - killed < 60
    assert processes[1 - lost].returncode in (75, -signal.SIGABRT)  # ours, or JAX's own end
    assert "--resume" in said
    processes[lost].wait()
    arguments = [*RUN, "--runs-dir", str(tmp_path), "--resume"]  # alone
    assert main(arguments) == 0
    assert_same_metrics(metrics, alone / "run/metrics.jsonl")


def test_a_signal_to_one_process_stops_all_and_saves(tmp_path):
    processes = start(RUN, 2, tmp_path)
    metrics = tmp_path / "run/metrics.jsonl"
    await_steps(processes, metrics)
    processes[1].send_signal(signal.SIGTERM)
    said = ended(processes, 60)
    assert [process.returncode for process in processes] == [128 + signal.SIGTERM] * 2, said
    saved = int(re.search(r"after step (\d+)", said[0]).group(1))
    assert (tmp_path / f"run/checkpoints/{saved}").is_dir()
    assert len(read_lines(metrics)) == saved


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--devices", "0"], "devices must be >= 1, or all, got 0"),
        (["--devices", "many"], "devices"),
        (["--process-id", "1"], "process_id needs --distributed, got 1"),
    ],
)
def test_wrong_placement_is_one_line_and_exit_code_2(arguments, says, tmp_path):
    process = subprocess.run(
        [sys.executable, "-m", "evojax_suite", *RUN, "--runs-dir", str(tmp_path), *arguments],
        capture_output=True, text=True, env={**os.environ, "XLA_FLAGS": ""},
    )  # fmt: skip
    assert process.returncode == 2
    assert says in process.stderr
    assert len(process.stderr.strip().splitlines()) == 1
    assert not any(tmp_path.iterdir())


def test_placement_is_no_setting_of_a_run():
    """So that a run goes on with another number of devices and processes."""
    from evojax_suite.commands.ga_distillation import Options

    placed = Options(devices=2, distributed=True, coordinator="a:1", num_processes=2, process_id=0)
    assert placed.settings() == Options().settings()
    assert isinstance(placed, Placement)
