"""Runs of several seeds in processes side by side, one of which is killed, and in shards."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from evojax_suite.cli.main import main
from evojax_suite.runtime import devices

RUN = [
    "ga-distillation", "--population-size", "4", "--width", "4", "--depth", "1", "--num-epochs",
    "2", "--num-networks", "2", "--strong-random-repeats", "0", "--checkpoint-seconds", "0",
]  # fmt: skip
DETERMINISTIC = ("distilled.npz", "metrics.jsonl", "config.json")


def same_files(one: Path, other: Path) -> bool:
    return all((one / file).read_bytes() == (other / file).read_bytes() for file in DETERMINISTIC)


def started(*arguments: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "evojax_suite", *RUN, *arguments]
    environment = {**os.environ, "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0"}
    return subprocess.Popen(
        command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


def children_of(process: subprocess.Popen[str], number: int) -> dict[str, psutil.Process]:
    """By their commands, once there are so many."""
    while True:
        assert process.poll() is None, process.communicate()
        children = {" ".join(one.cmdline()): one for one in psutil.Process(process.pid).children()}
        if sum("--shard" in command for command in children) == number:
            return children
        time.sleep(0.01)


def wait_for(process: subprocess.Popen[str], file: Path) -> None:
    while not file.exists():
        assert process.poll() is None, process.communicate()
        time.sleep(0.01)


@pytest.mark.skipif(devices.cores() < 2, reason="processes have a core each")
def test_one_process_is_killed_and_then_all_are_stopped_and_every_run_is_there_in_the_end(tmp_path):
    long = ["--generations", "40", "--seeds", "0:2"]
    assert main([*RUN, *long, "--runs-dir", str(tmp_path / "alone"), "--quiet"]) == 0
    runs = tmp_path / "runs"
    arguments = [*long, "--seed-processes", "2", "--runs-dir", str(runs)]
    process = started(*arguments)
    children = children_of(process, 2)
    if hasattr(os, "sched_getaffinity"):
        cores = [set(one.cpu_affinity()) for one in children.values()]
        assert not cores[0] & cores[1]
    (second,) = [one for line, one in children.items() if "--shard 1/2" in line]
    wait_for(process, runs / "ga_distillation-digits-seed1/metrics.jsonl")
    second.kill()
    while not [one for one in psutil.Process(process.pid).children() if one.pid > second.pid]:
        time.sleep(0.01)  # until another has taken its place
    process.send_signal(signal.SIGTERM)
    _, said = process.communicate(timeout=10)
    assert process.returncode == 128 + signal.SIGTERM
    assert "process 1 is lost and goes on from what it saved" in said
    assert not [one for one in children.values() if one.is_running()]
    assert not (runs / "ga_distillation-digits-all-seeds").exists()

    shown, said = started(*arguments, "--resume").communicate(timeout=300)
    assert "2 of 2" in said
    assert "all seeds:" in shown
    for seed in range(2):
        name = f"ga_distillation-digits-seed{seed}"
        assert same_files(runs / name, tmp_path / "alone" / name)
    page = json.loads((runs / "ga_distillation-digits-all-seeds/comparison.json").read_text())
    assert page[0]["seeds"] == [0, 1]


def test_shards_are_parts_of_the_seeds_and_the_last_one_writes_the_page(tmp_path, capsys):
    arguments = [*RUN, "--generations", "2", "--seeds", "3:6", "--runs-dir", str(tmp_path)]
    assert main([*arguments, "--shard", "0/2"]) == 0
    assert {path.name[-5:] for path in tmp_path.iterdir()} == {"seed3", "seed5"}
    assert "2 runs of this shard are done; others are not" in capsys.readouterr().err
    assert main([*arguments, "--shard", "1/2", "--quiet"]) == 0
    page = tmp_path / "ga_distillation-digits-all-seeds/comparison.json"
    assert json.loads(page.read_text())[0]["seeds"] == [3, 4, 5]
