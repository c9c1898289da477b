"""Blocks of the ConvNet as one function, and adaptive convolutions, against the layers."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from evojax_suite import networks
from evojax_suite.networks import NetworkConfig, blocks
from evojax_suite.networks.layers import GroupNorm, convolve, pool

# Grey images padded by 3, colour, and more channels than a first block takes.
SHAPES = [(28, 28, 1), (16, 16, 3), (16, 16, 5)]


def layers(images, kernel, scale, bias, padding):
    """The same block, layer by layer, by XLA's convolution and automatic gradients."""
    maps = convolve(images, kernel, padding, 1, "native")
    mean = maps.mean((1, 2), keepdims=True)
    standard = (maps - mean) / jnp.sqrt(maps.var((1, 2), keepdims=True) + 1e-5)
    return pool("average", jnp.maximum(standard * scale + bias, 0))


def arguments(shape, members=()):
    keys = jax.random.split(jax.random.key(0), 4)
    return (
        jax.random.normal(keys[0], (*members, 3, *shape)),
        jax.random.normal(keys[1], (*members, 3, 3, shape[-1], 4)) * 0.3,
        1 + 0.2 * jax.random.normal(keys[2], (*members, 4)),
        0.2 * jax.random.normal(keys[3], (*members, 4)),
    )


def value_and_gradients(block, padding):
    def weighted(*arrays):
        outputs = block(*arrays, padding)
        return (outputs * jnp.cos(jnp.arange(outputs.size).reshape(outputs.shape))).sum()

    return jax.value_and_grad(weighted, (0, 1, 2, 3))


def assert_close(actual, expected, tolerance=2e-5):
    for one, other in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
        scale = float(jnp.abs(other).max()) + 1e-6
        np.testing.assert_allclose(one, other, atol=tolerance * scale)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_a_block_and_its_gradients_are_those_of_the_layers(shape):
    padding = 3 if shape[0] == 28 else 1
    arrays = arguments(shape)
    actual = jax.jit(value_and_gradients(blocks.block, padding))(*arrays)
    assert_close(actual, jax.jit(value_and_gradients(layers, padding))(*arrays))


@pytest.mark.parametrize("shape", [(8, 8, 1), (16, 16, 5)], ids=str)
def test_members_together_are_members_one_by_one(shape):
    arrays = arguments(shape, (3,))
    one = value_and_gradients(blocks.block, 1)
    together = jax.jit(jax.vmap(one))(*arrays)
    single = jax.jit(value_and_gradients(layers, 1))
    for member in range(3):
        own = [array[member] for array in arrays]
        assert_close(jax.tree.map(lambda leaf, i=member: leaf[i], together), single(*own))


@pytest.mark.parametrize("mapped", ["none", "images", "both"])
def test_gradients_of_gradients_are_those_of_the_layers(mapped):
    """Gradient matching differentiates a network's gradient with respect to the images."""
    shape = (8, 8, 1)

    def matching(block):
        def distance(images, *parameters):
            gradients = value_and_gradients(block, 1)(images, *parameters)[1][1:]
            return sum((leaf**2).sum() for leaf in gradients)

        axes = {"none": None, "images": (0, None, None, None), "both": 0}[mapped]
        gradient = jax.grad(distance)
        return jax.jit(gradient if axes is None else jax.vmap(gradient, axes))

    images, *parameters = arguments(shape, (2,))
    if mapped == "none":
        images = images[0]
    if mapped != "both":
        parameters = [array[0] for array in parameters]
    actual = matching(blocks.block)(images, *parameters)
    assert_close(actual, matching(layers)(images, *parameters), 1e-4)


def test_a_constant_map_is_its_bias():
    images = jnp.full((2, 8, 8, 1), 3.0)
    kernel = jnp.zeros((3, 3, 1, 4)).at[1, 1].set(1.0)  # no padding in reach: constant
    bias = jnp.array([-1.0, 0.0, 0.5, 2.0])
    outputs = blocks.block(images, kernel, jnp.ones(4), bias, 1)
    np.testing.assert_allclose(outputs, np.broadcast_to([0, 0, 0.5, 2], outputs.shape), atol=1e-2)


def test_the_network_takes_blocks_where_they_fit_and_layers_elsewhere():
    """Odd maps, other activations: the network is the same function under every lowering."""
    for shape, options in (
        ((14, 14, 1), {}),  # 14, 7: the second block's map is odd
        ((8, 8, 3), {"activation": "tanh"}),
        ((8, 8, 3), {"normalization": "layer"}),
        ((8, 8, 3), {"pooling": "max"}),
    ):
        depth = 2
        by_layers, adaptive = (
            networks.create(
                NetworkConfig(width=4, depth=depth, convolution=name, **options), 10, shape
            )
            for name in ("native", "adaptive")
        )
        images = jax.random.normal(jax.random.key(1), (3, *shape))
        variables = by_layers.init(jax.random.key(0), images)
        variables = jax.tree.map(lambda leaf: leaf + 0.1 * jnp.cos(leaf), variables)
        expected = jax.jit(by_layers.apply)(variables, images)
        assert_close(jax.jit(adaptive.apply)(variables, images), expected, 1e-4)
        same = jax.tree.map(jnp.shape, jax.eval_shape(adaptive.init, jax.random.key(0), images))
        assert same == jax.tree.map(jnp.shape, variables)


def test_bfloat16_blocks_are_near_those_of_float32():
    images, kernel, scale, bias = arguments((28, 28, 1))
    exact = blocks.block(images, kernel, scale, bias, 3)
    half = blocks.block(images.astype(jnp.bfloat16), kernel, scale, bias, 3)
    assert half.dtype == jnp.bfloat16
    np.testing.assert_allclose(half.astype(jnp.float32), exact, atol=0.03, rtol=0.03)


def test_normalization_in_a_block_is_that_of_the_layer():
    maps = jax.random.normal(jax.random.key(0), (2, 8, 8, 6)) * 3 + 1
    scale, bias = jnp.linspace(0.5, 2, 6), jnp.linspace(-1, 1, 6)
    normalized = GroupNorm().apply({"params": {"scale": scale, "bias": bias}}, maps)
    expected = pool("average", jax.nn.relu(normalized))
    np.testing.assert_allclose(
        blocks.normalized_pool(maps, scale, bias), expected, atol=1e-5, rtol=1e-5
    )


@pytest.mark.parametrize("axes", [(0, None), (None, 0), (0, 0)], ids=str)
def test_adaptive_gradients_are_native_ones_whatever_is_mapped(axes):
    """A sum has the same gradient for every member's outputs: only the images are mapped then."""
    images, kernel, *_ = arguments((6, 6, 5), (3,))
    images, kernel = (
        array if axis == 0 else array[0] for array, axis in zip((images, kernel), axes, strict=True)
    )

    def gradients(lowering):
        def total(images, kernel):
            return convolve(images, kernel, 1, 1, lowering).sum()

        return jax.jit(jax.vmap(jax.grad(total, (0, 1)), axes))(images, kernel)

    assert_close(gradients("adaptive"), gradients("native"))


def test_adaptive_convolutions_are_grouped_for_no_members():
    """One network runs the backend's convolution; networks together run products."""
    images, kernel, *_ = arguments((16, 16, 5), (3,))

    def convolution(images, kernel):
        return convolve(images, kernel, 1, 1, "adaptive")

    def text(function, *arrays) -> str:
        return jax.jit(function).lower(*arrays).as_text()

    alone = text(convolution, images[0], kernel[0])
    assert "stablehlo.convolution" in alone
    assert "stablehlo.dot_general" not in alone
    together = text(jax.vmap(convolution), images, kernel)
    assert "stablehlo.convolution" not in together
    assert "stablehlo.dot_general" in together
    shared = text(jax.vmap(convolution, (0, None)), images, kernel[0])  # one network, more images
    assert "stablehlo.convolution" in shared
    assert "feature_group_count = 1" in shared
