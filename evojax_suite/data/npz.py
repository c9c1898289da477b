"""Sets in one .npz file: MedMNIST's names of the arrays, or those of Keras."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from evojax_suite.data.errors import DataError, first_line
from evojax_suite.data.source import Source, checked_split

_ARRAYS = {
    "train": (("train_images", "train_labels"), ("x_train", "y_train")),
    "validation": (("val_images", "val_labels"), ("x_val", "y_val")),
    "test": (("test_images", "test_labels"), ("x_test", "y_test")),
}


def read_npz(path: Path) -> Source:
    """Read `train_images`, `train_labels` and the optional `val_*` and `test_*`.

    `x_train`, `y_train`, ... are accepted too. Pickled arrays are never loaded. Raises DataError
    for a damaged file, for images without labels (or the reverse), and for a missing train part.
    """
    try:
        with np.load(path, allow_pickle=False) as archive:
            names = {name for pairs in _ARRAYS.values() for pair in pairs for name in pair}
            arrays = {name: archive[name] for name in archive.files if name in names}
    except Exception as error:  # a damaged zip or array header can raise nearly anything
        raise DataError(
            f"{path}: not a readable .npz, it may be truncated ({first_line(error)})"
        ) from error
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
