"""Sets from TensorFlow Datasets: prepared earlier by the user, or their files downloaded.

`tfds.data_source(download=True)` is not used to prepare a set: as of TensorFlow Datasets 4.9 the
builders of these sets read their files through TensorFlow, which this package does without. Its
download manager works without TensorFlow, checks the checksums it has, and keeps the files, which
the readers of this package then read.
"""

from __future__ import annotations

import os
import urllib.error
import urllib.request
from pathlib import Path

from evojax_suite.data import idx
from evojax_suite.data.archive import read_archive
from evojax_suite.data.catalog import Known
from evojax_suite.data.errors import DataError, first_line
from evojax_suite.data.npz import read_npz
from evojax_suite.data.prepared import find_prepared, import_tfds, read_prepared
from evojax_suite.data.source import Source


def tfds_folder() -> Path:
    """The folder of TensorFlow Datasets: TFDS_DATA_DIR, else ~/tensorflow_datasets."""
    return Path(os.path.expanduser(os.environ.get("TFDS_DATA_DIR") or "~/tensorflow_datasets"))


def from_tfds(known: Known) -> Source:
    """Read a set that TensorFlow Datasets has prepared, else download and read its files.

    Raises DataError if the set cannot be downloaded; without a network, within seconds.
    """
    prepared = find_prepared(tfds_folder() / known.name)
    if prepared is not None:
        return read_prepared(prepared, known.name)
    paths = _download(known)
    if known.files == "idx":
        stems = [stem for pair in idx.FILES.values() for stem in pair]
        return idx.read_idx_files(dict(zip(stems, paths, strict=True)), known.name)
    if known.files == "cifar":
        return read_archive(paths[0], (known.name,))
    return read_npz(paths[0])


def _download(known: Known) -> list[Path]:
    """The set's files, from the cache of TensorFlow Datasets or freshly downloaded."""
    tfds = import_tfds(known.name)
    folder = tfds_folder() / "downloads"
    try:
        kept = "".join(note.read_text() for note in (folder / known.name).glob("*.INFO"))
        for url in known.urls:
            if f'"{url}"' not in kept:
                _check_reachable(url)
        manager = tfds.download.DownloadManager(download_dir=folder, dataset_name=known.name)
        return [Path(path) for path in manager.download(list(known.urls))]
    except Exception as error:  # network, disk and checksum errors are of many kinds
        raise DataError(f"download failed ({first_line(error)})") from error


def _check_reachable(url: str) -> None:
    """Raise an error soon where there is no network: the download itself retries for minutes."""
    try:
        urllib.request.urlopen(urllib.request.Request(url, method="HEAD"), timeout=10).close()
    except urllib.error.HTTPError:
        pass  # the server answers; the download says what is wrong, if anything
    except OSError as error:
        raise OSError(f"cannot reach {url}: {first_line(error)}") from error
