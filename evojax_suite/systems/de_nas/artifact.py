"""The trained network of an architecture search: its units, its weights, its outputs."""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict
from jaxtyping import Float, UInt8

from evojax_suite.configuration import from_json
from evojax_suite.data.transforms import check_constants
from evojax_suite.inference import export, in_batches
from evojax_suite.runtime import results
from evojax_suite.systems.de_nas.networks import SequenceNetwork, layers
from evojax_suite.types import Array, Images, Probabilities, PyTree

_SETTINGS = "dropout", "normalization", "skip", "head"


@partial(jax.jit, static_argnames="network")
def _logits(
    network: SequenceNetwork,
    variables: PyTree,
    images: Images,
    mean: Float[Array, "channels"],
    std: Float[Array, "channels"],
) -> Probabilities:
    return jnp.asarray(network.apply(variables, (images - mean) / std))


@dataclass(frozen=True)
class SearchedNetwork:
    """A trained architecture for images; `save` and `load` keep it bit for bit."""

    network: SequenceNetwork
    variables: PyTree
    image_shape: tuple[int, int, int]
    mean: tuple[float, ...]  # of each channel, subtracted from pixels in [0, 1]
    std: tuple[float, ...]
    class_names: tuple[str, ...]
    dataset: str

    def __repr__(self) -> str:
        return f"SearchedNetwork({self.num_parameters:,} parameters, for {self.dataset!r})"

    @property
    def num_parameters(self) -> int:
        """The number of weights and biases."""
        return sum(leaf.size for leaf in jax.tree.leaves(self.variables["params"]))

    def _forward(self, images: Array | np.ndarray) -> Array:
        constants = np.array(self.mean, np.float32), np.array(self.std, np.float32)
        return _logits(self.network, self.variables, images, *constants)

    def logits(
        self,
        images: (
            UInt8[np.ndarray, "images height width channels"]
            | Float[np.ndarray, "images height width channels"]
        ),
        batch_size: int = 500,
    ) -> Float[np.ndarray, "images classes"]:
        """Logits of images, uint8 or float in [0, 1]."""
        return in_batches(self._forward, images, batch_size)

    def export(self) -> bytes:
        """A StableHLO program for any number of images (N, height, width, channels) in [0, 1],
        float32, on CPU, GPU and TPU; `jax.export.deserialize` reads it."""
        return export(lambda images: self._forward(images), self.image_shape)

    def save(self, directory: Path) -> None:
        """Write architecture.json, network.safetensors and network.stablehlo into `directory`."""
        directory.mkdir(parents=True, exist_ok=True)
        results.save_variables(directory / "network.safetensors", self.variables)
        network, shape = self.network, self.image_shape
        rows = layers(network.units, shape, network.num_classes, network.head or "dense")
        about = {
            "units": [unit._asdict() for unit in network.units],
            **{name: getattr(network, name) for name in _SETTINGS},
            "compute_dtype": jnp.dtype(network.dtype).name,
            "num_parameters": self.num_parameters,
            "layers": [layer._asdict() for layer in rows],
            "image_shape": shape,
            "inputs": "((pixels / 255) - mean) / std",
            **{name: getattr(self, name) for name in ("mean", "std", "class_names", "dataset")},
        }
        results.write_json(directory / "architecture.json", about)
        results.write_atomically(directory / "network.stablehlo", self.export())


def load(directory: Path | str) -> SearchedNetwork:
    """The network that `SearchedNetwork.save` wrote. Raises ValueError or OSError, one line."""
    path = Path(directory) / "architecture.json"
    try:
        about = json.loads(path.read_text())
        names = "image_shape", "mean", "std", "class_names", "dataset"
        values = from_json(SearchedNetwork, about, names)
        check_constants(values["mean"], values["std"], values["image_shape"][2])
        about = {"head": "dense"} | about  # which older ones do not name
        settings = from_json(SequenceNetwork, about, ("units", *_SETTINGS))
        if (dtype := about["compute_dtype"]) not in ("float32", "bfloat16"):
            raise ValueError(f"compute_dtype is {dtype!r}")
        num_classes = len(values["class_names"])
        network = SequenceNetwork(num_classes, **settings, dtype=jnp.dtype(dtype))
        images = jax.ShapeDtypeStruct((1, *values["image_shape"]), jnp.float32)
        fresh = jax.eval_shape(network.init, jax.random.key(0), images)
        shapes: dict[str, Any] = dict(flatten_dict(fresh, sep="/"))
    except OSError:
        raise
    except Exception as error:  # flax and JAX raise many kinds for layers that do not fit
        said = str(error) if isinstance(error, ValueError) else repr(error)
        reason = " ".join(said.splitlines())
        raise ValueError(f"{path} does not describe a searched network: {reason}") from error
    file = path.with_name("network.safetensors")
    try:
        variables = results.load_variables(file)
    except OSError:
        raise
    except Exception as error:  # a damaged file can raise nearly anything
        raise ValueError(f"{file}: {' '.join(str(error).splitlines())}") from error
    arrays: dict[str, Any] = dict(flatten_dict(variables, sep="/"))
    for name in sorted({*shapes, *arrays}):
        actual, needed = (
            f"{place[name].dtype} {place[name].shape}" if name in place else "none"
            for place in (arrays, shapes)
        )
        if actual != needed:
            raise ValueError(f"{file}: {name!r} is {actual}, needed: {needed}")
    return SearchedNetwork(network=network, variables=variables, **values)
