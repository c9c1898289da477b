"""CIFAR batches, binary and pickled, in folders and tars; pickles that want more are refused."""

from __future__ import annotations

import builtins
import io
import os
import pickle
import struct
import subprocess
import tarfile
from pathlib import Path

import numpy as np
import pytest

from evojax_suite.data import DataError, load

CLASSES = {"cifar10": 10, "cifar100": 100}
OFFICIAL = {
    "cifar10": {"bin": "cifar-10-batches-bin", "py": "cifar-10-batches-py"},
    "cifar100": {"bin": "cifar-100-binary", "py": "cifar-100-python"},
}


def planes(images: np.ndarray) -> np.ndarray:
    """(N, 32, 32, 3) images as CIFAR's (N, 3072) bytes."""
    return np.ascontiguousarray(images.transpose(0, 3, 1, 2)).reshape(len(images), 3072)


def binary(images, labels, kind) -> bytes:
    coarse = np.full((len(labels), 1), 77, np.uint8)
    columns = [labels[:, None].astype(np.uint8), planes(images)]
    return np.hstack(columns if kind == "cifar10" else [coarse, *columns]).tobytes()


def pickled(images, labels, kind, protocol=2) -> bytes:
    key = "labels" if kind == "cifar10" else "fine_labels"
    batch = {"data": planes(images), key: labels.tolist(), "filenames": ["x.png"] * len(labels)}
    return pickle.dumps(batch, protocol)


def pickled_by_python2(images, labels, kind) -> bytes:
    """What Python 2 wrote, as in the official archives: byte strings and numpy.core names."""
    assert kind == "cifar10"
    pixels = planes(images).tobytes()
    return b"".join([
        b"\x80\x02}(U\x04datacnumpy.core.multiarray\n_reconstruct\ncnumpy\nndarray\n",
        b"K\x00\x85U\x01b\x87R(K\x01", b"K" + bytes([len(images)]), b"M\x00\x0c\x86",
        b"cnumpy\ndtype\nU\x02u1K\x00K\x01\x87R(K\x03U\x01|NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xff",
        b"K\x00tb\x89T" + struct.pack("<I", len(pixels)) + pixels + b"tb",
        b"U\x06labels](" + b"".join(b"K" + bytes([label]) for label in labels) + b"eu.",
    ])  # fmt: skip


def batches(kind, form, train, test, encode=None) -> dict[str, bytes]:
    """The files of the set, by name."""
    encode = encode or (binary if form == "bin" else pickled)
    suffix = ".bin" if form == "bin" else ""
    if kind == "cifar100":
        return {f"train{suffix}": encode(*train, kind), f"test{suffix}": encode(*test, kind)}
    size = len(train[1]) // 5
    files = {f"test_batch{suffix}": encode(*test, kind)}
    for number in range(5):
        part = slice(number * size, (number + 1) * size)
        name = f"data_batch_{number + 1}{suffix}"
        files[name] = encode(train[0][part], train[1][part], kind)
    return files


def write(folder: Path, files: dict[str, bytes]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name, data in files.items():
        (folder / name).write_bytes(data)


def write_tar(path: Path, top: str, files: dict[str, bytes]) -> None:
    with tarfile.open(path, "w:gz" if path.name.endswith("gz") else "w") as tar:
        for name, data in {"readme.html": b"hello", **files}.items():
            member = tarfile.TarInfo(f"{top}/{name}")
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))


@pytest.fixture
def small(arrays):
    def make(kind):
        count = CLASSES[kind]
        return arrays(5 * count, count, (32, 32, 3)), arrays(count, count, (32, 32, 3), seed=1)

    return make


@pytest.mark.parametrize("form", ["bin", "py"])
@pytest.mark.parametrize("kind", ["cifar10", "cifar100"])
@pytest.mark.parametrize("place", ["in <name>/", "in data_dir", "itself", "tar.gz", "tar"])
def test_round_trip(tmp_path, small, assert_holds, kind, form, place):
    train, test = small(kind)
    files, top = batches(kind, form, train, test), OFFICIAL[kind][form]
    if place.startswith("tar"):
        write_tar(tmp_path / f"{kind}.{place}", top, files)
    else:
        folder = {"in <name>/": tmp_path / kind / top, "in data_dir": tmp_path / top}
        write(folder.get(place, tmp_path), files)
    dataset = load(kind, tmp_path)
    assert_holds(dataset, train, test)
    assert dataset.name == kind
    assert dataset.image_shape == (32, 32, 3)
    assert len(dataset.class_names) == CLASSES[kind]


def test_the_two_sets_are_not_mixed_up(tmp_path, small, assert_holds):
    for kind, name in (("cifar10", "cifar-10-binary"), ("cifar100", "cifar-100-binary")):
        files = batches(kind, "bin", *small(kind))
        write_tar(tmp_path / f"{name}.tar.gz", OFFICIAL[kind]["bin"], files)
    for kind in CLASSES:
        assert_holds(load(kind, tmp_path), *small(kind))


@pytest.mark.parametrize("protocol", range(2, pickle.HIGHEST_PROTOCOL + 1))
def test_pickles_of_every_protocol(tmp_path, small, assert_holds, protocol):
    def encode(images, labels, kind):
        return pickled(images, labels, kind, protocol)

    write(tmp_path, batches("cifar10", "py", *small("cifar10"), encode))
    assert_holds(load("cifar10", tmp_path), *small("cifar10"))


def test_pickles_of_python2(tmp_path, small, assert_holds):
    write(tmp_path, batches("cifar10", "py", *small("cifar10"), pickled_by_python2))
    assert_holds(load("cifar10", tmp_path), *small("cifar10"))


class Call:
    """Pickles as a call of `function`."""

    def __init__(self, function, *arguments):
        self.call = (function, arguments)

    def __reduce__(self):
        return self.call


ATTACKS = {
    "os.system": lambda mark: Call(os.system, f"touch {mark}"),
    "builtins.eval": lambda mark: Call(builtins.eval, f"open({str(mark)!r}, 'w')"),
    "builtins.exec": lambda mark: Call(builtins.exec, f"open({str(mark)!r}, 'w')"),
    "builtins.getattr": lambda mark: Call(getattr, "text", "upper"),
    "subprocess.Popen": lambda mark: Call(subprocess.Popen, ["touch", str(mark)]),
    "an object dtype": lambda mark: np.array([mark.name], object),
    "inside the labels": lambda mark: {"labels": [Call(os.system, f"touch {mark}")]},
    "numpy.load": lambda mark: Call(np.load, str(mark)),
}  # fmt: skip


@pytest.mark.parametrize("protocol", [2, 4, 5])
@pytest.mark.parametrize("attack", ATTACKS)
@pytest.mark.parametrize("place", ["folder", "tar"])
def test_attacks_are_refused(tmp_path, small, attack, protocol, place):
    mark = tmp_path / "mark"
    files = batches("cifar10", "py", *small("cifar10"))
    files["data_batch_3"] = pickle.dumps({"data": ATTACKS[attack](mark)}, protocol)
    if place == "tar":
        write_tar(tmp_path / "cifar10.tar.gz", "cifar-10-batches-py", files)
    else:
        write(tmp_path / "cifar10", files)
    with pytest.raises(DataError, match=r"data_batch_3: (refused|not a readable pickle)") as error:
        load("cifar10", tmp_path)
    assert not mark.exists()
    assert "\n" not in str(error.value)


def test_the_refusal_names_what_the_pickle_wanted(tmp_path, small):
    files = batches("cifar10", "py", *small("cifar10"))
    files["test_batch"] = pickle.dumps(Call(os.system, "true"))
    write(tmp_path, files)
    with pytest.raises(DataError, match=r"refused, the pickle asks for \w+\.system; allowed: dict"):
        load("cifar10", tmp_path)


def forged_array(state: tuple) -> bytes:
    """A batch whose array has a state of our choice, as protocol 2 writes it."""

    class Forged:
        def __reduce__(self):
            from numpy._core.multiarray import _reconstruct

            return _reconstruct, (np.ndarray, (0,), b"b"), state

    return pickle.dumps({"data": Forged(), "labels": [0]}, 2)


U1, I1 = np.dtype("u1"), np.dtype("i1")
BAD_BATCHES = {
    "truncated": (lambda good: good[:-30], "not a readable pickle"),
    "empty": (lambda good: b"", "not a readable pickle"),
    "no dict": (lambda good: pickle.dumps([1]), "a dict was expected"),
    "no data": (lambda good: pickle.dumps({"labels": [1]}), "'data' is not a uint8 array"),
    "no labels": (lambda good: pickle.dumps({"data": np.zeros((1, 3072), np.uint8)}), "labels are"),
    "labels that are no numbers": (
        lambda good: pickle.dumps({"data": np.zeros((1, 3072), np.uint8), "labels": ["x"]}),
        "labels are"),
    "wrong width": (
        lambda good: pickle.dumps({"data": np.zeros((1, 3000), np.uint8), "labels": [1]}), "3072"),
    "fewer bytes than its shape": (
        lambda good: forged_array((1, (1, 3072), U1, False, b"xx")), "whole uint8 array"),
    "another dtype": (
        lambda good: forged_array((1, (1, 3072), I1, False, bytes(3072))), "uint8 array"),
    "another order": (
        lambda good: forged_array((1, (1, 3072), U1, True, bytes(3072))), "uint8 array"),
    "counts disagree": (
        lambda good: pickle.dumps({"data": np.zeros((2, 3072), np.uint8), "labels": [1]}),
        "2 images but 1 labels"),
    "label out of range": (
        lambda good: pickle.dumps({"data": np.zeros((1, 3072), np.uint8), "labels": [10]}),
        "label 10 is out of range"),
    "negative label": (
        lambda good: pickle.dumps({"data": np.zeros((1, 3072), np.uint8), "labels": [-1]}),
        "label -1 is out of range"),
}  # fmt: skip


@pytest.mark.parametrize("damage", BAD_BATCHES)
def test_bad_pickles(tmp_path, small, damage):
    change, message = BAD_BATCHES[damage]
    files = batches("cifar10", "py", *small("cifar10"))
    write(tmp_path, files)
    load("cifar10", tmp_path)
    write(tmp_path, {"data_batch_2": change(files["data_batch_2"])})
    with pytest.raises(DataError, match=message) as error:
        load("cifar10", tmp_path)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("kind", ["cifar10", "cifar100"])
def test_truncated_binary_batch(tmp_path, small, kind):
    files = batches(kind, "bin", *small(kind))
    name = next(iter(files))
    write(tmp_path, files | {name: files[name][:-1]})
    with pytest.raises(DataError, match=rf"{name}: truncated"):
        load(kind, tmp_path)


def test_missing_batch(tmp_path, small):
    files = batches("cifar10", "bin", *small("cifar10"))
    del files["data_batch_4.bin"]
    write(tmp_path, files)
    with pytest.raises(DataError, match=r"data_batch_4\.bin is missing"):
        load("cifar10", tmp_path)
