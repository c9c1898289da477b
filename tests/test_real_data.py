"""The first system on real MNIST, at a size for the CPU."""

from __future__ import annotations

import json

import pytest

from evojax_suite.cli import main
from evojax_suite.distilled import DistilledDataset

pytestmark = pytest.mark.data


def test_mnist_from_the_command_to_the_report(tmp_path):
    code = main(
        ["ga-distillation", "--dataset", "mnist", "--runs-dir", str(tmp_path), "--name", "mnist",
         "--population-size", "4", "--generations", "3", "--width", "8", "--num-epochs", "30",
         "--fitness-subset-size", "1000", "--strong-random-repeats", "1", "--num-networks", "2"]
    )  # fmt: skip
    assert code == 0
    summary = json.loads((tmp_path / "mnist/summary.json").read_text())
    assert summary["dataset"] == "mnist"
    assert summary["test_accuracy_mean"] > 0.2  # ten classes
    assert summary["options"]["fitness_subset_size"] == 1000
    data = DistilledDataset.load(tmp_path / "mnist/distilled.npz")
    assert data.images.shape == (10, 28, 28, 1)
    assert (data.mean, data.std) == ((0.1307,), (0.3081,))
    assert (tmp_path / "mnist/report.html").exists()
