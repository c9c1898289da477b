"""Feed-forward ReLU networks as plain arrays: a tuple of layers, read from files in the formats of
PyTorch and flax, and written to files.

A network is fully connected, or has convolutions first: stride 1, padded so that maps keep their
size, each followed by ReLU and a 2x2 pooling. Weights have outputs and inputs as their first two
axes, whatever the layer, so that units are removed and exchanged alike in all layers.
"""

from __future__ import annotations

import collections
import itertools
import math
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Literal, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
import safetensors.numpy
from jaxtyping import Float

from evojax_suite.data.npz import arrays_in
from evojax_suite.networks.layers import pool
from evojax_suite.runtime.results import write_atomically
from evojax_suite.types import Array

Pooling = Literal["average", "max", "none"]
"""Pooling after each convolution, over 2x2 pixels."""


class Layer(NamedTuple):
    """Weights (outputs, inputs, ...) and biases; of a population, with a leading axis.

    A convolution's weights have its height and width as further axes, those of the first fully
    connected layer after convolutions the pixels of a map, row by row.
    """

    weight: Float[Array | np.ndarray, "..."]
    bias: Float[Array | np.ndarray, "*members outputs"]


Network: TypeAlias = tuple[Layer, ...]
Shape: TypeAlias = tuple[int, int, int]  # height, width and channels of an image
_Parsed: TypeAlias = tuple[Layer, bool]  # a layer, and whether its names are those of flax


def hidden_sizes(network: Network) -> tuple[int, ...]:
    """Units of each hidden layer; of a convolution, its filters."""
    return tuple(layer.bias.shape[-1] for layer in network[:-1])


def is_convolutional(network: Network) -> bool:
    """Whether the first layer is a convolution."""
    return network[0].weight.ndim == 4


def layer_sizes(network: Network, hidden: Iterable[Any]) -> list[Any]:
    """The number of inputs of `network` (channels of a convolution), `hidden`, that of outputs."""
    return [network[0].weight.shape[1], *hidden, network[-1].bias.shape[0]]


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
    values, outputs, axes = inputs, [], ("NHWC", "HWIO", "NHWC")
    for index, (weight, bias) in enumerate(network):
        if weight.ndim == 4:
            kernel = jnp.transpose(weight, (2, 3, 1, 0))
            values = jax.lax.conv_general_dilated(
                values, kernel, (1, 1), "SAME", dimension_numbers=axes
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


def num_parameters(network: Network, sizes: Iterable[Any]) -> Any:
    """The number of weights and biases of networks like `network` with hidden layers of `sizes`, a
    sequence of numbers or of arrays of one shape."""
    bounds = itertools.pairwise(layer_sizes(network, sizes))
    return sum(
        (before * math.prod(layer.weight.shape[2:]) + 1) * after
        for layer, (before, after) in zip(network, bounds, strict=True)
    )


def finite(name: str, array: np.ndarray) -> np.ndarray:
    """An array of a file as float32. Raises ValueError where it holds other than finite floating
    point numbers."""
    if not np.issubdtype(array.dtype, np.floating):
        raise ValueError(f"{name} must hold floating point numbers, got {array.dtype}")
    with np.errstate(over="ignore", invalid="ignore"):
        array = np.asarray(array, np.float32)
    if not np.isfinite(array).all():
        raise ValueError(f"{name} holds {np.sum(~np.isfinite(array))} NaN or infinite numbers")
    return array


def _natural(name: str) -> list[tuple[int, int, str]]:
    parts = re.split(r"(\d+)", name)
    return [(0, int(part), "") if part.isdecimal() else (1, 0, part) for part in parts]


def from_arrays(
    arrays: Mapping[str, np.ndarray],
    image_shape: Shape,
    num_classes: int,
    pooling: Pooling = "average",
) -> Network:
    """The network that named arrays hold: `<layer>.weight` (outputs, inputs[, height, width]) as
    PyTorch has them or `<layer>.kernel` ([height, width,] inputs, outputs) as flax does, each with
    `<layer>.bias`; `/` may stand for `.`.

    Layers are chained by their shapes, those of one shape in the natural order of their names. A
    fully connected layer after convolutions takes their maps filter by filter in PyTorch's naming,
    pixel by pixel in flax's, as these flatten them. Raises ValueError, one line, where the arrays
    are not a network of this kind.
    """
    layers: dict[str, dict[str, np.ndarray]] = {}
    for name, array in arrays.items():
        owner, _, role = name.replace("/", ".").rpartition(".")
        if role not in ("weight", "kernel", "bias"):
            raise ValueError(f"expected <layer>.weight, .kernel or .bias, found {name!r}")
        layers.setdefault(owner, {})[role] = finite(name, array)
    parsed: dict[str, _Parsed] = {}
    for owner in sorted(layers, key=_natural):
        parts = layers[owner]
        if "bias" not in parts or len(parts) != 2:
            raise ValueError(f"layer {owner!r} needs a weight or kernel and a bias, has {[*parts]}")
        bias, is_flax = parts["bias"], "kernel" in parts
        weight = parts["kernel" if is_flax else "weight"]
        if is_flax and weight.ndim > 1:
            weight = np.moveaxis(weight, (-1, -2), (0, 1))
        if weight.ndim not in (2, 4) or not weight.size or bias.shape != weight.shape[:1]:
            raise ValueError(
                f"layer {owner!r} must be fully connected or a convolution, got weights of shape "
                f"{weight.shape} and biases of shape {bias.shape}"
            )
        if not all(size % 2 for size in weight.shape[2:]):
            size = "x".join(map(str, weight.shape[2:]))
            raise ValueError(f"layer {owner!r} must be a convolution of odd size, got {size}")
        parsed[owner] = Layer(np.ascontiguousarray(weight), bias), is_flax
    chain = _chain([*parsed.values()], image_shape, num_classes, pooling)
    if chain is None or len(chain) < 2:
        shapes = ", ".join(f"{name} {layer.weight.shape}" for name, (layer, _) in parsed.items())
        convolutional = any(layer.weight.ndim == 4 for layer, _ in parsed.values())
        inputs = f"images of {image_shape}" if convolutional else f"{math.prod(image_shape)} inputs"
        raise ValueError(
            f"no chain of two or more layers leads from {inputs} to {num_classes} "
            f"classes through {shapes or 'no layers'} (outputs, inputs)"
        )
    return chain


def _chain(
    layers: list[_Parsed], image_shape: Shape, num_classes: int, pooling: Pooling
) -> Network | None:
    """All layers in an order in which their shapes fit, by preference the given one; None where
    there is none."""
    height, width, channels = image_shape
    convolutions, dense = ([x for x in layers if x[0].weight.ndim == n] for n in (4, 2))
    trail = _trail(convolutions, channels)
    if trail is None:
        return None
    chain = [convolutions[index][0] for index in trail]
    shrunk = 1 if pooling == "none" else 2
    for layer in chain:
        if min(height, width) < 2:
            return None
        height, width, channels = height // shrunk, width // shrunk, len(layer.bias)
    trail = _trail(dense, height * width * channels)
    if not trail or len(dense[trail[-1]][0].bias) != num_classes:
        return None
    for place, index in enumerate(trail):
        (weight, bias), is_flax = dense[index]
        if chain and not place:
            axes = (-1, channels) if is_flax else (channels, -1)
            weight = weight.reshape(len(weight), *axes)
            weight = np.ascontiguousarray(np.swapaxes(weight, 1, 2) if is_flax else weight)
        chain.append(Layer(weight, bias))
    return tuple(chain)


def _trail(layers: list[_Parsed], start: int) -> list[int] | None:
    """The order in which all layers follow one another from `start` inputs, the first of those that
    are left where several can be next; None where they cannot."""
    edges = [(layer.weight.shape[1], layer.weight.shape[0]) for layer, _ in layers]
    left, order = [*range(len(edges))], []
    while left:
        tried = set()
        for index in left:
            before, after = edges[index]
            if before != start or after in tried:
                continue
            tried.add(after)
            rest = [other for other in left if other != index]
            if _is_trail([edges[other] for other in rest], after):
                break
        else:
            return None
        left, start = rest, after
        order.append(index)
    return order


def _is_trail(edges: list[tuple[int, int]], start: int) -> bool:
    """Whether a path from `start` takes each of `edges` (from, to) once (Euler): as many lead to a
    place as from it, but for the path's ends, and all are connected."""
    more_from = collections.Counter(before for before, _ in edges)
    more_from.subtract(after for _, after in edges)
    more_from[start] -= 1
    reached, left = {start}, edges
    while left:
        apart = []
        for edge in left:
            if reached.isdisjoint(edge):
                apart.append(edge)
            else:
                reached.update(edge)
        if len(apart) == len(left):
            return False
        left = apart
    return max(more_from.values()) <= 0


def load(path: Path, image_shape: Shape, num_classes: int, pooling: Pooling = "average") -> Network:
    """A network from a .safetensors or .npz file; see `from_arrays`.

    Raises ValueError or OSError with one line that names the file.
    """
    if not path.is_file():
        raise FileNotFoundError(f"no file {path}")
    try:
        if path.suffix == ".npz":
            arrays = arrays_in(path)
        elif path.suffix == ".safetensors":
            arrays = safetensors.numpy.load(path.read_bytes())
        else:
            raise ValueError("expected a .safetensors or .npz file")
        return from_arrays(arrays, image_shape, num_classes, pooling)
    except OSError:
        raise
    except KeyError as error:
        raise ValueError(f"{path}: numbers of type {error} are none that NumPy has") from error
    except Exception as error:  # a damaged file can raise nearly anything
        reason = " ".join(str(error).splitlines()) or type(error).__name__
        raise ValueError(f"{path}: {reason}") from error


def arrays_of(layers: Iterable[tuple[Any, Any]]) -> dict[str, np.ndarray]:
    """The weights and biases of layers as PyTorch has them: `layers.<i>.weight` (outputs, inputs[,
    height, width]) and `.bias`."""
    arrays = {}
    for index, (weight, bias) in enumerate(layers):
        weight = weight.reshape(len(weight), -1) if weight.ndim == 3 else weight
        arrays[f"layers.{index}.weight"] = np.ascontiguousarray(weight)
        arrays[f"layers.{index}.bias"] = np.ascontiguousarray(bias)
    return arrays


def save(path: Path, network: Network) -> None:
    """Write `network` as safetensors, see `arrays_of`."""
    write_atomically(path, safetensors.numpy.save(arrays_of(network)))
