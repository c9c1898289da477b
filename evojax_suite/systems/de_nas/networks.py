"""Networks of architecture search: a list of units, then three dense layers (Pei et al. 2022).

`SequenceNetwork` is one architecture and one program. `PaddedNetwork` is all architectures of a
space in one program: filters are masked, the kernel and the resolution of a convolution choose a
branch, and the genome is data (the collection `genome` of its variables). It has the same outputs
as the network of that genome, and compiles once for all of them.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Annotated, Any, Literal, NamedTuple, TypeAlias

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from annotated_types import Ge, Lt

from evojax_suite.networks import layers as primitives
from evojax_suite.networks.layers import Convolution
from evojax_suite.systems.de_nas import architectures
from evojax_suite.systems.de_nas.architectures import (
    AVERAGE_POOLING,
    CONVOLUTION,
    Genome,
    Head,
    Space,
    Unit,
    dense_units,
    num_features,
)
from evojax_suite.types import Array, PRNGKey, PyTree

Initialization = Literal["pytorch", "kaiming"]


_Convolution: TypeAlias = Callable[[Array, Array], Array]
_Run: TypeAlias = Callable[..., Array]


class SequenceNetwork(nn.Module):
    """Units in their order, ReLU after each convolution; dropout, dense, ReLU, dropout, dense,
    ReLU, dense. `normalization` comes between a convolution and its ReLU, a skip connection around
    each convolution that keeps the number of filters; the head "linear" is the mean over the
    pixels, dropout, dense. None of these is in the paper. Without a head the outputs are maps."""

    num_classes: int
    units: tuple[Unit, ...]
    dropout: Annotated[float, Ge(0), Lt(1)] = 0.5
    normalization: str = "none"
    skip: bool = False
    lowering: primitives.Convolution | None = None
    dtype: jnp.dtype = jnp.float32
    head: Head | None = "dense"

    @nn.compact
    def __call__(self, images: jax.Array, train: bool = False) -> jax.Array:
        features = images
        for unit in self.units:
            if unit.kind != "convolution":
                features = primitives.pool(unit.kind, features)
                continue
            shape = unit.filters, unit.kernel, unit.kernel // 2
            convolution = primitives.Conv(*shape, lowering=self.lowering, dtype=self.dtype)
            maps = convolution(features, train)
            maps = primitives.normalize_features(self.normalization, maps, train)
            if self.skip and maps.shape == features.shape:
                maps += features
            features = nn.relu(maps)
        if self.head is None:
            return features
        if self.head == "linear":
            features = nn.Dropout(self.dropout, deterministic=not train)(features.mean((1, 2)))
        features = features.reshape(features.shape[0], -1)
        *hidden, last = dense_units(features.shape[-1], self.num_classes, self.head)[1:]
        for size in hidden:
            features = nn.Dropout(self.dropout, deterministic=not train)(features)
            features = nn.relu(primitives.Dense(size, dtype=self.dtype)(features))
        return primitives.Dense(last, dtype=self.dtype)(features).astype(jnp.float32)


def _scales(initialization: Initialization) -> tuple[float, float]:
    """The scales of weights and biases in U(-scale, scale) / sqrt(fan_in): PyTorch's default, or
    those of He et al. 2015, which keep the variance through ReLUs."""
    return {"pytorch": (1.0, 1.0), "kaiming": (6**0.5, 0.0)}[initialization]


def fresh(
    key: PRNGKey,
    network: SequenceNetwork,
    image_shape: tuple[int, ...],
    initialization: Initialization = "pytorch",
) -> PyTree:
    """Variables as `network.init` draws them, or Kaiming's, from one draw for all: one a layer
    takes longer to compile than the training."""
    variables = jax.eval_shape(network.init, key, jnp.zeros((1, *image_shape)))
    shapes = sorted(variables.get("params", {}).items())
    drawn = {name: layer for name, layer in shapes if "kernel" in layer}
    sizes = [leaf.size for leaf in jax.tree.leaves(drawn)]
    numbers = jax.random.uniform(key, (sum(sizes),), minval=-1, maxval=1)
    parts = iter(jnp.split(numbers, np.cumsum(sizes)[:-1]))
    scales = dict(zip(("kernel", "bias"), _scales(initialization), strict=True))
    parameters = {}
    for name, layer in drawn.items():
        bound = np.prod(layer["kernel"].shape[:-1]) ** -0.5
        parameters[name] = {
            kind: next(parts).reshape(leaf.shape) * (bound * scales[kind])
            for kind, leaf in sorted(layer.items())
        }

    def of_normalization(path: tuple[Any, ...], leaf: Array):
        return jnp.full(leaf.shape, float(path[-1].key in ("scale", "var")), leaf.dtype)

    rest = {**variables, "params": {name: layer for name, layer in shapes if name not in drawn}}
    rest = jax.tree_util.tree_map_with_path(of_normalization, rest)
    return rest | {"params": rest["params"] | parameters}


class Layer(NamedTuple):
    """A layer of a network: a row of the tables of Figs. 8 and 10."""

    name: str
    shape: tuple[int, ...]
    parameters: int


def layers(
    units: tuple[Unit, ...],
    image_shape: tuple[int, int, int],
    num_classes: int,
    head: Head = "dense",
) -> list[Layer]:
    """The layers of a network without normalisation, with their outputs and parameters."""
    shape, rows = image_shape, []
    for unit in units:
        channels, shape = shape[2], architectures.shape_after(unit, shape)
        if unit.kind == "convolution":
            size = (unit.kernel**2 * channels + 1) * unit.filters
            rows.append(Layer(f"convolution {unit.kernel}x{unit.kernel}", shape, size))
            rows.append(Layer("ReLU", shape, 0))
        else:
            rows.append(Layer(f"{unit.kind} pooling", shape, 0))
    height, width, channels = shape
    pixels = height * width if head == "dense" else 1
    sizes = dense_units(pixels * channels, num_classes, head)
    rows.append(Layer("flatten" if head == "dense" else "mean over pixels", (sizes[0],), 0))
    for before, after in itertools.pairwise(sizes):
        rows.append(Layer("dropout", (before,), 0))
        rows.append(Layer("dense", (after,), (before + 1) * after))
        rows.append(Layer("ReLU", (after,), 0))
    del rows[-1]  # no ReLU follows the last
    if head == "dense":
        del rows[-2]  # and no dropout is before it
    return rows


class PaddedNetwork(nn.Module):
    """Any network of `space` for images of `image_shape`: that of the genome in its variables.

    Parameters have the space's largest sizes; those beyond the genome's sizes have no effect and no
    gradient. `for_genome` scales fresh ones for a genome.
    """

    num_classes: int
    space: Space
    image_shape: tuple[int, int, int]
    dropout: float = 0.5
    lowering: primitives.Convolution | None = None

    @property
    def most_features(self) -> int:
        """The inputs of the first dense layer."""
        height, width, _ = self.image_shape
        return min(self.space.max_features, height * width * self.space.max_filters)

    @nn.compact
    def __call__(self, images: jax.Array, train: bool = False) -> jax.Array:
        space, sizes = self.space, sorted(set(self.space.kernels))
        most, levels = space.max_filters, architectures.most_poolings(self.image_shape) + 1
        height, width, first_inputs = self.image_shape
        empty = jnp.zeros(space.max_length, jnp.int32)
        genome = Genome(*(
            self.variable("genome", name, lambda: empty).value for name in Genome._fields
        ))  # fmt: skip
        largest = sizes[-1]
        kernel_shape = space.max_length - 1, largest, largest, most, most
        kernels = self.param("kernels", _unit_uniform, kernel_shape)
        first = self.param("first", _unit_uniform, (largest, largest, first_inputs, most))
        biases = self.param("biases", _unit_uniform, (space.max_length, most))
        lowering = self.lowering or primitives.default_convolution(train, most)
        lowering_first = self.lowering or primitives.default_convolution(train, first_inputs)

        is_pooling = genome.kinds > CONVOLUTION
        before = jnp.cumsum(is_pooling) - is_pooling  # poolings before a unit
        in_use = jnp.arange(most) < genome.filters[:, None]

        firsts = [_middle(size, lowering_first) for size in sizes]
        which = jnp.searchsorted(jnp.array(sizes), genome.kernels[0])
        features = jax.lax.switch(which, firsts, images, first)
        features = nn.relu(jnp.where(in_use[0], features + biases[0], 0))

        channels, poolings = architectures.last_filters(genome), is_pooling.sum()
        position = jnp.arange(self.most_features)
        flat = jnp.zeros((len(images), self.most_features))
        for level in range(levels):
            rows, columns = height >> level, width >> level
            widest = 2 * max(rows, columns) - 1  # what is beyond only ever meets the padding
            sizes_here = sorted({min(size, widest) for size in sizes})
            here = (genome.kinds == CONVOLUTION) & (before == level)
            start = jnp.maximum(here.argmax(), 1)
            which = jnp.searchsorted(jnp.array(sizes_here), jnp.minimum(genome.kernels, widest))
            run = _in_a_row(tuple(sizes_here), lowering)
            rest = which[1:], kernels, biases[1:], in_use[1:]
            features = run(features, start - 1, here[1:].sum(), *rest)

            size = rows * columns * channels
            pixel, channel = position // channels, position % channels
            taken = features[:, (pixel // columns) % rows, pixel % columns, channel]
            flat = jnp.where((poolings == level) & (position < size), taken, flat)
            if level < levels - 1:
                maximum = (is_pooling & (before == level) & (genome.kinds != AVERAGE_POOLING)).any()
                pooled = [primitives.pool(kind, features) for kind in ("max", "average")]
                features = jnp.where(maximum, *pooled)

        features = flat
        size = architectures.num_features_after((height, width), poolings) * channels
        most_units = dense_units(self.most_features, self.num_classes)
        num_units = dense_units(size, self.num_classes)
        # The units beyond the network's are zero, as inputs and as outputs.
        for index, (inputs, outputs) in enumerate(itertools.pairwise(most_units)):
            weights = self.param(f"dense_{index}", _unit_uniform, (inputs, outputs))
            bias = self.param(f"dense_bias_{index}", _unit_uniform, (outputs,))
            if index < 2:
                features = nn.Dropout(self.dropout, deterministic=not train)(features)
            features = features @ weights + bias
            if index < 2:
                is_unit = jnp.arange(outputs) < num_units[index + 1]
                features = jnp.where(is_unit, nn.relu(features), 0)
        return features


def _middle(size: int, lowering: Convolution) -> _Convolution:
    """The convolution of maps with the middle of a kernel, `size` wide."""

    def apply(maps: Array, kernel: Array) -> Array:
        edge = (len(kernel) - size) // 2
        middle = kernel[edge : edge + size, edge : edge + size]
        return primitives.convolve(maps, middle, size // 2, 1, lowering)

    return apply


def _in_a_row(sizes: tuple[int, ...], lowering: Convolution) -> _Run:
    """Convolutions with ReLU, one after the other: a function of maps, the place of the first among
    the units, their number, and for each unit which of `sizes` its kernel has, the kernel, the bias
    and the filters in use.

    The gradient is written out: the number of units is known as late as the network, and automatic
    differentiation keeps for each of them what every size would need.
    """
    convolutions = [_middle(size, lowering) for size in sizes]

    def after(place: Array, maps: Array, units: PyTree) -> Array:
        which, kernel, bias, in_use = (array[place] for array in units)
        outputs = jax.lax.switch(which, convolutions, maps, kernel) + bias
        return nn.relu(jnp.where(in_use, outputs, 0))

    @jax.custom_vjp
    def run(maps: Array, first: Array, number: Array, *units: Array) -> Array:
        def step(place: Array, maps: Array) -> Array:
            return after(first + place, maps, units)

        return jax.lax.fori_loop(0, number, step, maps)

    def forward(maps: Array, first: Array, number: Array, *units: Array) -> tuple[Array, PyTree]:
        def step(place: Array, seen: Array) -> Array:
            return seen.at[place + 1].set(after(first + place, seen[place], units))

        seen = jnp.zeros((len(units[0]) + 1, *maps.shape), maps.dtype).at[0].set(maps)
        seen = jax.lax.fori_loop(0, number, step, seen)
        return seen[number], (seen, first, number, *units[:3])

    def gradients_of(convolution: _Convolution) -> Callable[..., PyTree]:
        return lambda maps, kernel, gradient: jax.vjp(convolution, maps, kernel)[1](gradient)

    gradients = [gradients_of(convolution) for convolution in convolutions]

    def backward(residuals: PyTree, gradient: Array) -> PyTree:
        seen, first, number, which, kernels, biases = residuals

        def step(done: Array, carry: PyTree) -> PyTree:
            gradient, of_kernels, of_biases = carry
            place = number - 1 - done
            unit = first + place
            gradient = jnp.where(seen[place + 1] > 0, gradient, 0)
            inputs = seen[place], kernels[unit], gradient
            of_maps, of_kernel = jax.lax.switch(which[unit], gradients, *inputs)
            of_bias = gradient.sum((0, 1, 2))
            return of_maps, of_kernels.at[unit].set(of_kernel), of_biases.at[unit].set(of_bias)

        start = gradient, jnp.zeros_like(kernels), jnp.zeros_like(biases)
        gradient, of_kernels, of_biases = jax.lax.fori_loop(0, number, step, start)
        return gradient, None, None, None, of_kernels, of_biases, None

    run.defvjp(forward, backward)
    return run


def _unit_uniform(key: Array, shape: tuple[int, ...]) -> Array:
    return jax.random.uniform(key, shape, jnp.float32, -1, 1)


def for_genome(
    network: PaddedNetwork,
    parameters: PyTree,
    genome: Genome,
    initialization: Initialization = "pytorch",
) -> PyTree:
    """Freshly initialised parameters, scaled as those of a fresh network of this genome, with the
    fan-in of its layers."""
    inputs = architectures.inputs_of(genome, network.image_shape[2])
    bounds = jnp.maximum(genome.kernels**2 * inputs, 1) ** -0.5
    weight, bias = _scales(initialization)
    parameters = dict(parameters)
    parameters["first"] *= bounds[0] * weight
    parameters["kernels"] *= bounds[1:, None, None, None, None] * weight
    parameters["biases"] *= bounds[:, None] * bias
    sizes = dense_units(num_features(genome, network.image_shape), network.num_classes)
    for index, size in enumerate(sizes[:-1]):
        parameters[f"dense_{index}"] *= size**-0.5 * weight
        parameters[f"dense_bias_{index}"] *= size**-0.5 * bias
    return parameters


def unpadded(network: PaddedNetwork, parameters: PyTree, genome: Genome) -> PyTree:
    """The parameters of the SequenceNetwork of a genome, taken from those of a padded one."""
    taken, inputs = {}, network.image_shape[2]
    largest, number = max(network.space.kernels), 0
    for place, unit in enumerate(architectures.to_units(genome)):
        if unit.kind != "convolution":
            continue
        kernel = parameters["first"] if place == 0 else parameters["kernels"][place - 1]
        edge = (largest - unit.kernel) // 2
        middle = kernel[edge : edge + unit.kernel, edge : edge + unit.kernel]
        taken[f"Conv_{number}"] = {
            "kernel": middle[:, :, :inputs, : unit.filters],
            "bias": parameters["biases"][place, : unit.filters],
        }
        inputs, number = unit.filters, number + 1
    features = int(num_features(genome, network.image_shape))
    sizes = dense_units(features, network.num_classes)
    for index, (before, after) in enumerate(itertools.pairwise(sizes)):
        taken[f"Dense_{index}"] = {
            "kernel": parameters[f"dense_{index}"][:before, :after],
            "bias": parameters[f"dense_bias_{index}"][:after],
        }
    return taken
