"""Sets of TensorFlow Datasets, without TensorFlow: prepared on disk, or their files downloaded.

`tfds.data_source(download=True)` is not used to prepare a set: as of TensorFlow Datasets 4.9 the
builders of these sets read their files through TensorFlow. The download manager works without it,
checks the checksums it has, and keeps the files, which the readers of this package then read.
"""

from __future__ import annotations

import os
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any

import numpy as np

from evojax_suite.data import archive, idx, npz
from evojax_suite.data.catalog import Known
from evojax_suite.data.errors import DataError, data_error, first_line
from evojax_suite.data.source import PART_NAMES, Source, checked_split
from evojax_suite.names import plain


def tfds_folder() -> Path:
    """The folder of TensorFlow Datasets: TFDS_DATA_DIR, else ~/tensorflow_datasets."""
    return Path(os.path.expanduser(os.environ.get("TFDS_DATA_DIR") or "~/tensorflow_datasets"))


def from_tfds(known: Known) -> Source:
    """The set that TensorFlow Datasets has prepared, or else that in its files, downloaded. Raises
    DataError if it cannot be downloaded; without a network, within seconds."""
    if prepared := find_prepared(tfds_folder() / known.name):
        return read_prepared(prepared, known.name)
    paths = _download(known)
    if known.files == "idx":
        return idx.read_idx_files(dict(zip(idx.STEMS, paths, strict=True)), known.name)
    if known.files == "cifar":
        return archive.read_archive(paths[0], (known.name,))
    return npz.read_npz(paths[0])


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
    """A prepared set with the features "image" and "label", which must have the name `name` if that
    is given. Only random-access files (array_record) can be read without TensorFlow. Raises
    DataError for others, and for damaged ones."""
    tfds = _import_tfds(str(folder))
    needed = (
        "a set prepared by TensorFlow Datasets as array_record, with the features image and label"
    )
    with data_error(f"{folder}: cannot be read", advice=f"; needed: {needed}"):
        builder = tfds.builder_from_directory(str(folder))
        if name is not None and plain(builder.name) != plain(name):
            raise DataError(f"{folder}: holds the set {builder.name}; needed: {name}")
        splits = builder.as_data_source()
        label = builder.info.features["label"]
        parts = {}
        for split, part in PART_NAMES.items():
            if split in splits:
                examples = [splits[split][index] for index in range(len(splits[split]))]
                images = np.stack([example["image"] for example in examples])
                labels = np.array([example["label"] for example in examples])
                parts[part] = checked_split(images, labels, f"{folder} ({split})")
        return Source(parts, tuple(label.names), str(folder))


def _import_tfds(where: str) -> Any:
    """The tensorflow_datasets module, imported only when a set needs it (it is optional)."""
    missing = f"{where}: reading it needs tensorflow_datasets"
    advice = "; pip install tensorflow_datasets array_record importlib_resources"
    with data_error(missing, ImportError, advice=advice):
        import tensorflow_datasets
    return tensorflow_datasets


def _download(known: Known) -> list[Path]:
    """The set's files, from the cache of TensorFlow Datasets or freshly downloaded."""
    tfds = _import_tfds(known.name)
    folder = tfds_folder() / "downloads"
    with data_error("download failed"):
        kept = "".join(note.read_text() for note in (folder / known.name).glob("*.INFO"))
        for url in known.urls:
            if f'"{url}"' not in kept:
                _check_reachable(url)
        manager = tfds.download.DownloadManager(download_dir=folder, dataset_name=known.name)
        return [Path(path) for path in manager.download(list(known.urls))]


def _check_reachable(url: str) -> None:
    """Raise an error soon where there is no network: the download itself retries for minutes."""
    try:
        urllib.request.urlopen(urllib.request.Request(url, method="HEAD"), timeout=10).close()
    except urllib.error.HTTPError:
        pass  # the server answers; the download says what is wrong, if anything
    except OSError as error:
        raise OSError(f"cannot reach {url}: {first_line(error)}") from error
