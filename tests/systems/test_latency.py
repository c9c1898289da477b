"""The seconds of pruned networks from measurements of their layers."""

from __future__ import annotations

import json

import jax.numpy as jnp
import numpy as np
import pytest

from evojax_suite.systems.ecomp import graph as graphs, latency
from evojax_suite.systems.ecomp.graph import Node


def graph():
    """Four convolutions, of which the second and third are alike and the fourth adds a value, and
    a fully connected layer."""

    def node(*shape, **about):
        return Node(np.zeros(shape, np.float32), np.zeros(shape[0], np.float32), **about)

    return (
        node(16, 3, 3, 3, source=0),
        node(16, 16, 3, 3, source=1),
        node(16, 16, 3, 3, source=2),
        node(16, 16, 3, 3, source=3, add=2, pooling="global"),
        node(10, 16, source=4, relu=False),
    )


@pytest.fixture
def calls(monkeypatch):
    """The layers that were timed; each takes a second for ten weights."""
    timed = []

    def fake(function, node, source, other):
        assert function(node, source, other).shape[0] == 5
        timed.append(node.weight.shape)
        out_of_line = node.weight.shape[0] == 2  # faster than one output
        return node.weight.size / (30 if out_of_line else 10)

    monkeypatch.setattr(latency, "timed", fake)
    return timed


def test_layers_are_timed_once_for_a_shape(calls, tmp_path):
    tables = latency.measured(graph(), (8, 8, 3), 5, tmp_path / "latency.json")
    counts = {1, 2, 4, 8, 12, 16}
    assert {shape[1] for shape in calls if shape[0] == 16} == {3, *counts}
    # The first has 3 inputs, the last 10 outputs; two of the other three are alike.
    assert len(calls) == len(counts) * (1 + len(counts) + len(counts) + 1)
    before = len(calls)
    again = latency.measured(graph(), (8, 8, 3), 5, tmp_path / "latency.json")
    assert len(calls) == before
    for old, new in zip(tables, again, strict=True):
        np.testing.assert_array_equal(old.seconds, new.seconds)
    assert len(json.loads((tmp_path / "latency.json").read_text())) == 5


def test_seconds_are_interpolated_and_grow(calls):
    tables = latency.measured(graph(), (8, 8, 3), 5)

    # The last addition makes the second and the fourth convolution's units one group.
    assert graphs.group_sizes(graph()) == (3, 16, 16, 16)
    first, second, third = 16, 10, 7  # beyond two units seconds are as weights, bilinear
    weights = 27 * first + 9 * (first * second + 2 * second * third) + 10 * second
    got = latency.seconds_of(graph(), tables, (3, first, second, third))
    np.testing.assert_allclose(got, weights / 10, rtol=1e-6)
    many = jnp.array([4, 9, 16]), jnp.array([4, 5, 16]), jnp.array([6, 7, 16])
    together = latency.seconds_of(graph(), tables, (3, *many))
    for index, total in enumerate(together):
        alone = latency.seconds_of(graph(), tables, (3, *(int(each[index]) for each in many)))
        np.testing.assert_allclose(total, alone, rtol=1e-6)
    for table in tables:
        assert (np.diff(table.seconds, axis=0) >= 0).all()
        assert (np.diff(table.seconds, axis=1) >= 0).all()


def test_two_linear_layers_take_the_seconds_of_one_where_that_is_smaller(calls):
    convolution = Node(np.ones((8, 3, 3, 3), np.float32), np.zeros(8, np.float32), source=0)
    last = Node(np.ones((10, 8), np.float32), np.zeros(10, np.float32), source=1, relu=False)
    whole = (convolution.replace(pooling="global"), last)
    halves = graphs.decomposed(whole, np.random.default_rng(0).random((4, 6, 6, 3)))
    tables = latency.measured(halves, (6, 6, 3), 5)
    assert len(tables) == 4
    apart = (27 * 4 + 4 * 8 + 80) / 10
    np.testing.assert_allclose(latency.seconds_of(halves, tables, (3, 4, 8)), apart, rtol=1e-6)
    together = (27 * 8 + 80) / 10
    sizes = 3, jnp.array([4, 7, 8]), jnp.array([8, 8, 8])
    expected = [apart, together, together]
    np.testing.assert_allclose(latency.seconds_of(halves, tables, sizes), expected, rtol=1e-6)


def test_a_larger_product_takes_longer():
    seconds = [
        latency.timed(lambda a, b: a @ b, jnp.ones((size, size)), jnp.ones((size, size)))
        for size in (16, 512)
    ]
    assert 0 < seconds[0] < seconds[1] / 10
