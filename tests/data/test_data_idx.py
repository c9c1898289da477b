"""IDX files: round trips in every spelling, and each kind of damage."""

from __future__ import annotations

import gzip
import struct
from pathlib import Path

import numpy as np
import pytest

from evojax_suite.data import DataError, load


def idx_bytes(array: np.ndarray) -> bytes:
    header = struct.pack(f">I{array.ndim}I", 0x800 + array.ndim, *array.shape)
    return header + array.astype(np.uint8).tobytes()


def write(folder: Path, train, test, dotted: bool = False, zipped: bool = False) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for stem, (images, labels) in (("train", train), ("t10k", test)):
        for kind, array in (("images-idx3", images), ("labels-idx1", labels)):
            name = f"{stem}-{kind}-ubyte"
            name = name.replace("-idx", ".idx") if dotted else name
            data = idx_bytes(array)
            if zipped:
                (folder / f"{name}.gz").write_bytes(gzip.compress(data))
            else:
                (folder / name).write_bytes(data)


@pytest.fixture
def small(arrays):
    return arrays(50, 10, (5, 4)), arrays(20, 10, (5, 4), seed=1)


@pytest.mark.parametrize("dotted", [False, True])
@pytest.mark.parametrize("zipped", [False, True])
def test_round_trip(tmp_path, small, assert_holds, dotted, zipped):
    write(tmp_path / "mnist", *small, dotted, zipped)
    dataset = load("mnist", tmp_path)
    assert_holds(dataset, *small)
    assert dataset.name == "mnist"
    assert dataset.image_shape == (5, 4, 1)
    assert dataset.class_names == tuple("0123456789")
    assert (dataset.mean, dataset.std) == ((0.1307,), (0.3081,))


def test_data_dir_is_the_sets_own_folder_unless_it_is_named_after_another(tmp_path, small):
    write(tmp_path / "kmnist", *small)
    assert load("kmnist", tmp_path / "kmnist").class_names[0] == "o"
    with pytest.raises(DataError, match="mnist is missing"):
        load("mnist", tmp_path / "kmnist")


def test_own_folder_by_path(tmp_path, small, assert_holds):
    write(tmp_path / "mine", *small)
    dataset = load(tmp_path / "mine")
    assert_holds(dataset, *small)
    assert dataset.name == "mine"


LABELS, IMAGES = "train-labels-idx1-ubyte", "t10k-images-idx3-ubyte"


def cut(path: Path, count: int) -> None:
    path.write_bytes(path.read_bytes()[:-count])


def wrong_magic(path: Path) -> None:
    path.write_bytes(b"\0\0\x0d\x03" + path.read_bytes()[4:])


def zipped_and_cut(path: Path) -> None:
    path.write_bytes(gzip.compress(path.read_bytes())[:-12])


DAMAGE = {
    "truncated images": (IMAGES, lambda path: cut(path, 3), "truncated, 397 bytes .* ask for 400"),
    "truncated header": (IMAGES, lambda path: path.write_bytes(b"\0\0\x08\x03\0"), "truncated"),
    "empty file": (LABELS, lambda path: path.write_bytes(b""), "truncated"),
    "truncated gzip": (IMAGES, zipped_and_cut, "may be truncated"),
    "too long": (LABELS, lambda path: path.write_bytes(path.read_bytes() + b"x"), "too long"),
    "wrong magic": (IMAGES, wrong_magic, "0x00000d03; expected 0x00000803"),
    "images as labels": (LABELS, lambda path: path.write_bytes(idx_bytes(np.zeros((2, 3, 3)))),
                         "0x00000803; expected 0x00000801"),
    "counts disagree": (LABELS, lambda path: path.write_bytes(idx_bytes(np.arange(49) % 10)),
                        "50 images but 49 labels"),
    "label out of range": (LABELS, lambda path: path.write_bytes(idx_bytes(np.arange(50) % 11)),
                           "label 10 is out of range; allowed: 0..9"),
    "class without images": (LABELS, lambda path: path.write_bytes(idx_bytes(np.arange(50) % 7)),
                             "class 7 has no images"),
    "missing file": (LABELS, Path.unlink, f"missing {LABELS}"),
    "no images": (IMAGES, lambda path: path.write_bytes(idx_bytes(np.zeros((0, 5, 4)))),
                  "0 images but 20 labels"),
}  # fmt: skip


@pytest.mark.parametrize("damage", DAMAGE)
def test_damage_is_one_clear_line(tmp_path, small, damage):
    name, break_file, message = DAMAGE[damage]
    write(tmp_path / "mnist", *small)
    load("mnist", tmp_path)
    break_file(tmp_path / "mnist" / name)
    with pytest.raises(DataError, match=message) as error:
        load("mnist", tmp_path)
    assert "\n" not in str(error.value)
    assert str(tmp_path / "mnist") in str(error.value)


def test_parts_of_different_sizes(tmp_path, arrays):
    write(tmp_path / "mnist", arrays(50, 10, (5, 4)), arrays(20, 10, (4, 5)))
    with pytest.raises(DataError, match=r"\(test\): images are \(4, 5, 1\) .* one size"):
        load("mnist", tmp_path)
