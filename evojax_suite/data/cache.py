"""Sets that are slow to read, kept as plain arrays in the user's cache folder."""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import math
import os
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import PIL
import platformdirs

from evojax_suite.data.errors import first_line
from evojax_suite.data.source import Source
from evojax_suite.types import Split

FORMAT = 1
"""Another number where the same files come to give other arrays, or entries are laid out anew."""

_SLOW_SECONDS = 0.5
_SETTLED_SECONDS = 2.0  # the coarsest time stamps of a file system, FAT's
_ABANDONED_SECONDS = 24 * 3600.0
_ENDING = ".dataset"
_UNFINISHED = ".partial"

Found = TypeVar("Found", bound=Source | None)


def folder() -> Path:
    """The folder of the entries; it need not exist."""
    return platformdirs.user_cache_path("evojax-suite", appauthor=False) / "datasets"


def cached(read: Callable[[], Found], path: Path, *reader: Any) -> Source | Found:
    """What `read` gives, from the cache where the files at `path` are as they were.

    read: reads the archive or folder at `path`, and all below it if it is one. `reader` is what
    else decides, in values that JSON has.

    An entry holds for as long as each file has the size and times that it had; there is one for a
    path and reader. A set that is quickly read, or changed while or just before it was, is not
    kept. That an entry cannot be read or written is no error.
    """
    from evojax_suite import __version__  # the package imports this module

    place = os.path.realpath(path)
    state, newest = _state(place)
    if state is None:
        return read()
    name = hashlib.blake2b(json.dumps([place, *reader]).encode(), digest_size=16).hexdigest()
    entry = folder() / f"{name}{_ENDING}"
    versions = [FORMAT, __version__, PIL.__version__]  # Pillow's say how a JPEG is decoded
    about = {"versions": versions, "path": place, "state": state}
    kept = _read(entry, about, str(path))
    if kept is not None:
        return kept
    started, clock = time.perf_counter(), time.time()
    found = read()
    is_settled = newest < clock - _SETTLED_SECONDS
    if found is None or not is_settled or time.perf_counter() - started < _SLOW_SECONDS:
        return found
    if _state(place)[0] == state:
        try:
            _write(entry, about, found)
        except OSError as error:
            logging.getLogger(__name__).warning(
                "%s is not kept for the next time: %s", path, first_line(error)
            )
    return found


def _state(path: str) -> tuple[str | None, float]:
    """A digest of names, sizes and times of the files at and below `path`, and the newest time.

    Of a change with size and modification time as before, the time of the status still tells. No
    digest where not all can be seen: reading says why.
    """
    digest, newest = hashlib.blake2b(digest_size=16), 0
    try:
        for file in _files(path):
            found = os.stat(file)
            newest = max(newest, found.st_mtime_ns, found.st_ctime_ns)
            own = f"\0{found.st_size} {found.st_mtime_ns} {found.st_ctime_ns}\0"
            digest.update(os.fsencode(file) + own.encode())
    except OSError:
        return None, 0.0
    return digest.hexdigest(), newest / 1e9


def _files(path: str) -> Iterator[str]:
    def refuse(error: OSError) -> None:
        raise error

    yield path
    for root, folders, files in os.walk(path, onerror=refuse) if os.path.isdir(path) else ():
        folders.sort()
        yield from (os.path.join(root, name) for name in sorted([*folders, *files]))


def _read(entry: Path, about: dict[str, Any], where: str) -> Source | None:
    """The set in an entry that is whole and `about` the same, else None."""
    try:
        with entry.open("rb") as file:
            digest, line = file.read(64), file.readline()
            head = json.loads(line)
            if {name: head.get(name) for name in about} != about:
                return None
            sizes = [math.prod(shape) for pair in head["parts"].values() for shape, _ in pair]
            total = hashlib.blake2b(line)
            if any(size < 0 for size in sizes) or sum(sizes) > os.fstat(file.fileno()).st_size:
                return None
            parts = {}
            for part, pair in head["parts"].items():
                arrays = []
                for shape, kind in pair:
                    array = np.fromfile(file, np.dtype(kind), math.prod(shape)).reshape(shape)
                    total.update(array.data)
                    arrays.append(array)
                parts[part] = Split(*arrays)
            if file.read(1) or total.digest() != digest:
                return None
            names = head["class_names"]
            return Source(parts, None if names is None else tuple(names), where, head["name"])
    except Exception:  # damage of any kind is as if the entry were not there
        return None


def _write(entry: Path, about: dict[str, Any], source: Source) -> None:
    """Write an entry whole or not at all, and drop those that no one needs. Raises OSError."""
    if not entry.is_absolute():  # a user without a home folder
        raise OSError(f"{entry.parent} is no folder of the user")
    arrays = {part: (split.images, split.labels) for part, split in source.parts.items()}
    shapes = {part: [[a.shape, a.dtype.str] for a in pair] for part, pair in arrays.items()}
    names = {"class_names": source.class_names, "name": source.name}
    line = json.dumps(about | names | {"parts": shapes}).encode() + b"\n"
    digest = hashlib.blake2b(line)
    entry.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    _tidy(entry.parent)
    number, unfinished = tempfile.mkstemp(_UNFINISHED, dir=entry.parent)
    try:
        with open(number, "wb") as file:
            file.write(bytes(digest.digest_size) + line)
            for pair in arrays.values():
                for array in map(np.ascontiguousarray, pair):
                    digest.update(array.data)
                    file.write(array.data)
            file.seek(0)
            file.write(digest.digest())
        os.replace(unfinished, entry)
    finally:
        with contextlib.suppress(OSError):
            os.unlink(unfinished)


def _tidy(cache: Path) -> None:
    """Delete entries of what is gone, those that cannot be told, and what a killed process left."""
    for file in cache.iterdir():
        with contextlib.suppress(OSError):
            if file.suffix == _UNFINISHED:
                if file.stat().st_mtime < time.time() - _ABANDONED_SECONDS:
                    file.unlink()
            elif file.suffix == _ENDING and not os.path.exists(_path_of(file)):
                file.unlink()


def _path_of(entry: Path) -> str:
    """What an entry is of, or nothing."""
    try:
        with entry.open("rb") as file:
            file.seek(64)
            return str(json.loads(file.readline())["path"])
    except (ValueError, KeyError, TypeError):
        return ""
