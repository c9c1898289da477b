"""IDX files, the format of MNIST, Fashion-MNIST and KMNIST: a magic number, sizes, then bytes."""

from __future__ import annotations

import gzip
import math
import struct
import zlib
from pathlib import Path

import numpy as np

from evojax_suite.data.errors import DataError, data_error
from evojax_suite.data.source import Source, checked_split

FILES = {
    "train": ("train-images-idx3-ubyte", "train-labels-idx1-ubyte"),
    "test": ("t10k-images-idx3-ubyte", "t10k-labels-idx1-ubyte"),
}
STEMS = tuple(stem for pair in FILES.values() for stem in pair)


def find_idx(folder: Path) -> dict[str, Path] | None:
    """The four IDX files in a folder, keyed by their names in FILES; None where there is none.
    Raises DataError if some but not all of them are there."""
    paths = {}
    for stem in STEMS:
        names = stem, stem.replace("-idx", ".idx")
        for path in (folder / f"{name}{ending}" for name in names for ending in ("", ".gz")):
            if path.is_file():
                paths.setdefault(stem, path)
    missing = ", ".join(stem for stem in STEMS if stem not in paths)
    if paths and missing:
        raise DataError(f"{folder}: missing {missing} (plain or .gz) beside {next(iter(paths))}")
    return paths or None


def read_idx_files(paths: dict[str, Path], where: str) -> Source:
    """The set in the four files of `find_idx`, whose images become (N, H, W, 1) uint8. Raises
    DataError for a wrong magic number, a wrong length and sizes that disagree."""
    parts = {
        part: checked_split(_read(paths[images], 3), _read(paths[labels], 1), f"{where} ({part})")
        for part, (images, labels) in FILES.items()
    }
    return Source(parts, None, where)


def _read(path: Path, dimensions: int) -> np.ndarray:
    """The uint8 array of one file; gzip is known by its first two bytes."""
    with data_error(f"{path}: cannot be read, it may be truncated", OSError, EOFError, zlib.error):
        data = path.read_bytes()
        if data.startswith(b"\x1f\x8b"):
            data = gzip.decompress(data)
    header, magic = 4 + 4 * dimensions, 0x800 + dimensions
    if len(data) >= 4 and data[:4] != struct.pack(">I", magic):
        raise DataError(f"{path}: magic number 0x{data[:4].hex()}; expected 0x{magic:08x}")
    if len(data) < header:
        raise DataError(f"{path}: truncated, {len(data)} bytes; its header alone has {header}")
    shape = struct.unpack(f">{dimensions}I", data[4:header])
    sizes, needed, present = "x".join(map(str, shape)), math.prod(shape), len(data) - header
    if present != needed:
        wrong = "truncated" if present < needed else "too long"
        actual = f"{present} bytes after the header"
        raise DataError(f"{path}: {wrong}, {actual}; its sizes {sizes} ask for {needed}")
    try:
        return np.frombuffer(data, np.uint8, offset=header).reshape(shape)
    except ValueError as error:  # a zero among sizes that are too large for an array
        raise DataError(f"{path}: its sizes are {sizes}") from error
