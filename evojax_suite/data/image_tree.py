"""Images in class folders, <part>/<class>/<image>, one file at a time from a disk or a tar."""

from __future__ import annotations

import contextlib
import ctypes
import io
import logging
import os
import warnings
from collections import deque
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path, PurePosixPath
from typing import TypeAlias

import numpy as np
from PIL import Image, ImageOps

from evojax_suite.data.errors import DataError, data_error
from evojax_suite.data.source import PART_NAMES, Source, checked_split, sorted_walk

_SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp", ".webp", ".tif", ".tiff")
_FORMATS = ("PNG", "JPEG", "BMP", "WEBP", "TIFF")
_GREY_MODES = ("1", "L", "LA")
_COLOUR_MODES = ("P", "RGB", "RGBA", "CMYK", "YCbCr")
_LAYOUT = "train|val|test/<class>/<image>, or <class>/<image>, in at most one top-level folder"
_SAMPLE_FORMAT, _SIGNED = 339, 2  # a tag of TIFF and one of its values
_NUM_THREADS = min(os.cpu_count() or 1, 8)
_AT_A_TIME = 64

_Decoded: TypeAlias = tuple[np.ndarray, str]  # pixels and the mode of the file
_Class: TypeAlias = list[tuple[str, np.ndarray, str]]  # decoded images: names, pixels, modes
_Image: TypeAlias = tuple[PurePosixPath, bytes, _Class]  # the path, the file and its class


class ImageTree(contextlib.ExitStack):
    """A collection of the files of one set, added in any order; `source` returns the parts.

    The order within a part is by class, then by file name, whatever the order of arrival. A
    context, within which threads decode what was added: Pillow's decoders let others run.
    """

    def __init__(self, where: str, image_size: int | None = None) -> None:
        """image_size: the height and width to which images are cut and resized, if they are."""
        super().__init__()
        self.where, self._image_size = where, image_size
        _silence(self)
        self._threads = ThreadPoolExecutor(_NUM_THREADS)
        self.callback(self._threads.shutdown, cancel_futures=True)
        self._waiting: list[_Image] = []
        self._sent: deque[tuple[list[_Image], Future[list[_Decoded]]]] = deque()
        self._top_folders: set[str] = set()
        self._parts: set[str] = set()
        self._classes: dict[tuple[str, str], _Class] = {}
        self._size: tuple[int, ...] | None = None
        self._without_part: list[tuple[PurePosixPath, bytes]] = []

    def add(self, path: PurePosixPath, data: bytes | None) -> None:
        """Take one file (`data` its bytes) or folder (`data` None), by its path in the set.

        Hidden files are skipped, and so are files outside the class folders that are no images.
        Raises DataError for an image out of place, and for a file in a class folder that is no
        image; then or later for one that cannot be decoded, or whose size differs from the others'.
        """
        steps = path.parts
        if any(step.startswith((".", "__MACOSX")) for step in steps):
            return
        is_image = data is not None and path.suffix.lower() in _SUFFIXES
        depth = 0 if steps and steps[0] in PART_NAMES else 1
        if len(steps) <= depth or steps[depth] not in PART_NAMES or len(steps) > depth + 3:
            if is_image and data is not None:
                self._without_part.append((path, data))
                if self._parts or len(steps) not in (2, 3):
                    self._check_places()
            return
        self._top_folders.add("/".join(steps[:depth]))
        part, within_part = PART_NAMES[steps[depth]], steps[depth + 1 :]
        self._parts.add(part)
        if data is None and len(within_part) == 1:
            self._classes.setdefault((part, within_part[0]), [])
        elif data is not None and is_image and len(within_part) == 2:
            of_class = self._classes.setdefault((part, within_part[0]), [])
            self._waiting.append((path, data, of_class))
            if self._size is None or len(self._waiting) == _AT_A_TIME:
                self._decode()
        elif is_image or len(within_part) == 2:
            allowed = f"layout: {_LAYOUT}, images: {', '.join(_SUFFIXES)}"
            raise DataError(f"{self.where}: {path} is no image in a class folder; {allowed}")

    def _check_places(self) -> None:
        """Raise DataError for an image that is in no part, unless all are in class folders that lie
        side by side."""
        depths = {len(path.parts) for path, _ in self._without_part}
        if self._without_part and (self._parts or depths not in ({2}, {3})):
            image = self._without_part[0][0]
            raise DataError(f"{self.where}: image {image} is out of place; layout: {_LAYOUT}")

    @property
    def is_empty(self) -> bool:
        return not self._parts and not self._without_part

    def source(self) -> Source:
        """The parts; labels count the train part's classes, sorted (by number if all are numbers).

        Raises DataError as `add` does, and for an empty class folder, a part without images, a
        class that only the validation or test split has, and several top-level folders.
        """
        self._check_places()
        for path, data in self._without_part:  # one part, from which others are split off
            *top, name, file = path.parts
            self.add(PurePosixPath(*top, "train", name, file), data)
        self._collect(0)
        self._decode()
        if len(self._top_folders) > 1:
            tops = ", ".join(sorted(top or "(none)" for top in self._top_folders))
            raise DataError(f"{self.where}: parts lie in several folders: {tops}; one is allowed")
        for (part, name), images in self._classes.items():
            if not images:
                empty = f"class folder {part}/{name} is empty; each needs an image"
                raise DataError(f"{self.where}: {empty} ({', '.join(_SUFFIXES)})")
        names = [name for part, name in self._classes if part == "train"]
        names.sort(key=int if all(name.isdecimal() for name in names) else None)
        self._check_modes()
        in_colour = any(pixels.ndim == 3 for i in self._classes.values() for _, pixels, _ in i)
        parts = {}
        for part in sorted(self._parts):
            where = f"{self.where} ({part})"
            classes = {name: images for (p, name), images in self._classes.items() if p == part}
            extra = sorted(set(classes) - set(names))
            if extra and "train" in self._parts:
                raise DataError(f"{where}: class {extra[0]} is not among the train part's classes")
            if not classes:
                raise DataError(f"{where}: the part has no images; layout: {_LAYOUT}")
            pixels, labels = [], []
            for label, name in enumerate(names):
                for _, image, _ in sorted(classes.get(name, []), key=lambda entry: entry[0]):
                    add_channels = in_colour and image.ndim == 2
                    pixels.append(np.stack([image] * 3, -1) if add_channels else image)
                    labels.append(label)
            if pixels:
                parts[part] = checked_split(np.stack(pixels), np.array(labels), where)
        return Source(parts, tuple(names), self.where)

    def _check_modes(self) -> None:
        """Raise DataError where the images of a class have a mode, grey or colour, transparent or
        not, that those of another class have not, so that a network need only tell the modes."""
        modes: dict[str, set[str]] = {}
        for (_, name), images in self._classes.items():
            modes.setdefault(name, set()).update(mode for _, _, mode in images)
        (first, own), *others = modes.items()
        for name, other in others:
            if not own & other:
                raise DataError(
                    f"{self.where}: images of {first} are {', '.join(sorted(own))}, of {name} "
                    f"{', '.join(sorted(other))}, so that the mode tells the class; store all alike"
                )

    def _decode(self) -> None:
        """Decode the waiting images: many of them in a thread; few, and the very first, whose size
        all must have, at once."""
        images, self._waiting = self._waiting, []
        if len(images) < _AT_A_TIME:
            self._keep(images, _decode_all(self.where, images, self._size, self._image_size))
            return
        about = self.where, images, self._size, self._image_size
        work = self._threads.submit(_decode_all, *about)
        self._sent.append((images, work))
        self._collect(2 * _NUM_THREADS)

    def _collect(self, num_left: int) -> None:
        """Wait for the threads until at most `num_left` of their groups of images are pending."""
        while len(self._sent) > num_left:
            images, work = self._sent.popleft()
            self._keep(images, work.result())

    def _keep(self, images: list[_Image], decoded: list[_Decoded]) -> None:
        for (path, _, of_class), (pixels, mode) in zip(images, decoded, strict=True):
            self._size = pixels.shape[:2]
            of_class.append((path.name, pixels, mode))


def _silence(context: contextlib.ExitStack) -> None:
    """Suppress in `context` the messages on metadata, and on errors that are raised as well."""
    log, none = logging.getLogger("PIL"), logging.NullHandler()
    try:  # libtiff prints its errors, and Pillow has no way to tell it not to
        set_handler = ctypes.CDLL(Image.core.__file__).TIFFSetErrorHandler
        set_handler.argtypes, set_handler.restype = [ctypes.c_void_p], ctypes.c_void_p
    except (OSError, AttributeError):  # it is elsewhere in this Pillow
        set_handler = lambda handler: None  # noqa: E731
    context.enter_context(warnings.catch_warnings(action="ignore"))
    log.addHandler(none)
    context.callback(log.removeHandler, none)
    context.callback(set_handler, set_handler(None))


def _decode_all(
    where: str, images: list[_Image], size: tuple[int, ...] | None, image_size: int | None
) -> list[_Decoded]:
    return [_decode(f"{where}: {path}", data, size, image_size) for path, data, _ in images]


def _decode(
    where: str, data: bytes, size: tuple[int, ...] | None, image_size: int | None
) -> _Decoded:
    """The uint8 pixels (H, W) of a grey image, (H, W, 3) of any other, without transparency, and
    the mode; `size` is the height and width that they must have, `image_size` that of the square
    in their middle once it is resized."""
    unreadable = data_error(f"{where} cannot be decoded")
    with unreadable, Image.open(io.BytesIO(data), formats=_FORMATS) as image:
        _check_header(where, image, None if image_size else size)
        mode = "L" if image.mode in _GREY_MODES else "RGB"
        decoded = image if image.mode == mode else image.convert(mode)
        if image_size:
            decoded = ImageOps.fit(decoded, (image_size, image_size), Image.Resampling.LANCZOS)
        pixels = np.asarray(decoded)
        _check_size(where, pixels.shape[:2], size)  # some are turned when decoded
        return pixels, image.mode


def _check_header(where: str, image: Image.Image, size: tuple[int, ...] | None) -> None:
    """Raise DataError where the header shows an error, before the pixels take memory."""
    width, height = image.size
    count, most = width * height, Image.MAX_IMAGE_PIXELS
    if most and count > most:
        raise DataError(f"{where} cannot be decoded ({count} pixels, exceeds limit of {most})")
    _check_size(where, (height, width), size)
    # A photograph's JPEG may hold its preview as a second frame.
    if getattr(image, "is_animated", False) and image.format != "MPO":
        raise DataError(f"{where} has several frames; allowed: one")
    if image.mode not in (*_GREY_MODES, *_COLOUR_MODES):
        allowed = "8 bits per channel, grey or colour"
        raise DataError(f"{where} has mode {image.mode}; allowed: {allowed}")
    # Of colours with 16 bits Pillow keeps 8; of signed ones it forgets the sign.
    if any(";16" in str(tile) for tile in getattr(image, "tile", ())):
        raise DataError(f"{where} has 16 bits per channel; allowed: 8")
    if _SIGNED in getattr(image, "tag_v2", {}).get(_SAMPLE_FORMAT, ()):
        raise DataError(f"{where} has signed pixels; allowed: 0..255")


def _check_size(where: str, actual: tuple[int, ...], size: tuple[int, ...] | None) -> None:
    if size is not None and actual != size:
        sizes = "{}x{} (height x width), an earlier image {}x{}".format(*actual, *size)
        raise DataError(
            f"{where} is {sizes}; all images must have one size, or image_size one to take"
        )


def read_image_folder(folder: Path, image_size: int | None = None) -> Source | None:
    """The set in the class folders below `folder`, or None where there are none."""
    with ImageTree(str(folder), image_size) as tree:
        for root, folders, files in sorted_walk(folder):
            inside = PurePosixPath(Path(root).relative_to(folder).as_posix())
            for name in folders:
                tree.add(inside / name, None)
            for name in files:
                is_image = name.lower().endswith(_SUFFIXES)
                tree.add(inside / name, (Path(root) / name).read_bytes() if is_image else b"")
        return None if tree.is_empty else tree.source()
