"""EComp, against a plain program with scikit-learn, and its runs through the command line."""

from __future__ import annotations

import json
import re
from dataclasses import replace

import jax
import jax.export
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
from sklearn.manifold._t_sne import _joint_probabilities
from sklearn.metrics import pairwise_distances

from evojax_suite import ecomp
from evojax_suite.cli.main import main
from evojax_suite.data import load, with_whole_training_set
from evojax_suite.data.splits import balanced_subset
from evojax_suite.systems.ecomp import artifact as compressed, compression, feed_forward

DIGITS = with_whole_training_set(load("digits"))
CONFIG = ecomp.Config(population_size=8, num_generations=4, batch_size=50)
PARAMS = ecomp.Params(mutation_rate=0.2, perplexity=15.0)


def trained_parent(shape=(64, 16, 16, 10), seed=0):
    """By scikit-learn, so that nothing of ours is in it."""
    from sklearn.neural_network import MLPClassifier

    images = DIGITS.train.images.reshape(len(DIGITS.train), -1) / np.float32(255)
    model = MLPClassifier(shape[1:-1], max_iter=25, random_state=seed)
    with pytest.warns(UserWarning, match="Maximum iterations"):
        model.fit(images, DIGITS.train.labels)
    pairs = zip(model.coefs_, model.intercepts_, strict=True)
    return tuple(feed_forward.Layer(w.T.astype(np.float32), b.astype(np.float32)) for w, b in pairs)


@pytest.fixture(scope="module")
def parent():
    return trained_parent()


@pytest.fixture(scope="module")
def data(parent):
    places = balanced_subset(DIGITS.train.labels, 200, 10)
    return ecomp.make_data(parent, DIGITS.train.images[places], DIGITS.train.labels[places])


def states_of(config, data, params=PARAMS, steps=None):
    algorithm = ecomp.build(config)
    step = jax.jit(algorithm.step)
    state = jax.jit(algorithm.init)(jax.random.key(0), params, data)
    states, metrics = [state], []
    for index in range(ecomp.num_steps(config, len(data.labels)) if steps is None else steps):
        assert not bool(algorithm.finished(state))
        state, values = step(jax.random.fold_in(jax.random.key(1), index), state, params, data)
        states.append(state)
        metrics.append(jax.device_get(values))
    return algorithm, states, metrics


@pytest.fixture(scope="module")
def run(data):
    return states_of(CONFIG, data)


def batch_of(state, data, index):
    places = state.order[index * 50 : (index + 1) * 50]
    return np.asarray(data.images[places]), np.asarray(data.labels[places])


def plain_fitness(network, parent, images, labels, params=PARAMS):
    """With scikit-learn, in NumPy, from the paper and its program."""

    def outputs(network):
        values, found = images.astype(np.float64), []
        for index, (weight, bias) in enumerate(network):
            values = values @ np.asarray(weight, np.float64).T + np.asarray(bias)
            if index < len(network) - 1:
                values = np.maximum(values, 0)
            found.append(values)
        return found

    *hidden, logits = outputs(network)
    *targets, _ = outputs(parent)
    loss = 0.0
    for activations, target in zip(hidden, targets, strict=True):
        q, p = (
            _joint_probabilities(pairwise_distances(v, squared=True), params.perplexity, verbose=0)
            for v in (activations, target)
        )
        loss += 2 * np.dot(p, np.log(np.maximum(p, np.finfo(np.double).eps) / q))
    accuracy = (logits.argmax(1) == labels).mean()
    size = sum(h.shape[1] for h in hidden) / sum(t.shape[1] for t in targets)
    fitness = (
        params.accuracy_weight * accuracy
        - params.similarity_weight * loss
        + params.compression_weight * (1 - size)
    )
    return fitness, accuracy, loss, size


def test_fitness_is_that_of_a_plain_program(run, data, parent):
    _, states, metrics = run
    for step, batch in ((1, 0), (3, 1)):
        state = states[step]
        images, labels = batch_of(state, data, batch)
        population = state.population
        networks = [
            compression.trimmed(compression.member(population, m), population.sizes[m])
            for m in range(8)
        ]
        expected = np.array([plain_fitness(one, parent, images, labels) for one in networks])
        np.testing.assert_allclose(state.scores.fitness, expected[:, 0], atol=2e-3)
        found = metrics[step - 1]
        np.testing.assert_allclose(found.fitness_best, expected[:, 0].max(), atol=2e-3)
        np.testing.assert_allclose(found.accuracy_mean, expected[:, 1].mean(), atol=1e-6)
        np.testing.assert_allclose(found.similarity_loss_mean, expected[:, 2].mean(), rtol=5e-3)
        np.testing.assert_allclose(found.similarity_loss_worst, expected[:, 2].max(), rtol=5e-3)
        np.testing.assert_allclose(found.relative_size_least, expected[:, 3].min(), rtol=1e-6)


def test_initial_sizes_are_the_released_programs():
    sizes = ecomp.initial_sizes(ecomp.Config(), feed_forward.zeros((784, 256, 256, 10)))
    rates = np.arange(0.1, 0.8, 0.007)[:100]
    expected = [256 - int(rate * 256 + 1e-9) for rate in rates]
    np.testing.assert_array_equal(sizes, np.stack([expected, expected], 1))
    assert (sizes.max(), sizes.min()) == (231, 53)


def test_generations_pass_through_epochs_and_judging_through_all_batches(run, data):
    _, states, metrics = run
    assert len(metrics) == 1 + 4 + 4
    assert [bool(m.judging) for m in metrics] == [False] * 5 + [True] * 4
    assert [int(m.generation) for m in metrics] == list(range(1, 10))
    epoch = states[2].order
    assert not np.array_equal(epoch, states[1].order)  # the first population has its own
    for state in states[2:6]:
        np.testing.assert_array_equal(state.order, epoch)
    for state in states[1:]:
        np.testing.assert_array_equal(np.sort(state.order), np.arange(200))
    for state in states[6:]:  # the last population is judged, not changed
        jax.tree.map(np.testing.assert_array_equal, state.population, states[5].population)


def test_the_best_has_the_highest_mean_over_all_batches(run, data, parent):
    algorithm, states, _ = run
    best = algorithm.result(states[-1], PARAMS, data)
    judged = np.mean([state.scores.fitness for state in states[6:]], 0)
    assert int(best.member) == judged.argmax()
    np.testing.assert_allclose(best.fitness, judged.max(), rtol=1e-5)
    network = compression.trimmed(jax.device_get(best.network), best.sizes)
    fitness = [
        plain_fitness(network, parent, *batch_of(states[-1], data, batch))[0] for batch in range(4)
    ]
    np.testing.assert_allclose(best.fitness, np.mean(fitness), atol=2e-3)


def test_the_texts_best_is_that_of_the_last_generation(data):
    config = replace(CONFIG, final_choice="last")
    algorithm, states, metrics = states_of(config, data)
    assert len(metrics) == 5
    assert bool(algorithm.finished(states[-1]))
    best = algorithm.result(states[-1], PARAMS, data)
    assert int(best.member) == int(np.asarray(states[-1].scores.fitness).argmax())


def test_all_widths_on_the_cpu_compute_what_one_does(data, monkeypatch):
    _, one, _ = states_of(CONFIG, data, steps=2)
    monkeypatch.setattr(ecomp.algorithm, "_VECTOR", 2)
    _, several, _ = states_of(CONFIG, data, steps=2)
    np.testing.assert_allclose(several[1].scores.fitness, one[1].scores.fitness, atol=1e-4)
    np.testing.assert_allclose(several[2].scores.fitness, one[2].scores.fitness, atol=1e-4)


def test_networks_of_nan_are_counted_and_leave_no_children(data):
    algorithm, states, _ = states_of(CONFIG, data, steps=1)
    state = states[1]
    heads = state.population.layers[0].weight.at[:7].set(jnp.nan)
    first = state.population.layers[0]._replace(weight=heads)
    layers = (first, *state.population.layers[1:])
    broken = replace(
        state,
        population=replace(state.population, layers=layers),
        preference=state.preference.at[:7].set(-jnp.inf),
    )
    after, metrics = jax.jit(algorithm.step)(jax.random.key(5), broken, PARAMS, data)
    assert int(metrics.num_failed) == 0  # all are children of the last
    np.testing.assert_array_equal(
        after.population.sizes, np.asarray(state.population.sizes)[[7] * 8]
    )
    judging = replace(broken, num_steps=jnp.int32(5))
    after, metrics = jax.jit(algorithm.step)(jax.random.key(5), judging, PARAMS, data)
    assert int(metrics.num_failed) == 7
    assert np.isfinite(metrics.fitness_mean)
    best = algorithm.result(after, PARAMS, data)
    assert int(best.member) == 7
    hopeless = replace(broken, preference=jnp.full(8, -jnp.inf))
    jax.jit(algorithm.step)(jax.random.key(5), hopeless, PARAMS, data)  # still draws parents


def test_padding_of_nan_never_leaks(data):
    algorithm, states, _ = states_of(CONFIG, data, steps=1)
    population = states[1].population
    inside = jnp.arange(population.layers[0].bias.shape[1]) < population.sizes[:, :1]
    first = population.layers[0]
    first = first._replace(
        weight=jnp.where(inside[..., None], first.weight, jnp.nan),
        bias=jnp.where(inside, first.bias, jnp.nan),
    )
    second = population.layers[1]
    second = second._replace(weight=jnp.where(inside[:, None], second.weight, jnp.nan))
    tails = jnp.where(inside[..., None], population.tails, jnp.nan)
    poisoned = replace(population, layers=(first, second, population.layers[2]), tails=tails)
    state, clean = replace(states[1], population=poisoned), states[1]
    step = jax.jit(algorithm.step)
    for index in range(8):
        key = jax.random.fold_in(jax.random.key(2), index)
        state, metrics = step(key, state, PARAMS, data)
        clean, _expected = step(key, clean, PARAMS, data)
        assert int(metrics.num_failed) == 0
        np.testing.assert_allclose(state.scores.fitness, clean.scores.fitness, atol=1e-5)


@pytest.mark.parametrize(
    "options",
    [
        {"pruning": "activity"},
        {"mutated_layers": "hidden"},
        {"similarity": "student_t"},
        {"similarity": "cka"},
    ],
    ids=str,
)
def test_options_change_what_they_name(data, parent, run, options):
    config = replace(CONFIG, **options)
    _, states, metrics = states_of(config, data, steps=2)
    _, plain, plain_metrics = run
    assert all(int(m.num_failed) == 0 for m in metrics)
    if options == {"pruning": "activity"}:
        hidden = feed_forward.forward(parent, data.images[:50])[:-1]
        member = 7  # the smallest
        for layer, activations in enumerate(hidden):
            size = int(states[0].population.sizes[member, layer])
            expected = np.sort(np.argsort(np.asarray(activations.mean(0)), kind="stable")[-size:])
            units = states[0].population.units[layer][member, :size]
            np.testing.assert_array_equal(units, expected)
    elif "similarity" in options:
        assert metrics[0].similarity_loss_mean != plain_metrics[0].similarity_loss_mean
        assert metrics[0].accuracy_mean == plain_metrics[0].accuracy_mean
        if options["similarity"] == "cka":
            assert metrics[0].similarity_loss_best >= 0
            assert metrics[0].similarity_loss_worst <= 2
    else:
        outer = states[2].population.layers[-1].weight
        inner = plain[2].population.layers[-1].weight
        assert not np.array_equal(outer, inner)


def test_size_alone_shrinks_and_accuracy_alone_stays_accurate(data):
    config = replace(CONFIG, population_size=40, num_generations=25)
    algorithm = ecomp.build(config)

    @jax.jit
    def last(params):
        def step(state, index):
            return algorithm.step(jax.random.fold_in(jax.random.key(1), index), state, params, data)

        state = algorithm.init(jax.random.key(0), params, data)
        return jax.tree.map(lambda m: m[-1], jax.lax.scan(step, state, jnp.arange(26))[1])

    final = {}
    for name, (accuracy, size) in {"size": (0.0, 30.0), "accuracy": (30.0, 0.0)}.items():
        weights = {"accuracy_weight": accuracy, "compression_weight": size}
        final[name] = last(replace(PARAMS, similarity_weight=0.0, **weights))
    assert final["size"].relative_size_mean < 0.35
    assert final["accuracy"].accuracy_mean > 0.7
    assert final["accuracy"].relative_size_mean > 0.5


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"population_size": 7}, "population_size must be even and >= 2, got 7"),
        ({"num_generations": -1}, "num_generations must be >= 0, got -1"),
        ({"batch_size": 2}, "batch_size must be >= 4, got 2"),
        ({"least_compression": 0.8}, "least_compression 0.8 and most_compression 0.8"),
        ({"most_compression": 1.1}, "most_compression 1.1"),
    ],
)
def test_settings_out_of_range_get_one_line(options, said):
    with pytest.raises(ValueError, match=re.escape(said)):
        ecomp.Config(**options)


@pytest.mark.parametrize(
    ("params", "shape", "num_images", "said"),
    [
        ({}, (64, 16, 8, 10), 200, "must be equal in size, got 16, 8"),
        ({}, (64, 16, 16, 10), 220, "a multiple of batch_size 50, got 220"),
        ({"perplexity": 49.0}, (64, 16, 16, 10), 200, "perplexity must be >= 1 and < 49"),
        ({"mutation_rate": 1.5}, (64, 16, 16, 10), 200, "mutation_rate must be in [0, 1], got 1.5"),
        ({"mutation_span": -1.0}, (64, 16, 16, 10), 200, "mutation_span must be in [0, 1], got -1"),
    ],
)
def test_what_does_not_fit_together_gets_one_line(params, shape, num_images, said):
    with pytest.raises(ValueError, match=re.escape(said)):
        ecomp.check(CONFIG, replace(PARAMS, **params), feed_forward.zeros(shape), num_images)


# Through the command line.

TINY = [
    "--dataset", "digits", "--parent-units", "16", "--parent-epochs", "2", "--population-size",
    "8", "--num-generations", "30", "--batch-size", "50", "--perplexity", "10",
    "--mutation-rate", "0.2", "--checkpoint-seconds", "0", "--name", "run", "--no-simple-rules",
]  # fmt: skip
DETERMINISTIC = ("network.safetensors", "network.json", "metrics.jsonl", "parent.safetensors")


def ecomp_main(runs_dir, *more):
    return main(["ecomp", *TINY, "--runs-dir", str(runs_dir), *more])


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    runs = tmp_path_factory.mktemp("uninterrupted")
    assert ecomp_main(runs, "--simple-rules", "--fine-tuning-seconds", "0.2") == 0
    return runs / "run"


def test_a_run_leaves_what_its_user_needs(finished):
    summary = json.loads((finished / "summary.json").read_text())
    assert {
        "test_accuracy", "parent_test_accuracy", "relative_size", "hidden_units",
        "num_parameters", "seconds", "compile_seconds", "parent_seconds", "test_agreement",
    } <= summary.keys()  # fmt: skip
    assert summary["num_failed"] == 0
    assert summary["relative_size"] == sum(summary["hidden_units"]) / 32
    rules = {name: row["test_accuracy"] for name, row in summary["alternatives"].items()}
    assert rules["l1, refitted"] > rules["random"]
    assert rules["l1, trained by gradients"] > rules["l1"]
    about = json.loads((finished / "network.json").read_text())
    assert about["layer_sizes"] == [64, *summary["hidden_units"], 10]
    assert about["num_parameters"] == summary["num_parameters"]
    assert [len(u) for u in about["lineage"]["units_kept"]] == summary["hidden_units"]
    lines = (finished / "metrics.jsonl").read_text().splitlines()
    assert len(lines) == 1 + 30 + len(range(0, 1350, 50))
    page = (finished / "report.html").read_text()
    assert page.count('<div class="charts">') == 1
    assert f"{100 * summary['test_accuracy']:.2f}%" in page
    assert "L1, trained by gradients" in page


def test_the_network_comes_back_bit_for_bit_and_without_this_package(finished, tmp_path):
    network = compressed.load(finished)
    logits = network.logits(DIGITS.test.images)
    summary = json.loads((finished / "summary.json").read_text())
    accuracy = (logits.argmax(-1) == DIGITS.test.labels).mean()
    assert accuracy == pytest.approx(summary["test_accuracy"])
    network.save(tmp_path)
    np.testing.assert_array_equal(compressed.load(tmp_path).logits(DIGITS.test.images), logits)
    np.testing.assert_array_equal(
        network.logits(DIGITS.test.images.astype(np.float32) / 255), logits
    )
    exported = jax.export.deserialize((tmp_path / "network.stablehlo").read_bytes())
    for count in (3, 11):
        images = DIGITS.test.images[:count].astype(np.float32) / 255
        np.testing.assert_allclose(exported.call(images), logits[:count], rtol=1e-4, atol=1e-5)


def test_a_killed_run_goes_on_to_the_same_bytes(finished, run_until_killed, tmp_path):
    arguments = ["ecomp", *TINY, "--runs-dir", str(tmp_path)]
    run_until_killed(arguments, tmp_path / "run" / "metrics.jsonl", 10)
    assert not (tmp_path / "run" / "summary.json").exists()
    assert ecomp_main(tmp_path, "--resume") == 0
    for name in DETERMINISTIC:
        assert (tmp_path / "run" / name).read_bytes() == (finished / name).read_bytes(), name


def test_your_own_parent_is_compressed(tmp_path, parent, capsys):
    arrays = {}
    for index, layer in enumerate(parent):
        arrays[f"{2 * index}.weight"] = np.ascontiguousarray(layer.weight)
        arrays[f"{2 * index}.bias"] = layer.bias
    path = tmp_path / "mine.safetensors"
    safetensors.numpy.save_file(arrays, path)
    assert ecomp_main(tmp_path, "--parent", str(path), "--num-generations", "3") == 0
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    images = DIGITS.test.images.reshape(len(DIGITS.test), -1) / np.float32(255)
    expected = feed_forward.forward(parent, images)[-1].argmax(-1) == DIGITS.test.labels
    assert summary["parent_test_accuracy"] == pytest.approx(expected.mean())
    assert not (tmp_path / "run" / "parent").exists()
    assert "agree" in capsys.readouterr().out


def test_a_front_is_written_with_all_its_networks(tmp_path):
    extended = ["--selection", "nsga2", "--no-balanced", "--shrinking", "--crossover", "aligned"]
    assert ecomp_main(tmp_path, *extended, "--num-generations", "10") == 0
    run = tmp_path / "run"
    front = json.loads((run / "front.json").read_text())
    assert json.loads((run / "summary.json").read_text())["front_size"] == len(front) > 1
    assert {run / row["file"] for row in front} == set((run / "front").iterdir())
    images = DIGITS.test.images.reshape(len(DIGITS.test), -1) / np.float32(255)
    for row, after in zip(front, [*front[1:], None], strict=True):
        network = feed_forward.load(run / row["file"], (8, 8, 1), 10)
        assert list(feed_forward.hidden_sizes(network)) == row["hidden_units"]
        accuracy = feed_forward.forward(network, images)[-1].argmax(-1) == DIGITS.test.labels
        assert row["test_accuracy"] == pytest.approx(np.mean(accuracy))
        if after:
            assert row["num_parameters"] <= after["num_parameters"]
    assert (run / "figures" / "front.png").exists()


def test_the_filters_of_a_convolutional_parent_are_pruned(tmp_path):
    network = ["--parent-network", "ConvNet", "--parent-units", "12", "--pooling", "max"]
    assert ecomp_main(tmp_path, *network, "--num-images", "200", "--num-generations", "4") == 0
    run = tmp_path / "run"
    summary = json.loads((run / "summary.json").read_text())
    assert summary["num_failed"] == 0
    assert len(summary["hidden_units"]) == 3
    loaded = compressed.load(run)
    assert [layer.weight.ndim for layer in loaded.network] == [4, 4, 4, 3]
    assert loaded.num_parameters == summary["num_parameters"] < summary["parent_num_parameters"]
    logits = loaded.logits(DIGITS.test.images)
    accuracy = (logits.argmax(-1) == DIGITS.test.labels).mean()
    assert accuracy == pytest.approx(summary["test_accuracy"])
    exported = jax.export.deserialize((run / "network.stablehlo").read_bytes())
    images = DIGITS.test.images[:5].astype(np.float32) / 255
    np.testing.assert_allclose(exported.call(images), logits[:5], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (["--parent-network", "ConvNet", "--pooling", "mean"], "must be one of average, max, none"),
        (["--parent", "missing.npz"], "no file missing.npz"),
        (["--population-size", "7"], "--search.population-size must be even"),
        (["--parent-epochs", "0"], "--parent-epochs must be >= 1, got 0"),
        (["--num-images", "120"], "a multiple of --batch-size 50, got 120"),
        (["--num-images", "5000"], "num_samples must be in"),
        (["--batch-size", "5000"], "fewer than --batch-size 5000"),
        (["--perplexity", "60"], "--perplexity must be >= 1 and < 49 with --batch-size 50, got 60"),
        (["--pruning", "magnitude"], "magnitude"),
    ],
)
def test_wrong_input_is_one_line_and_exit_code_2(more, said, tmp_path, capsys):
    assert ecomp_main(tmp_path, *more) == 2
    error = capsys.readouterr().err.strip().splitlines()
    assert said in error[-1]
    assert error[-1].startswith("evojax-suite: error:")
    assert not (tmp_path / "run").exists()
