"""What a reader hands over: checked parts of a dataset, before missing parts are split off."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from evojax_suite.data.errors import DataError
from evojax_suite.types import Split


@dataclass(frozen=True)
class Source:
    """The parts that a reader found.

    parts: keyed "train", "validation", "test"; a part that the source lacks is absent.
    class_names: one per label, or None where the format has no names.
    where: path or name for error messages.
    name: the archive's name where its images may be another version of the set (cifar10_jpeg).
    """

    parts: dict[str, Split]
    class_names: tuple[str, ...] | None
    where: str
    name: str | None = None


def checked_split(images: np.ndarray, labels: np.ndarray, where: str) -> Split:
    """Check one part and bring it to the form that `Split` promises.

    images: (N, H, W) or (N, H, W, C), uint8 in 0..255 or float in [0, 1].
    labels: (N,) or (N, 1) integers >= 0.
    Raises DataError for every other type, shape or value, and for a part without images.
    """
    images, labels = np.asarray(images), np.asarray(labels)
    if images.ndim == 3:
        images = images[..., None]
    if images.ndim != 4 or not 1 <= images.shape[3] <= 4 or 0 in images.shape[1:]:
        raise DataError(
            f"{where}: images have shape {images.shape}; allowed: (N, H, W), or (N, H, W, C) with "
            "1 to 4 channels"
        )
    if labels.ndim == 2 and labels.shape[1] == 1:
        labels = labels[:, 0]
    if labels.ndim != 1 or labels.dtype.kind not in "iu":
        raise DataError(
            f"{where}: labels have shape {labels.shape} and type {labels.dtype}; allowed: (N,) or "
            "(N, 1) integers"
        )
    if len(images) != len(labels):
        raise DataError(f"{where}: {len(images)} images but {len(labels)} labels; they must agree")
    if len(images) == 0:
        raise DataError(f"{where}: the part has no images; at least one is needed")
    if labels.min() < 0 or labels.max() > np.iinfo(np.int32).max:
        wrong = labels.min() if labels.min() < 0 else labels.max()
        raise DataError(f"{where}: label {wrong} is out of range; labels count from 0")
    return Split(_checked_pixels(images, where), np.ascontiguousarray(labels, np.int32))


def _checked_pixels(images: np.ndarray, where: str) -> np.ndarray:
    if images.dtype == np.uint8:
        return np.ascontiguousarray(images)
    if not np.issubdtype(images.dtype, np.floating):
        raise DataError(
            f"{where}: images have type {images.dtype}; allowed: uint8 in 0..255, or float in "
            "[0, 1]"
        )
    lowest, highest = float(images.min()), float(images.max())
    if np.isnan(lowest) or np.isnan(highest):
        raise DataError(f"{where}: float images contain NaN; allowed: values in [0, 1]")
    if lowest < 0 or highest > 1:
        raise DataError(
            f"{where}: float images lie in [{lowest:g}, {highest:g}]; allowed: values in [0, 1]"
        )
    return np.ascontiguousarray(images, np.float32)
