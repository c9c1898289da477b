"""The systems on real MNIST and CIFAR-10, at a size for the CPU."""

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


def test_devs_and_gradient_matching_shrink_cifar10(tmp_path):
    shared = [
        "--dataset", "cifar10", "--runs-dir", str(tmp_path), "--num-images", "400", "--width", "8",
        "--num-epochs", "30", "--num-networks", "1",
    ]  # fmt: skip
    devs = ["--name", "devs", "--target-sizes", "100", "10", "--feature-epochs", "5"]
    assert main(["devs", *shared, *devs, "--min-training-steps", "20"]) == 0
    matching = ["--name", "dc", "--method", "herding", "gradient_matching", "--num-samples", "10"]
    sizes = ["--condensation-iterations", "2", "--dc.real-batch-size", "8", "--dc.network.width"]
    assert main(["coreset", *shared, *matching, *sizes, "8", "--probe-epochs", "2"]) == 0
    for name in ("devs/DEvS-10", "devs/random-10", "dc/herding-10", "dc/gradient_matching-10"):
        data = DistilledDataset.load(tmp_path / f"{name}.npz")
        assert data.images.shape == (10, 32, 32, 3)
        assert data.training.flip
        assert 0 < data.test_accuracies[0] < 0.5
    summary = json.loads((tmp_path / "devs/summary.json").read_text())
    assert summary["num_training_images"] == 400
