"""Kernels for a block of the ConvNet, interpreted, against its layers."""

from __future__ import annotations

import math
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from evojax_suite import networks
from evojax_suite.networks import ConvNet, NetworkConfig, blocks, fused
from tests.test_blocks import assert_close, layers, value_and_gradients

# Number, height, width, channels, padding, filters. Grey images padded by 3, colour, two tiles of
# filters; then maps of which a program holds one and four, three programs, and two tiles.
FIRST = [(2, 28, 28, 1, 3, 16), (3, 8, 8, 3, 1, 16), (1, 8, 16, 2, 1, 256)]
LATER = [(1, 16, 16, 16, 1, 32), (4, 8, 8, 32, 1, 16), (3, 4, 8, 16, 1, 16), (1, 4, 8, 256, 1, 256)]


def arguments(number, height, width, channels, padding, filters, dtype=jnp.float32):
    keys = jax.random.split(jax.random.key(number), 4)
    images = jax.random.normal(keys[0], (number, height, width, channels), dtype)
    kernel = jax.random.normal(keys[1], (3, 3, channels, filters)) / (3 * channels**0.5)
    scale = 1 + 0.2 * jax.random.normal(keys[2], (filters,))
    assert fused.fits(images, filters, padding)
    return images, kernel, scale, 0.2 * jax.random.normal(keys[3], (filters,))


@pytest.mark.parametrize("shape", [*FIRST, *LATER], ids=str)
def test_a_block_and_its_gradients_are_those_of_the_layers(shape):
    arrays, padding = arguments(*shape), shape[4]
    actual = jax.jit(value_and_gradients(fused.block, padding))(*arrays)
    assert_close(actual, jax.jit(value_and_gradients(layers, padding))(*arrays))


@pytest.mark.parametrize("shape", [(2, 8, 8, 1, 1, 16), (2, 8, 8, 16, 1, 16)], ids=str)
def test_members_together_are_members_one_by_one(shape):
    members = [arguments(*shape), arguments(*shape)]
    members[1] = [array + 0.1 * jnp.cos(array) for array in members[1]]
    stacked = [jnp.stack(both) for both in zip(*members, strict=True)]
    axes = (None, 0, 0, 0)  # the images are the same for all
    one = value_and_gradients(fused.block, 1)
    together = jax.jit(jax.vmap(one, axes))(members[0][0], *stacked[1:])
    single = jax.jit(value_and_gradients(layers, 1))
    for place, own in enumerate(members):
        expected = single(members[0][0], *own[1:])
        assert_close(jax.tree.map(lambda leaf, i=place: leaf[i], together), expected)


@pytest.mark.parametrize("shape", [FIRST[0], LATER[1]], ids=str)
def test_bfloat16_is_as_near_to_float32_as_that_of_the_blocks_is(shape):
    arrays, padding = arguments(*shape), shape[4]
    half = [arrays[0].astype(jnp.bfloat16), *arrays[1:]]
    exact = jax.tree.leaves(value_and_gradients(layers, padding)(*arrays)[1])

    def errors(block):
        found = jax.jit(value_and_gradients(block, padding))(*half)[1]
        return [
            float(jnp.square(one.astype(jnp.float32) - other).mean() ** 0.5)
            for one, other in zip(found, exact, strict=True)
        ]

    for mine, theirs in zip(errors(fused.block), errors(blocks.block), strict=True):
        assert mine < 1.5 * theirs
    pooled = fused.block(*half, padding)
    assert pooled.dtype == jnp.bfloat16
    np.testing.assert_allclose(pooled, layers(*arrays, padding), atol=0.04, rtol=0.03)


def test_a_constant_map_is_its_bias():
    images = jnp.full((2, 8, 8, 1), 3.0)
    kernel = jnp.zeros((3, 3, 1, 16)).at[1, 1].set(1.0)  # no padding in reach: constant
    bias = jnp.linspace(-1, 2, 16)
    outputs = fused.block(images, kernel, jnp.ones(16), bias, 1)
    np.testing.assert_allclose(
        outputs, np.broadcast_to(jnp.maximum(bias, 0), outputs.shape), atol=1e-2
    )


@pytest.mark.parametrize(
    ("shape", "filters", "padding"),
    [
        ((2, 7, 8, 16), 16, 1),  # odd sides
        ((2, 12, 12, 16), 16, 1),  # no powers of 2
        ((2, 32, 32, 16), 16, 1),  # more pixels than a program holds
        ((2, 4, 4, 16), 16, 1),  # fewer windows than the order of rows needs
        ((2, 8, 8, 24), 16, 1),
        ((2, 8, 8, 16), 20, 1),
        ((2, 8, 8, 16), 16, 3),
        ((2, 28, 28, 1), 16, 1),
        ((2, 4, 4, 1), 16, 1),
    ],
)
def test_what_the_kernels_do_not_take(shape, filters, padding):
    assert not fused.fits(jnp.zeros(shape), filters, padding)


def test_the_network_takes_kernels_where_they_fit_and_blocks_elsewhere():
    """14, 7 and 16, 8, 4: the last block's maps are odd, or too small."""
    for side, width, calls in ((14, 16, 0), (16, 16, 2), (16, 12, 0)):
        by_layers, with_kernels = (
            ConvNet(10, width, lowering=lowering) for lowering in ("native", "fused")
        )
        images = jax.random.normal(jax.random.key(1), (3, side, side, 1))
        variables = by_layers.init(jax.random.key(0), images)
        variables = jax.tree.map(lambda leaf: leaf + 0.1 * jnp.cos(leaf), variables)
        expected = jax.jit(by_layers.apply)(variables, images)
        with mock.patch.object(fused, "_call", wraps=fused._call) as call:
            assert_close(with_kernels.apply(variables, images), expected, 1e-4)
        assert call.call_count == calls


def test_networks_take_kernels_on_gpus_alone():
    config = NetworkConfig(width=16, convolution="fused")
    assert networks.create(config, 10, (16, 16, 1)).lowering is None
    with mock.patch.object(jax, "default_backend", return_value="gpu"):
        assert networks.create(config, 10, (16, 16, 1)).lowering == "fused"


def test_what_a_kernel_states_follows_from_the_shapes():
    """Products of the four kernels of a block, and the bytes of the blocks that a program sees."""
    number, side, channels, filters = 4, 8, 32, 16
    arrays = arguments(number, side, side, channels, 1, filters)
    with mock.patch.object(fused, "_call", wraps=fused._call) as call:
        jax.eval_shape(value_and_gradients(fused.block, 1), *arrays)
    found = {}
    for (kernel, grid, inputs, _, cost), _ in call.call_args_list:
        name = getattr(kernel, "func", kernel).__name__
        found[name] = [math.prod(grid) * value for value in cost]
        seen = [math.prod(size for size in part.shape if size) for part in inputs]
        found[name].append(math.prod(grid) * sum(seen) * 4)
    product = 2 * number * side**2 * 9 * channels * filters
    assert found["_forward_kernel"][0] == found["_to_images_kernel"][0] == product
    assert found["_to_kernel_kernel"][0] == product * 10 / 9  # the last program's second position
    assert found["_through_kernel"][0] == 0
    # The map and the pooled gradient but not the parameters; maps once for each position.
    assert found["_through_kernel"][2] == pytest.approx(found["_through_kernel"][3], rel=0.1)
    by_position = 4 * number * side**2 * 9
    weights = 4 * 9 * channels * filters  # once, since one program holds all images
    assert found["_forward_kernel"][2] == by_position * channels + weights
    assert found["_to_images_kernel"][2] == by_position * filters + weights
    assert found["_to_kernel_kernel"][2] == by_position * (channels + filters * 5 / 9)


def test_all_kernels_are_lowered_for_a_card(import_script):
    compiling_for = import_script("benchmarks/gpu_check.py").compiling_for
    arrays = [jnp.stack([array, array]) for array in arguments(*LATER[0])]
    first = [jnp.stack([array, array]) for array in arguments(*FIRST[1])]

    def both(first, second):
        gradients = value_and_gradients(fused.block, 1)
        return jax.vmap(gradients)(*first), jax.vmap(gradients)(*second)

    with mock.patch.object(jax, "default_backend", return_value="gpu"), compiling_for("h100"):
        lowered = jax.jit(both).trace(first, arrays).lower(lowering_platforms=("cuda",))
    text = lowered.as_text()
    names = "_first_forward", "_first_backward", "_forward", "_through", "_to_images", "_to_kernel"
    for name in names:
        assert f'name = "{name}_kernel"' in text
