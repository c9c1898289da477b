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
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import PIL
import platformdirs

from evojax_suite.data.errors import first_line
from evojax_suite.data.source import Source, sorted_walk
from evojax_suite.types import Split

FORMAT = 1
"""To be raised where the same files come to give other arrays, or entries another layout."""

_SLOW_SECONDS = 0.5
_SETTLED_SECONDS = 2.0  # the coarsest time stamps of a file system, FAT's
_ABANDONED_SECONDS = 24 * 3600.0
_ENDING, _UNFINISHED = ".dataset", ".partial"
_LOGGER = logging.getLogger(__name__)

SourceT = TypeVar("SourceT", bound=Source | None)


def folder() -> Path:
    """The folder of the entries; it need not exist."""
    return platformdirs.user_cache_path("evojax-suite", appauthor=False) / "datasets"


def cached(read: Callable[[], SourceT], path: Path, *reader: Any) -> Source | SourceT:
    """The result of `read`, from the cache where the files that it reads are unchanged.

    path: the archive that `read` reads, or the folder with all that is below it.
    reader: what else the result depends on, as values that JSON has.

    An entry holds for as long as each file keeps its size and times; a path and reader have one.
    A set that is read quickly, or that changed during the reading or just before, is not kept. An
    entry that cannot be read or written is no error.
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
    if kept := _read(entry, about, str(path)):
        return kept
    started, clock = time.perf_counter(), time.time()
    source = read()
    is_slow = time.perf_counter() - started >= _SLOW_SECONDS
    is_settled = newest < clock - _SETTLED_SECONDS
    if source is not None and is_slow and is_settled and _state(place)[0] == state:
        try:
            _write(entry, about, source)
        except OSError as error:
            _LOGGER.warning("%s is not kept for the next time: %s", path, first_line(error))
    return source


def _state(path: str) -> tuple[str | None, float]:
    """A digest of names, sizes and times of the files at and below `path`, and the newest time.
    None where some cannot be listed: reading then says why. The time of the last status change
    tells of new bytes with the same size and modification time."""
    digest, newest, files = hashlib.blake2b(digest_size=16), 0, [path]
    try:
        for root, folders, names in sorted_walk(path) if os.path.isdir(path) else ():
            files += [os.path.join(root, name) for name in sorted([*folders, *names])]
        for file in files:
            status = os.stat(file)
            newest = max(newest, status.st_mtime_ns, status.st_ctime_ns)
            state = f"\0{status.st_size} {status.st_mtime_ns} {status.st_ctime_ns}\0"
            digest.update(os.fsencode(file) + state.encode())
    except OSError:
        return None, 0.0
    return digest.hexdigest(), newest / 1e9


def _read(entry: Path, about: dict[str, Any], where: str) -> Source | None:
    """The set in an entry that is whole and has this `about`, else None."""
    try:
        with entry.open("rb") as file:
            digest, line = file.read(64), file.readline()
            head = json.loads(line)
            if head | about != head:
                return None
            shapes = [shape for pair in head["parts"].values() for shape in pair]
            sizes = [math.prod(shape) for shape, _ in shapes]
            if any(size < 0 for size in sizes) or sum(sizes) > os.fstat(file.fileno()).st_size:
                return None
            arrays = [np.fromfile(file, kind, math.prod(s)).reshape(s) for s, kind in shapes]
            total = hashlib.blake2b(line)
            for array in arrays:
                total.update(array.data)
            if file.read(1) or total.digest() != digest:
                return None
            splits = map(Split, arrays[::2], arrays[1::2])
            names = None if head["class_names"] is None else tuple(head["class_names"])
            return Source(dict(zip(head["parts"], splits, strict=True)), names, where, head["name"])
    except Exception:  # a damaged entry, in whatever way, is as none
        return None


def _write(entry: Path, about: dict[str, Any], source: Source) -> None:
    """Write an entry whole or not at all, and drop obsolete ones. Raises OSError."""
    if not entry.is_absolute():  # a user without a home folder
        raise OSError(f"{entry.parent} is no folder of the user")
    pairs = {part: (split.images, split.labels) for part, split in source.parts.items()}
    shapes = {part: [[a.shape, a.dtype.str] for a in pair] for part, pair in pairs.items()}
    rest = {"class_names": source.class_names, "name": source.name, "parts": shapes}
    line = json.dumps(about | rest).encode() + b"\n"
    digest = hashlib.blake2b(line)
    entry.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    _tidy(entry.parent)
    number, unfinished = tempfile.mkstemp(_UNFINISHED, dir=entry.parent)
    try:
        with open(number, "wb") as file:
            file.write(bytes(digest.digest_size) + line)
            for array in (np.ascontiguousarray(a) for pair in pairs.values() for a in pair):
                digest.update(array.data)
                file.write(array.data)
            file.seek(0)
            file.write(digest.digest())
        os.replace(unfinished, entry)
    finally:
        with contextlib.suppress(OSError):
            os.unlink(unfinished)


def _tidy(cache: Path) -> None:
    """Delete entries that are unreadable or whose set is gone, and what a killed process left."""
    oldest = time.time() - _ABANDONED_SECONDS
    for file in cache.iterdir():
        with contextlib.suppress(OSError):
            is_left = file.suffix == _UNFINISHED and file.stat().st_mtime < oldest
            if is_left or (file.suffix == _ENDING and not os.path.exists(_path_of(file))):
                file.unlink()


def _path_of(entry: Path) -> str:
    """The path of an entry's set, or nothing."""
    try:
        with entry.open("rb") as file:
            file.seek(64)
            return str(json.loads(file.readline())["path"])
    except (ValueError, KeyError, TypeError):
        return ""
