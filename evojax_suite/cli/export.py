"""Write a small set for other tools."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import tyro

from evojax_suite import exports
from evojax_suite.configuration import configuration
from evojax_suite.distilled import DistilledDataset
from evojax_suite.running.options import Command

EXAMPLE = "export runs/demo/distilled.npz demo.safetensors"


@configuration
class Options(Command):
    """Write a small set for other tools: tensors for PyTorch, or PNG files in class folders."""

    path: Annotated[Path, tyro.conf.Positional]
    """A .npz that a run has written."""
    output: Annotated[Path, tyro.conf.Positional]
    """The file, or the folder, to write; it must not exist, or be an empty folder."""
    format: Literal["safetensors", "image_folder"] = "safetensors"
    """safetensors: images (n, C, H, W), labels, mean, std. image_folder: train/<class>/<image>, as
    TensorFlow Datasets, Hugging Face and torchvision read it, and labels.csv."""


def run(options: Options) -> None:
    """Write the set. Raises ValueError, DataError or OSError, each with a message of one line."""
    suffix = options.output.suffix
    if options.format == "safetensors" and suffix != ".safetensors":
        ending = f"ends in {suffix}" if suffix else "has no ending"
        raise ValueError(f"{options.output} {ending}: a file of tensors ends in .safetensors")
    data = DistilledDataset.load(options.path).unpacked()
    written = f"{len(data.images)} images of {data.dataset}: {options.output}"
    if options.format == "safetensors":
        if options.output.exists():
            raise FileExistsError(f"{options.output} exists already")
        options.output.parent.mkdir(parents=True, exist_ok=True)
        exports.save_safetensors(options.output, data)
        print(written)
        return
    cut = f"{100 * exports.save_image_folder(options.output, data):.1f}% of the pixels lay beyond"
    print(f"{written}; {cut} black or white and were cut, the other formats keep them")
