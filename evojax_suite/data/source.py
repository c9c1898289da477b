"""What a reader returns: checked parts of a dataset, before missing parts are split off."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from evojax_suite.data.errors import DataError
from evojax_suite.types import Split

PART_NAMES = {
    "train": "train", "validation": "validation", "val": "validation", "valid": "validation",
    "test": "test",
}  # fmt: skip
"""The names of parts on disk, and in a `Source`."""


@dataclass(frozen=True)
class Source:
    """The parts of a dataset that its files have.

    parts: keyed "train", "validation", "test"; a part that the files lack is absent.
    class_names: one per label, or None where the format has no names.
    where: path or name for error messages.
    name: the archive's name where its images may be another version of the set (cifar10_jpeg).
    """

    parts: dict[str, Split]
    class_names: tuple[str, ...] | None
    where: str
    name: str | None = None


def joined(splits: Sequence[Split]) -> Split:
    """One split of all images of `splits`, in their order."""
    images, labels = zip(*((split.images, split.labels) for split in splits), strict=True)
    return Split(np.concatenate(images), np.concatenate(labels))


def part_of(split: Split, positions: np.ndarray | slice) -> Split:
    """The images of `split` at `positions`, with their labels."""
    return Split(split.images[positions], split.labels[positions])


def checked_split(images: np.ndarray, labels: np.ndarray, where: str) -> Split:
    """One part, checked and in the form that `Split` promises.

    images: (N, H, W) or (N, H, W, C), uint8 in 0..255 or float in [0, 1].
    labels: (N,) or (N, 1) integers >= 0.
    Raises DataError for every other type, shape or value, and for a part without images.
    """
    images, labels = np.asarray(images), np.asarray(labels)
    if images.ndim == 3:
        images = images[..., None]
    if images.ndim != 4 or not 1 <= images.shape[3] <= 4 or 0 in images.shape[1:]:
        allowed = "(N, H, W), or (N, H, W, C) with 1 to 4 channels"
        raise DataError(f"{where}: images have shape {images.shape}; allowed: {allowed}")
    if labels.ndim == 2 and labels.shape[1] == 1:
        labels = labels[:, 0]
    if labels.ndim != 1 or labels.dtype.kind not in "iu":
        actual = f"shape {labels.shape} and type {labels.dtype}"
        raise DataError(f"{where}: labels have {actual}; allowed: (N,) or (N, 1) integers")
    if len(images) != len(labels):
        raise DataError(f"{where}: {len(images)} images but {len(labels)} labels; they must agree")
    if len(images) == 0:
        raise DataError(f"{where}: the part has no images; at least one is needed")
    if labels.min() < 0 or labels.max() > np.iinfo(np.int32).max:
        wrong = labels.min() if labels.min() < 0 else labels.max()
        raise DataError(f"{where}: label {wrong} is out of range; labels count from 0")
    labels = np.ascontiguousarray(labels, np.int32)
    if images.dtype == np.uint8:
        return Split(np.ascontiguousarray(images), labels)
    if not np.issubdtype(images.dtype, np.floating):
        allowed = "uint8 in 0..255, or float in [0, 1]"
        raise DataError(f"{where}: images have type {images.dtype}; allowed: {allowed}")
    low, high = float(images.min()), float(images.max())
    if np.isnan(low) or np.isnan(high):
        raise DataError(f"{where}: float images contain NaN; allowed: values in [0, 1]")
    if low < 0 or high > 1:
        actual = f"[{low:g}, {high:g}]"
        raise DataError(f"{where}: float images lie in {actual}; allowed: values in [0, 1]")
    return Split(np.ascontiguousarray(images, np.float32), labels)


def sorted_walk(folder: str | Path) -> Iterator[tuple[str, list[str], list[str]]]:
    """`os.walk` in sorted order, with an OSError for a folder that cannot be listed."""

    def refuse(error: OSError) -> None:
        raise error

    for root, folders, files in os.walk(folder, onerror=refuse):
        folders.sort()
        yield root, folders, sorted(files)
