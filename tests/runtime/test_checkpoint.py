"""Checkpoints: what is damaged is found and set aside, and a full disk loses nothing."""

from __future__ import annotations

import os
import subprocess

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from evojax_suite.cli.main import main
from evojax_suite.runtime.checkpoint import Checkpoints, DamagedCheckpoint
from evojax_suite.runtime.results import read_lines

# Where storage fails, Orbax leaves tasks of its own behind.
pytestmark = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")


def state_of(seed):
    return {"values": jax.random.normal(jax.random.key(seed), (300, 20)), "step": jnp.int32(seed)}


def assert_is(state, seed):
    jax.tree.map(np.testing.assert_array_equal, state, state_of(seed))


def truncate(files):
    largest = max(files, key=lambda file: file.stat().st_size)
    os.truncate(largest, largest.stat().st_size // 2)


def flip_a_byte(files):
    largest = max(files, key=lambda file: file.stat().st_size)
    content = bytearray(largest.read_bytes())
    content[len(content) // 2] ^= 0xFF
    largest.write_bytes(content)


def remove(files):
    max(files, key=lambda file: file.stat().st_size).unlink()


def empty_descriptions(files):
    for file in files:
        if "METADATA" in file.name:
            os.truncate(file, 0)


@pytest.mark.parametrize("damage", [truncate, flip_a_byte, remove, empty_descriptions])
def test_a_damaged_checkpoint_is_set_aside(damage, tmp_path, capfd):
    folder = tmp_path / "checkpoints"
    checkpoints = Checkpoints(folder)
    checkpoints.save(1, state_of(1))
    checkpoints.save(2, state_of(2))
    checkpoints.close()
    damage([file for file in (folder / "2").rglob("*") if file.is_file()])
    checkpoints = Checkpoints(folder)
    with pytest.raises(DamagedCheckpoint, match="checkpoint 2 "):
        checkpoints.restore(2, state_of(0))
    notes = []
    step, state = checkpoints.newest(state_of(0), notes.append)
    assert step == 1
    assert_is(state, 1)
    assert (tmp_path / "damaged-checkpoint-2").is_dir()
    (note,) = notes
    assert note.startswith("checkpoint 2 ")
    assert note.endswith("the run goes on from 1")
    assert "tensorstore_spec" not in note
    assert capfd.readouterr().err == ""
    checkpoints.save(2, state_of(2))  # made anew
    checkpoints.close()
    step, state = Checkpoints(folder).newest(state_of(0), pytest.fail)
    assert step == 2
    assert_is(state, 2)


def test_where_none_can_be_read_all_stay(tmp_path):
    folder = tmp_path / "checkpoints"
    checkpoints = Checkpoints(folder)
    checkpoints.save(1, state_of(1))
    checkpoints.save(2, state_of(2))
    checkpoints.close()
    for step in ("1", "2"):
        truncate([file for file in (folder / step).rglob("*") if file.is_file()])
    with pytest.raises(DamagedCheckpoint, match=r"checkpoint 2 .*; checkpoint 1 .*--restart"):
        Checkpoints(folder).newest(state_of(0), pytest.fail)
    assert sorted(path.name for path in folder.iterdir()) == ["1", "2"]


def test_the_last_are_kept_and_a_torn_one_does_not_count(tmp_path):
    checkpoints = Checkpoints(tmp_path, max_to_keep=2)
    for step in (1, 2, 3):
        checkpoints.save(step, state_of(step))
    checkpoints.close()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["2", "3"]
    (tmp_path / "4.orbax-checkpoint-tmp").mkdir()
    assert Checkpoints(tmp_path).newest(state_of(0), pytest.fail)[0] == 3


RUN = [
    "ga-distillation", "--population-size", "60", "--width", "4", "--depth", "1",
    "--num-epochs", "1", "--num-networks", "1", "--strong-random-repeats", "0",
    "--num-generations", "6", "--fitness-subset-size", "50", "--checkpoint-seconds", "0",
    "--name", "run",
]  # fmt: skip


def test_a_full_disk_is_one_line_and_the_run_goes_on(small_disk, tmp_path, capsys):
    def remount(size):
        options = f"remount,size={size}"
        subprocess.run(["mount", "-o", options, str(small_disk)], check=True)

    remount("600k")
    assert main([*RUN, "--runs-dir", str(small_disk)]) == 2
    said = [line for line in capsys.readouterr().err.splitlines() if "error" in line]
    assert len(said) == 1
    assert "the state cannot be saved: no space is left; --resume goes on from step" in said[0]
    remount("20m")
    assert main([*RUN, "--runs-dir", str(small_disk), "--resume"]) == 0
    assert main([*RUN, "--runs-dir", str(tmp_path)]) == 0
    files = [folder / "run/metrics.jsonl" for folder in (small_disk, tmp_path)]
    assert read_lines(files[0]) == read_lines(files[1])
