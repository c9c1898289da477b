"""The search for a set in a local directory, and the reading of a user's set by its path."""

from __future__ import annotations

import re
from functools import partial
from pathlib import Path

from evojax_suite.data import cifar, idx, tfds
from evojax_suite.data.archive import SUFFIXES, archive_stem, read_archive
from evojax_suite.data.cache import cached
from evojax_suite.data.catalog import Known, find_known
from evojax_suite.data.errors import DataError
from evojax_suite.data.image_tree import read_image_folder
from evojax_suite.data.npz import read_npz
from evojax_suite.data.source import Source
from evojax_suite.names import plain


def find_local(known: Known, data_dir: Path, cache: bool = True) -> Source | None:
    """The set in `data_dir`, or None where there is nothing of it.

    Looks, in this order, in `data_dir`'s folder of the set's name and in `data_dir` itself for
    <name>.npz, medmnist/<name>.npz, <name>*.tar (.tar.gz, .tgz), and the set's original files, a
    prepared TensorFlow dataset or class folders. `cache`: whether to cache archives and class
    folders. Raises DataError if `data_dir` is no folder, and if a file of the set cannot be read.
    """
    if not data_dir.is_dir():
        raise DataError(f"{data_dir}: no such folder; give one with the datasets as data_dir")
    named = [path for path in sorted(data_dir.iterdir()) if plain(path.name) == plain(known.name)]
    for folder in (*filter(Path.is_dir, named), data_dir):
        for npz in (folder / f"{known.name}.npz", folder / "medmnist" / f"{known.name}.npz"):
            if npz.is_file():
                return read_npz(npz)
        if archive := _find_archive(known, folder):
            return _read_archive(archive, known, cache)
        # MNIST, Fashion-MNIST and KMNIST have the same file names: the folder's name decides.
        fits_name = find_known(folder.name) in (None, known)
        if fits_name and (source := _read_files(folder, known, cache)):
            return source
    return None


def places(known: Known) -> str:
    """The places where `find_local` looks, for messages."""
    return f"{known.name}/, {known.name}.npz, medmnist/{known.name}.npz, {known.name}*.tar[.gz]"


def read_path(path: Path, cache: bool = True, image_size: int | None = None) -> Source:
    """The set of a user's folder, .tar, .tar.gz, .tgz or .npz. image_size: the height and width to
    which the images of class folders are cut and resized. Raises DataError."""
    if path.is_dir():
        if source := _read_files(path, None, cache, image_size):
            return source
        raise DataError(
            f"{path}: no dataset in this folder; allowed: train|val|test/<class>/<image>, IDX "
            "files, CIFAR batches, or a set prepared by TensorFlow Datasets"
        )
    if not path.is_file():
        raise DataError(f"{path}: no such file or folder")
    if path.suffix.lower() == ".npz":
        return read_npz(path)
    if archive_stem(path) is not None:
        return _read_archive(path, None, cache, image_size)
    raise DataError(f"{path}: unknown file type; allowed: .npz, {', '.join(SUFFIXES)}, or a folder")


def _cifar_kinds(known: Known | None) -> tuple[str, ...]:
    return tuple(kind for kind in cifar.FOLDERS if known is None or kind == known.name)


def _find_archive(known: Known, folder: Path) -> Path | None:
    """The archive whose name begins with the set's; the official and the bare name come first."""
    name = re.compile("[-_]?".join(plain(known.name)) + r"(?![0-9A-Za-z])", re.IGNORECASE)
    stems = {
        path: plain(stem)
        for path in sorted(folder.iterdir())
        if path.is_file() and (stem := archive_stem(path)) and name.match(stem)
    }
    official = [plain(known.name + kind) for kind in ("", "-binary", "-python")]
    first = [path for path, stem in stems.items() if stem in official]
    if not first and len(stems) > 1:
        several = f"several archives could be {known.name}: {', '.join(p.name for p in stems)}"
        raise DataError(f"{folder}: {several}; keep one of them there")
    return next(iter(first or stems), None)


def _read_archive(
    path: Path, known: Known | None, cache: bool, image_size: int | None = None
) -> Source:
    kinds = _cifar_kinds(known)
    read = partial(read_archive, path, kinds, image_size)
    about = (image_size,) if image_size else ()
    return cached(read, path, kinds, path.name, *about) if cache else read()


def _read_files(
    folder: Path, known: Known | None, cache: bool, image_size: int | None = None
) -> Source | None:
    """The set whose files lie in the folder in one of the known layouts, else None."""
    if (known is None or known.files == "idx") and (paths := idx.find_idx(folder)):
        return idx.read_idx_files(paths, str(folder))
    for kind in _cifar_kinds(known):
        if batches := cifar.batches_in_folder(folder, kind):
            return cifar.read_cifar(batches, kind, str(folder))
    if prepared := tfds.find_prepared(folder):
        return tfds.read_prepared(prepared, known.name if known else None)
    if known is not None and not (folder / "train").is_dir():
        return None
    read = partial(read_image_folder, folder, image_size)
    about = (image_size,) if image_size else ()
    return cached(read, folder, *about) if cache else read()
