"""EComp's search with refits: against least squares of NumPy, by brute force, and as a command."""

from __future__ import annotations

import itertools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings, strategies as st

from evojax_suite import ecomp
from evojax_suite.cli.main import main
from evojax_suite.data import load
from evojax_suite.problems import PruningProblem
from evojax_suite.systems.ecomp import (
    artifact,
    baselines,
    graph as graphs,
    latency,
    mask_search,
    refit,
)
from evojax_suite.systems.ecomp.feed_forward import Layer
from evojax_suite.systems.ecomp.graph import Node
from evojax_suite.systems.ecomp.refit import Kept

RIDGE = 1e-7  # so small that least squares without it agree


def random_graph(shapes, seed=0):
    """A chain of layers of these shapes of weights."""
    random = np.random.default_rng(seed)
    layers = [
        Layer(
            (random.normal(size=shape) / np.sqrt(np.prod(shape[1:]))).astype(np.float32),
            random.normal(size=shape[0]).astype(np.float32) / 4,
        )
        for shape in shapes
    ]
    return graphs.from_network(tuple(layers))


DENSE = random_graph([(9, 12), (8, 9), (4, 8)])
INPUTS = jnp.asarray(np.random.default_rng(1).normal(size=(300, 12)), jnp.float32)
TARGETS = jax.nn.one_hot(np.random.default_rng(2).integers(0, 4, 300), 4)
FIT = refit.make_fit(jax.random.key(0), DENSE, INPUTS, TARGETS)


def residual(channels=6, seed=3):
    """A convolution, a residual block, a second one with a projection and a stride, a layer on
    pooled maps."""
    random = np.random.default_rng(seed)

    def node(*shape, **about):
        weight = random.normal(size=shape) / np.sqrt(np.prod(shape[1:]))
        bias = random.normal(size=shape[0]) / 4
        return Node(jnp.asarray(weight, jnp.float32), jnp.asarray(bias, jnp.float32), **about)

    wide = channels + 2
    return (
        node(channels, 3, 3, 3, source=0),
        node(5, channels, 3, 3, source=1),
        node(channels, 5, 3, 3, source=2, add=1),
        node(wide, channels, 1, 1, source=3, relu=False, stride=2),
        node(7, channels, 3, 3, source=3, stride=2),
        node(wide, 7, 3, 3, source=5, add=4, pooling="global"),
        node(4, wide, source=6, relu=False),
    )


RESIDUAL = residual()
MAPS = jnp.asarray(np.random.default_rng(4).normal(size=(60, 8, 8, 3)), jnp.float32)


def kept(*places, padding=0):
    """Units of each group, with places of padding after them."""
    return [
        Kept(
            jnp.array([*each, *[0] * padding], jnp.int32),
            jnp.arange(len(each) + padding) < len(each),
        )
        for each in places
    ]


def least_squares(rows, wanted):
    rows = np.concatenate([rows, np.ones((len(rows), 1))], 1).astype(np.float64)
    return np.linalg.lstsq(rows, np.asarray(wanted, np.float64), rcond=None)[0]


SOME = (0, 2, 3, 7, 8, 11), (1, 2, 5, 8), (0, 3, 4, 6, 7)


def test_the_network_is_that_of_least_squares_layer_by_layer():
    outputs, _ = graphs.forward(DENSE, INPUTS)
    values = np.asarray(INPUTS)[:, SOME[0]]
    expected = []
    for output, units in zip(outputs, (*SOME[1:], range(4)), strict=True):
        coefficients = least_squares(values, np.asarray(output)[:, units])
        values = values @ coefficients[:-1] + coefficients[-1]
        expected.append(coefficients)
        values = np.maximum(values, 0)
    network = refit.refit(DENSE, kept(*SOME), FIT, RIDGE)
    for node, coefficients in zip(network, expected, strict=True):
        np.testing.assert_allclose(node.weight.T, coefficients[:-1], atol=2e-3)
        np.testing.assert_allclose(node.bias, coefficients[-1], atol=2e-3)


@pytest.mark.parametrize("ridge", [1e-6, 0.1])
def test_what_lost_nothing_stays_as_it_is(ridge):
    whole = kept(*map(range, graphs.group_sizes(DENSE)))
    for node, parent in zip(refit.refit(DENSE, whole, FIT, ridge), DENSE, strict=True):
        np.testing.assert_allclose(node.weight, parent.weight, atol=1e-4)
        np.testing.assert_allclose(node.bias, parent.bias, atol=1e-4)


def test_a_large_ridge_leaves_the_parents_weights():
    network = refit.refit(DENSE, kept(*SOME), FIT, 1e6)
    for node, cut in zip(network, graphs.part(DENSE, [*map(np.array, SOME)]), strict=True):
        np.testing.assert_allclose(node.weight, cut.weight, atol=1e-4)


def test_padding_changes_nothing():
    rounds = 2, 3
    exact = refit.refit(DENSE, kept(*SOME), FIT, 1e-4, *rounds)
    units = kept(*SOME, padding=3)
    padded = refit.refit(DENSE, units, FIT, 1e-4, *rounds)
    for node, wide in zip(exact, padded, strict=True):
        outputs, inputs = node.weight.shape
        np.testing.assert_allclose(wide.weight[:outputs, :inputs], node.weight, atol=1e-4)
        assert not np.any(wide.weight[outputs:])
        assert not np.any(wide.weight[:, inputs:])


def test_each_round_towards_labels_lowers_the_cross_entropy():
    """It minimises an upper bound that touches the cross-entropy where the round begins."""
    losses = []
    for rounds in range(8):
        network = refit.refit(DENSE, kept(*SOME), FIT, RIDGE, 0, rounds)
        logits = graphs.forward(network, INPUTS[:, np.array(SOME[0])])[0][-1]
        losses.append(-float((TARGETS * jax.nn.log_softmax(logits)).sum(1).mean()))
    assert np.all(np.diff(losses) < 0), losses


def test_relaxed_targets_lower_what_a_relu_can_tell():
    """The squared error, where the target is below 0 only of what is above 0."""

    def error(rounds):
        network = refit.refit(DENSE, kept(*SOME), FIT, RIDGE, rounds)
        output = graphs.forward(network, INPUTS[:, np.array(SOME[0])])[0][0]
        wanted = graphs.forward(DENSE, INPUTS)[0][0][:, np.array(SOME[1])]
        told = jnp.where(wanted < 0, jnp.maximum(output, 0), output - wanted)
        return float(jnp.square(told).mean())

    errors = [error(rounds) for rounds in (0, 1, 3, 8)]
    assert np.all(np.diff(errors) < 0), errors


def test_the_order_is_that_of_backward_elimination_by_brute_force():
    """The order is that of the first hidden layer, which the second one reads."""
    outputs, values = graphs.forward(DENSE, INPUTS)
    features, wanted = np.asarray(values[1], np.float64), np.asarray(outputs[1], np.float64)

    def error(units):
        coefficients = least_squares(features[:, units], wanted)
        rows = np.concatenate([features[:, units], np.ones((300, 1))], 1)
        return np.square(rows @ coefficients - wanted).sum()

    left, order = [*range(9)], []
    while len(left) > 1:
        without = {unit: error([each for each in left if each != unit]) for unit in left}
        order.append(min(without, key=without.get))
        left.remove(order[-1])
    priority = refit.priorities(DENSE, FIT, RIDGE)[1]
    np.testing.assert_array_equal(np.argsort(priority), [*order, *left])
    np.testing.assert_allclose(np.sort(priority)[::-1], -np.log1p(np.arange(9)), rtol=1e-6)


def test_the_cost_of_a_filter_counts_all_that_read_it():
    """Group 1 of the residual network is read by a block, a projection and two additions: the
    filter without which its three readers are fitted best goes first."""
    targets = jax.nn.one_hot(np.arange(60) % 4, 4)
    fit = refit.make_fit(jax.random.key(0), RESIDUAL, MAPS, targets, 20)
    _, values = graphs.forward(RESIDUAL, MAPS)
    costs = np.zeros(6)
    for index in (1, 3, 4):
        node = RESIDUAL[index]
        rows = np.asarray(refit.rows_of(node, values[node.source], fit.positions[index]))
        wanted = np.asarray(fit.outputs[index])
        centred = np.square(wanted - wanted.mean(0)).sum()
        for unit in range(6):
            others = np.delete(rows, unit, 2).reshape(len(rows), -1)
            coefficients = least_squares(others, wanted)
            predicted = others @ coefficients[:-1] + coefficients[-1]
            costs[unit] += np.square(predicted - wanted).sum() / centred
    group = graphs.groups(RESIDUAL)[1]
    # Two of the three readers start from value 3, the sum, whose units are the same group.
    assert np.argmin(refit.priorities(RESIDUAL, fit, RIDGE)[group]) == np.argmin(costs)


def test_units_that_are_added_are_one_group():
    assert graphs.groups(RESIDUAL) == (0, 1, 2, 1, 3, 4, 3, 5)
    assert graphs.group_sizes(RESIDUAL) == (3, 6, 5, 8, 7)


def test_sizes_are_counted():
    sizes = (3, 4, 2, 5, 3)
    small = graphs.part(RESIDUAL, [np.arange(size) for size in sizes])
    count = sum(leaf.size for leaf in jax.tree.leaves(small))
    assert graphs.num_parameters(RESIDUAL, sizes) == count
    multiplications = 64 * (3 * 4 * 9 + 4 * 2 * 9 + 2 * 4 * 9)
    multiplications += 16 * (4 * 5 + 4 * 3 * 9 + 3 * 5 * 9) + 5 * 4
    assert graphs.num_multiplications(RESIDUAL, sizes, (8, 8, 3)) == multiplications
    assert graphs.forward(small, MAPS)[0][-1].shape == (60, 4)


@pytest.mark.parametrize(("graph", "inputs"), [(DENSE, INPUTS), (RESIDUAL, MAPS)])
def test_layers_are_two_through_their_principal_components(graph, inputs):
    halves = graphs.decomposed(graph, inputs)
    outputs, values = graphs.forward(graph, inputs)
    apart = graphs.forward(halves, inputs)[0]
    for index, output in enumerate(outputs[:-1]):
        np.testing.assert_allclose(apart[2 * index + 1], output, atol=1e-4)
        components = np.asarray(apart[2 * index]).reshape(-1, output.shape[-1])
        own = np.asarray(graphs.preactivation(graph[index], values[graph[index].source]))
        own = own.reshape(components.shape)
        singular = np.linalg.svd(own - own.mean(0), compute_uv=False)
        np.testing.assert_allclose(np.square(components).sum(0), singular**2, rtol=1e-3, atol=1e-3)
    np.testing.assert_allclose(apart[-1], outputs[-1], atol=1e-4)
    whole = graphs.as_one(halves)
    assert jax.tree.structure(whole) == jax.tree.structure(graph)
    np.testing.assert_allclose(graphs.forward(whole, inputs)[0][-1], outputs[-1], atol=1e-4)
    between = graphs.groups_between(halves)
    units = [n for group, n in enumerate(graphs.group_sizes(halves)) if group not in between]
    assert tuple(units) == graphs.group_sizes(graph)
    assert graphs.num_parameters(halves, graphs.group_sizes(halves)) == graphs.num_parameters(
        graph, graphs.group_sizes(graph)
    )


HALVES = graphs.decomposed(RESIDUAL, MAPS)


@settings(deadline=None, max_examples=20)
@given(st.data())
def test_halves_of_any_size_are_counted_as_they_are_written(data):
    whole = graphs.group_sizes(HALVES)
    sizes = [data.draw(st.integers(1, size)) for size in whole]
    small = graphs.part(HALVES, [np.arange(size) for size in sizes])
    written = graphs.as_one(small)
    count = sum(np.size(leaf) for leaf in jax.tree.leaves(written))
    assert graphs.num_parameters(HALVES, sizes) == count
    traced = graphs.num_parameters(HALVES, [jnp.float32(size) for size in sizes])
    assert int(traced) == count
    assert graphs.num_multiplications(HALVES, sizes, (8, 8, 3)) == graphs.num_multiplications(
        written, graphs.group_sizes(written), (8, 8, sizes[0])
    )
    ranks = graphs.ranks(HALVES, sizes)
    assert len(written) == len(HALVES) - ranks.count(None)
    inputs = MAPS[:4, ..., : sizes[0]]
    expected, logits = (graphs.forward(one, inputs)[0][-1] for one in (small, written))
    np.testing.assert_allclose(logits, expected, atol=1e-4)


def test_dead_filters_of_a_residual_network_go_without_a_trace():
    """A filter is dead in a whole group: nothing writes to it, so that without it the refitted
    network computes what the parent does."""
    dead = {1: 2, 2: 4, 3: 5, 4: 0}
    group, nodes = graphs.groups(RESIDUAL), []
    for index, node in enumerate(RESIDUAL):
        unit = dead.get(group[index + 1])
        if unit is not None:
            bias = node.bias.at[unit].set(0.0)
            node = node.replace(weight=node.weight.at[unit].set(0.0), bias=bias)
        nodes.append(node)
    graph, targets = tuple(nodes), jax.nn.one_hot(np.arange(60) % 4, 4)
    fit = refit.make_fit(jax.random.key(0), graph, MAPS, targets, 20)
    units = [
        np.delete(np.arange(size), dead[index]) if index in dead else np.arange(size)
        for index, size in enumerate(graphs.group_sizes(graph))
    ]
    network = refit.refit(graph, kept(*units), fit, 1e-6)
    expected, logits = (graphs.forward(one, MAPS)[0][-1] for one in (graph, network))
    np.testing.assert_allclose(logits, expected, atol=2e-3)
    orders = refit.priorities(graph, fit, 1e-4)
    for index, unit in dead.items():
        assert np.argmin(orders[index]) == unit


# The search.

CONFIG = ecomp.RefitConfig(
    population_size=12, num_generations=6, num_fit_images=180, smallest=0.1, largest=0.6
)


@pytest.fixture(scope="module")
def searched():
    data = mask_search.make_data(
        jax.random.key(0), CONFIG, ecomp.RefitParams(), DENSE, INPUTS, TARGETS, (1, 1, 12)
    )
    algorithm, params = mask_search.build(CONFIG), ecomp.RefitParams()
    states = [algorithm.init(jax.random.key(1), params, data)]
    step = jax.jit(algorithm.step)
    for generation in range(6):
        key = jax.random.fold_in(jax.random.key(2), generation)
        states.append(step(key, states[-1], params, data)[0])
    return data, states


def test_errors_are_those_of_the_networks_themselves(searched):
    """The errors hold in whatever program a member was computed."""
    data, states = searched
    for index in range(12):
        units = [np.flatnonzero(mask[index]) for mask in states[-1].masks]
        network = refit.refit(
            DENSE, kept(*units), data.fit, ecomp.RefitParams().ridge, 0, CONFIG.label_rounds
        )
        logits = graphs.forward(network, INPUTS[180:][:, units[0]])[0][-1]
        error = -float((TARGETS[180:] * jax.nn.log_softmax(logits)).sum(1).mean())
        size = graphs.num_parameters(DENSE, [*map(len, units)])
        whole = graphs.num_parameters(DENSE, graphs.group_sizes(DENSE))
        np.testing.assert_allclose(
            np.exp(states[-1].objectives[index]), [error, size / whole], rtol=1e-3
        )


def test_parents_and_children_compete(searched):
    """What a state has is never beaten by what it had."""
    for before, after in itertools.pairwise(searched[1][1:]):
        least, now = (np.asarray(state.objectives).min(0) for state in (before, after))
        assert np.all(now <= least + 1e-6)
    sizes = np.exp(np.asarray(searched[1][-1].objectives)[:, 1])
    assert sizes.max() <= CONFIG.largest


def test_children_keep_what_both_parents_have(searched):
    """Without noise: their common units, as many as there is room for, then those of one."""
    data, states = searched
    search = mask_search._Search(CONFIG)
    params = ecomp.RefitParams(noise=0.0, size_span=0.0, vote=100.0)
    masks = tuple(
        jnp.concatenate([jnp.tile(first, (6, 1)), jnp.tile(second, (6, 1))])
        for first, second in [(mask[0], mask[5]) for mask in states[0].masks]
    )
    preference = jnp.arange(12) % 6 * 1.0
    children = search.children_of(jax.random.key(5), masks, preference, params, data)
    for mask, child in zip(masks, children, strict=True):
        first, second = np.asarray(mask[0]), np.asarray(mask[-1])
        low, high = sorted([first.sum(), second.sum()])
        for one in np.asarray(child):
            assert low <= one.sum() <= high
            either = first | second
            assert not (one & ~either).any() or (one & either).sum() == either.sum()
            both = first & second
            assert (one & both).sum() in (both.sum(), first.sum(), second.sum())


def test_any_evosax_algorithm_searches_scores_of_units():
    """With the elimination's order as scores, the loss of its networks; random ones are worse."""
    problem = PruningProblem(
        tuple(Layer(np.asarray(node.weight), np.asarray(node.bias)) for node in DENSE),
        np.asarray(jax.nn.sigmoid(INPUTS)).reshape(300, 1, 12, 1),
        np.asarray(TARGETS.argmax(1)),
        (6, 4, 5),
        CONFIG,
    )
    state = problem.init(jax.random.key(0))
    order = jnp.concatenate(problem.data.priorities)
    random = jax.vmap(problem.sample)(jax.random.split(jax.random.key(1), 7))
    assert [int(mask.sum()) for mask in problem.decode(order)] == [6, 4, 5]
    losses, state, _ = problem.eval(
        jax.random.key(2), jnp.concatenate([order[None], random]), state
    )
    assert losses.shape == (8,)
    assert int(state.counter) == 1
    shuffled = jax.vmap(lambda key: jax.random.permutation(key, order))(
        jax.random.split(jax.random.key(3), 20)
    )
    assert float(losses[0]) < float(problem.eval(jax.random.key(2), shuffled, state)[0].mean())


def test_equal_shares_fill_the_size():
    def measure(sizes: tuple[int, ...]):
        return sum(sizes) / 29

    assert baselines.equal_shares((12, 9, 8), measure, 0.5) == (6, 4, 4)
    assert baselines.equal_shares((12, 9, 8), measure, 0.5, {0}) == (12, 1, 1)
    assert baselines.equal_shares((12, 9, 8), measure, 0.4, {0}) is None


# Through the command line.

DIGITS = load("digits")
TINY = [
    "ecomp", "--recipe", "recommended", "--dataset", "digits", "--parent-units", "32",
    "--parent-epochs", "12", "--search.population-size", "16", "--search.num-generations", "4",
    "--search.front-size", "6", "--fine-tuning-seconds", "0.1", "--name", "run",
]  # fmt: skip


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    runs = tmp_path_factory.mktemp("refit")
    assert main([*TINY, "--runs-dir", str(runs)]) == 0
    return runs / "run"


def test_the_front_is_ahead_of_pruning_by_norm_with_the_same_refit(finished):
    """By 10 points on average at 4 to 30 % of the parameters, which are all of one layer's width
    apart."""
    front = json.loads((finished / "front.json").read_text())
    gains = []
    for row in front:
        assert {"relative_parameters", "validation_accuracy", "test_accuracy"} <= row.keys()
        assert row["relative_parameters"] <= 0.3
        rule = row["l1_refit"]
        if rule:
            assert rule["relative_parameters"] <= row["relative_parameters"]
            gains.append(row["test_accuracy"] - rule["test_accuracy"])
    assert np.mean(gains) > 0.1, gains
    sizes = [row["relative_parameters"] for row in front]
    assert sizes == sorted(sizes)


def test_the_networks_are_what_the_summary_says(finished, tmp_path):
    summary = json.loads((finished / "summary.json").read_text())
    network = ecomp.load(finished)
    assert network.num_parameters == summary["num_parameters"]
    assert len(network.inputs_kept) == summary["num_inputs"] < 64
    logits = network.logits(DIGITS.test.images)
    accuracy = (logits.argmax(-1) == DIGITS.test.labels).mean()
    assert accuracy == pytest.approx(summary["test_accuracy"])
    exported = jax.export.deserialize((finished / "network.stablehlo").read_bytes())
    images = DIGITS.test.images[:5].astype(np.float32) / 255
    np.testing.assert_allclose(exported.call(images), logits[:5], rtol=1e-4, atol=1e-4)
    network.save(tmp_path)
    np.testing.assert_array_equal(artifact.load(tmp_path).logits(DIGITS.test.images), logits)
    for row in json.loads((finished / "front.json").read_text()):
        inputs = row["num_inputs"]
        one = graphs.load(finished / row["file"], (8, 8, 1), 10, inputs)
        flat = DIGITS.test.images.reshape(len(DIGITS.test), -1) / np.float32(255)
        chosen = flat if row["inputs_kept"] is None else flat[:, row["inputs_kept"]]
        right = graphs.forward(one, chosen)[0][-1].argmax(-1) == DIGITS.test.labels
        assert row["test_accuracy"] == pytest.approx(np.mean(right))
    names = {"random", "l1", "activity", "l1, refitted", "l1, trained by gradients"}
    assert names <= summary["alternatives"].keys()
    page = (finished / "report.html").read_text()
    assert f"{100 * summary['test_accuracy']:.2f} %" in page


@pytest.mark.parametrize(("size", "largest"), [("multiplications", 0.3), ("latency", 0.7)])
def test_filters_are_refitted_too(size, largest, tmp_path):
    more = ["--parent-network", "ConvNet", "--parent-units", "8", "--parent-epochs", "2"]
    more += ["--search.size", size, "--search.largest", str(largest), "--num-images", "300"]
    assert main([*TINY, *more, "--runs-dir", str(tmp_path)]) == 0
    for row in json.loads((tmp_path / "run" / "front.json").read_text()):
        assert row["num_inputs"] == 1
        assert row[f"relative_{size}"] <= largest
        assert row.get("milliseconds", 0) > 0 or size != "latency"
    assert (tmp_path / "run" / "latency.json").exists() == (size == "latency")
    assert f"{size} (%)" in (tmp_path / "run" / "report.html").read_text()
    loaded = ecomp.load(tmp_path / "run")
    ranks = json.loads((tmp_path / "run" / "summary.json").read_text())["ranks"]
    convolutions = 3 + sum(rank is not None for rank in ranks)  # some are two, as latency has it
    assert [layer.weight.ndim for layer in loaded.network] == [4] * convolutions + [3]


def test_a_parent_with_two_linear_layers_in_a_row_is_searched_by_latency(tmp_path, monkeypatch):
    def fake(function, node, source=None, other=None):
        """A second for a weight."""
        return float(sum(leaf.size for leaf in jax.tree.leaves(node)))

    monkeypatch.setattr(latency, "timed", fake)
    first, *others = random_graph([(12, 64), (16, 12), (10, 16)], seed=1)
    graphs.save(tmp_path / "parent.safetensors", (first.replace(relu=False), *others))
    more = ["--parent", str(tmp_path / "parent.safetensors"), "--no-simple-rules"]
    more += ["--search.size", "latency", "--search.largest", "0.9", "--num-images", "300"]
    assert main([*TINY, *more, "--runs-dir", str(tmp_path)]) == 0
    for row in json.loads((tmp_path / "run" / "front.json").read_text()):
        assert 0 < row["elimination"]["relative_latency"] <= row["relative_latency"] <= 0.9


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (["--search.smallest", "0.5"], "smallest must be below largest, got 0.5 and 0.3"),
        (["--search.ridge", "0"], "ridge must be > 0, got 0"),
        (["--search.error", "mse"], "mse"),
        (["--search.population-size", "1"], "--search.population-size must be >= 2, got 1"),
        (["--fine-tuning-seconds", "-1"], "--fine-tuning-seconds"),
    ],
)
def test_wrong_input_is_one_line_and_exit_code_2(more, said, tmp_path, capsys):
    assert main([*TINY, *more, "--runs-dir", str(tmp_path)]) == 2
    error = capsys.readouterr().err.strip().splitlines()
    assert said in error[-1]
    assert not (tmp_path / "run").exists()
