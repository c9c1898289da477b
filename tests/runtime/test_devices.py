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

import jax
import numpy as np
import pytest

from evojax_suite.cli.main import main
from evojax_suite.running.options import Placement, RunOptions
from evojax_suite.runtime.resources import cores
from evojax_suite.runtime.results import read_lines


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
        ("kernel_regression", 4),
        ("predator_prey", 4),
        ("strong_random", 4),
        ("accuracies_on", 4),
    ],
)
def test_on_several_devices_every_member_is_as_on_one(over_devices, name, number):
    here = {key: leaf for key, leaf in over_devices.items() if key.startswith(f"{name}/{number}/")}
    assert here
    for key, leaf in here.items():
        expected = over_devices[key.replace(f"/{number}/", "/1/", 1)]
        assert leaf.shape == expected.shape
        np.testing.assert_allclose(leaf, expected, rtol=1e-4, atol=1e-5, err_msg=key)


@pytest.mark.parametrize("number", [1, 2, 4])
def test_in_groups_every_member_is_as_in_one(over_devices, number):
    here = {key: leaf for key, leaf in over_devices.items() if f"in_groups/{number}/" in key}
    assert here
    for key, leaf in here.items():
        expected = over_devices[key.replace(f"/{number}/", "/whole/", 1)]
        np.testing.assert_allclose(leaf, expected, rtol=1e-4, atol=1e-5, err_msg=key)


def test_a_run_that_goes_on_over_other_devices_says_so_and_compiles_apart(over_devices):
    # Of six members four devices have two each, so that one of them has none.
    assert over_devices["devices"].tolist() == [2, 2, 2, 3]
    assert over_devices["notes"].tolist() == [
        "/run goes on from step 3 over another number of devices, 3 in place of 2: what follows "
        "may differ by rounding"
    ]
    compiled = over_devices["compile_seconds"]
    assert (compiled[[0, 2, 3]] > 0).all()  # the first after each start
    assert compiled[1] == 0


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        ({}, None),
        ({"groups": "0::/a/b\n", "sets/a/cpu.max": "100000 100000\n"}, 1),
        ({"groups": "0::/\n", "sets/cpu.max": "max 100000\n"}, None),
        ({"groups": "0::/\n", "sets/cpu.max": "50000 100000\n"}, 1),
        (
            {
                "groups": "3:memory:/a\n2:cpu,cpuacct:/a\n",
                "sets/cpu/cpu.cfs_quota_us": "190000\n",
                "sets/cpu/cpu.cfs_period_us": "100000\n",
            },
            1,
        ),
        (
            {
                "groups": "2:cpu:/\n",
                "sets/cpu/cpu.cfs_quota_us": "-1\n",
                "sets/cpu/cpu.cfs_period_us": "100000\n",
            },
            None,
        ),
    ],
    ids=["no groups", "of a parent", "no limit", "half", "version 1", "no limit, version 1"],
)
def test_the_cores_of_a_container_are_what_its_quota_leaves(files, expected, tmp_path):
    for name, content in files.items():
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(content)
    allowed = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    found = cores(tmp_path / "groups", tmp_path / "sets")
    assert 1 <= found <= (expected or allowed)
    assert expected or found == cores(tmp_path / "none", tmp_path / "none")


@pytest.mark.parametrize(
    ("asked", "said", "expected"),
    [("auto", None, cores()), ("all", "3", 3), ("auto", "1", 1), (2, "1", 2)],
)
def test_a_cpu_is_as_many_devices_as_it_has_cores_or_as_is_said(asked, said, expected):
    environment = {**os.environ, "XLA_FLAGS": "", "JAX_NUM_CPU_DEVICES": said or ""}
    if said is None:
        del environment["JAX_NUM_CPU_DEVICES"]
    script = f"from evojax_suite.runtime import devices; print(devices.take({asked!r}))"
    found = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True)
    assert int(found.stdout) == expected


def test_seeds_share_a_program_on_a_cpu_where_no_devices_were_asked_for(monkeypatch):
    monkeypatch.setattr("evojax_suite.runtime.devices.take", lambda devices: 3)
    assert jax.default_backend() != "cpu" or (
        RunOptions(seeds="0:4", seeds_in_flight=2).resolved_seeds_in_flight() == 2
    )
    assert RunOptions(seeds="0:4").resolved_seeds_in_flight() == 1


RUN = [
    "ga-distillation", "--population-size", "6", "--width", "4", "--depth", "1", "--num-epochs",
    "2", "--num-networks", "2", "--strong-random-repeats", "0", "--checkpoint-seconds", "0",
    "--num-generations", "20", "--name", "run",
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
    """The processes of one run, which may make as many devices as by default."""
    environment = {**os.environ}
    environment.pop("JAX_NUM_CPU_DEVICES", None)
    coordinator = f"localhost:{free_port()}"
    return [
        subprocess.Popen(
            [
                sys.executable, "-m", "evojax_suite", *arguments, "--runs-dir", str(runs_dir),
                "--distributed", "--coordinator", coordinator,
                "--num-processes", str(number), "--process-id", str(index),
            ],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=environment,
        )
        for index in range(number)
    ]  # fmt: skip


def ended(processes, seconds) -> list[str]:
    """What each said, once all have ended."""
    try:
        return ["".join(process.communicate(timeout=seconds)) for process in processes]
    finally:
        for process in processes:
            process.kill()


def await_steps(processes, metrics: Path):
    """Return after two steps of a run that goes on, one of which is in a whole checkpoint."""
    deadline = time.monotonic() + 240
    saved = metrics.parent / "checkpoints"
    while (
        not any(step.name.isdecimal() for step in saved.glob("*"))  # named so once it is whole
        or metrics.read_bytes().count(b"\n") < 2
    ):
        assert all(process.poll() is None for process in processes)
        assert time.monotonic() < deadline
        time.sleep(0.1)


def assert_same_metrics(found: Path, expected: Path, steps: int | None = None):
    for here, there in zip(read_lines(found), read_lines(expected)[:steps], strict=True):
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
    processes = start([*RUN, "--num-generations", "6"], 4, tmp_path)
    said = ended(processes, 240)
    assert [process.returncode for process in processes] == [0] * 4, said
    assert_same_metrics(tmp_path / "run/metrics.jsonl", alone / "run/metrics.jsonl", 6)
    assert all(line["devices"] == 4 for line in read_lines(tmp_path / "run/timing.jsonl"))
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
def test_when_a_process_is_killed_the_others_end_and_the_run_goes_on(alone, lost, tmp_path, capsys):
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
    assert "1 in place of 2: what follows may differ by rounding" in capsys.readouterr().err
    assert_same_metrics(metrics, alone / "run/metrics.jsonl")


def test_a_signal_to_one_process_stops_all_and_saves(tmp_path):
    processes = start([*RUN, "--devices", "2"], 2, tmp_path)
    metrics = tmp_path / "run/metrics.jsonl"
    await_steps(processes, metrics)
    assert read_lines(tmp_path / "run/timing.jsonl")[0]["devices"] == 4
    processes[1].send_signal(signal.SIGTERM)
    said = ended(processes, 60)
    assert [process.returncode for process in processes] == [128 + signal.SIGTERM] * 2, said
    saved = int(re.search(r"after step (\d+)", said[0]).group(1))
    assert (tmp_path / f"run/checkpoints/{saved}").is_dir()
    assert len(read_lines(metrics)) == saved


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--devices", "0"], "devices must be >= 1 or one of auto, all, got 0"),
        (["--devices", "many"], "devices"),
        (["--process-id", "1"], "--process-id needs --distributed, got 1"),
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
    from evojax_suite.systems.ga_distillation.experiment import Options

    placed = Options(devices=2, distributed=True, coordinator="a:1", num_processes=2, process_id=0)
    assert placed.settings() == Options().settings()
    assert isinstance(placed, Placement)
