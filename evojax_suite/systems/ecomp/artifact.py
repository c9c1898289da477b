"""A compressed network: its weights, where they come from, its predictions and its files."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
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
from evojax_suite.systems.ecomp import feed_forward, graph as graphs
from evojax_suite.systems.ecomp.graph import Graph
from evojax_suite.types import Array, Dataset, Images, Probabilities

Inputs = Literal["unit", "normalized"]
"""The inputs of a network: pixels in [0, 1], or these normalised by the dataset's mean and
deviation. A fully connected network takes them flattened row by row, channels last."""


@jax.jit
def _logits(
    network: Graph,
    images: Images,
    mean: Float[Array, "channels"],
    std: Float[Array, "channels"],
    kept: Int32[Array, "inputs"] | None,
) -> Probabilities:
    inputs = (images - mean) / std
    if not network[0].is_convolution:
        inputs = inputs.reshape(images.shape[0], -1)
    if kept is not None:
        inputs = inputs[:, kept]
    return graphs.forward(network, inputs)[0][-1]


def constants(
    dataset: Dataset, inputs: Inputs
) -> tuple[Float[np.ndarray, "channels"], Float[np.ndarray, "channels"]]:
    """Mean and deviation by which pixels in [0, 1] are normalised for `inputs`."""
    channels = dataset.image_shape[-1]
    if inputs == "unit":
        return np.zeros(channels, np.float32), np.ones(channels, np.float32)
    return np.array(dataset.mean, np.float32), np.array(dataset.std, np.float32)


class _Chain:
    """What files say of a network whose layers are a chain, where they have no nodes."""

    pooling: feed_forward.Pooling = "average"


@dataclass(frozen=True)
class CompressedNetwork:
    """A network for images; `save` and `load` keep it bit for bit."""

    network: Graph  # NumPy arrays, without padding
    image_shape: tuple[PositiveInt, PositiveInt, PositiveInt]
    mean: Float[np.ndarray, "channels"]  # by which pixels in [0, 1] are normalised
    std: Float[np.ndarray, "channels"]
    class_names: tuple[str, ...]
    dataset: str
    lineage: dict[str, Any]  # where the weights come from, as JSON
    inputs_kept: tuple[NonNegativeInt, ...] | None = None
    """The places of the inputs that it takes, of the flattened image; None is all of them."""

    def __repr__(self) -> str:
        return f"CompressedNetwork({self.num_parameters:,} parameters, for {self.dataset!r})"

    @property
    def num_parameters(self) -> int:
        """The number of weights and biases."""
        return sum(leaf.size for leaf in jax.tree.leaves(self.network))

    def _forward(self, images: Array | np.ndarray) -> Array:
        kept = None if self.inputs_kept is None else np.array(self.inputs_kept, np.int32)
        return _logits(self.network, images, self.mean, self.std, kept)

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
        graphs.save(directory / "network.safetensors", self.network)
        inputs = "((pixels / 255) - mean) / std"
        if not self.network[0].is_convolution:
            inputs += ", flattened row by row, channels last"
        if self.inputs_kept is not None:
            inputs += ", of which it takes inputs_kept"
        about = {
            "nodes": graphs.description(self.network),
            "layer_sizes": [self.network[0].weight.shape[1], *(len(n.bias) for n in self.network)],
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
        about = {"inputs_kept": None, "pooling": "average"} | json.loads(path.read_text())
        names = "dataset", "lineage", "image_shape", "class_names", "inputs_kept"
        values = from_json(CompressedNetwork, about, names)
        pooling = from_json(_Chain, about, ("pooling",))["pooling"]
        mean, std = (np.array(about[name], np.float32) for name in ("mean", "std"))
        check_constants(mean, std, values["image_shape"][2])
    except (KeyError, TypeError, ValueError, RecursionError) as error:
        said = str(error) if isinstance(error, ValueError) else repr(error)
        reason = " ".join(said.splitlines())
        raise ValueError(f"{path} does not describe a compressed network: {reason}") from error
    file, shape = path.with_suffix(".safetensors"), values["image_shape"]
    classes, kept = len(values["class_names"]), values["inputs_kept"]
    if max(kept or (0,)) >= math.prod(shape):
        raise ValueError(f"{path}: inputs_kept to {max(kept)}, allowed: below {math.prod(shape)}")
    network = graphs.load(file, shape, classes, None if kept is None else len(kept))
    if network is None:  # of a version that wrote chains alone
        chain = feed_forward.load(file, shape, classes, pooling)
        network = graphs.from_network(chain, pooling)
    return CompressedNetwork(network=network, mean=mean, std=std, **values)
