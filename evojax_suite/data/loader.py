"""`load`: a dataset by name or path, from the bundled set, a local directory or a download."""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from evojax_suite.data.archive import archive_stem
from evojax_suite.data.catalog import Known, find_known, unknown_name
from evojax_suite.data.errors import DataError
from evojax_suite.data.local import find_local, places, read_path
from evojax_suite.data.source import Source, checked_split, part_of
from evojax_suite.data.splits import hold_out
from evojax_suite.data.tfds import from_tfds
from evojax_suite.names import plain
from evojax_suite.types import Dataset, Split

DATA_DIR_VARIABLE = "EVOJAX_SUITE_DATA"


def load(
    name: str | Path,
    data_dir: str | Path | None = None,
    *,
    cache: bool = True,
    image_size: int | None = None,
) -> Dataset:
    """Load a dataset with its train, validation and test splits.

    name: one of NAMES (case and "-" or "_" do not matter), or the path of a user's set.
    data_dir: a local directory to look in first; else the environment's EVOJAX_SUITE_DATA. A set
    that is not there is read from, or downloaded by, TensorFlow Datasets.
    cache: keep the pixels of archives and class folders that are slow to read in the user's cache
    folder, for as long as these stay as they are.
    image_size: the height and width to which images in class folders of your own are resized, each
    cut to the square in its middle; needed where they differ in size.

    A set without a validation split gives one in five of its training images to it, stratified by
    class and fixed: 60,000 become 48,000 + 12,000 whatever the run's seed. A user's set without a
    test split first gives one in five of its training images to that. digits, which has no
    official parts, is 60 : 20 : 20.

    Raises DataError with one line for an unknown name, a missing set, and files that are damaged
    or disagree.
    """
    if not isinstance(name, str | os.PathLike) or not str(name).strip():
        raise unknown_name(str(name))
    if known := find_known(name) if isinstance(name, str) else None:
        if image_size is not None:
            raise DataError(f"image_size is for class folders of your own, got it with {name}")
        return _assemble(_find(known, data_dir, cache), known, known.name)
    path = _expanded(name)
    if not path.exists() and path.name == str(name) and not path.suffix:
        raise unknown_name(str(name))
    stem = archive_stem(path) or (path.stem if path.suffix == ".npz" else path.resolve().name)
    dataset = _assemble(read_path(path, cache, image_size), None, stem)
    if image_size is not None and dataset.image_shape[:2] != (image_size, image_size):
        sizes = "{}x{}".format(*dataset.image_shape[:2])
        raise DataError(f"{path}: image_size resizes class folders alone; these images are {sizes}")
    return dataset


def from_arrays(
    train: tuple[np.ndarray, np.ndarray],
    validation: tuple[np.ndarray, np.ndarray] | None = None,
    test: tuple[np.ndarray, np.ndarray] | None = None,
    class_names: Sequence[str] | None = None,
    name: str = "arrays",
) -> Dataset:
    """A dataset of images and labels that are in memory.

    Each part: images (N, H, W) or (N, H, W, C), uint8 in 0..255 or float in [0, 1], and labels
    (N,), integers from 0. Missing parts are split off as `load` does it. Raises DataError, one
    line, for every other type, shape or value.
    """
    parts = {}
    for part, arrays in (("train", train), ("validation", validation), ("test", test)):
        if arrays is not None:
            parts[part] = checked_split(arrays[0], arrays[1], f"{name} ({part})")
    names = None if class_names is None else tuple(class_names)
    return _assemble(Source(parts, names, name), None, name)


def _expanded(path: str | os.PathLike[str]) -> Path:
    """`path` with the home folder for ~; pathlib raises RuntimeError for an unknown user's."""
    if not isinstance(path, str | os.PathLike):
        raise DataError(f"{path!r} is no path")
    return Path(os.path.expanduser(path))


def _find(known: Known, data_dir: str | Path | None, cache: bool) -> Source:
    """The first of the bundled set, the local directory and TensorFlow Datasets that has it."""
    if known.files == "bundled":
        return _digits()
    directory = data_dir or os.environ.get(DATA_DIR_VARIABLE)
    looked = f"no data_dir is given and {DATA_DIR_VARIABLE} is not set"
    if directory:
        if source := find_local(known, _expanded(directory), cache):
            return source
        looked = f"{places(known)} are not in {directory}"
    try:
        return from_tfds(known)
    except DataError as error:
        advice = f"put the set into a folder and name that as data_dir or in {DATA_DIR_VARIABLE}"
        tried = f"{looked}; TensorFlow Datasets: {error}"
        raise DataError(f"{known.name} is missing: {tried}; {advice}") from error


def _digits() -> Source:
    """scikit-learn's bundled 8x8 digits, their 0..16 rounded to 0..255, in three fixed parts."""
    from sklearn.datasets import load_digits

    digits: Any = load_digits()
    pixels = np.rint(digits.images * (255 / 16)).astype(np.uint8)
    rest, test = _split_off(checked_split(pixels, digits.target, "digits"), 5)
    train, validation = _split_off(rest, 4)
    return Source({"train": train, "validation": validation, "test": test}, None, "digits")


def _split_off(split: Split, one_in: int) -> tuple[Split, Split]:
    kept, held_out = hold_out(split.labels, one_in)
    return part_of(split, kept), part_of(split, held_out)


def _assemble(source: Source, known: Known | None, name: str) -> Dataset:
    """Check the parts against each other and the known set, and split off missing ones."""
    where = source.where
    if "train" not in source.parts:
        raise DataError(f"{where}: there is no train part; one is needed")
    class_names, parts = _name_classes(source, known)
    if len(class_names) < 2:
        raise DataError(f"{where}: {len(class_names)} class; at least 2 are needed")
    _check_parts(parts, len(class_names), where)
    official = () if known is None else ("test", "validation")[: 1 + (known.files == "medmnist")]
    for part in [part for part in ("test", "validation") if part not in parts]:
        if part in official:
            raise DataError(f"{where}: there is no {part} split; {name} has an official one")
        parts["train"], parts[part] = _split_off(parts["train"], 5)
        if not len(parts[part]):
            too_few = f"too few train images to give any to the {part} part"
            raise DataError(f"{where}: {too_few}; at least 3 in all and 2 in a class are needed")
    if known and source.name and plain(source.name) != plain(name):
        name = source.name
    mean, std = (known.mean, known.std) if known and known.mean else _statistics(parts["train"])
    channels = parts["train"].images.shape[3]
    if len(mean) != channels:
        raise DataError(f"{where}: images have {channels} channels; {name} has {len(mean)}")
    name, class_names = _text(name), tuple(map(_text, class_names))
    return Dataset(name, parts["train"], parts["validation"], parts["test"], class_names, mean, std)


def _text(name: str) -> str:
    """A name on disk as text; bytes that are none are written as in "\\udcff"."""
    return name.encode(errors="backslashreplace").decode()


def _name_classes(source: Source, known: Known | None) -> tuple[tuple[str, ...], dict[str, Split]]:
    """The class names, and the parts with labels in the known set's order where the names agree.

    Names that only count ("0", "1", ...) say no more than the labels.
    """
    names, parts = source.class_names, dict(source.parts)
    numbers = tuple(map(str, range(len(names or np.unique(parts["train"].labels)))))
    if known is None:
        return names or numbers, parts
    expected = known.class_names
    if not names or names == numbers:
        return expected, parts
    if len(names) != len(expected):
        raise DataError(f"{source.where}: {len(names)} classes; {known.name} has {len(expected)}")
    if set(names) != set(expected):
        return names, parts
    label = np.array([expected.index(name) for name in names], np.int32)
    return expected, {part: Split(s.images, label[s.labels]) for part, s in parts.items()}


def _check_parts(parts: dict[str, Split], num_classes: int, where: str) -> None:
    shape, dtype = parts["train"].images.shape[1:], parts["train"].images.dtype
    for part, split in parts.items():
        images, highest = split.images, split.labels.max()
        if images.shape[1:] != shape or images.dtype != dtype:
            differ = f"images are {images.shape[1:]} {images.dtype}, in train {shape} {dtype}"
            raise DataError(f"{where} ({part}): {differ}; all parts must have one size and type")
        if highest >= num_classes:
            allowed = f"allowed: 0..{num_classes - 1}, each with an image in train"
            raise DataError(f"{where} ({part}): label {highest} is out of range; {allowed}")
    images = parts["train"].images
    if (value := images.min()) == images.max():
        raise DataError(f"{where} (train): all pixels of all images are {value}; they must differ")
    counts = np.bincount(parts["train"].labels, minlength=num_classes)
    if not counts.all():
        empty = f"class {int(np.argmin(counts))} has no images"
        allowed = f"allowed: labels 0..{num_classes - 1}, each with an image"
        raise DataError(f"{where} (train): {empty}; {allowed}")


def _statistics(train: Split) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Per-channel mean and std of the images scaled to [0, 1], to 4 digits; std at least 0.001."""
    means, stds = zip(*map(_mean_and_std, np.moveaxis(train.images, 3, 0)), strict=True)
    return tuple(round(mean, 4) for mean in means), tuple(max(round(s, 4), 1e-3) for s in stds)


def _mean_and_std(pixels: np.ndarray) -> tuple[float, float]:
    if pixels.dtype != np.uint8:
        return float(pixels.mean(dtype=np.float64)), float(pixels.std(dtype=np.float64))
    # Exact, and without eight bytes for each pixel.
    count, total = pixels.size, int(pixels.sum(dtype=np.int64))
    squares = int(np.square(pixels, dtype=np.uint16).sum(dtype=np.int64))
    return total / count / 255, math.sqrt(count * squares - total**2) / count / 255
