"""Networks of architecture search: a list of units, then three dense layers; paper 004.

`SequenceNetwork` is one architecture and one program. `PaddedNetwork` is all architectures of a
space in one program: filters are masked, the kernel and the resolution of a convolution choose a
branch, and the genome is data (the collection `genome` of its variables). It computes what the
network of that genome computes, and compiles once for all of them.
"""

from __future__ import annotations

import itertools
from typing import Annotated, Literal, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from annotated_types import Ge, Lt

from evojax_suite.networks.layers import (
    Conv,
    Convolution,
    Dense,
    convolve,
    default_convolution,
    normalize_features,
    pool,
)
from evojax_suite.systems.de_nas.architectures import (
    AVERAGE_POOLING,
    CONVOLUTION,
    END,
    Genome,
    Space,
    Unit,
    dense_units,
    last_filters,
    most_poolings,
    num_features,
    num_features_after,
    to_units,
)
from evojax_suite.types import Array, PRNGKey, PyTree


class SequenceNetwork(nn.Module):
    """Units in their order, ReLU after each convolution; dropout, dense, ReLU, dropout, dense,
    ReLU, dense. `normalization` comes between a convolution and its ReLU, a skip connection around
    each convolution that keeps the number of filters; neither is in the paper."""

    num_classes: int
    units: tuple[Unit, ...]
    dropout: Annotated[float, Ge(0), Lt(1)] = 0.5
    normalization: str = "none"
    skip: bool = False
    lowering: Convolution | None = None
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, images: jax.Array, train: bool = False) -> jax.Array:
        features = images
        for unit in self.units:
            if unit.kind != "convolution":
                features = pool(unit.kind, features)
                continue
            inputs = features
            features = Conv(
                unit.filters,
                unit.kernel,
                unit.kernel // 2,
                lowering=self.lowering,
                dtype=self.dtype,
            )(features, train)
            features = normalize_features(self.normalization, features, train)
            if self.skip and inputs.shape == features.shape:
                features += inputs
            features = nn.relu(features)
        features = features.reshape(features.shape[0], -1)
        units = dense_units(features.shape[-1], self.num_classes)
        for index, size in enumerate(units[1:]):
            if index < 2:
                features = nn.Dropout(self.dropout, deterministic=not train)(features)
            features = Dense(size, dtype=self.dtype)(features)
            if index < 2:
                features = nn.relu(features)
        return features.astype(jnp.float32)


Initialization = Literal["pytorch", "kaiming"]


def _scales(initialization: Initialization) -> tuple[float, float]:
    """Scales of weights and biases in U(-scale, scale) / sqrt(fan_in): PyTorch's default, or He et
    al. 2015, which keeps the variance through ReLUs."""
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
    layers = variables["params"]
    drawn = {name for name, layer in layers.items() if "kernel" in layer}
    shapes = jax.tree.leaves([layers[name] for name in sorted(drawn)])
    numbers = iter(
        jnp.split(
            jax.random.uniform(key, (sum(leaf.size for leaf in shapes),), minval=-1, maxval=1),
            np.cumsum([leaf.size for leaf in shapes])[:-1],
        )
    )
    parameters = {}
    scales = dict(zip(("kernel", "bias"), _scales(initialization), strict=True))
    for name in sorted(layers):
        if name in drawn:
            bound = np.prod(layers[name]["kernel"].shape[:-1]) ** -0.5
            parameters[name] = {
                kind: next(numbers).reshape(leaf.shape) * (bound * scales[kind])
                for kind, leaf in sorted(layers[name].items())
            }
        else:  # of a normalisation
            parameters[name] = {
                kind: jnp.full(leaf.shape, float(kind == "scale"))
                for kind, leaf in layers[name].items()
            }
    statistics = jax.tree_util.tree_map_with_path(
        lambda path, leaf: jnp.full(leaf.shape, float(path[-1].key == "var")),
        {name: value for name, value in variables.items() if name != "params"},
    )
    return {"params": parameters, **statistics}


class Layer(NamedTuple):
    """A row of the tables of Figs. 8 and 10."""

    name: str
    shape: tuple[int, ...]
    parameters: int


def layers(
    units: tuple[Unit, ...], image_shape: tuple[int, int, int], num_classes: int
) -> list[Layer]:
    """What a network (without normalisation) is made of, its outputs and parameters."""
    height, width, channels = image_shape
    rows = []
    for unit in units:
        if unit.kind == "convolution":
            size = (unit.kernel**2 * channels + 1) * unit.filters
            channels = unit.filters
            name = f"convolution {unit.kernel}x{unit.kernel}"
            rows.append(Layer(name, (height, width, channels), size))
            rows.append(Layer("ReLU", (height, width, channels), 0))
        else:
            height, width = height // 2, width // 2
            name = {"max": "max pooling", "average": "average pooling"}[unit.kind]
            rows.append(Layer(name, (height, width, channels), 0))
    sizes = dense_units(height * width * channels, num_classes)
    rows.append(Layer("flatten", (sizes[0],), 0))
    for index, (before, after) in enumerate(itertools.pairwise(sizes)):
        if index < 2:
            rows.append(Layer("dropout", (before,), 0))
        rows.append(Layer("dense", (after,), (before + 1) * after))
        if index < 2:
            rows.append(Layer("ReLU", (after,), 0))
    return rows


class PaddedNetwork(nn.Module):
    """Any network of `space` for images of `image_shape`, as its variables' genome says.

    Parameters have the space's largest sizes; what is beyond the genome's own has no effect and no
    gradient. Fresh ones are scaled for a genome by `for_genome`.
    """

    num_classes: int
    space: Space
    image_shape: tuple[int, int, int]
    dropout: float = 0.5
    lowering: Convolution | None = None

    @property
    def most_features(self) -> int:
        height, width, _ = self.image_shape
        return min(self.space.max_features, height * width * self.space.max_filters)

    @nn.compact
    def __call__(self, images: jax.Array, train: bool = False) -> jax.Array:
        space, sizes = self.space, sorted(set(self.space.kernels))
        most, levels = space.max_filters, most_poolings(self.image_shape) + 1
        first_inputs = self.image_shape[2]
        empty = Genome(*(jnp.zeros(space.max_length, jnp.int32) for _ in range(3)))
        genome = Genome(
            *(
                self.variable("genome", name, lambda value=value: value).value
                for name, value in empty._asdict().items()
            )
        )
        uniform = _unit_uniform
        largest = sizes[-1]
        kernels = self.param(
            "kernels", uniform, (space.max_length - 1, largest, largest, most, most)
        )
        first = self.param("first", uniform, (largest, largest, first_inputs, most))
        biases = self.param("biases", uniform, (space.max_length, most))
        lowering = self.lowering or default_convolution(train, most)

        which = jnp.searchsorted(jnp.array(sizes), genome.kernels)
        before = jnp.cumsum(genome.kinds > CONVOLUTION) - (genome.kinds > CONVOLUTION)
        own = jnp.arange(most) < genome.filters[:, None]

        height, width, _ = self.image_shape
        lowering_first = self.lowering or default_convolution(train, first_inputs)

        def convolution(size, lowering):
            """Convolution with the middle of the kernel, `size` wide."""
            edge = (largest - size) // 2

            def apply(maps, kernel):
                middle = kernel[edge : edge + size, edge : edge + size]
                return convolve(maps, middle, size // 2, 1, lowering)

            return apply

        features = jax.lax.switch(
            which[0], [convolution(size, lowering_first) for size in sizes], images, first
        )
        features = nn.relu(jnp.where(own[0], features + biases[0], 0))

        def at_level(level, function):
            """`function` on the corner of the buffer that maps take up after `level` poolings."""
            rows, columns = height >> level, width >> level

            def apply(features, kernel):
                found = function(features[:, :rows, :columns], kernel)
                missing = height - found.shape[1], width - found.shape[2]
                return jnp.pad(found, [(0, 0), (0, missing[0]), (0, missing[1]), (0, 0)])

            return apply

        branches = [lambda features, kernel: features]
        branches += [
            at_level(level, convolution(size, lowering))
            for level in range(levels)
            for size in sizes
        ]
        branches += [
            at_level(level, lambda maps, kernel, kind=kind: pool(kind, maps))
            for level in range(levels - 1)
            for kind in ("max", "average")
        ]
        convolutions = 1 + before * len(sizes) + which
        poolings = 1 + levels * len(sizes) + before * 2 + (genome.kinds == AVERAGE_POOLING)
        branch = jnp.where(genome.kinds == CONVOLUTION, convolutions, poolings)
        branch = jnp.where(genome.kinds == END, 0, branch)
        places = before + (genome.kinds > CONVOLUTION)  # poolings up to and with a unit

        row, column = jnp.arange(height)[:, None], jnp.arange(width)

        @jax.custom_vjp
        def chosen(number, features, kernel):
            return jax.lax.switch(number, branches, features, kernel)

        def forward(number, features, kernel):
            return chosen(number, features, kernel), (number, features, kernel)

        def backward(residuals, gradient):
            """Gradient with the inputs alone kept: automatic differentiation keeps what each branch
            needs for every unit, zeros for all but one."""
            number, features, kernel = residuals

            def gradients_of(branch):
                return lambda features, kernel: jax.vjp(branch, features, kernel)[1](gradient)

            own = [gradients_of(branch) for branch in branches]
            return None, *jax.lax.switch(number, own, features, kernel)

        chosen.defvjp(forward, backward)

        def unit(features, inputs):
            number, kind, kernel, bias, own, level = inputs
            features = chosen(number, features, kernel)
            inside = (row < height >> level) & (column < width >> level)
            changed = nn.relu(features + bias)
            changed = jnp.where(inside[:, :, None] & own, changed, 0)
            return jnp.where(kind == CONVOLUTION, changed, features), None

        rest = (branch[1:], genome.kinds[1:], kernels, biases[1:], own[1:], places[1:])
        features, _ = jax.lax.scan(unit, features, rest)

        channels, poolings = last_filters(genome), places[-1]
        pixels = num_features_after((height, width), poolings)
        size = pixels * channels
        position = jnp.arange(self.most_features)
        pixel, channel = position // channels, position % channels
        columns = jnp.maximum(width >> poolings, 1)
        flat = features[:, (pixel // columns) % height, pixel % columns, channel]
        flat = jnp.where(position < size, flat, 0)
        most_units = dense_units(self.most_features, self.num_classes)
        own_units = dense_units(size, self.num_classes)
        features = flat
        # The units beyond the network's own are zero, as inputs and as outputs.
        for index, (before, after) in enumerate(itertools.pairwise(most_units)):
            weights = self.param(f"dense_{index}", uniform, (before, after))
            bias = self.param(f"dense_bias_{index}", uniform, (after,))
            if index < 2:
                features = nn.Dropout(self.dropout, deterministic=not train)(features)
            features = features @ weights + bias
            if index < 2:
                features = nn.relu(features)
                features = jnp.where(jnp.arange(after) < own_units[index + 1], features, 0)
        return features


def _unit_uniform(key: Array, shape: tuple[int, ...]) -> Array:
    return jax.random.uniform(key, shape, jnp.float32, -1, 1)


def for_genome(
    network: PaddedNetwork,
    parameters: PyTree,
    genome: Genome,
    initialization: Initialization = "pytorch",
) -> PyTree:
    """Freshly initialised parameters as those of a fresh network of this genome, with the fan-in of
    its own layers."""
    is_convolution = genome.kinds == CONVOLUTION
    last = jax.lax.cummax(jnp.where(is_convolution, jnp.arange(len(genome.kinds)), 0))
    inputs = jnp.roll(genome.filters[last], 1).at[0].set(network.image_shape[2])
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
    """The parameters of the SequenceNetwork that a padded one is."""
    taken, inputs = {}, network.image_shape[2]
    largest, number = max(network.space.kernels), 0
    for place, unit in enumerate(to_units(genome)):
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
