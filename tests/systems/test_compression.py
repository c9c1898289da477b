"""Populations of networks of different sizes, against networks computed one by one."""

from __future__ import annotations

import itertools
from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings, strategies as st
from scipy import stats

from evojax_suite.systems.ecomp import compression, feed_forward
from evojax_suite.systems.ecomp.feed_forward import Layer

# One compilation a shape, instead of one an operation.
cut_off_crossover = jax.jit(compression.cut_off_crossover)
aligned_crossover = jax.jit(compression.aligned_crossover)
scaling_mutation = jax.jit(compression.scaling_mutation, static_argnames="hidden_only")
shrinking_mutation = jax.jit(compression.shrinking_mutation, static_argnums=4)

SHAPES = {
    "two hidden layers": (20, 8, 8, 4),
    "one": (20, 8, 4),
    "three, unequal": (20, 9, 5, 7, 4),
    "fewer inputs than units": (5, 8, 8, 4),
    "as many inputs as units": (8, 8, 3),
}


def parent(shape, seed=0):
    random = np.random.default_rng(seed)
    return tuple(
        Layer(
            jnp.asarray(random.normal(size=(after, before)), jnp.float32),
            jnp.asarray(random.normal(size=after), jnp.float32),
        )
        for before, after in itertools.pairwise(shape)
    )


def sizes_of(shape, members, seed=0):
    random = np.random.default_rng(seed)
    columns = [random.integers(1, most, members, endpoint=True) for most in shape[1:-1]]
    return np.stack(columns, 1).astype(np.int32)


def importance(network):
    return tuple(jnp.abs(layer.weight).sum(1) for layer in network[:-1])


def pruned(network, sizes):
    widths = tuple(int(size) for size in sizes.max(0))
    return compression.pruned(network, importance(network), jnp.asarray(sizes), widths)


def population_of(shape, members=6, seed=0):
    network = parent(shape, seed)
    return pruned(network, sizes_of(shape, members, seed))


def whole(population, index):
    """Without padding."""
    return compression.trimmed(
        jax.device_get(compression.member(population, index)), np.asarray(population.sizes[index])
    )


def directly_pruned(network, sizes):
    """By deleting rows and columns, as torch-pruning does."""
    layers = [Layer(np.asarray(w), np.asarray(b)) for w, b in network]
    kept = []
    for index, size in enumerate(sizes):
        norms = np.abs(np.asarray(network[index].weight)).reshape(-1, network[index].weight[0].size)
        norms = norms.sum(1)
        gone = np.argsort(norms, kind="stable")[: len(norms) - size]
        kept.append(np.delete(np.arange(len(norms)), gone))
        layers[index] = Layer(
            np.delete(layers[index].weight, gone, 0), np.delete(layers[index].bias, gone)
        )
        after = layers[index + 1]
        layers[index + 1] = after._replace(weight=np.delete(after.weight, gone, 1))
    return layers, kept


def with_nan_padding(population):
    """All that is no unit's becomes NaN."""
    reach = population.layers[0].weight.shape[-1]
    inside = [jnp.arange(w) < population.sizes[:, [i]] for i, w in
              enumerate(feed_forward.hidden_sizes(population.layers))]  # fmt: skip
    members = len(population.sizes)
    before = [jnp.ones((members, reach), bool), *inside]
    after = [*inside, jnp.ones((members, population.layers[-1].bias.shape[-1]), bool)]
    layers = tuple(
        Layer(
            jnp.where(a[:, :, None] & b[:, None, :], layer.weight, jnp.nan),
            jnp.where(a, layer.bias, jnp.nan),
        )
        for layer, b, a in zip(population.layers, before, after, strict=True)
    )
    alive = jnp.zeros(population.tails.shape[:2], bool).at[population.tail_of].max(inside[0])
    tails = jnp.where(alive[..., None], population.tails, jnp.nan)
    return replace(population, layers=layers, tails=tails)


def computed(population, inputs, widths=None):
    """Hidden activations and logits of all members by the population's way."""
    widths = widths or feed_forward.hidden_sizes(population.layers)
    together = _computed(population, inputs, widths)
    return [[leaf[m] for leaf in together] for m in range(len(population.sizes))]


@partial(jax.jit, static_argnums=2)
def _computed(population, inputs, widths):
    def one(first, rest, sizes):
        return compression.hidden_and_logits(first, rest, sizes, widths)

    first = compression.first_activations(population, inputs)
    return jax.vmap(one, in_axes=(1, 0, 0))(first, population.layers[1:], population.sizes)


def assert_networks_equal(first, second):
    jax.tree.map(np.testing.assert_array_equal, tuple(first), tuple(second))


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_pruning_keeps_the_units_of_a_direct_computation(shape):
    network, sizes = parent(shape), sizes_of(shape, 6)
    population = pruned(network, sizes)
    for member, size in enumerate(sizes):
        expected, kept = directly_pruned(network, size)
        assert_networks_equal(whole(population, member), expected)
        for layer, units in enumerate(kept):
            np.testing.assert_array_equal(population.units[layer][member, : len(units)], units)


def test_equal_importance_loses_the_first_units():
    network = parent((6, 4, 3))
    population = compression.pruned(network, (jnp.ones(4),), jnp.array([[2], [3]]), (3,))
    np.testing.assert_array_equal(population.units[0][0, :2], [2, 3])
    np.testing.assert_array_equal(population.units[0][1, :3], [1, 2, 3])


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_padded_networks_compute_what_unpadded_ones_do_whatever_the_padding_holds(shape):
    population = population_of(shape)
    inputs = jax.random.normal(jax.random.key(0), (7, shape[0]))
    for key in jax.random.split(jax.random.key(1), 3):  # lines merge, so tails are shared
        for variant in (population, with_nan_padding(population)):
            for member, outputs in enumerate(computed(variant, inputs)):
                expected = feed_forward.forward(whole(population, member), inputs)
                for ours, theirs in zip(outputs, expected, strict=True):
                    count = theirs.shape[1]
                    np.testing.assert_allclose(ours[:, :count], theirs, rtol=1e-4, atol=1e-4)
                    assert (np.asarray(ours[:, count:]) == 0).all()
        key_parents, key_cross, key_mutate = jax.random.split(key, 3)
        parents = jax.random.randint(key_parents, (2, 3), 0, 6)
        population = with_nan_padding(population)
        population = cut_off_crossover(key_cross, population, *parents)
        population = scaling_mutation(
            key_mutate, population, jnp.arange(6) == 2, 0.1, hidden_only=False
        )


def test_narrower_widths_that_hold_the_units_change_nothing():
    population = population_of(SHAPES["two hidden layers"])
    population = replace(population, sizes=jnp.minimum(population.sizes, 5))
    inputs = jax.random.normal(jax.random.key(0), (7, 20))
    narrow, wide = computed(population, inputs, (5, 5)), computed(population, inputs)
    for one, other in zip(narrow, wide, strict=True):
        np.testing.assert_allclose(one[-1], other[-1], rtol=1e-5, atol=1e-5)


def marked(population):
    """All weights and biases of member m are m."""
    members = len(population.sizes)

    def mark(leaf):
        values = jnp.arange(members, dtype=leaf.dtype).reshape(-1, *[1] * (leaf.ndim - 1))
        return jnp.broadcast_to(values, leaf.shape)

    return replace(
        population,
        layers=jax.tree.map(mark, population.layers),
        tails=mark(population.tails),
        units=jax.tree.map(mark, population.units),
    )


@given(seed=st.integers(0, 10**6), shape=st.sampled_from(list(SHAPES.values())))
@settings(max_examples=10, deadline=None)
def test_a_child_is_its_second_parent_with_a_block_of_the_first(seed, shape):
    population = marked(population_of(shape, seed=seed))
    random = np.random.default_rng(seed)
    first, second = random.integers(0, 6, (2, 3))
    children = cut_off_crossover(jax.random.key(seed), population, first, second)
    inner, outer = np.concatenate([first, second]), np.concatenate([second, first])
    np.testing.assert_array_equal(children.sizes, np.asarray(population.sizes)[outer])
    cuts = np.zeros((6, len(shape) - 1), int)
    for child in range(6):
        sizes = np.minimum(population.sizes[inner[child]], population.sizes[outer[child]])
        bounds = [shape[0], *(int(size) for size in sizes), shape[-1]]
        network = whole(children, child)
        for index, (weight, bias) in enumerate(network):
            if inner[child] == outer[child]:
                assert (weight == outer[child]).all()
                assert (bias == outer[child]).all()
                continue
            cut = cuts[child, index] = int((bias == inner[child]).sum())
            assert 1 <= cut <= min(bounds[index], bounds[index + 1])
            block = np.full(weight.shape, outer[child], np.float32)
            block[:cut, :cut] = inner[child]
            np.testing.assert_array_equal(weight, block)
            np.testing.assert_array_equal(bias, np.where(np.arange(len(bias)) < cut, *(
                inner[child], outer[child])))  # fmt: skip
        for index, units in enumerate(children.units):
            units = np.asarray(units[child, : children.sizes[child, index]])
            np.testing.assert_array_equal(units, network[index].bias)
    different = first != second  # pairs share their cut-offs
    np.testing.assert_array_equal(cuts[:3][different], cuts[3:][different])


def test_crossover_by_hand():
    """Four and five units, cut-off 2: the paper's Fig. 1."""
    shape = (6, 5, 3)
    network = parent(shape)
    population = marked(pruned(network, np.array([[4], [5]], np.int32)))
    pair = jnp.array([0]), jnp.array([1])
    for seed in range(200):
        children = cut_off_crossover(jax.random.key(seed), population, *pair)
        small, large = whole(children, 1), whole(children, 0)
        if (small[0].bias == 1).sum() == 2 and (small[1].bias == 1).sum() == 1:
            break
    np.testing.assert_array_equal(small[0].weight[:, :3], [[1, 1, 0]] * 2 + [[0, 0, 0]] * 2)
    np.testing.assert_array_equal(large[0].weight[:, :3], [[0, 0, 1]] * 2 + [[1, 1, 1]] * 3)
    np.testing.assert_array_equal(small[0].bias, [1, 1, 0, 0])
    np.testing.assert_array_equal(small[1].weight, [[1, 0, 0, 0], [0] * 4, [0] * 4])
    np.testing.assert_array_equal(large[1].weight, [[0, 1, 1, 1, 1], [1] * 5, [1] * 5])
    assert small[0].weight.shape == (4, 6)
    assert large[0].weight.shape == (5, 6)


def test_cut_offs_are_uniform_and_drawn_for_each_layer():
    keys = jax.random.split(jax.random.key(0), 4000)
    sizes = jnp.array([6, 7]), jnp.array([9, 5])
    cuts = jax.vmap(lambda key: compression._cut_offs(key, (20, 4), *sizes))(keys)
    for layer, most in enumerate((6, 5, 4)):
        counts = np.bincount(cuts[:, layer], minlength=most + 1)
        assert counts[0] == 0
        assert len(counts) == most + 1
        assert stats.chisquare(counts[1:]).pvalue > 1e-3
    assert abs(np.corrcoef(cuts[:, 0], cuts[:, 1])[0, 1]) < 0.06


@pytest.mark.parametrize("hidden_only", [False, True])
def test_mutation_scales_each_weight_of_the_chosen_and_of_no_other(hidden_only):
    population = population_of((60, 40, 40, 10), members=6)
    one_line = jnp.zeros(3, jnp.int32), jnp.zeros(3, jnp.int32)
    population = cut_off_crossover(jax.random.key(0), population, *one_line)
    assert len(set(population.tail_of.tolist())) == 1
    chosen = jnp.array([False, True, False, True, False, False])
    after = scaling_mutation(jax.random.key(1), population, chosen, 0.1, hidden_only=hidden_only)
    np.testing.assert_array_equal(after.num_mutations, chosen)
    factors = []
    for member in range(6):
        before, now = whole(population, member), whole(after, member)
        for index, (old, new) in enumerate(zip(before, now, strict=True)):
            np.testing.assert_array_equal(old.bias, new.bias)
            last = index == len(before) - 1
            if not chosen[member] or (hidden_only and last):
                np.testing.assert_array_equal(old.weight, new.weight)
            else:
                factors.append((new.weight / old.weight).ravel())
    assert not np.array_equal(factors[0][:50], factors[3 - hidden_only][:50])
    factors = np.concatenate(factors)
    assert stats.kstest(factors, stats.uniform(0.9, 0.2).cdf).pvalue > 1e-3


def test_a_member_alone_on_its_tail_changes_it_in_place():
    population = population_of((20, 8, 8, 4))
    after = scaling_mutation(
        jax.random.key(1), population, jnp.ones(6, bool), 0.1, hidden_only=False
    )
    np.testing.assert_array_equal(np.sort(after.tail_of), np.arange(6))
    for member in range(6):
        ratio = whole(after, member)[0].weight / whole(population, member)[0].weight
        assert ((ratio > 0.8999) & (ratio < 1.1001)).all()


# Beyond the paper.


def convolutional(seed=0):
    """Convolutions 3 -> 6 -> 6 on 8x8 images, then 6 units, then 4 classes."""
    random = np.random.default_rng(seed)
    shapes = ((6, 3, 3, 3), (6, 6, 3, 3), (6, 6, 4), (4, 6))
    return tuple(
        Layer(
            jnp.asarray(random.normal(size=shape), jnp.float32),
            jnp.asarray(random.normal(size=shape[0]), jnp.float32),
        )
        for shape in shapes
    )


def filters_population(sizes, network=None):
    network = network or convolutional()
    sums = tuple(jnp.abs(w).reshape(len(w), -1).sum(1) for w, _ in network[:-1])
    return compression.pruned(network, sums, jnp.asarray(sizes, jnp.int32), (6, 6, 6))


@jax.jit
def cut_and_computed(population, images):
    def one(member):
        network = compression.cut(
            compression.member(population, member), population.sizes[member], (6, 6, 6)
        )
        return feed_forward.forward(network, images)

    return jax.lax.map(one, jnp.arange(len(population.sizes)))


def test_filters_are_pruned_exchanged_and_scaled_as_units_are():
    sizes = [[6, 6, 6], [5, 2, 4], [3, 3, 3], [1, 6, 2]]
    population = filters_population(sizes)
    for member, size in enumerate(sizes):
        expected, _ = directly_pruned(convolutional(), size)
        assert_networks_equal(whole(population, member), expected)
    images = jax.random.normal(jax.random.key(0), (3, 8, 8, 3))
    pairs = jnp.array([0, 1]), jnp.array([2, 3])
    children = cut_off_crossover(jax.random.key(1), population, *pairs)
    children = scaling_mutation(
        jax.random.key(2), children, jnp.arange(4) == 1, 0.1, hidden_only=False
    )
    np.testing.assert_array_equal(children.sizes, np.array(sizes)[[2, 3, 0, 1]])
    for variant in (children, nan_in_the_padding(children)):
        outputs = cut_and_computed(variant, images)
        for member in range(4):
            expected = feed_forward.forward(whole(children, member), images)
            for ours, theirs in zip(outputs, expected, strict=True):
                count = theirs.shape[-1]
                np.testing.assert_allclose(ours[member, ..., :count], theirs, rtol=1e-4, atol=1e-3)
                assert (np.asarray(ours[member, ..., count:]) == 0).all()
    children = cut_off_crossover(jax.random.key(1), marked(population), *pairs)
    for child, (inner, outer) in enumerate([(0, 2), (1, 3), (2, 0), (3, 1)]):
        for layer in whole(children, child):
            cut = int((layer.bias == inner).sum())
            assert 1 <= cut <= min(layer.weight.shape[:2])
            block = np.full(layer.weight.shape, outer, np.float32)
            block[:cut, :cut] = inner
            np.testing.assert_array_equal(layer.weight, block)


def nan_in_the_padding(population):
    def poison(leaf, axis, layer):
        places = jax.lax.broadcasted_iota(jnp.int32, leaf.shape, axis)
        count = population.sizes[:, layer].reshape(-1, *[1] * (leaf.ndim - 1))
        return jnp.where(places < count, leaf, jnp.nan)

    layers = list(population.layers)
    for layer in range(3):
        weight, bias = layers[layer]
        layers[layer] = Layer(poison(weight, 1, layer), poison(bias, 1, layer))
        after = layers[layer + 1]
        layers[layer + 1] = after._replace(weight=poison(after.weight, 2, layer))
    return replace(population, layers=tuple(layers))


def test_filters_in_another_order_are_aligned():
    network = convolutional()
    random = np.random.default_rng(0)
    orders = [np.arange(3), *(random.permutation(6) for _ in range(3)), np.arange(4)]
    other = tuple(
        Layer(layer.weight[after][:, before], layer.bias[after])
        for layer, before, after in zip(network, orders[:-1], orders[1:], strict=True)
    )
    one = filters_population([[6, 6, 6]], network)
    population = compression.joined(one, filters_population([[6, 6, 6]], other))
    population = replace(population, tails=jnp.concatenate([one.tails] * 2))
    images = jax.random.normal(jax.random.key(0), (10, 8, 8, 3))
    *hidden, logits = cut_and_computed(population, images)
    pair = jnp.array([0]), jnp.array([1])
    children = aligned_crossover(jax.random.key(1), population, *pair, hidden)
    found = cut_and_computed(children, images)[-1]
    np.testing.assert_allclose(found, logits, rtol=1e-3, atol=1e-3 * np.abs(logits).max())


def test_shrinking_removes_the_least_important_filters():
    population = filters_population([[6, 6, 6]] * 4)
    after = shrinking_mutation(jax.random.key(0), population, jnp.ones(4, bool), 0.5, True)
    network = convolutional()
    for member in range(4):
        layers = [list(layer) for layer in network]
        for index, size in enumerate(np.asarray(after.sizes[member])):
            outgoing = np.moveaxis(np.abs(network[index + 1].weight), 1, 0).reshape(6, -1).sum(1)
            scores = np.abs(network[index].weight).reshape(6, -1).sum(1) * outgoing
            units = np.sort(np.argsort(-scores, kind="stable")[:size])
            layers[index] = [array[units] for array in layers[index]]
            layers[index + 1][0] = layers[index + 1][0][:, units]
        for ours, theirs in zip(whole(after, member), layers, strict=True):
            np.testing.assert_array_equal(ours.weight, theirs[0])
            np.testing.assert_array_equal(ours.bias, theirs[1])


def greedy_partners(first, second):
    """Pair after pair, by a plain loop over float64 correlations."""
    correlation = np.nan_to_num(np.corrcoef(first.T, second.T)[: first.shape[1], first.shape[1] :])
    partners = np.full(second.shape[1], -1)
    for _ in range(min(correlation.shape)):
        a, b = np.unravel_index(correlation.argmax(), correlation.shape)
        partners[b] = a
        correlation[a], correlation[:, b] = -np.inf, -np.inf
    return partners


@given(seed=st.integers(0, 10**6), size_first=st.integers(1, 12), size_second=st.integers(1, 12))
@settings(max_examples=25, deadline=None)
def test_units_are_matched_greedily_by_correlation(seed, size_first, size_second):
    random = np.random.default_rng(seed)
    first, second = random.normal(size=(2, 30, 12)).astype(np.float32)
    found = np.asarray(compression.matched_units(first, second, size_first, size_second))
    expected = greedy_partners(first[:, :size_first], second[:, :size_second])
    np.testing.assert_array_equal(found[:size_second], expected)
    assert (found[size_second:] == -1).all()


def test_constant_units_are_matched_last():
    random = np.random.default_rng(0)
    first = random.normal(size=(30, 4)).astype(np.float32)
    second = first[:, [2, 0, 1, 3]].copy()
    first[:, 3] = second[:, 3] = 0
    np.testing.assert_array_equal(compression.matched_units(first, second, 4, 4), [2, 0, 1, 3])


def hidden_of(population, inputs):
    outputs = computed(population, inputs)
    layers = len(outputs[0]) - 1
    return [jnp.stack([one[layer] for one in outputs]) for layer in range(layers)]


@pytest.mark.parametrize("shape", [(20, 8, 8, 4), (20, 9, 5, 7, 4), (5, 8, 8, 4)])
def test_aligned_crossover_of_one_network_in_two_orders_changes_nothing(shape):
    network = parent(shape)
    random = np.random.default_rng(0)
    orders = [np.arange(shape[0]), *(random.permutation(n) for n in shape[1:-1]), np.arange(4)]
    other = tuple(
        Layer(layer.weight[after][:, before], layer.bias[after])
        for layer, before, after in zip(network, orders[:-1], orders[1:], strict=True)
    )
    sizes = np.array([shape[1:-1]], np.int32)
    population = compression.joined(pruned(network, sizes), pruned(other, sizes))
    tails = [pruned(one, sizes).tails for one in (network, other)]
    population = replace(
        population, tails=jnp.concatenate(tails), tail_of=jnp.arange(2, dtype=jnp.int32)
    )
    inputs = jax.random.normal(jax.random.key(0), (40, shape[0]))
    pair = jnp.array([0]), jnp.array([1])
    expected = feed_forward.forward(network, inputs)[-1]
    plain_differs = False
    for seed in range(4):
        key = jax.random.key(seed)
        hidden = hidden_of(population, inputs)
        children = aligned_crossover(key, population, *pair, hidden)
        for child in range(2):
            logits = feed_forward.forward(whole(children, child), inputs)[-1]
            np.testing.assert_allclose(logits, expected, rtol=1e-3, atol=1e-3)
        plain = cut_off_crossover(key, population, *pair)
        logits = feed_forward.forward(whole(plain, 0), inputs)[-1]
        plain_differs |= not np.allclose(logits, expected, atol=1e-2)
    assert plain_differs


def test_aligned_crossover_keeps_the_shape_and_the_padding_out():
    shape = SHAPES["three, unequal"]
    population = population_of(shape)
    inputs = jax.random.normal(jax.random.key(0), (40, shape[0]))
    pairs = jnp.array([0, 1, 2]), jnp.array([3, 4, 5])
    children = aligned_crossover(
        jax.random.key(0), with_nan_padding(population), *pairs, hidden_of(population, inputs)
    )
    np.testing.assert_array_equal(children.sizes, population.sizes[jnp.array([3, 4, 5, 0, 1, 2])])
    for child in range(6):
        assert all(np.isfinite(array).all() for layer in whole(children, child) for array in layer)


@pytest.mark.parametrize("balanced", [True, False])
@pytest.mark.parametrize("shape", [(20, 8, 8, 4), (5, 9, 6, 4)])
def test_shrinking_removes_the_least_important_units(shape, balanced):
    network = parent(shape)
    sizes = np.tile(np.array([shape[1:-1]], np.int32), (40, 1))
    population = pruned(network, sizes)
    chosen = jnp.arange(40) % 2 == 0
    after = shrinking_mutation(
        jax.random.key(0), with_nan_padding(population), chosen, 0.5, balanced
    )
    lost = np.asarray(population.sizes - after.sizes)
    assert (lost[1::2] == 0).all()
    assert lost.min() == 0
    assert (lost[::2] >= 1).all()
    assert (lost <= np.ceil(0.5 * sizes)).all()
    assert len(np.unique(lost[::2, 0])) > 2
    if balanced and shape[1] == shape[2]:
        assert (lost[:, 0] == lost[:, 1]).all()
    elif not balanced:
        assert (lost[:, 0] != lost[:, 1]).any()
    for member in (0, 2, 4, 1):
        layers, kept = [list(layer) for layer in network], []
        for index, size in enumerate(np.asarray(after.sizes[member])):
            outgoing = np.abs(network[index + 1].weight).sum(0)
            scores = np.abs(network[index].weight).sum(1) * outgoing
            kept.append(np.sort(np.argsort(-scores, kind="stable")[:size]))
        for index, units in enumerate(kept):
            layers[index][0], layers[index][1] = layers[index][0][units], layers[index][1][units]
            layers[index + 1][0] = layers[index + 1][0][:, units]
        for (weight, bias), (w, b) in zip(whole(after, member), layers, strict=True):
            np.testing.assert_array_equal(weight, w)
            np.testing.assert_array_equal(bias, b)
        for index, units in enumerate(kept):
            np.testing.assert_array_equal(after.units[index][member, : len(units)], units)


def test_shrinking_leaves_one_unit():
    network = parent((20, 3, 3, 4))
    population = pruned(network, np.ones((4, 2), np.int32))
    after = shrinking_mutation(jax.random.key(0), population, jnp.ones(4, bool), 1.0, False)
    assert (np.asarray(after.sizes) == 1).all()
