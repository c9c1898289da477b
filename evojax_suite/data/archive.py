"""Tar archives, plain or gzipped, read in one pass and never extracted to disk."""

from __future__ import annotations

import gzip
import tarfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path, PurePosixPath

from evojax_suite.data.cifar import batch_names, read_cifar
from evojax_suite.data.errors import DataError, data_error
from evojax_suite.data.image_tree import ImageTree
from evojax_suite.data.source import Source

SUFFIXES = (".tar", ".tar.gz", ".tgz")


def archive_stem(path: Path) -> str | None:
    """The file name without its tar suffix, or None if it has none of SUFFIXES."""
    endings = (suffix for suffix in SUFFIXES if path.name.lower().endswith(suffix))
    return next((path.name[: -len(ending)] for ending in endings), None)


def read_archive(path: Path, cifar_kinds: tuple[str, ...], image_size: int | None = None) -> Source:
    """The CIFAR batches of the given kinds, or the images in class folders, of a tar archive.

    image_size: the height and width to which the latter are cut and resized. Raises DataError for
    a damaged archive and for one with neither.
    """
    batches: dict[str, dict[str, bytes]] = {kind: {} for kind in cifar_kinds}
    with ImageTree(str(path), image_size) as tree:
        for member, data in _walk(path):
            kind = next((kind for kind in batches if member.name in batch_names(kind)), None)
            if kind is not None and data is not None:
                batches[kind][member.name] = data
            else:
                tree.add(member, data)
        for kind, files in batches.items():
            if files:
                return read_cifar(files, kind, str(path))
        if tree.is_empty:
            neither = "neither CIFAR batches nor images as train|val|test/<class>/<image>"
            raise DataError(f"{path}: holds {neither}")
        return replace(tree.source(), name=archive_stem(path))


def _walk(path: Path) -> Iterator[tuple[PurePosixPath, bytes | None]]:
    """All regular files (with their bytes) and folders (with None), in the archive's order."""
    with data_error(f"{path}: not a readable tar archive, it may be truncated"):
        with path.open("rb") as file:
            open_ = gzip.open if file.read(2) == b"\x1f\x8b" else open
        with open_(path, "rb") as stream, tarfile.open(fileobj=stream, mode="r:") as tar:
            for member in tar:
                if member.isdir():
                    yield PurePosixPath(member.name), None
                elif member.isreg():
                    content = tar.extractfile(member)
                    yield PurePosixPath(member.name), content.read() if content else b""
            # tarfile takes a cut or damaged header for the archive's end; a true end is zeros.
            stream.seek(tar.offset)
            if stream.read(tarfile.BLOCKSIZE) != bytes(tarfile.BLOCKSIZE):
                raise tarfile.ReadError("the end of the archive is missing")
