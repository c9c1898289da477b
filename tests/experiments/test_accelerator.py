"""The script for a card, rehearsed: every block but PyTorch's, at tiny sizes; all but the paper's
run in this process, where what one compiles serves others."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

SEARCHED = "cifar10", "cifar10-four-soft"
SCRIPT = Path(__file__).parents[2] / "experiments/benchmarks/accelerator.py"


def rehearse(output: Path, *arguments: str) -> subprocess.CompletedProcess:
    command = [sys.executable, SCRIPT, "--rehearse", "--output", output, *arguments]
    environment = {**os.environ, "JAX_PLATFORMS": "cpu"}
    return subprocess.run(
        [str(part) for part in command], env=environment, capture_output=True, text=True
    )


def rows_of(path: Path) -> dict[str, dict]:
    found = json.loads(path.read_text())
    assert found.pop("machine")["device"] == "cpu"
    return found


@pytest.fixture(scope="module")
def results(import_script, tmp_path_factory) -> Path:
    output = tmp_path_factory.mktemp("results")
    script = import_script("benchmarks/accelerator.py")
    blocks = import_script("benchmarks/accelerator_blocks.py")
    for name in ("agreement", "engine", "kernels", "systems", "distillation", "transfer", "labels"):
        deadline = time.time() + 300
        blocks.main(blocks.Options(name, output, deadline, searches=SEARCHED, rehearse=True))
        assert not script.faults(output / f"{name}.json")
    return output


def test_first_steps_are_those_that_are_expected(results):
    rows = rows_of(results / "agreement.json")
    systems = "ga_distillation", "gradient_matching", "devs", "cest", "de_nas", "ecomp"
    half = {f"{name}, bfloat16" for name in systems[:2]}
    assert set(rows) == {f"{name}, float32" for name in systems} | half
    for row in rows.values():
        assert row["agrees"] is True
        assert row["largest difference"] <= row["tolerance"]


def test_the_engine_is_measured_beside_what_is_predicted(results):
    rows = rows_of(results / "engine.json")
    assert any(name.startswith("a generation") for name in rows)
    assert any(name.startswith("training, adaptive") for name in rows)
    assert any(name.startswith("evaluation, adaptive") for name in rows)
    kernels = {name: rows.pop(name) for name in list(rows) if name.startswith("kernels of")}
    assert set(kernels) == {"kernels of training", "kernels of evaluation"}
    for row in rows.values():
        assert 0 < row["fastest"] <= row["median"]
        assert row["predicted"] > 0
        assert row["kernels"] > 0


def test_kernels_agree_and_are_measured(results):
    rows = rows_of(results / "kernels.json")
    agreement = [row for name, row in rows.items() if name.startswith("a block of")]
    assert len(agreement) == 4
    assert all(row["agrees"] for row in agreement)
    for name in ("a generation, fused, bfloat16", "training, fused, bfloat16, 2 in flight"):
        assert rows[name]["median"] > 0


def test_every_other_system_is_timed(results):
    rows = rows_of(results / "systems.json")
    assert rows["EComp, 7 runs together"]["runs"] == 7
    assert rows["DE-NAS, candidates"]["candidates an hour"] > 0
    assert len(rows["CEST, epochs"]["seconds of steps"]) == 3
    assert set(rows["DEvS, a reduction"]["stages"]) >= {"training", "features", "clustering"}


def test_images_are_found_and_judged(results):
    rows = rows_of(results / "distillation.json")
    for name in SEARCHED:
        assert rows[name]["generations"] >= 2
        assert 0 < rows[f"judges of {name}"]["test accuracy"][0] < 1
        with np.load(results / f"{name}.npz") as found:
            assert found["images"].shape == (10, 8, 8, 1)
            assert found["labels"].argmax(1).tolist() == list(range(10))


def test_what_was_found_is_judged_by_other_networks(results):
    assert rows_of(results / "transfer.json")["the transfer table"]["sets"] == len(SEARCHED)
    cells = json.loads((results / "table.json").read_text())["rows"]
    assert {cell["column"] for cell in cells} == {"ConvNet-8, own recipe", "MLP"}
    assert all(0 < cell["accuracies"][0] < 1 for cell in cells)


def test_the_same_images_are_judged_with_hard_labels_and_a_teachers(results):
    rows = json.loads((results / "by-labels.json").read_text())["rows"]
    names = "random, 20", "herding, 20", "k-center, 20"
    labels = "hard", "a teacher's"
    assert [(row["set"], row["labels"]) for row in rows] == [
        (name, label) for name in names for label in labels
    ]
    assert all(0 < row["accuracies"][0] < 1 for row in rows)


def test_the_papers_run_goes_on_where_it_was(tmp_path):
    before, after = tmp_path / "before", tmp_path / "after"
    for output, more in ((before, ()), (after, ("--checkpoint", str(before)))):
        done = rehearse(output, "--blocks", "paper", *more)
        assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
        assert rows_of(output / "paper.json")["ga-distillation on digits"]["generations"] == 3
        assert sorted(output.glob("paper-run.tar.*"))
    first, second = ((folder / "paper-run/metrics.jsonl").read_text() for folder in (before, after))
    assert first == second  # it was complete, and nothing was done again


def test_what_does_not_fit_is_not_begun_and_what_fails_is_told(tmp_path):
    done = rehearse(tmp_path, "--blocks", "paper", "--seconds", "20")
    (row,) = rows_of(tmp_path / "paper.json").values()
    assert row["not run"].startswith("needs about 31 s")
    assert done.returncode == 0
    done = rehearse(tmp_path, "--blocks", "papers")
    assert done.returncode == 1
    assert done.stderr.strip() == (
        "blocks must be of agreement, engine, kernels, pytorch, systems, distillation, transfer, "
        "labels, paper, got 'papers'"
    )
