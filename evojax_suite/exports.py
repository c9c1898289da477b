"""A small set in the files of other tools: tensors for PyTorch, images in class folders."""

from __future__ import annotations

import csv
import io
import json
import shutil
from pathlib import Path

import numpy as np
import safetensors.numpy
from PIL import Image

from evojax_suite.data.transforms import denormalize
from evojax_suite.distilled import DistilledDataset
from evojax_suite.runtime.results import to_jsonable, write_atomically


def save_safetensors(path: Path, data: DistilledDataset) -> None:
    """Tensors as PyTorch has them: `images` (n, C, H, W) float32, normalised; `labels` (n, K)
    float32, probabilities; `mean` and `std` (C,), for test images in [0, 1].

    The recipe, class names and the dataset's name are JSON in the file's metadata, key `recipe`.
    """
    recipe = {n: getattr(data, n) for n in ("dataset", "class_names", "network", "training")}
    names = ("images", "labels", "mean", "std")
    arrays = {name: np.asarray(getattr(data, name), np.float32) for name in names}
    arrays["images"] = np.ascontiguousarray(np.moveaxis(arrays["images"], -1, 1))
    metadata = {"recipe": json.dumps(to_jsonable(recipe))}
    write_atomically(path, safetensors.numpy.save(arrays, metadata))


def save_image_folder(folder: Path, data: DistilledDataset) -> float:
    """PNG files train/<class>/<number>.png, which this package, TensorFlow Datasets' ImageFolder,
    Hugging Face's imagefolder and torchvision's ImageFolder read; the class is the most probable.
    labels.csv has the probabilities of all classes, one row for each file.

    PNG has 256 values from black to white: returns the fraction of pixels that lay outside and were
    clipped. Raises ValueError for images of 2 channels, and for a class whose name cannot name a
    folder, before anything is written; FileExistsError where `folder` holds something.
    """
    if data.images.shape[-1] not in (1, 3, 4):
        raise ValueError(f"PNG has 1, 3 or 4 channels, the images have {data.images.shape[-1]}")
    for name in data.class_names:
        if not name or name in (".", "..") or set(name) & set('/\\\0:*?"<>|'):
            raise ValueError(f"class {name!r} cannot be the name of a folder")
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise FileExistsError(f"{folder} exists and is not an empty folder")
    pixels = denormalize(np.asarray(data.images), data.mean, data.std)
    cut = float(np.mean((pixels < -0.5 / 255) | (pixels > 1 + 0.5 / 255)))
    pictures = np.rint(np.clip(pixels, 0, 1) * 255).astype(np.uint8)
    partial = folder.with_name(f".{folder.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)  # left by a process that was killed
    try:
        _write_images(partial, data, pictures)
        if folder.exists():
            folder.rmdir()  # empty
        partial.replace(folder)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return cut


def _write_images(folder: Path, data: DistilledDataset, pictures: np.ndarray) -> None:
    classes, digits = np.asarray(data.labels).argmax(-1), len(str(len(pictures) - 1))
    table = io.StringIO()
    rows = csv.writer(table, lineterminator="\n")
    rows.writerow(["file_name", *data.class_names])
    for number, (picture, label) in enumerate(zip(pictures, classes, strict=True)):
        file = Path("train") / data.class_names[label] / f"{number:0{digits}}.png"
        (folder / file).parent.mkdir(parents=True, exist_ok=True)
        squeezed = picture[..., 0] if picture.shape[-1] == 1 else picture
        buffer = io.BytesIO()
        Image.fromarray(squeezed).save(buffer, "PNG")
        write_atomically(folder / file, buffer.getvalue())
        rows.writerow([file.as_posix(), *(f"{float(p):.8g}" for p in data.labels[number])])
    write_atomically(folder / "labels.csv", table.getvalue())
