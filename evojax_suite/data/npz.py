"""Sets in one .npz file, whose arrays have the names of MedMNIST or those of Keras."""

from __future__ import annotations

import warnings
from collections.abc import Container
from pathlib import Path

import numpy as np

from evojax_suite.data.errors import DataError, first_line
from evojax_suite.data.source import Source, checked_split

_ARRAYS = {
    "train": (("train_images", "train_labels"), ("x_train", "y_train")),
    "validation": (("val_images", "val_labels"), ("x_val", "y_val")),
    "test": (("test_images", "test_labels"), ("x_test", "y_test")),
}


def arrays_in(path: Path, names: Container[str] | None = None) -> dict[str, np.ndarray]:
    """The arrays of a .npz file, or those of `names` that it has. Pickled ones are never loaded.
    Raises OSError, and ValueError, one line without the path, for a damaged file."""
    try:
        with warnings.catch_warnings(action="ignore"):  # of damaged headers, or of Python 2
            file = np.load(path, allow_pickle=False)
            if isinstance(file, np.ndarray):
                raise ValueError("it is a single array")
            with file:
                arrays = {name: file[name] for name in file.files if not names or name in names}
    except OSError:
        raise
    except Exception as error:  # a damaged zip or array header can raise nearly anything
        reason = first_line(error).split(". ")[0]  # numpy goes on to advise unpickling
        raise ValueError(f"not a readable .npz, it may be truncated ({reason})") from error
    for name, array in arrays.items():
        if not isinstance(array, np.ndarray):  # without the magic number the bytes as they are
            raise ValueError(f"not a readable .npz, {name!r} is no array")
    return arrays


def read_npz(path: Path) -> Source:
    """The set of `train_images`, `train_labels` and the optional `val_*` and `test_*`, or of
    `x_train`, `y_train`, .... Raises DataError for a damaged file, for images without labels (or
    the reverse), and for a missing train part."""
    try:
        arrays = arrays_in(path, {name for p in _ARRAYS.values() for pair in p for name in pair})
    except (OSError, ValueError) as error:
        raise DataError(f"{path}: {first_line(error)}") from error
    parts = {}
    for part, pairs in _ARRAYS.items():
        for images, labels in pairs:
            if (images in arrays) != (labels in arrays):
                raise DataError(f"{path}: has only one of {images} and {labels}; both are needed")
            if images in arrays and part not in parts:
                parts[part] = checked_split(arrays[images], arrays[labels], f"{path} ({part})")
    if "train" not in parts:
        raise DataError(f"{path}: no train_images and train_labels, nor x_train and y_train")
    return Source(parts, None, str(path))
