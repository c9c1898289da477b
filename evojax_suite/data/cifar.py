"""CIFAR-10 and CIFAR-100: binary and python batches, from the files of a folder or a tar."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TypeAlias

import numpy as np

from evojax_suite.data import restricted_pickle
from evojax_suite.data.errors import DataError
from evojax_suite.data.source import Source, checked_split, joined

FOLDERS = {
    "cifar10": ("cifar-10-batches-bin", "cifar-10-batches-py"),
    "cifar100": ("cifar-100-binary", "cifar-100-python"),
}
_FILES = {
    "cifar10": {"train": tuple(f"data_batch_{n}" for n in range(1, 6)), "test": ("test_batch",)},
    "cifar100": {"train": ("train",), "test": ("test",)},
}
# A binary record is the label bytes, the last of which counts (CIFAR-100: coarse, then fine), and
# the red, green and blue planes of a 32x32 image.
_LABEL_BYTES = {"cifar10": 1, "cifar100": 2}
_PIXEL_BYTES = 3 * 32 * 32
_Batch: TypeAlias = tuple[np.ndarray, np.ndarray]  # planes (N, _PIXEL_BYTES) and labels (N,)


def batch_names(kind: str) -> set[str]:
    """The names of all batch files of "cifar10" or "cifar100", binary and python."""
    stems = {stem for stems in _FILES[kind].values() for stem in stems}
    return stems | {f"{stem}.bin" for stem in stems}


def batches_in_folder(folder: Path, kind: str) -> dict[str, bytes]:
    """The batch files in `folder` or in its first subfolder with the official name, by name."""
    for place in (*(folder / name for name in FOLDERS[kind]), folder):
        paths = [place / name for name in sorted(batch_names(kind))]
        if files := {path.name: path.read_bytes() for path in paths if path.is_file()}:
            return files
    return {}


def read_cifar(files: Mapping[str, bytes], kind: str, where: str) -> Source:
    """The set in batches keyed by file name; binary ones are preferred. Images are (N, 32, 32, 3).
    Raises DataError for a missing batch, a wrong length and a pickle that is not one of arrays."""
    is_binary = any(name.endswith(".bin") for name in files)
    read, suffix = (_read_binary, ".bin") if is_binary else (_read_pickle, "")
    parts = {}
    for part, stems in _FILES[kind].items():
        batches = []
        for name in (f"{stem}{suffix}" for stem in stems):
            if name not in files:
                raise DataError(f"{where}: {name} is missing; needed: {', '.join(stems)}")
            place = f"{where}: {name}"
            planes, labels = read(files[name], kind, place)
            images = planes.reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1)
            batches.append(checked_split(images, labels, place))
        parts[part] = joined(batches)
    return Source(parts, None, where)


def _read_binary(data: bytes, kind: str, where: str) -> _Batch:
    label_bytes = _LABEL_BYTES[kind]
    record = label_bytes + _PIXEL_BYTES
    if len(data) % record:
        raise DataError(f"{where}: truncated, {len(data)} bytes; a multiple of {record} is needed")
    records = np.frombuffer(data, np.uint8).reshape(-1, record)
    return records[:, label_bytes:], records[:, label_bytes - 1]


def _read_pickle(data: bytes, kind: str, where: str) -> _Batch:
    loaded = restricted_pickle.loads(data, where)
    batch = {k.decode("latin1") if isinstance(k, bytes) else k: v for k, v in loaded.items()}
    planes, labels = batch.get("data"), batch.get("labels" if kind == "cifar10" else "fine_labels")
    if not isinstance(planes, np.ndarray) or planes.ndim != 2 or planes.shape[1] != _PIXEL_BYTES:
        raise DataError(f"{where}: 'data' is not a uint8 array of shape (N, {_PIXEL_BYTES})")
    if not isinstance(labels, list) or not all(type(label) is int for label in labels):
        raise DataError(f"{where}: the labels are missing or not a list of integers")
    if any(label.bit_length() > 31 for label in labels):
        raise DataError(f"{where}: a label has more than 31 bits; labels count from 0")
    return planes, np.array(labels, np.int64)
