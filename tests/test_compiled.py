"""Convolutions and blocks in C++, against the other lowerings."""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings, strategies as st

from evojax_suite import networks
from evojax_suite.networks import NetworkConfig, blocks, compiled
from evojax_suite.networks.layers import convolve
from tests.test_blocks import assert_close, layers, value_and_gradients

pytestmark = pytest.mark.skipif(compiled.compiler() is None, reason="there is no C++ compiler")

# Number, height, width, channels, padding, filters: grey images padded by 3, colour, sides that no
# tile divides, one and two vectors of filters, sums of several groups of images.
BLOCKS = [
    (2, 28, 28, 1, 3, 16),
    (3, 8, 8, 3, 1, 32),
    (1, 14, 6, 48, 1, 144),
    (4, 8, 4, 16, 1, 16),
    (33, 4, 4, 32, 1, 48),
]


def arguments(number, height, width, channels, padding, filters):
    keys = jax.random.split(jax.random.key(number), 4)
    images = jax.random.normal(keys[0], (number, height, width, channels))
    kernel = jax.random.normal(keys[1], (3, 3, channels, filters)) / (3 * channels**0.5)
    scale = 1 + 0.2 * jax.random.normal(keys[2], (filters,))
    assert compiled.fits(images, filters, padding)
    return images, kernel, scale, 0.2 * jax.random.normal(keys[3], (filters,))


@pytest.mark.parametrize("shape", BLOCKS, ids=str)
def test_a_block_and_its_gradients_are_those_of_the_layers(shape):
    arrays, padding = arguments(*shape), shape[4]
    actual = jax.jit(value_and_gradients(blocks.compiled_block, padding))(*arrays)
    assert_close(actual, jax.jit(value_and_gradients(layers, padding))(*arrays))


def of_convolution(lowering, padding, images, kernel):
    def weighted(images, kernel):
        outputs = convolve(images, kernel, padding, 1, lowering)
        return (outputs * jnp.cos(jnp.arange(outputs.size).reshape(outputs.shape))).sum(), outputs

    return jax.value_and_grad(weighted, (0, 1), has_aux=True)(images, kernel)


@settings(max_examples=15, deadline=None, derandomize=True)
@given(
    number=st.sampled_from([1, 5, 35]),
    sides=st.tuples(st.integers(3, 19), st.integers(3, 19)),
    channels=st.sampled_from([1, 2, 3, 16, 48]),
    filters=st.sampled_from([16, 32, 48]),
    size_and_padding=st.sampled_from([(1, 0), (3, 0), (3, 1), (3, 2), (5, 2)]),
)
def test_a_convolution_and_its_gradients_are_xlas(
    number, sides, channels, filters, size_and_padding
):
    size, padding = size_and_padding
    if min(sides) + 2 * padding < size:
        return
    keys = jax.random.split(jax.random.key(number))
    images = jax.random.normal(keys[0], (number, *sides, channels))
    kernel = jax.random.normal(keys[1], (size, size, channels, filters)) / size
    assert compiled.fits(images, filters, padding, size)
    found = [
        jax.jit(partial(of_convolution, name, padding))(images, kernel)
        for name in ("compiled", "native")
    ]
    assert_close(*found)


def test_numbers_do_not_depend_on_threads():
    images, kernel, scale, bias = arguments(70, 8, 8, 16, 1, 32)
    one = value_and_gradients(blocks.compiled_block, 1)
    mesh = jax.make_mesh((1,), ("devices",))
    everywhere = jax.sharding.PartitionSpec()
    divided = jax.shard_map(one, mesh=mesh, in_specs=everywhere, out_specs=everywhere)
    programs = [jax.jit(one), jax.jit(divided)]
    arrays = images, kernel, scale, bias
    texts = [program.lower(*arrays).as_text() for program in programs]
    assert ["threads = true" in text for text in texts] == [True, False]
    found = [jax.tree.leaves(program(*arrays)) for program in programs]
    for alone, other in zip(*found, strict=True):
        np.testing.assert_array_equal(alone, other)


def test_members_together_are_members_one_by_one():
    members = [arguments(3, 8, 8, 16, 1, 16), arguments(3, 8, 8, 16, 1, 16)]
    members[1] = [array + 0.1 * jnp.cos(array) for array in members[1]]
    stacked = [jnp.stack(both) for both in zip(*members, strict=True)]
    one = value_and_gradients(blocks.compiled_block, 1)
    together = jax.jit(jax.vmap(one))(*stacked)
    for place, own in enumerate(members):
        expected = jax.jit(one)(*own)
        for leaf, other in zip(jax.tree.leaves(together), jax.tree.leaves(expected), strict=True):
            np.testing.assert_allclose(leaf[place], other, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(
    "config",
    [
        NetworkConfig(width=16),
        NetworkConfig(width=16, normalization="batch", pooling="max"),
        NetworkConfig(network="VGG10", width=16),
    ],
    ids=["blocks", "convolutions", "VGG10"],
)
def test_a_network_is_the_same_network(config):
    images = jax.random.normal(jax.random.key(1), (4, 16, 16, 3))
    found = []
    for name in ("auto", "compiled"):
        network = networks.create(
            NetworkConfig(**{**vars(config), "convolution": name}), 10, (16, 16, 3)
        )
        variables = network.init(jax.random.key(0), images)
        parameters = variables["params"]
        statistics = {name: value for name, value in variables.items() if name != "params"}

        def loss(parameters, images, network=network, statistics=statistics):
            logits, _ = network.apply(
                {"params": parameters, **statistics},
                images,
                train=True,
                mutable=list(statistics),
                rngs={"dropout": jax.random.key(2)},
            )
            return jnp.square(logits - 1).sum()

        found.append((parameters, jax.jit(jax.value_and_grad(loss))(parameters, images)))
    (parameters, (value, gradients)), (same, (other, expected)) = found
    jax.tree.map(np.testing.assert_array_equal, parameters, same)
    np.testing.assert_allclose(value, other, rtol=1e-4)
    largest = max(float(jnp.abs(leaf).max()) for leaf in jax.tree.leaves(expected))
    jax.tree.map(
        lambda one, two: np.testing.assert_allclose(one, two, atol=1e-4 * largest),
        gradients,
        expected,
    )


def test_what_the_compiler_refuses_is_one_line(monkeypatch, tmp_path):
    source = tmp_path / "compiled.cc"
    source.write_text("no C++\n")
    monkeypatch.setattr(compiled, "_SOURCE", source)
    compiled.load.cache_clear()
    with pytest.raises(ValueError, match=r"could not compile compiled\.cc: ") as refused:
        compiled.load()
    assert "\n" not in str(refused.value)
