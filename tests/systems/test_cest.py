"""CEST: selection against plain computations, the trainer, and its runs by the command line."""

from __future__ import annotations

import json
import re
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from evojax_suite import cest, networks
from evojax_suite.cli.main import main
from evojax_suite.data import load, normalize
from evojax_suite.networks import NetworkConfig
from evojax_suite.runtime.results import load_variables
from evojax_suite.systems.cest import experiment, subsets
from evojax_suite.training import TrainingConfig, evaluate, judge_each, make_batches, start_fit
from evojax_suite.types import Split

DIGITS = load("digits")
DATASET = replace(DIGITS, train=Split(DIGITS.train.images[:96], DIGITS.train.labels[:96]))
# Batch normalisation and dropout, as in the paper's network; small enough to compile quickly.
NETWORK = NetworkConfig(width=4, depth=1, normalization="batch", dropout=0.2)
CONFIG = cest.Config(
    network=NETWORK,
    training=TrainingConfig(num_epochs=6, batch_size=16),
    epochs_per_selection=2,
    prey_population=6,
    prey_generations=3,
)
PARAMS = cest.Params()


def states_of(config, timed=False, num_epochs=6, dataset=DATASET):
    algorithm = cest.build(config, 10, dataset.image_shape, timed)
    data = cest.make_data(config, dataset)
    step = algorithm.step if timed else jax.jit(algorithm.step)
    state = jax.jit(algorithm.init)(jax.random.key(0), PARAMS, data)
    states, metrics = [state], []
    for index in range(num_epochs):
        key = jax.random.fold_in(jax.random.key(1), index)
        state, values = step(key, state, PARAMS, data)
        states.append(state)
        metrics.append(jax.device_get(values))
    return data, states, metrics


@pytest.fixture(scope="module")
def run():
    return states_of(CONFIG)


def losses_of(state, images, labels):
    """The loss and the prediction of each example by itself."""
    network = networks.create(NETWORK, 10, (8, 8, 1))
    logits = network.apply(state.fit.variables, normalize(images, DIGITS.mean, DIGITS.std))
    log_probabilities = np.asarray(jax.nn.log_softmax(logits))
    return -log_probabilities[np.arange(len(labels)), labels], np.asarray(logits.argmax(1))


def test_fitness_by_gather_is_that_of_evaluating_each_subset(run):
    _, states, _ = run
    state = states[3]  # the pass was made with the network of states[1]: none changed it since
    images, labels = DATASET.train.images, DATASET.train.labels
    network = networks.create(NETWORK, 10, (8, 8, 1))
    fitness = cest.prey_fitness(state.prey, state.difficulty)
    for subset, found in zip(np.asarray(state.prey), fitness, strict=True):
        batches = make_batches(
            jnp.asarray(normalize(images[subset], DIGITS.mean, DIGITS.std)),
            jnp.asarray(labels[subset]),
            7,
        )
        plain = evaluate(network, states[1].fit.variables, batches)
        np.testing.assert_allclose(found, plain.cross_entropy, rtol=1e-4)
    assert (np.diff(fitness) <= 1e-6).all()  # fittest first
    np.testing.assert_array_equal(state.chosen[:24], state.prey[0])


def test_the_pass_is_each_examples_loss(run):
    _, states, _ = run
    network = networks.create(NETWORK, 10, (8, 8, 1))
    images, labels = DATASET.train.images, DATASET.train.labels
    found = judge_each(
        network,
        states[4].fit.variables,
        jnp.asarray(normalize(images, DIGITS.mean, DIGITS.std)),
        jnp.asarray(labels),
        11,
    )
    losses, predictions = losses_of(states[4], images, labels)
    np.testing.assert_allclose(found.losses, losses, rtol=1e-3, atol=1e-5)
    np.testing.assert_array_equal(found.correct, predictions == labels)


def test_epochs_selections_and_examples_are_counted(run):
    _, states, metrics = run
    assert [int(m.selections) for m in metrics] == [0, 1, 1, 2, 2, 3]
    assert [float(m.gradient_examples) for m in metrics] == [96, 120, 144, 168, 192, 216]
    assert [float(m.measured_examples) for m in metrics] == [0, 96, 96, 192, 192, 288]
    assert cest.num_gradient_examples(CONFIG, 96) == 216
    assert cest.epochs_of_equal_gradients(CONFIG, 96) == 3
    assert int(metrics[0].distinct) == 96
    for state, m in zip(states[2:], metrics[1:], strict=True):
        chosen = np.asarray(state.chosen)[: int(state.num_chosen)]
        assert len(chosen) == 24
        assert int(m.distinct) == len(np.unique(chosen))
        assert m.difficulty_chosen <= m.difficulty_most + 1e-6
    assert all(int(m.num_failed) == 0 for m in metrics)


def test_evolution_makes_prey_harder_and_keeps_the_best():
    hardness = jnp.asarray(np.random.default_rng(0).exponential(size=400), jnp.float32)
    groups = subsets.make_groups(np.zeros(400, int), 100, 1, False)
    prey = subsets.drawn(jax.random.key(0), groups, 20)
    found = []
    for generations in (0, 5, 20, 80):
        config = replace(CONFIG, prey_population=20, prey_generations=generations)
        evolved = cest.evolve(jax.random.key(1), prey, hardness, groups, config, PARAMS)
        found.append(cest.prey_fitness(evolved, hardness))
    best = [float(fitness[0]) for fitness in found]
    np.testing.assert_allclose(best[0], cest.prey_fitness(prey, hardness).max(), rtol=1e-6)
    assert best[0] < best[1] < best[2] < best[3]
    assert found[3].mean() > found[0].mean()


@pytest.mark.parametrize("selection", ["top_k", "loss_proportional", "random", "full"])
def test_other_rules_pick_what_they_say(selection):
    config = replace(CONFIG, selection=selection)
    data, states, metrics = states_of(config, num_epochs=3)
    state, losses = states[2], losses_of(states[1], DATASET.train.images, DATASET.train.labels)[0]
    chosen = np.asarray(state.chosen)[: int(state.num_chosen)]
    assert len(np.unique(chosen)) == len(chosen)
    if selection == "full":
        np.testing.assert_array_equal(np.sort(chosen), np.arange(96))
        assert float(metrics[-1].gradient_examples) == 3 * 96
        return
    assert len(chosen) == 24
    hardest = np.argsort(-losses)[:24]
    assert (np.sort(chosen) == np.sort(hardest)).all() == (selection == "top_k")
    assert (float(metrics[-1].measured_examples) == 0) == (selection == "random")
    if selection == "loss_proportional":
        hardness = jnp.where(jnp.arange(96) % 4 == 1, 1.0, 0.0)
        found, _ = cest.select(jax.random.key(0), state.prey, hardness, data.groups, config, PARAMS)
        np.testing.assert_array_equal(np.sort(found), np.arange(1, 96, 4))


def test_what_stays_wrong_is_given_up():
    flipped = DATASET.train.labels.copy()
    flipped[:10] = (flipped[:10] + 5) % 10
    dataset = replace(DATASET, train=Split(DATASET.train.images, flipped))
    config = replace(
        CONFIG, selection="top_k", give_up_after=2, epochs_per_selection=1, initial_epochs=0
    )
    _, states, _ = states_of(config, num_epochs=4, dataset=dataset)
    for state in states[3:]:
        given_up = np.asarray(state.wrong_in_a_row) >= 2
        assert given_up.sum() >= 24
        chosen = np.asarray(state.chosen)[:24]
        assert given_up[chosen].mean() < given_up.mean() or (~given_up).sum() < 24


def test_difficulties_are_averaged_over_the_passes():
    config = replace(CONFIG, selection="top_k", difficulty_decay=0.75)
    _, states, _ = states_of(config)
    first = losses_of(states[1], DATASET.train.images, DATASET.train.labels)[0]
    second = losses_of(states[3], DATASET.train.images, DATASET.train.labels)[0]
    np.testing.assert_allclose(states[2].difficulty, first, rtol=1e-3, atol=1e-5)
    expected = 0.75 * first + 0.25 * second
    np.testing.assert_allclose(states[4].difficulty, expected, rtol=1e-3, atol=1e-5)


def test_error_rate_as_difficulty_is_zero_or_one():
    _, states, _ = states_of(replace(CONFIG, difficulty="error"), num_epochs=2)
    _, predictions = losses_of(states[1], DATASET.train.images, DATASET.train.labels)
    np.testing.assert_array_equal(states[2].difficulty, predictions != DATASET.train.labels)


def test_a_rotating_part_is_measured_at_a_time():
    config = replace(CONFIG, pass_fraction=0.25)
    _, states, metrics = states_of(config)
    known = [int((~np.isnan(state.difficulty)).sum()) for state in states]
    assert known == [0, 0, 24, 24, 48, 48, 72]
    assert float(metrics[-1].measured_examples) == 72


def test_losses_of_training_spare_the_pass():
    config = replace(CONFIG, pass_fraction=0.0, reuse_training_losses=True)
    _, states, metrics = states_of(config)
    assert float(metrics[-1].measured_examples) == 0
    assert np.isfinite(states[1].difficulty).all()  # of the first epoch on all
    changed = np.asarray(states[3].difficulty) != np.asarray(states[2].difficulty)
    chosen = np.zeros(96, bool)
    chosen[np.asarray(states[3].chosen)[:24]] = True
    np.testing.assert_array_equal(changed, chosen)


def test_a_share_is_random_and_classes_are_balanced():
    config = replace(CONFIG, selection="top_k", random_share=0.5)
    _, states, _ = states_of(config, num_epochs=2)
    losses = losses_of(states[1], DATASET.train.images, DATASET.train.labels)[0]
    hardest = np.argsort(-losses)[:24]
    share = np.isin(np.asarray(states[2].chosen)[:24], hardest).mean()
    assert 0.5 <= share < 0.9
    config = replace(CONFIG, balanced=True, repair=True)
    _, states, _ = states_of(config, num_epochs=2)
    counts = np.bincount(DATASET.train.labels[np.asarray(states[2].chosen)[:24]], minlength=10)
    assert set(counts) == {2, 3}
    assert len(np.unique(np.asarray(states[2].chosen)[:24])) == 24


def test_trainings_that_differ_in_their_rule_share_a_program():
    """And in their length; a rule that chooses in each step has one of its own beside it."""
    programs, params = {}, cest.Params()
    longer = replace(CONFIG.training, num_epochs=9)
    for changes in (
        {},
        {"selection": "full", "training": longer},
        {"selection": "random", "fraction": 0.5},
        {"selection": "selective_backprop", "initial_epochs": 1},
    ):
        config = replace(CONFIG, **changes)
        algorithm = cest.build(config, 10, DATASET.image_shape, True, programs)
        data = cest.make_data(config, DATASET)
        state = algorithm.init(jax.random.key(0), params, data)
        for number in range(2):
            state, _ = algorithm.step(jax.random.key(number), state, params, data)
    assert [name for name, *_ in programs].count("training") == 2


@pytest.mark.parametrize(
    ("changes", "number"),
    [({}, 100), ({"num_validation_images": 200}, 200), ({"scale": "paper"}, 360)],
)
def test_curves_of_small_runs_need_few_images(changes, number, tmp_path):
    options = experiment.Options(num_images=100, config=CONFIG, **changes)
    job = experiment.prepare(options, DIGITS, tmp_path)
    assert (len(job.dataset.train), len(job.dataset.validation)) == (100, number)


def test_timing_the_stages_changes_nothing(run):
    _, states, metrics = run
    _, timed_states, timed = states_of(CONFIG, timed=True)
    np.testing.assert_allclose(
        [float(m.validation_loss) for m in timed],
        [float(m.validation_loss) for m in metrics],
        rtol=1e-3,
    )
    np.testing.assert_array_equal(timed_states[2].chosen, states[2].chosen)
    assert set(timed[0].stage_seconds) == {"compilation", "training", "validation"}
    assert set(timed[3].stage_seconds) == {"pass", "evolution", "training", "validation"}


def test_statistics_of_batch_normalisation_are_each_predators_own_under_vmap():
    algorithm = cest.build(CONFIG, 10, DATASET.image_shape)
    data = cest.make_data(CONFIG, DATASET)
    keys = jax.random.split(jax.random.key(3), 3)
    step = jax.jit(algorithm.step)
    single = [algorithm.init(key, PARAMS, data) for key in keys]
    together = jax.vmap(lambda key: algorithm.init(key, PARAMS, data))(keys)
    mapped = jax.jit(jax.vmap(algorithm.step, in_axes=(0, 0, None, None)))
    for epoch in range(2):
        key = jax.random.fold_in(jax.random.key(4), epoch)
        own = jax.random.split(key, 3)
        together, _ = mapped(own, together, PARAMS, data)
        single = [step(k, s, PARAMS, data)[0] for k, s in zip(own, single, strict=True)]
    for member, state in enumerate(single):
        jax.tree.map(
            lambda one, all, member=member: np.testing.assert_allclose(
                all[member], one, rtol=2e-2, atol=2e-3
            ),
            state.fit.statistics,
            together.fit.statistics,
        )
    means = jax.tree.leaves(together.fit.statistics)[0]
    assert np.ptp(means, axis=0).max() > 1e-3


def test_the_network_that_the_paper_cites():
    network = networks.create(NetworkConfig(network="VGG10", width=256), 100, (32, 32, 3))
    variables = jax.eval_shape(network.init, jax.random.key(0), jnp.zeros((1, 32, 32, 3)))
    kernels = [leaf.shape for leaf in jax.tree.leaves(variables["params"]) if len(leaf.shape) > 1]
    convolutions = sorted(shape for shape in kernels if len(shape) == 4)
    assert convolutions == sorted(
        [(3, 3, 3, 256), (3, 3, 256, 256), (3, 3, 256, 512)] + [(3, 3, 512, 512)] * 5
    )
    assert {shape for shape in kernels if len(shape) == 2} == {(2048, 1024), (1024, 100)}
    assert sum(leaf.ndim == 1 for leaf in jax.tree.leaves(variables["batch_stats"])) == 18


def test_a_failed_loss_is_counted_and_is_not_the_hardest():
    algorithm = cest.build(replace(CONFIG, selection="top_k"), 10, DATASET.image_shape)
    data = cest.make_data(CONFIG, DATASET)
    state = algorithm.init(jax.random.key(0), PARAMS, data)
    broken = jax.tree.map(lambda leaf: leaf * jnp.nan, state.fit.parameters)
    state = replace(state, fit=replace(state.fit, parameters=broken), epoch=jnp.int32(1))
    after, metrics = jax.jit(algorithm.step)(jax.random.key(1), state, PARAMS, data)
    assert int(metrics.num_failed) == 24
    assert (np.asarray(after.difficulty) == 0).all()


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"fraction": 0.0}, "fraction must be in (0, 1], got 0.0"),
        ({"prey_population": 7}, "prey_population must be even and >= 2, got 7"),
        ({"epochs_per_selection": 0}, "epochs_per_selection must be >= 1, got 0"),
        ({"random_share": 1.0}, "random_share must be in [0, 1), got 1.0"),
        ({"pass_fraction": 1.5}, "pass_fraction must be in [0, 1], got 1.5"),
        ({"pass_fraction": 0.0}, "pass_fraction 0 needs reuse_training_losses"),
        ({"selection": "craig", "pass_fraction": 0.5}, "need pass_fraction 1"),
        ({"selection": "infobatch", "initial_epochs": 0}, "infobatch needs initial_epochs >= 1"),
    ],
)
def test_settings_out_of_range_get_one_line(options, said):
    with pytest.raises(ValueError, match=re.escape(said)):
        cest.Config(**options)


# Through the command line.

TINY = [
    "cest", "--dataset", "digits", "--num-images", "200", "--network", "ConvNet", "--width", "4",
    "--depth", "1", "--normalization", "batch", "--dropout", "0.2", "--num-epochs", "12",
    "--epochs-per-selection", "3", "--prey-population", "6", "--checkpoint-seconds", "0",
    "--name", "run",
]  # fmt: skip
DETERMINISTIC = (
    "network.safetensors", "metrics.jsonl", "full/network.safetensors", "full/metrics.jsonl",
    "full/network-4.safetensors",
)  # fmt: skip


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    runs = tmp_path_factory.mktemp("cest")
    assert main([*TINY, "--runs-dir", str(runs)]) == 0
    return runs / "run"


def test_a_run_leaves_what_its_user_needs(finished):
    summary = json.loads((finished / "summary.json").read_text())
    kinds = {"train_loss", "train_accuracy", "validation_loss", "validation_accuracy",
             "test_accuracy", "gradient_examples", "seconds"}  # fmt: skip
    times = {"pass_seconds", "evolution_seconds", "training_seconds", "compile_seconds"}
    assert kinds | times <= summary.keys()
    assert kinds | times <= summary["baseline"].keys()
    assert kinds <= summary["baseline_equal_gradients"].keys()
    assert summary["gradient_examples"] == 200 + 11 * 50
    assert summary["baseline"]["gradient_examples"] == 12 * 200
    assert summary["baseline_equal_gradients"]["gradient_examples"] == 4 * 200
    parts = sum(summary[f"{stage}_seconds"] for stage in ("training", "pass", "evolution"))
    assert summary["seconds"] == pytest.approx(parts)
    assert summary["baseline"]["pass_seconds"] == 0
    network = networks.create(NETWORK, 10, (8, 8, 1))
    variables = load_variables(finished / "network.safetensors")
    assert jax.tree.structure(variables) == jax.tree.structure(
        dict(start_fit(jax.random.key(0), network, TrainingConfig(), (8, 8, 1)).variables)
    )
    images = jnp.asarray(normalize(DIGITS.test.images, DIGITS.mean, DIGITS.std))
    accuracy = (network.apply(variables, images).argmax(1) == DIGITS.test.labels).mean()
    assert summary["test_accuracy"] == pytest.approx(float(accuracy), abs=1e-6)
    page = (finished / "report.html").read_text()
    assert page.count('<div class="charts">') == 2


@pytest.mark.parametrize(
    ("file", "lines"),
    [("metrics.jsonl", 1), ("metrics.jsonl", 7), ("full/metrics.jsonl", 2),
     ("full/metrics.jsonl", 9)],
    ids=["first epochs", "selected epochs", "baseline", "after equal gradients"],
)  # fmt: skip
def test_killed_in_any_phase_and_resumed_it_ends_with_the_same_bytes(
    finished, run_until_killed, tmp_path, file, lines
):
    arguments = [*TINY, "--runs-dir", str(tmp_path)]
    run_until_killed(arguments, tmp_path / "run" / file, lines)
    assert not (tmp_path / "run" / "summary.json").exists()
    assert main([*arguments, "--resume"]) == 0
    for name in DETERMINISTIC:
        assert (tmp_path / "run" / name).read_bytes() == (finished / name).read_bytes(), name


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (["--fraction", "2"], "fraction must be in (0, 1], got 2.0"),
        (["--selection", "hardest"], "must be one of cest, top_k"),
        (["--mutation-rate", "-1"], "--mutation-rate must be in [0, 1], got -1.0"),
        (["--num-images", "5000"], "--num-images must be in 1..1077, got 5000"),
        (["--temperature", "-1"], "temperature must be >= 0, got -1.0"),
        (["--network", "LeNet", "--depth", "1"], "dropout belongs to the ConvNet"),
    ],
)
def test_wrong_input_is_one_line_and_exit_code_2(more, said, tmp_path, capsys):
    assert main([*TINY, "--runs-dir", str(tmp_path), *more]) == 2
    error = capsys.readouterr().err.strip().splitlines()
    assert len(error) == 1
    assert said in error[0]
    assert not (tmp_path / "run").exists()
