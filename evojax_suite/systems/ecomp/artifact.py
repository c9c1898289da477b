"""A compressed network: its weights, where they come from, its predictions and its files."""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import jax
import numpy as np
from jaxtyping import Float, Int32, Real
from pydantic import NonNegativeInt, PositiveInt

from evojax_suite.configuration import from_json
from evojax_suite.data.transforms import check_constants
from evojax_suite.inference import export, in_batches
from evojax_suite.runtime.results import write_atomically, write_json
from evojax_suite.systems.ecomp import feed_forward
from evojax_suite.systems.ecomp.feed_forward import Network
from evojax_suite.types import Array, Dataset, Images, Probabilities

Inputs = Literal["unit", "normalized"]
"""The inputs of a network: pixels in [0, 1], or these normalised by the dataset's mean and
deviation. A fully connected network takes them flattened row by row, channels last."""


@partial(jax.jit, static_argnames="pooling")
def _logits(
    network: Network,
    images: Images,
    mean: Float[Array, "channels"],
    std: Float[Array, "channels"],
    pooling: feed_forward.Pooling,
    kept: Int32[Array, "inputs"] | None,
) -> Probabilities:
    inputs = (images - mean) / std
    if not feed_forward.is_convolutional(network):
        inputs = inputs.reshape(images.shape[0], -1)
    if kept is not None:
        inputs = inputs[:, kept]
    return feed_forward.forward(network, inputs, pooling)[-1]


def constants(
    dataset: Dataset, inputs: Inputs
) -> tuple[Float[np.ndarray, "channels"], Float[np.ndarray, "channels"]]:
    """Mean and deviation by which pixels in [0, 1] are normalised for `inputs`."""
    channels = dataset.image_shape[-1]
    if inputs == "unit":
        return np.zeros(channels, np.float32), np.ones(channels, np.float32)
    return np.array(dataset.mean, np.float32), np.array(dataset.std, np.float32)


@dataclass(frozen=True)
class CompressedNetwork:
    """A feed-forward ReLU network for images; `save` and `load` keep it bit for bit."""

    network: Network  # NumPy arrays, without padding
    image_shape: tuple[PositiveInt, PositiveInt, PositiveInt]
    mean: Float[np.ndarray, "channels"]  # by which pixels in [0, 1] are normalised
    std: Float[np.ndarray, "channels"]
    class_names: tuple[str, ...]
    dataset: str
    lineage: dict[str, Any]  # where the weights come from, as JSON
    pooling: feed_forward.Pooling = "average"  # after each convolution, where there are any
    inputs_kept: tuple[NonNegativeInt, ...] | None = None
    """The places of the inputs that it takes, of the flattened image; None is all of them."""

    @property
    def num_parameters(self) -> int:
        """The number of weights and biases."""
        return sum(array.size for layer in self.network for array in layer)

    @property
    def architecture(self) -> str:
        """A description of the architecture."""
        if not feed_forward.is_convolutional(self.network):
            return "fully connected, ReLU between the layers"
        num = sum(layer.weight.ndim == 4 for layer in self.network)
        return (
            f"{num} convolutions of stride 1 that keep the size, each with ReLU and then 2x2 "
            f"pooling ({self.pooling}), then fully connected, ReLU between the layers"
        )

    def _forward(self, images: Array | np.ndarray) -> Array:
        kept = None if self.inputs_kept is None else np.array(self.inputs_kept, np.int32)
        return _logits(self.network, images, self.mean, self.std, self.pooling, kept)

    def logits(
        self, images: Real[np.ndarray, "images height width channels"], batch_size: int = 1000
    ) -> Float[np.ndarray, "images classes"]:
        """Logits of images, uint8 or float in [0, 1]."""
        return in_batches(self._forward, images, batch_size)

    def export(self) -> bytes:
        """A StableHLO program for any number of images (N, height, width, channels) in [0, 1],
        float32, on CPU, GPU and TPU; `jax.export.deserialize` reads it."""
        # A function, as jax.jit hashes what it compiles and a bound method hashes its arrays too.
        return export(lambda images: self._forward(images), self.image_shape)

    def save(self, directory: Path) -> None:
        """Write network.safetensors, network.json and network.stablehlo into `directory`."""
        network = self.network
        feed_forward.save(directory / "network.safetensors", network)
        inputs = "((pixels / 255) - mean) / std"
        if not feed_forward.is_convolutional(network):
            inputs += ", flattened row by row, channels last"
        if self.inputs_kept is not None:
            inputs += ", of which it takes inputs_kept"
        about = {
            "architecture": self.architecture,
            "layer_sizes": feed_forward.layer_sizes(network, feed_forward.hidden_sizes(network)),
            "pooling": self.pooling,
            "num_parameters": self.num_parameters,
            "image_shape": self.image_shape,
            "inputs": inputs,
        }
        further = ("mean", "std", "class_names", "dataset", "lineage", "inputs_kept")
        about |= {name: getattr(self, name) for name in further}
        write_json(directory / "network.json", about)
        write_atomically(directory / "network.stablehlo", self.export())


def load(directory: Path | str) -> CompressedNetwork:
    """The network that `CompressedNetwork.save` wrote. Raises ValueError or OSError, one line."""
    path = Path(directory) / "network.json"
    try:
        about = {"pooling": "average", "inputs_kept": None} | json.loads(path.read_text())
        names = "dataset", "lineage", "pooling", "image_shape", "class_names", "inputs_kept"
        values = from_json(CompressedNetwork, about, names)
        mean, std = (np.array(about[name], np.float32) for name in ("mean", "std"))
        check_constants(mean, std, values["image_shape"][2])
    except (KeyError, TypeError, ValueError, RecursionError) as error:
        said = str(error) if isinstance(error, ValueError) else repr(error)
        reason = " ".join(said.splitlines())
        raise ValueError(f"{path} does not describe a compressed network: {reason}") from error
    file, num_classes = path.with_suffix(".safetensors"), len(values["class_names"])
    shape, kept = values["image_shape"], values["inputs_kept"]
    shape = shape if kept is None else (1, 1, len(kept))
    network = feed_forward.load(file, shape, num_classes, values["pooling"])
    return CompressedNetwork(network=network, mean=mean, std=std, **values)
