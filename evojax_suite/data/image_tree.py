"""Images in class folders: <part>/<class>/<image>, met one file at a time from a disk or a tar."""

from __future__ import annotations

import io
import os
import warnings
from collections.abc import Iterator
from pathlib import Path, PurePosixPath

import numpy as np
from PIL import Image

from evojax_suite.data.errors import DataError, first_line
from evojax_suite.data.source import Source, checked_split

_PARTS = {
    "train": "train", "val": "validation", "validation": "validation", "valid": "validation",
    "test": "test",
}  # fmt: skip
_SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp")
_GREY_MODES = ("1", "L", "LA")
_COLOUR_MODES = ("P", "RGB", "RGBA", "CMYK", "YCbCr")
_LAYOUT = "train|val|test/<class>/<image>, in at most one top-level folder"


class ImageTree:
    """Collects the files of one set in any order; `source` gives the parts.

    The order within a part is by class, then by file name, whatever the order of arrival.
    """

    def __init__(self, where: str) -> None:
        self.where = where
        self._top_folders: set[str] = set()
        self._parts: set[str] = set()
        self._classes: dict[tuple[str, str], list[tuple[str, np.ndarray]]] = {}
        self._size: tuple[int, ...] | None = None

    def add(self, path: PurePosixPath, data: bytes | None) -> None:
        """Take one file (`data` its bytes) or folder (`data` None), by its path in the set.

        Hidden files are skipped, and so is what is no image and outside the class folders.
        Raises DataError for an image out of place, one that cannot be decoded, one whose size
        differs from the others', and for a file in a class folder that is no image.
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
            pixels = self._decode(path, data)
            self._classes.setdefault((part, within_part[0]), []).append((within_part[1], pixels))
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

        Raises DataError for an empty class folder, a part without images, a class that only the
        validation or test part has, and several top-level folders.
        """
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

    def _decode(self, path: PurePosixPath, data: bytes | None) -> np.ndarray:
        """(H, W) uint8 for a grey image, (H, W, 3) for any other; transparency is dropped."""
        where = f"{self.where}: {path}"
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # of what is beside the pixels
                warnings.simplefilter("error", Image.DecompressionBombWarning)
                mode, pixels = _pixels(data or b"")
        except Exception as error:  # pillow's decoders raise nearly anything on damaged files
            raise DataError(f"{where} cannot be decoded ({first_line(error)})") from error
        if pixels is None:
            raise DataError(f"{where} has mode {mode}; allowed: 8 bits per channel, grey or colour")
        self._size = self._size or pixels.shape[:2]
        if pixels.shape[:2] != self._size:
            raise DataError(
                f"{where} is {pixels.shape[0]}x{pixels.shape[1]} (height x width), an earlier "
                f"image {self._size[0]}x{self._size[1]}; all images must have one size"
            )
        return pixels


def _pixels(data: bytes) -> tuple[str, np.ndarray | None]:
    """Pillow's mode of an image, and its pixels where that is an allowed one."""
    with Image.open(io.BytesIO(data), formats=("PNG", "JPEG", "BMP")) as image:
        mode = image.mode
        if mode in _GREY_MODES:
            return mode, np.asarray(image if mode == "L" else image.convert("L"))
        if mode in _COLOUR_MODES:
            return mode, np.asarray(image if mode == "RGB" else image.convert("RGB"))
        return mode, None


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
