"""IDX files, the format of MNIST, Fashion-MNIST and KMNIST: a magic number, sizes, then bytes."""

from __future__ import annotations

import gzip
import math
import struct
import zlib
from pathlib import Path

import numpy as np

from evojax_suite.data.errors import DataError, first_line
from evojax_suite.data.source import Source, checked_split

FILES = {
    "train": ("train-images-idx3-ubyte", "train-labels-idx1-ubyte"),
    "test": ("t10k-images-idx3-ubyte", "t10k-labels-idx1-ubyte"),
}


def find_idx(folder: Path) -> dict[str, Path] | None:
    """The four IDX files in a folder, keyed by their names in FILES; None where there is none.

    Raises DataError if some but not all of them are there.
    """
    stems = [stem for pair in FILES.values() for stem in pair]
    found = {}
    for stem in stems:
        for name in (stem, stem.replace("-idx", ".idx")):
            for path in (folder / name, folder / f"{name}.gz"):
                if path.is_file():
                    found.setdefault(stem, path)
    if not found:
        return None
    missing = [stem for stem in stems if stem not in found]
    if missing:
        raise DataError(
            f"{folder}: missing {', '.join(missing)} (plain or .gz) beside {next(iter(found))}"
        )
    return found


def read_idx_files(paths: dict[str, Path], where: str) -> Source:
    """Read the four files that `find_idx` names. Images become (N, H, W, 1) uint8.

    Raises DataError for a wrong magic number, a wrong length and sizes that disagree.
    """
    parts = {
        part: checked_split(_read(paths[images], 3), _read(paths[labels], 1), f"{where} ({part})")
        for part, (images, labels) in FILES.items()
    }
    return Source(parts, None, where)


def _read(path: Path, dimensions: int) -> np.ndarray:
    """One file as a uint8 array with that many dimensions; gzip is known by its first two bytes."""
    try:
        data = path.read_bytes()
        if data.startswith(b"\x1f\x8b"):
            data = gzip.decompress(data)
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(
            f"{path}: cannot be read, it may be truncated ({first_line(error)})"
        ) from error
    header = 4 + 4 * dimensions
    magic = 0x800 + dimensions
    if len(data) >= 4 and data[:4] != struct.pack(">I", magic):
        raise DataError(f"{path}: magic number 0x{data[:4].hex()}; expected 0x{magic:08x}")
    if len(data) < header:
        raise DataError(f"{path}: truncated, {len(data)} bytes; its header alone has {header}")
    shape = struct.unpack(f">{dimensions}I", data[4:header])
    if len(data) - header != math.prod(shape):
        what = "truncated" if len(data) - header < math.prod(shape) else "too long"
        raise DataError(
            f"{path}: {what}, {len(data) - header} bytes after the header; its sizes "
            f"{'x'.join(map(str, shape))} ask for {math.prod(shape)}"
        )
    try:
        return np.frombuffer(data, np.uint8, offset=header).reshape(shape)
    except ValueError as error:  # a zero among sizes that are too large for an array
        raise DataError(f"{path}: its sizes are {'x'.join(map(str, shape))}") from error
