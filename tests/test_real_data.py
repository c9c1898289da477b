"""The systems on real MNIST, Fashion-MNIST and CIFAR-10, at a size for the CPU."""

from __future__ import annotations

import io
import json
import os
import tarfile
import time
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from evojax_suite import load
from evojax_suite.cli.main import main
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


def test_devs_shrinks_fashion_mnist(tmp_path):
    arguments = [
        "--dataset", "fashion_mnist", "--runs-dir", str(tmp_path), "--num-images", "400", "--width",
        "8", "--num-epochs", "10", "--num-networks", "1", "--target-sizes", "100", "10",
        "--feature-epochs", "5", "--min-training-steps", "20", "--name", "run",
    ]  # fmt: skip
    assert main(["devs", *arguments]) == 0
    check_sets(tmp_path / "run", ("DEvS-10", "random-10"), (28, 28, 1))
    summary = json.loads((tmp_path / "run/summary.json").read_text())
    assert summary["num_training_images"] == 400


def test_herding_and_gradient_matching_shrink_cifar10(tmp_path):
    arguments = [
        "--dataset", "cifar10", "--runs-dir", str(tmp_path), "--num-images", "200", "--width", "8",
        "--num-epochs", "10", "--num-networks", "1", "--method", "herding", "gradient_matching",
        "--num-samples", "10", "--condensation-iterations", "2", "--dc.real-batch-size", "8",
        "--dc.network.width", "8", "--probe-epochs", "2", "--name", "run",
    ]  # fmt: skip
    assert main(["coreset", *arguments]) == 0
    check_sets(tmp_path / "run", ("herding-10", "gradient_matching-10"), (32, 32, 3))


def seconds_of(function):
    """Processor time of this process, as beside other work the clock says little."""
    start = time.process_time()
    result = function()
    return time.process_time() - start, result


def decode_one_by_one(path, number):
    """The first images of an archive, as a short program would read them."""
    with tarfile.open(path) as tar:
        files = (tar.extractfile(member).read() for member in tar if member.isreg())
        for file in islice(files, number):
            with Image.open(io.BytesIO(file)) as image:
                assert np.asarray(image).shape == (32, 32, 3)


def test_lossless_cifar10_is_soon_there_and_sooner_again(monkeypatch, tmp_path):
    folder = Path(os.environ["EVOJAX_SUITE_DATA"]) / "lossless"
    if not (folder / "cifar10.tar.gz").exists():
        pytest.skip(f"there is no {folder / 'cifar10.tar.gz'}")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    sample = 6_000
    by_hand = seconds_of(lambda: decode_one_by_one(folder / "cifar10.tar.gz", sample))[0]
    by_hand *= 60_000 / sample
    seconds, found = zip(
        *(seconds_of(lambda: load("cifar10", folder)) for _ in range(2)), strict=True
    )
    assert seconds[0] < 3 * by_hand
    assert seconds[1] < by_hand / 10
    assert len([*tmp_path.rglob("*.dataset")]) == 1
    for dataset in found:
        assert dataset.name == "cifar10"
        train = np.concatenate([dataset.train.images, dataset.validation.images])
        labels = np.concatenate([dataset.train.labels, dataset.validation.labels])
        assert train.shape == (50_000, 32, 32, 3)
        assert dataset.test.images.shape == (10_000, 32, 32, 3)
        np.testing.assert_array_equal(np.bincount(labels), [5000] * 10)
        np.testing.assert_array_equal(np.bincount(dataset.test.labels), [1000] * 10)
        for channel, mean, std in ((0, 0.4914, 0.2470), (1, 0.4822, 0.2435), (2, 0.4465, 0.2616)):
            assert train[..., channel].mean() / 255 == pytest.approx(mean, abs=5e-5)
            assert train[..., channel].std() / 255 == pytest.approx(std, abs=5e-5)
    for part in ("train", "validation", "test"):
        one, other = (getattr(dataset, part) for dataset in found)
        np.testing.assert_array_equal(one.images, other.images)
        np.testing.assert_array_equal(one.labels, other.labels)


def check_sets(run, names, shape):
    for name in names:
        data = DistilledDataset.load(run / f"{name}.npz")
        assert data.images.shape == (10, *shape)
        assert data.training.flip
        assert 0 < data.test_accuracies[0] < 0.8
