"""`load`: names, the bundled digits, where it looks, and the real sets if they are at hand."""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from sklearn.datasets import load_digits

from evojax_suite.data import NAMES, DataError, load

# Read at import: a fixture hides it from the tests themselves.
REAL_DATA = os.environ.get("EVOJAX_SUITE_DATA")


def test_names():
    assert set(NAMES) == {
        "digits", "mnist", "fashion_mnist", "kmnist", "cifar10", "cifar100", "pathmnist",
        "dermamnist", "octmnist", "bloodmnist", "tissuemnist", "organamnist", "organcmnist",
        "organsmnist", "pneumoniamnist", "breastmnist", "retinamnist",
    }  # fmt: skip


def test_digits():
    digits = load("digits")
    parts = (digits.train, digits.validation, digits.test)
    assert [len(part) for part in parts] == [1078, 360, 359]
    assert digits.image_shape == (8, 8, 1)
    assert digits.class_names == tuple("0123456789")
    original: Any = load_digits()
    expected = np.rint(original.images * 255 / 16).astype(np.uint8)
    pairs = sorted((i.tobytes(), k) for i, k in zip(expected, original.target, strict=True))
    loaded = [(i.tobytes(), k) for p in parts for i, k in zip(p.images, p.labels, strict=True)]
    assert sorted(loaded) == pairs
    for part in parts:
        shares = np.bincount(part.labels) / np.bincount(original.target)
        np.testing.assert_allclose(shares, len(part) / 1797, atol=0.01)
    scaled = digits.train.images / 255
    np.testing.assert_allclose((digits.mean[0], digits.std[0]), (scaled.mean(), scaled.std()),
                               atol=5.1e-5)  # fmt: skip


def test_digits_are_the_same_every_time():
    np.testing.assert_array_equal(load("digits").train.images, load("Digits").train.images)


@pytest.fixture
def fashion(tmp_path, arrays):
    images, labels = arrays(50, 10, (4, 4))
    folder = tmp_path / "sets"
    folder.mkdir()
    np.savez(folder / "fashion_mnist.npz", x_train=images, y_train=labels,
             x_test=images, y_test=labels)  # fmt: skip
    return folder


@pytest.mark.parametrize("name", ["fashion_mnist", "Fashion-MNIST", "FASHION-mnist"])
def test_case_and_separators_do_not_matter(fashion, name):
    assert load(name, fashion).name == "fashion_mnist"


def test_environment_variable_and_argument(fashion, tmp_path, monkeypatch):
    monkeypatch.setenv("EVOJAX_SUITE_DATA", str(fashion))
    assert load("fashion_mnist").name == "fashion_mnist"
    (tmp_path / "empty").mkdir()
    monkeypatch.setenv("EVOJAX_SUITE_DATA", str(tmp_path / "empty"))
    assert load("fashion_mnist", str(fashion)).name == "fashion_mnist"


@pytest.mark.parametrize(
    ("name", "message"),
    [
        (
            "cifar11",
            r"unknown dataset 'cifar11' \(did you mean cifar10\?\); allowed: digits, mnist",
        ),
        ("imagenet", r"unknown dataset 'imagenet'; allowed: digits, mnist"),
        ("no/such/folder", "no/such/folder: no such file or folder"),
        ("missing.npz", r"missing\.npz: no such file or folder"),
        (Path("missing"), "unknown dataset 'missing'"),
        (__file__, r"unknown file type; allowed: \.npz, \.tar"),
    ],
)
def test_unknown_names_and_paths(name, message):
    with pytest.raises(DataError, match=message) as error:
        load(name)
    assert "\n" not in str(error.value)


def test_data_dir_that_does_not_exist(tmp_path):
    with pytest.raises(DataError, match="nowhere: no such folder"):
        load("mnist", tmp_path / "nowhere")


@pytest.mark.parametrize("archives", [["mnist_a.tar", "mnist_b.tar.gz"]])
def test_several_archives_are_ambiguous(tmp_path, archives):
    for name in archives:
        (tmp_path / name).touch()
    with pytest.raises(DataError, match=r"several .* mnist_a\.tar, mnist_b\.tar\.gz; keep one"):
        load("mnist", tmp_path)


@pytest.mark.parametrize("name", ["mnists.tar", "cifar100.tar.gz", "emnist.tar", "xmnist.npz"])
@pytest.mark.parametrize("wanted", ["mnist", "cifar10"])
def test_files_of_similar_names_are_left_alone(tmp_path, monkeypatch, name, wanted):
    (tmp_path / name).write_bytes(b"damaged")
    monkeypatch.setattr("evojax_suite.data.loader.from_tfds", refuse)
    with pytest.raises(DataError, match=f"^{wanted} is missing: .*are not in .*nothing is fetched"):
        load(wanted, tmp_path)


def refuse(known):
    raise DataError("nothing is fetched")


def test_a_missing_set_says_where_it_looked_and_what_to_do(tmp_path, monkeypatch):
    monkeypatch.setattr("evojax_suite.data.loader.from_tfds", refuse)
    with pytest.raises(DataError) as error:
        load("kmnist", tmp_path)
    message = str(error.value)
    assert "\n" not in message
    for part in (str(tmp_path), "kmnist/", "kmnist.npz", "kmnist*.tar", "EVOJAX_SUITE_DATA"):
        assert part in message
    with pytest.raises(DataError, match="no data_dir is given and EVOJAX_SUITE_DATA is not set"):
        load("kmnist")


@pytest.mark.data
@pytest.mark.skipif(not REAL_DATA, reason="EVOJAX_SUITE_DATA is not set")
@pytest.mark.parametrize(
    ("name", "sizes", "shape", "seconds"),
    [
        ("mnist", (48_000, 12_000, 10_000), (28, 28, 1), 10),
        ("fashion_mnist", (48_000, 12_000, 10_000), (28, 28, 1), 10),
        ("cifar10", (40_000, 10_000, 10_000), (32, 32, 3), 60),
        ("pneumoniamnist", (None, 524, 624), (28, 28, 1), 10),
    ],
)
def test_real_sets(name, sizes, shape, seconds):
    start = time.perf_counter()
    dataset = load(name, REAL_DATA)
    assert time.perf_counter() - start < seconds
    parts = (dataset.train, dataset.validation, dataset.test)
    for part, size in zip(parts, sizes, strict=True):
        assert size is None or len(part) == size
    assert dataset.image_shape == shape
    assert dataset.name.startswith(name)
    counts = [np.bincount(part.labels) for part in parts[:2]]
    if name in ("fashion_mnist", "cifar10"):  # balanced sets
        assert [len(set(count)) for count in counts] == [1, 1]
    scaled = dataset.train.images[::7].reshape(-1, shape[2]) / 255
    if name != "pneumoniamnist":  # MedMNIST's constants are a convention
        np.testing.assert_allclose(scaled.mean(0), dataset.mean, atol=0.005)
    if name.endswith("_mnist") or name == "mnist":
        np.testing.assert_allclose(scaled.std(0), dataset.std, atol=0.005)
