"""Finds a set in a local directory, and reads a user's own set by its path."""

from __future__ import annotations

import re
from functools import partial
from pathlib import Path

from evojax_suite.data.archive import SUFFIXES, archive_stem, read_archive
from evojax_suite.data.cache import cached
from evojax_suite.data.catalog import Known, find_known, plain
from evojax_suite.data.cifar import FOLDERS, batches_in_folder, read_cifar
from evojax_suite.data.errors import DataError
from evojax_suite.data.idx import find_idx, read_idx_files
from evojax_suite.data.image_tree import ImageTree, walk_folder
from evojax_suite.data.npz import read_npz
from evojax_suite.data.prepared import find_prepared, read_prepared
from evojax_suite.data.source import Source


def find_local(known: Known, data_dir: Path, cache: bool = True) -> Source | None:
    """The set in `data_dir`, or None where there is nothing of it.

    Looks, in this order, in `data_dir`'s folder of the set's name and in `data_dir` itself for
    <name>.npz, medmnist/<name>.npz, <name>*.tar (.tar.gz, .tgz), and the set's own files, a
    prepared TensorFlow dataset or class folders. `cache`: of archives and class folders.
    Raises DataError if `data_dir` is no folder, and if what is found cannot be read.
    """
    if not data_dir.is_dir():
        raise DataError(f"{data_dir}: no such folder; give one with the datasets as data_dir")
    own = [path for path in sorted(data_dir.iterdir()) if plain(path.name) == plain(known.name)]
    for folder in (*filter(Path.is_dir, own), data_dir):
        for npz in (folder / f"{known.name}.npz", folder / "medmnist" / f"{known.name}.npz"):
            if npz.is_file():
                return read_npz(npz)
        archive = _find_archive(known, folder)
        if archive is not None:
            return _read_archive(archive, _cifar_kinds(known), cache)
        # MNIST, Fashion-MNIST and KMNIST have the same file names: the folder's name decides.
        of_another = find_known(folder.name) not in (None, known)
        source = None if of_another else _read_files(folder, known, cache)
        if source is not None:
            return source
    return None


def places(known: Known) -> str:
    """What `find_local` looks for, in words."""
    return f"{known.name}/, {known.name}.npz, medmnist/{known.name}.npz, {known.name}*.tar[.gz]"


def read_path(path: Path, cache: bool = True) -> Source:
    """A user's own set: a folder, a .tar, .tar.gz or .tgz, or a .npz. Raises DataError."""
    if path.is_dir():
        source = _read_files(path, None, cache)
        if source is None:
            raise DataError(
                f"{path}: no dataset in this folder; allowed: train|val|test/<class>/<image>, IDX "
                "files, CIFAR batches, or a set prepared by TensorFlow Datasets"
            )
        return source
    if not path.is_file():
        raise DataError(f"{path}: no such file or folder")
    if path.suffix.lower() == ".npz":
        return read_npz(path)
    if archive_stem(path) is not None:
        return _read_archive(path, tuple(FOLDERS), cache)
    raise DataError(f"{path}: unknown file type; allowed: .npz, {', '.join(SUFFIXES)}, or a folder")


def _cifar_kinds(known: Known) -> tuple[str, ...]:
    return (known.name,) if known.files == "cifar" else ()


def _find_archive(known: Known, folder: Path) -> Path | None:
    """The archive whose name begins with the set's; the official and the bare name come first."""
    begins_with_name = re.compile(
        "[-_]?".join(plain(known.name)) + r"(?![0-9A-Za-z])", re.IGNORECASE
    )
    found = {
        path: plain(stem)
        for path in sorted(folder.iterdir())
        if path.is_file() and (stem := archive_stem(path)) and begins_with_name.match(stem)
    }
    official = [plain(known.name + kind) for kind in ("", "-binary", "-python")]
    first = [path for path, stem in found.items() if stem in official]
    if not first and len(found) > 1:
        raise DataError(
            f"{folder}: several archives could be {known.name}: "
            f"{', '.join(path.name for path in found)}; keep one of them there"
        )
    return next(iter(first or found), None)


def _read_archive(path: Path, cifar_kinds: tuple[str, ...], cache: bool) -> Source:
    read = partial(read_archive, path, cifar_kinds)
    return cached(read, path, cifar_kinds, path.name) if cache else read()


def _read_files(folder: Path, known: Known | None, cache: bool) -> Source | None:
    """A set whose files lie in the folder in one of the known layouts, else None."""
    if known is None or known.files == "idx":
        paths = find_idx(folder)
        if paths is not None:
            return read_idx_files(paths, str(folder))
    for kind in FOLDERS if known is None else _cifar_kinds(known):
        batches = batches_in_folder(folder, kind)
        if batches:
            return read_cifar(batches, kind, str(folder))
    prepared = find_prepared(folder)
    if prepared is not None:
        return read_prepared(prepared, known.name if known else None)
    if known is not None and not (folder / "train").is_dir():
        return None
    read = partial(_read_tree, folder)
    return cached(read, folder) if cache else read()


def _read_tree(folder: Path) -> Source | None:
    with ImageTree(str(folder)) as tree:
        for path, data in walk_folder(folder):
            tree.add(path, data)
        return None if tree.is_empty else tree.source()
