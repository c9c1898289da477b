"""Sets that TensorFlow Datasets has prepared on disk, read without TensorFlow."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from evojax_suite.data.catalog import plain
from evojax_suite.data.errors import DataError, first_line
from evojax_suite.data.source import Source, checked_split

_SPLITS = {
    "train": "train", "validation": "validation", "val": "validation", "valid": "validation",
    "test": "test",
}  # fmt: skip


def find_prepared(folder: Path) -> Path | None:
    """The folder itself or its newest `<major.minor.patch>` subfolder with a dataset_info.json."""
    if (folder / "dataset_info.json").is_file():
        return folder
    versions = {}
    for info in folder.glob("*.*.*/dataset_info.json"):
        numbers = info.parent.name.split(".")
        if all(number.isdecimal() for number in numbers):
            versions[tuple(map(int, numbers))] = info.parent
    return versions[max(versions)] if versions else None


def read_prepared(folder: Path, name: str | None) -> Source:
    """Read a prepared set whose features include "image" and "label"; `name` is the one it must be.

    Only random-access files (array_record) can be read without TensorFlow; raises DataError for
    others, and for a set with other features or damaged files.
    """
    tfds = import_tfds(str(folder))
    try:
        builder = tfds.builder_from_directory(str(folder))
        if name is not None and plain(builder.name) != plain(name):
            raise DataError(f"{folder}: holds the set {builder.name}; needed: {name}")
        splits = builder.as_data_source()
        label = builder.info.features["label"]
        parts = {}
        for split, part in _SPLITS.items():
            if split in splits:
                examples = [splits[split][index] for index in range(len(splits[split]))]
                images = np.stack([example["image"] for example in examples])
                labels = np.array([example["label"] for example in examples])
                parts[part] = checked_split(images, labels, f"{folder} ({split})")
        return Source(parts, tuple(label.names), str(folder))
    except DataError:
        raise
    except Exception as error:  # tfds, array_record and the decoders raise many kinds
        raise DataError(
            f"{folder}: cannot be read ({first_line(error)}); needed: a set prepared by TensorFlow "
            "Datasets as array_record, with the features image and label"
        ) from error


def import_tfds(where: str) -> Any:
    """The tensorflow_datasets module, imported only when a set needs it (it is optional)."""
    try:
        import tensorflow_datasets
    except ImportError as error:
        raise DataError(
            f"{where}: reading it needs tensorflow_datasets ({first_line(error)}); pip install "
            "tensorflow_datasets array_record importlib_resources"
        ) from error
    return tensorflow_datasets
