"""Images in class folders: <part>/<class>/<image>, met one file at a time from a disk or a tar."""

from __future__ import annotations

import contextlib
import ctypes
import io
import logging
import os
import warnings
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path, PurePosixPath
from typing import NamedTuple, Self

import numpy as np
from PIL import Image

from evojax_suite.data.errors import DataError, first_line
from evojax_suite.data.source import Source, checked_split

_PARTS = {
    "train": "train", "val": "validation", "validation": "validation", "valid": "validation",
    "test": "test",
}  # fmt: skip
_SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp", ".webp", ".tif", ".tiff")
_FORMATS = ("PNG", "JPEG", "BMP", "WEBP", "TIFF")
_GREY_MODES = ("1", "L", "LA")
_COLOUR_MODES = ("P", "RGB", "RGBA", "CMYK", "YCbCr")
_LAYOUT = "train|val|test/<class>/<image>, in at most one top-level folder"
_SAMPLE_FORMAT, _SIGNED = 339, 2  # of TIFF
_NUM_THREADS = min(os.cpu_count() or 1, 8)
_AT_A_TIME = 64


class _Image(NamedTuple):
    """A file of an image, and the images of its class, by file name, that it belongs to."""

    path: PurePosixPath
    data: bytes
    others: list[tuple[str, np.ndarray]]


class ImageTree:
    """Collects the files of one set in any order; `source` gives the parts.

    The order within a part is by class, then by file name, whatever the order of arrival. A
    context, within which threads decode what was added: Pillow's decoders let others run.
    """

    def __init__(self, where: str) -> None:
        self.where = where
        self._threads = ThreadPoolExecutor(_NUM_THREADS)
        self._silence = contextlib.ExitStack()
        self._waiting: list[_Image] = []
        self._sent: deque[tuple[list[_Image], Future[list[np.ndarray]]]] = deque()
        self._top_folders: set[str] = set()
        self._parts: set[str] = set()
        self._classes: dict[tuple[str, str], list[tuple[str, np.ndarray]]] = {}
        self._size: tuple[int, ...] | None = None

    def __enter__(self) -> Self:
        self._silence.enter_context(_silence())
        return self

    def __exit__(self, *error: object) -> None:
        self._threads.shutdown(cancel_futures=True)
        self._silence.close()

    def add(self, path: PurePosixPath, data: bytes | None) -> None:
        """Take one file (`data` its bytes) or folder (`data` None), by its path in the set.

        Hidden files are skipped, and so is what is no image and outside the class folders.
        Raises DataError for an image out of place, and for a file in a class folder that is no
        image; then or later for one that cannot be decoded, or whose size differs from the others'.
        """
        steps = path.parts
        if any(step.startswith((".", "__MACOSX")) for step in steps):
            return
        is_image = data is not None and path.suffix.lower() in _SUFFIXES
        depth = 0 if steps and steps[0] in _PARTS else 1
        if len(steps) <= depth or steps[depth] not in _PARTS or len(steps) > depth + 3:
            if is_image:
                raise DataError(f"{self.where}: image {path} is out of place; layout: {_LAYOUT}")
            return
        self._top_folders.add("/".join(steps[:depth]))
        part = _PARTS[steps[depth]]
        self._parts.add(part)
        within_part = steps[depth + 1 :]
        if data is None and len(within_part) == 1:
            self._classes.setdefault((part, within_part[0]), [])
        elif is_image and len(within_part) == 2:
            others = self._classes.setdefault((part, within_part[0]), [])
            self._waiting.append(_Image(path, data or b"", others))
            if self._size is None or len(self._waiting) == _AT_A_TIME:
                self._decode()
        elif is_image or len(within_part) == 2:
            raise DataError(
                f"{self.where}: {path} is no image in a class folder; layout: {_LAYOUT}, images: "
                f"{', '.join(_SUFFIXES)}"
            )

    @property
    def is_empty(self) -> bool:
        return not self._parts

    def source(self) -> Source:
        """The parts; labels count the train part's classes, sorted (by number if all are numbers).

        Raises DataError as `add` does, and for an empty class folder, a part without images, a
        class that only the validation or test split has, and several top-level folders.
        """
        while self._sent:
            self._collect()
        self._decode()
        if len(self._top_folders) > 1:
            folders = ", ".join(sorted(folder or "(none)" for folder in self._top_folders))
            raise DataError(
                f"{self.where}: parts lie in several folders: {folders}; one is allowed"
            )
        for (part, name), images in self._classes.items():
            if not images:
                raise DataError(
                    f"{self.where}: class folder {part}/{name} is empty; each needs an image "
                    f"({', '.join(_SUFFIXES)})"
                )
        names = [name for part, name in self._classes if part == "train"]
        names.sort(key=int if all(name.isdecimal() for name in names) else None)
        in_colour = any(
            pixels.ndim == 3 for images in self._classes.values() for _, pixels in images
        )
        parts = {}
        for part in sorted(self._parts):
            where = f"{self.where} ({part})"
            found = {name: images for (own, name), images in self._classes.items() if own == part}
            unknown = sorted(set(found) - set(names))
            if unknown and "train" in self._parts:
                raise DataError(
                    f"{where}: class {unknown[0]} is not among the train part's classes"
                )
            if not found:
                raise DataError(f"{where}: the part has no images; layout: {_LAYOUT}")
            pixels, labels = [], []
            for label, name in enumerate(names):
                for _, image in sorted(found.get(name, []), key=lambda entry: entry[0]):
                    pixels.append(_in_colour(image) if in_colour else image)
                    labels.append(label)
            if pixels:
                parts[part] = checked_split(np.stack(pixels), np.array(labels), where)
        return Source(parts, tuple(names), self.where)

    def _decode(self) -> None:
        """Decode what waits: many images in a thread; few of them, and the very first, whose size
        all must have, at once."""
        images, self._waiting = self._waiting, []
        if len(images) < _AT_A_TIME:
            self._keep(images, _decode_all(self.where, images, self._size))
            return
        work = self._threads.submit(_decode_all, self.where, images, self._size)
        self._sent.append((images, work))
        if len(self._sent) > 2 * _NUM_THREADS:
            self._collect()

    def _collect(self) -> None:
        images, work = self._sent.popleft()
        self._keep(images, work.result())

    def _keep(self, images: list[_Image], decoded: list[np.ndarray]) -> None:
        for image, pixels in zip(images, decoded, strict=True):
            self._size = pixels.shape[:2]
            image.others.append((image.path.name, pixels))


@contextlib.contextmanager
def _silence() -> Iterator[None]:
    """Nothing is said of what is beside the pixels, nor of errors that are raised as well."""
    log, none = logging.getLogger("PIL"), logging.NullHandler()
    try:  # libtiff prints its errors, and Pillow has no way to tell it not to
        set_handler = ctypes.CDLL(Image.core.__file__).TIFFSetErrorHandler
        set_handler.argtypes, set_handler.restype = [ctypes.c_void_p], ctypes.c_void_p
    except (OSError, AttributeError):  # it is elsewhere in this Pillow
        set_handler = lambda handler: None  # noqa: E731
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        log.addHandler(none)
        before = set_handler(None)
        try:
            yield
        finally:
            set_handler(before)
            log.removeHandler(none)


def _decode_all(where: str, images: list[_Image], size: tuple[int, ...] | None) -> list[np.ndarray]:
    return [_decode(f"{where}: {image.path}", image.data, size) for image in images]


def _decode(where: str, data: bytes, size: tuple[int, ...] | None) -> np.ndarray:
    """(H, W) uint8 for a grey image, (H, W, 3) for any other; transparency is dropped.

    size: the height and width that it must have.
    """
    try:
        with Image.open(io.BytesIO(data), formats=_FORMATS) as image:
            wrong = _why_refused(image, size)
            if wrong is None:
                mode = "L" if image.mode in _GREY_MODES else "RGB"
                pixels = np.asarray(image if image.mode == mode else image.convert(mode))
                wrong = _of_another_size(pixels.shape[:2], size)  # some are turned when decoded
                if wrong is None:
                    return pixels
    except Exception as error:  # pillow's decoders raise nearly anything on damaged files
        raise DataError(f"{where} cannot be decoded ({first_line(error)})") from error
    raise DataError(f"{where} {wrong}")


def _why_refused(image: Image.Image, size: tuple[int, ...] | None) -> str | None:
    """What is wrong with an image by its header, before its pixels take memory."""
    width, height = image.size
    most = Image.MAX_IMAGE_PIXELS
    if most and width * height > most:
        return f"cannot be decoded ({width * height} pixels, exceeds limit of {most})"
    other_size = _of_another_size((height, width), size)
    if other_size is not None:
        return other_size
    # A photograph's JPEG may hold its preview as a second frame.
    if getattr(image, "is_animated", False) and image.format != "MPO":
        return "has several frames; allowed: one"
    if image.mode not in (*_GREY_MODES, *_COLOUR_MODES):
        return f"has mode {image.mode}; allowed: 8 bits per channel, grey or colour"
    # Of colours with 16 bits Pillow keeps 8; of signed ones it forgets the sign.
    if any(";16" in str(tile) for tile in getattr(image, "tile", ())):
        return "has 16 bits per channel; allowed: 8"
    if _SIGNED in getattr(image, "tag_v2", {}).get(_SAMPLE_FORMAT, ()):
        return "has signed pixels; allowed: 0..255"
    return None


def _of_another_size(own: tuple[int, ...], size: tuple[int, ...] | None) -> str | None:
    if size is None or own == size:
        return None
    return (
        f"is {own[0]}x{own[1]} (height x width), an earlier image {size[0]}x{size[1]}; all images "
        "must have one size"
    )


def walk_folder(folder: Path) -> Iterator[tuple[PurePosixPath, bytes | None]]:
    """All files (with their bytes) and folders (with None) under a folder, by relative path."""

    def refuse(error: OSError) -> None:
        raise error

    for root, folders, files in os.walk(folder, onerror=refuse):
        folders.sort()
        inside = PurePosixPath(Path(root).relative_to(folder).as_posix())
        yield from ((inside / name, None) for name in folders)
        for name in sorted(files):
            is_image = name.lower().endswith(_SUFFIXES)
            yield inside / name, (Path(root) / name).read_bytes() if is_image else b""


def _in_colour(image: np.ndarray) -> np.ndarray:
    return image if image.ndim == 3 else np.repeat(image[..., None], 3, axis=2)
