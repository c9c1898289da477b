"""Fully connected ReLU networks as plain arrays: a tuple of layers, read from and written to files
in the formats in which people hold them."""

from __future__ import annotations

import itertools
import re
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple, TypeAlias

import jax.numpy as jnp
import numpy as np
import safetensors
import safetensors.numpy

from evojax_suite.results import write_atomically
from evojax_suite.types import Array


class Layer(NamedTuple):
    """Weights of a fully connected layer, (outputs, inputs), and biases, (outputs,)."""

    weight: Array | np.ndarray
    bias: Array | np.ndarray


Network: TypeAlias = tuple[Layer, ...]


def hidden_sizes(network: Network) -> tuple[int, ...]:
    """Units of each hidden layer."""
    return tuple(layer.bias.shape[-1] for layer in network[:-1])


def zeros(sizes: tuple[int, ...]) -> Network:
    """A network of zeros; sizes: of inputs, hidden layers and outputs."""
    return tuple(
        Layer(np.zeros((after, before), np.float32), np.zeros(after, np.float32))
        for before, after in itertools.pairwise(sizes)
    )


def forward(network: Network, inputs: Array) -> list[Array]:
    """Hidden activations (N, units) of each layer, then logits (N, num_classes).

    inputs: (N, D).
    """
    values, outputs = inputs, []
    for index, layer in enumerate(network):
        values = values @ layer.weight.T + layer.bias
        if index < len(network) - 1:
            values = jnp.maximum(values, 0.0)
        outputs.append(values)
    return outputs


def num_parameters(num_inputs: int, sizes, num_classes: int):
    """Weights and biases of networks with hidden layers of `sizes`, a sequence of numbers or of
    arrays of one shape."""
    bounds = [num_inputs, *sizes, num_classes]
    return sum((a + 1) * b for a, b in itertools.pairwise(bounds))


def _natural(name: str) -> list:
    return [
        (0, int(part), "") if part.isdigit() else (1, 0, part) for part in re.split(r"(\d+)", name)
    ]


def from_arrays(arrays: Mapping[str, np.ndarray], num_inputs: int, num_classes: int) -> Network:
    """The network that named arrays hold: `<layer>.weight` (outputs, inputs) as PyTorch has them or
    `<layer>.kernel` (inputs, outputs) as flax does, each with `<layer>.bias`; `/` for `.` is fine.

    Layers are chained by their shapes, those of one shape in the natural order of their names.
    Raises ValueError, one line, for what is no such network from `num_inputs` to `num_classes`.
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
    found: dict[str, Layer] = {}
    for owner in sorted(layers, key=_natural):
        parts = layers[owner]
        if "bias" not in parts or len(parts) != 2:
            raise ValueError(f"layer {owner!r} needs a weight or kernel and a bias, has {[*parts]}")
        weight = parts["weight"] if "weight" in parts else parts["kernel"].T
        if weight.ndim != 2 or parts["bias"].shape != weight.shape[:1]:
            raise ValueError(
                f"layer {owner!r} must be fully connected, got weights of shape {weight.shape} "
                f"and biases of shape {parts['bias'].shape}"
            )
        found[owner] = Layer(np.ascontiguousarray(weight), parts["bias"])
    chain = _chain(tuple(found.items()), num_inputs, num_classes)
    if chain is None or len(chain) < 2:
        shapes = ", ".join(f"{name} {layer.weight.shape}" for name, layer in found.items())
        raise ValueError(
            f"no chain of two or more layers leads from {num_inputs} inputs to {num_classes} "
            f"classes through {shapes or 'no layers'} (outputs, inputs)"
        )
    return chain


def _chain(left: tuple[tuple[str, Layer], ...], inputs: int, num_classes: int) -> Network | None:
    """All of `left` in an order in which shapes fit, by preference the given one."""
    if not left:
        return () if inputs == num_classes else None
    for index, (_, layer) in enumerate(left):
        if layer.weight.shape[1] == inputs:
            rest = _chain(left[:index] + left[index + 1 :], layer.weight.shape[0], num_classes)
            if rest is not None:
                return (layer, *rest)
    return None


def load(path: Path, num_inputs: int, num_classes: int) -> Network:
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
        return from_arrays(arrays, num_inputs, num_classes)
    except (ValueError, EOFError, zipfile.BadZipFile, safetensors.SafetensorError) as error:
        raise ValueError(f"{path}: {error}") from error


def save(path: Path, network: Network) -> None:
    """Write `network` as safetensors, `layers.<i>.weight` (outputs, inputs) and `.bias`."""
    arrays = {
        f"layers.{index}.{role}": np.ascontiguousarray(array)
        for index, layer in enumerate(network)
        for role, array in layer._asdict().items()
    }
    write_atomically(path, safetensors.numpy.save(arrays))
