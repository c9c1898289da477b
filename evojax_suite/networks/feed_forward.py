"""Feed-forward ReLU networks as plain arrays: a tuple of layers, read from and written to files in
the formats in which people hold them.

A network is fully connected, or has convolutions first: stride 1, padded so that maps keep their
size, each followed by ReLU and a 2x2 pooling. Weights have outputs and inputs as their first two
axes, whatever the layer: what removes or exchanges units needs no more.
"""

from __future__ import annotations

import itertools
import math
import re
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Literal, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
import safetensors
import safetensors.numpy

from evojax_suite.networks.layers import pool
from evojax_suite.results import write_atomically
from evojax_suite.types import Array

Pooling = Literal["average", "max", "none"]
"""After each convolution, over 2x2 pixels."""


class Layer(NamedTuple):
    """Weights (outputs, inputs, ...) and biases (outputs,).

    A convolution's weights have its height and width as further axes, those of the first fully
    connected layer after convolutions the pixels of a map, row by row.
    """

    weight: Array | np.ndarray
    bias: Array | np.ndarray


Network: TypeAlias = tuple[Layer, ...]


def hidden_sizes(network: Network) -> tuple[int, ...]:
    """Units of each hidden layer; of a convolution, its filters."""
    return tuple(layer.bias.shape[-1] for layer in network[:-1])


def is_convolutional(network: Network) -> bool:
    """Whether the first layer is a convolution."""
    return network[0].weight.ndim == 4


def zeros(sizes: tuple[int, ...]) -> Network:
    """A fully connected network of zeros; sizes: of inputs, hidden layers and outputs."""
    return tuple(
        Layer(np.zeros((after, before), np.float32), np.zeros(after, np.float32))
        for before, after in itertools.pairwise(sizes)
    )


def forward(network: Network, inputs: Array, pooling: Pooling = "average") -> list[Array]:
    """Activations of each hidden layer, then logits (N, num_classes).

    inputs: (N, D), or images (N, H, W, C) where the network begins with convolutions. Activations
    are (N, units), of a convolution (N, pixels, filters), pooled.
    """
    values, outputs = inputs, []
    for index, (weight, bias) in enumerate(network):
        if weight.ndim == 4:
            values = jax.lax.conv_general_dilated(
                values,
                jnp.transpose(weight, (2, 3, 1, 0)),
                (1, 1),
                "SAME",
                dimension_numbers=("NHWC", "HWIO", "NHWC"),
            )
            values = jnp.maximum(values + bias, 0.0)
            if pooling != "none":
                values = pool(pooling, values)
            outputs.append(values.reshape(values.shape[0], -1, values.shape[-1]))
            continue
        if weight.ndim == 3:  # pixels of maps, and filters, as one axis
            values = values.reshape(values.shape[0], -1)
            weight = jnp.swapaxes(weight, 1, 2).reshape(weight.shape[0], -1)
        values = values @ weight.T + bias
        if index < len(network) - 1:
            values = jnp.maximum(values, 0.0)
        outputs.append(values)
    return outputs


def num_parameters(network: Network, sizes):
    """Weights and biases of networks like `network` with hidden layers of `sizes`, a sequence of
    numbers or of arrays of one shape."""
    bounds = [network[0].weight.shape[1], *sizes, network[-1].bias.shape[0]]
    return sum(
        (before * math.prod(layer.weight.shape[2:]) + 1) * after
        for layer, (before, after) in zip(network, itertools.pairwise(bounds), strict=True)
    )


def _natural(name: str) -> list:
    return [
        (0, int(part), "") if part.isdigit() else (1, 0, part) for part in re.split(r"(\d+)", name)
    ]


def from_arrays(
    arrays: Mapping[str, np.ndarray],
    image_shape: tuple[int, int, int],
    num_classes: int,
    pooling: Pooling = "average",
) -> Network:
    """The network that named arrays hold: `<layer>.weight` (outputs, inputs[, height, width]) as
    PyTorch has them or `<layer>.kernel` ([height, width,] inputs, outputs) as flax does, each with
    `<layer>.bias`; `/` for `.` is fine.

    Layers are chained by their shapes, those of one shape in the natural order of their names. A
    fully connected layer after convolutions takes their maps filter by filter in PyTorch's naming,
    pixel by pixel in flax's, as these flatten them. image_shape: (H, W, C). Raises ValueError, one
    line, for what is no such network.
    """
    layers: dict[str, dict[str, np.ndarray]] = {}
    for name, array in arrays.items():
        owner, _, role = name.replace("/", ".").rpartition(".")
        if role not in ("weight", "kernel", "bias"):
            raise ValueError(f"expected <layer>.weight, .kernel or .bias, found {name!r}")
        if not np.issubdtype(array.dtype, np.floating):
            raise ValueError(f"{name} must hold floating point numbers, got {array.dtype}")
        if not np.isfinite(array).all():
            raise ValueError(f"{name} holds {np.sum(~np.isfinite(array))} NaN or infinite numbers")
        layers.setdefault(owner, {})[role] = np.asarray(array, np.float32)
    found: dict[str, tuple[Layer, bool]] = {}
    for owner in sorted(layers, key=_natural):
        parts = layers[owner]
        if "bias" not in parts or len(parts) != 2:
            raise ValueError(f"layer {owner!r} needs a weight or kernel and a bias, has {[*parts]}")
        weight = (
            parts["weight"] if "weight" in parts else np.moveaxis(parts["kernel"], (-1, -2), (0, 1))
        )
        if weight.ndim not in (2, 4) or parts["bias"].shape != weight.shape[:1]:
            raise ValueError(
                f"layer {owner!r} must be fully connected or a convolution, got weights of shape "
                f"{weight.shape} and biases of shape {parts['bias'].shape}"
            )
        if not all(size % 2 for size in weight.shape[2:]):
            raise ValueError(
                f"layer {owner!r} must be a convolution of odd size, got {weight.shape[2]}x"
                f"{weight.shape[3]}"
            )
        layer = Layer(np.ascontiguousarray(weight), parts["bias"])
        found[owner] = layer, "kernel" in parts
    height, width, channels = image_shape
    num_inputs = height * width * channels
    convolutional = any(layer.weight.ndim == 4 for layer, _ in found.values())
    start = (channels, height, width) if convolutional else (num_inputs,)
    chain = _chain(tuple(found.values()), start, num_classes, pooling)
    if chain is None or len(chain) < 2:
        shapes = ", ".join(f"{name} {layer.weight.shape}" for name, (layer, _) in found.items())
        inputs = f"images of {image_shape}" if convolutional else f"{num_inputs} inputs"
        raise ValueError(
            f"no chain of two or more layers leads from {inputs} to {num_classes} "
            f"classes through {shapes or 'no layers'} (outputs, inputs)"
        )
    return chain


def _chain(
    left: tuple[tuple[Layer, bool], ...], inputs: tuple[int, ...], num_classes: int, pooling: str
) -> Network | None:
    """All of `left`, layers and whether they are flax's, in an order in which shapes fit, by
    preference the given one. inputs: (units,), or of maps (filters, height, width)."""
    if not left:
        return () if inputs == (num_classes,) else None
    for index, (layer, is_flax) in enumerate(left):
        weight = layer.weight
        if weight.ndim == 4:
            if len(inputs) == 1 or weight.shape[1] != inputs[0] or min(inputs[1:]) < 2:
                continue
            shrunk = 1 if pooling == "none" else 2
            after = (weight.shape[0], inputs[1] // shrunk, inputs[2] // shrunk)
        elif weight.shape[1] == math.prod(inputs):
            after = (weight.shape[0],)
            if len(inputs) == 3:
                axes = (-1, inputs[0]) if is_flax else (inputs[0], -1)
                weight = weight.reshape(len(weight), *axes)
                weight = np.ascontiguousarray(np.swapaxes(weight, 1, 2) if is_flax else weight)
        else:
            continue
        rest = _chain(left[:index] + left[index + 1 :], after, num_classes, pooling)
        if rest is not None:
            return (Layer(weight, layer.bias), *rest)
    return None


def load(
    path: Path, image_shape: tuple[int, int, int], num_classes: int, pooling: Pooling = "average"
) -> Network:
    """A network from a .safetensors or .npz file; see `from_arrays`.

    Raises ValueError or OSError with one line that names the file.
    """
    if not path.is_file():
        raise FileNotFoundError(f"no file {path}")
    try:
        if path.suffix == ".npz":
            with np.load(path, allow_pickle=False) as file:
                arrays = {name: file[name] for name in file.files}
        elif path.suffix == ".safetensors":
            arrays = safetensors.numpy.load_file(path)
        else:
            raise ValueError("expected a .safetensors or .npz file")
        return from_arrays(arrays, image_shape, num_classes, pooling)
    except (ValueError, EOFError, zipfile.BadZipFile, safetensors.SafetensorError) as error:
        raise ValueError(f"{path}: {error}") from error


def save(path: Path, network: Network) -> None:
    """Write `network` as safetensors, `layers.<i>.weight` (outputs, inputs[, height, width]) and
    `.bias`, as PyTorch has them."""
    arrays = {}
    for index, (weight, bias) in enumerate(network):
        weight = weight.reshape(len(weight), -1) if weight.ndim == 3 else weight
        arrays[f"layers.{index}.weight"] = np.ascontiguousarray(weight)
        arrays[f"layers.{index}.bias"] = np.ascontiguousarray(bias)
    write_atomically(path, safetensors.numpy.save(arrays))
