"""DE-NAS: scores and survival against plain computations, the search, its runs by command line."""

from __future__ import annotations

import json
from dataclasses import replace

import jax
import jax.export
import jax.numpy as jnp
import numpy as np
import pytest

from evojax_suite import de_nas
from evojax_suite.cli.main import main
from evojax_suite.data import load
from evojax_suite.systems.de_nas import architectures, artifact as searched, candidates, experiment
from evojax_suite.systems.de_nas.architectures import Genome, Space
from evojax_suite.systems.de_nas.networks import SequenceNetwork
from evojax_suite.training import evaluate, fit_epochs, start_fit
from evojax_suite.types import Split

DIGITS = load("digits")
SPACE = Space(
    min_length=3, max_length=5, kernels=(1, 3), min_first_filters=2, max_first_filters=3,
    max_filters=4, max_features=256,
)  # fmt: skip
CONFIG = de_nas.Config(
    population_size=4,
    num_children=2,
    num_generations=2,
    num_best=2,
    final_epochs=2,
    space=SPACE,
    training=replace(de_nas.TRAINING, num_epochs=1, crop_padding=1, flip=False),
)
PARAMS = de_nas.Params()


def small_digits():
    part = DIGITS.train
    return replace(DIGITS, train=Split(part.images[:200], part.labels[:200]))


@pytest.fixture(scope="module")
def data():
    return de_nas.make_data(CONFIG, small_digits())


def search(config, data, seed=0):
    algorithm = de_nas.build(config, 10, DIGITS.image_shape)
    state, lines = algorithm.init(jax.random.key(seed), PARAMS, data), []
    while not bool(algorithm.finished(state)):
        key = jax.random.fold_in(jax.random.key(seed), len(lines))
        state, metrics = algorithm.step(key, state, PARAMS, data)
        lines.append(metrics)
    return algorithm, state, lines


@pytest.fixture(scope="module")
def found(data):
    return search(CONFIG, data)


def test_scores_by_hand():
    accuracy, sizes = np.array([0.9, 0.5, 0.7]), np.array([1000, 200, 600])
    expected = [0.7 * 0 + 0.3 * 1, 0.7 * 1 + 0.3 * 0, 0.7 * 0.5 + 0.3 * 0.5]
    np.testing.assert_allclose(de_nas.scores(accuracy, sizes, PARAMS), expected)
    assert de_nas.best_first(accuracy, sizes, PARAMS).tolist() == [0, 2, 1]
    heavy = PARAMS.replace(error_weight=0.1, size_weight=0.9)
    assert de_nas.best_first(accuracy, sizes, heavy).tolist() == [1, 2, 0]


def test_what_was_named_is_not_made_small():
    dataset = load("digits")
    left = experiment.reduced(experiment.Options(), dataset).config
    assert (left.training.optimizer, left.training.learning_rate) == ("adam", 2e-3)
    assert (left.space.max_filters, left.final_epochs) == (16, 50)
    named = "--learning-rate", "--max-filters", "--final-epochs"
    kept = experiment.reduced(experiment.Options(named=named), dataset).config
    assert (kept.training, kept.space.max_filters, kept.final_epochs) == (
        de_nas.Config().training,
        de_nas.Config().space.max_filters,
        de_nas.Config().final_epochs,
    )
    assert kept.space.max_features == left.space.max_features


def test_finalists_are_the_most_accurate_that_differ():
    genomes = Genome(*(np.array(rows)[:, None] for rows in ([1, 1, 1, 1], [3, 5, 3, 1], [8] * 4)))
    accuracy = np.array([0.5, 0.9, 0.6, np.nan], np.float32)
    result = de_nas.SearchResult(genomes, accuracy, most_accurate=1, smallest=0)
    assert result.finalists(1) == [1]
    assert result.finalists(9) == [1, 2, 3]  # the first is the third again, the last one failed


def test_a_failed_candidate_is_last_and_shifts_no_other_score():
    accuracy, sizes = np.array([0.9, np.nan, 0.5, 0.7]), np.array([1000, 1, 200, 600])
    found = de_nas.scores(accuracy, sizes, PARAMS)
    kept = de_nas.scores(accuracy[[0, 2, 3]], sizes[[0, 2, 3]], PARAMS)
    np.testing.assert_allclose(found[[0, 2, 3]], kept)
    assert found[1] == np.inf
    for survival in ("score", "nsga2"):
        assert de_nas.best_first(accuracy, sizes, PARAMS, survival)[-1] == 1


def test_scores_on_the_scale_of_the_first():
    accuracy, sizes = np.array([0.9, 0.5, 0.98, np.nan]), np.array([1000, 200, 1800, 1])
    expected = [0.3, 0.7, 0.7 * -0.2 + 0.3 * 2, np.inf]
    np.testing.assert_allclose(de_nas.scores(accuracy, sizes, PARAMS, scale=2), expected)


def test_equal_candidates_have_equal_scores():
    assert de_nas.scores(np.full(3, 0.5), np.full(3, 10), PARAMS).tolist() == [0, 0, 0]


def test_nsga2_keeps_the_front_first():
    accuracy = np.array([0.9, 0.6, 0.8, 0.85, 0.5])
    sizes = np.array([900, 100, 950, 500, 300])  # 2 and 4 are dominated
    order = de_nas.best_first(accuracy, sizes, PARAMS, "nsga2")
    assert set(order[:3]) == {0, 1, 3}


def test_the_population_is_the_best_of_all_that_lived(found):
    _, state, lines = found
    assert len(lines) == CONFIG.num_candidates == 8
    accuracy = np.asarray(state.accuracy)
    sizes = architectures.costs(state.genomes, DIGITS.image_shape, 10).parameters
    alive = np.arange(4)
    for children in ((4, 5), (6, 7)):
        alive = alive[de_nas.best_first(accuracy[alive], sizes[alive], PARAMS)]
        alive = np.concatenate([alive[:4], children])
    alive = alive[de_nas.best_first(accuracy[alive], sizes[alive], PARAMS)]
    assert np.asarray(state.population).tolist() == alive[:4].tolist()
    assert [line.search_generation for line in lines] == [0, 0, 0, 0, 1, 1, 2, 2]
    np.testing.assert_array_equal([line.num_parameters for line in lines], sizes)
    np.testing.assert_allclose([line.accuracy for line in lines], accuracy)


def test_children_come_from_the_population(found):
    """Every unit of a child is a unit of one who lived, at the same place or before."""
    _, state, _ = found
    parents = [architectures.to_units(architectures.member(state.genomes, i)) for i in range(4)]
    known = {unit for units in parents for unit in units}
    for index in (4, 5):
        assert set(architectures.to_units(architectures.member(state.genomes, index))) <= known


def test_a_candidate_is_judged_as_a_plain_program_judges_it(found, data):
    _, state, _ = found
    index = 5
    genome = architectures.member(state.genomes, index)
    key_start, key_fit = jax.random.split(
        jax.random.wrap_key_data(jnp.asarray(np.asarray(state.keys)[index]))
    )
    separate = replace(CONFIG, programs="separate")
    judge = de_nas.make_evaluator(separate, 10, DIGITS.image_shape)
    accuracy = judge(
        genome, jax.random.wrap_key_data(state.keys[index]), data, np.zeros(0)
    ).evaluation.accuracy
    network = SequenceNetwork(10, architectures.to_units(genome))
    images = (np.asarray(data.images, np.float32) / 255 if data.images.dtype == np.uint8
              else np.asarray(data.images))  # fmt: skip
    images = (images - np.asarray(data.mean)) / np.asarray(data.std)
    fit, _ = fit_epochs(
        key_fit, network, CONFIG.training, 4,
        start_fit(key_start, network, CONFIG.training, DIGITS.image_shape),
        jnp.asarray(images), jax.nn.one_hot(data.labels, 10), 200, 1,
    )  # fmt: skip
    expected = evaluate(network, fit.variables, data.validation).accuracy
    np.testing.assert_allclose(accuracy, expected, atol=0.02)


@pytest.mark.parametrize(
    ("filters", "shape", "images", "padded"),
    [(16, (8, 8, 1), 1078, True), (32, (8, 8, 1), 1078, False), (16, (28, 28, 1), 1000, False)],
)
def test_short_trainings_of_small_networks_share_one_program(filters, shape, images, padded):
    """As measured (experiments/de_nas/README.md): both are alike at the second, and the padded
    program takes more than twice the time at the third."""
    config = de_nas.Config(space=Space(max_filters=filters, max_features=256))
    work = de_nas.padded_work(config, shape, images)
    assert (work <= candidates._MOST_PADDED_WORK) == padded


def test_the_look_ahead_changes_nothing(found, data):
    _, state, _ = found
    _, alone, _ = search(replace(CONFIG, workers=1), data)
    jax.tree.map(np.testing.assert_array_equal, state, alone)


EVOSAX = replace(CONFIG, method="evosax", num_children=4)


def test_an_evosax_algorithm_moves_what_the_candidates_are_decoded_from(data):
    _, state, _ = search(EVOSAX, data)
    state = jax.device_get(state)
    decode = jax.vmap(lambda x: architectures.decode(x, SPACE, DIGITS.image_shape))
    numbers = jax.scipy.stats.norm.cdf(state.encoded.vectors).reshape(12, -1, 4)
    jax.tree.map(np.testing.assert_array_equal, decode(numbers), state.genomes)
    _, others, _ = search(replace(CONFIG, num_generations=0), data)
    first = [architectures.member(genomes, slice(4)) for genomes in (state.genomes, others.genomes)]
    jax.tree.map(np.testing.assert_array_equal, *first)
    # Told the first population and its children: each member is the better of the two.
    sizes = architectures.costs(state.genomes, DIGITS.image_shape, 10).parameters
    fitness = de_nas.scores(state.accuracy, sizes, PARAMS, scale=4)
    first, children = np.argsort(fitness[:4], kind="stable"), np.arange(4, 8)
    better = np.where(fitness[children] <= fitness[first], children, first)
    np.testing.assert_array_equal(state.encoded.strategy.population, state.encoded.vectors[better])
    np.testing.assert_allclose(state.encoded.strategy.fitness, fitness[better], rtol=1e-6)
    assert len(set(map(bytes, state.encoded.vectors))) == 12


def test_a_distribution_of_evosax_starts_among_the_best(data):
    config = replace(EVOSAX, strategy="SNES", population_size=6, num_generations=1)
    _, state, _ = search(config, data)
    sizes = architectures.costs(state.genomes, DIGITS.image_shape, 10).parameters
    order = np.argsort(de_nas.scores(np.asarray(state.accuracy), sizes, PARAMS, scale=6)[:6])
    mean = np.asarray(state.encoded.vectors)[order[:4]].mean(0)
    np.testing.assert_allclose(state.encoded.strategy.mean, mean, rtol=1e-5, atol=1e-6)


RUNGS = replace(CONFIG, rungs=(1, 3), training=replace(CONFIG.training, num_epochs=4))


def test_a_rung_stops_who_does_not_reach_it(found, data):
    _, state, _ = found
    genome, key = architectures.member(state.genomes, 5), jax.random.key(7)
    judge = de_nas.make_evaluator(RUNGS, 10, DIGITS.image_shape)
    whole = judge(genome, key, data, np.full(2, -np.inf, np.float32))
    assert whole.num_epochs == 4
    assert np.isfinite(whole.rungs).all()
    assert whole.rungs[-1] == whole.evaluation.accuracy
    for bars, epochs in (((2, -np.inf), 1), ((-np.inf, 2), 3), ((whole.rungs[0], 0), 4)):
        stopped = judge(genome, key, data, np.array(bars, np.float32))
        assert stopped.num_epochs == epochs
        reached = RUNGS.rungs.index(epochs) + 1 if epochs < 4 else 3
        np.testing.assert_array_equal(stopped.rungs[:reached], whole.rungs[:reached])
        assert np.isnan(stopped.rungs[reached:]).all()
        assert stopped.evaluation.accuracy == whole.rungs[reached - 1]


def test_children_train_on_only_with_the_better_half_of_the_survivors(data):
    _, state, lines = search(RUNGS, data)
    rungs, epochs = np.asarray(state.rungs), np.asarray(state.num_epochs)
    assert (epochs[:4] == 4).all()
    assert [line.num_epochs for line in lines] == epochs.tolist()
    accuracy = np.asarray(state.accuracy)
    sizes = architectures.costs(state.genomes, DIGITS.image_shape, 10).parameters
    alive = np.arange(4)
    for children in ((4, 5), (6, 7)):
        alive = alive[de_nas.best_first(accuracy[alive], sizes[alive], PARAMS)][:4]
        for child in children:
            expected = 4
            for rung, end in reversed(list(enumerate(RUNGS.rungs))):
                reached = np.sort(rungs[alive, rung][np.isfinite(rungs[alive, rung])])
                if rungs[child, rung] < reached[(len(reached) - 1) // 2]:
                    expected = end
            assert epochs[child] == expected
        alive = np.concatenate([alive, children])


def test_random_search_and_known_networks(data):
    config = replace(CONFIG, method="random", num_known=2, num_generations=1)
    _, state, _ = search(config, data)
    first = [architectures.to_units(architectures.member(state.genomes, i)) for i in range(6)]
    assert [unit.kind for unit in first[0][:3]] == ["convolution", "convolution", "max"]
    assert first[1][0].filters >= first[0][0].filters
    for units in first[2:]:  # as drawn: filters grow
        filters = [unit.filters for unit in units if unit.kind == "convolution"]
        assert filters == sorted(filters)


def test_a_screen_lets_the_largest_of_random_networks_train(data):
    algorithm = de_nas.build(replace(CONFIG, screen=20), 10, DIGITS.image_shape)
    state = algorithm.init(jax.random.key(0), PARAMS, data)
    state, _ = algorithm.step(jax.random.key(0), state, PARAMS, data)
    keys = jax.random.split(jax.random.key(1), 200)
    drawn = jax.vmap(lambda key: architectures.random_genome(key, SPACE, DIGITS.image_shape))(keys)
    first = architectures.member(state.genomes, np.arange(CONFIG.population_size))
    sizes, usual = (
        architectures.costs(genomes, DIGITS.image_shape, 10).parameters
        for genomes in (first, drawn)
    )
    assert sizes.min() > np.median(usual)
    assert sizes.max() <= usual.max()


def test_the_result_names_the_most_accurate_and_the_smallest(found, data):
    algorithm, state, _ = found
    result = algorithm.result(state, PARAMS, data)
    sizes = architectures.costs(result.genomes, DIGITS.image_shape, 10).parameters
    assert result.accuracy[result.most_accurate] == result.accuracy.max()
    assert sizes[result.smallest] == sizes.min()


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"population_size": 2}, "population_size must be >= 3, got 2"),
        ({"num_best": 5}, "num_best must be <= population_size = 4, got 5"),
        ({"num_known": 5}, "num_known must be <= population_size = 4, got 5"),
        ({"dropout": 1.0}, r"dropout must be in \[0, 1\), got 1.0"),
        ({"workers": 0}, "workers must be >= 1, got 0"),
        ({"programs": "padded", "skip": True}, "programs padded needs"),
        ({"rungs": (1,)}, r"rungs must rise within 1..0, below the 1 epochs, got \(1,\)"),
        ({"method": "evosax", "num_known": 1}, "evosax takes no known networks, got 1"),
        ({"method": "evosax", "screen": 2}, "method evosax takes no screen, got 2"),
        ({"method": "evosax", "num_children": 5}, "num_children must be <= population_size = 4"),
    ],
)
def test_a_wrong_configuration_is_refused(changes, says):
    with pytest.raises(ValueError, match=says):
        replace(CONFIG, **changes)


def test_images_too_small_and_one_class_are_refused():
    with pytest.raises(ValueError, match="images must be at least 4x4"):
        de_nas.build(CONFIG, 10, (3, 8, 1))
    with pytest.raises(ValueError, match="at least 2 classes, got 1"):
        de_nas.make_data(CONFIG, replace(DIGITS, class_names=("zero",)))
    with pytest.raises(ValueError, match="DifferentialEvolution with a population of 2"):
        de_nas.build(replace(CONFIG, method="evosax"), 10, DIGITS.image_shape)
    with pytest.raises(ValueError, match=r"differential_weight must be in \[0, 1\], got 2"):
        de_nas.Params(differential_weight=2).check()


def test_a_bound_that_no_network_keeps_is_refused(data):
    space = replace(SPACE, max_features=16, convolution_rate=1.0)  # 64 without pooling
    with pytest.raises(ValueError, match="no random network with at most max_features = 16"):
        search(replace(CONFIG, space=space), data)
    with pytest.raises(ValueError, match="max_weights = 1 was found"):
        search(replace(CONFIG, space=replace(SPACE, max_weights=1)), data)


def test_evolution_keeps_to_the_weights_that_it_may_have(data):
    config = replace(CONFIG, num_children=4, space=replace(SPACE, max_weights=100))
    for method in ("evolution", "evosax"):
        _, state, _ = search(replace(config, method=method), data)
        assert (architectures.num_weights(state.genomes, 1).sum(1) <= 100).all()


RUN = [
    "de-nas", "--num-images", "200", "--population-size", "4", "--num-children", "2",
    "--num-generations", "2", "--num-best", "2", "--min-length", "3", "--max-length", "5",
    "--kernels", "1", "3", "--min-first-filters", "2", "--max-first-filters", "3",
    "--max-filters", "4", "--max-features", "256", "--num-epochs", "2", "--final-epochs", "3",
    "--checkpoint-seconds", "0", "--name", "run", "--baselines", "--inherit", "--child-epochs", "1",
]  # fmt: skip
DETERMINISTIC = (
    "architecture.json", "network.safetensors", "smallest/architecture.json", "history.json",
    "metrics.jsonl", "training/most_accurate/metrics.jsonl",
)  # fmt: skip


@pytest.mark.parametrize("changes", [{"inherit": True, "child_epochs": 1}, {"programs": "padded"}])
def test_networks_by_hand_may_stand_beside_any_search(changes):
    config = replace(CONFIG, **changes)
    for skip in (False, True):
        assert experiment.of_hand_made(config, skip).normalization == "batch"


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    runs = tmp_path_factory.mktemp("de-nas")
    assert main([*RUN, "--runs-dir", str(runs)]) == 0
    return runs / "run"


def test_a_run_leaves_what_its_user_needs(finished):
    summary = json.loads((finished / "summary.json").read_text())
    assert summary["system"] == "de_nas"
    assert summary["num_evaluated"] == 8
    assert {"test_accuracy", "num_parameters", "seconds", "candidates_per_hour"} <= summary.keys()
    rows = json.loads((finished / "history.json").read_text())
    assert len(rows) == 8
    assert sum(row["survived"] for row in rows) == 4
    assert summary["num_parameters_largest"] == max(row["num_parameters"] for row in rows)
    best = max((row for row in rows if row["survived"]), key=lambda row: row["accuracy"])
    assert summary["search_accuracy"] == pytest.approx(best["accuracy"])
    network = searched.load(finished)
    assert [unit._asdict() for unit in network.network.units] == best["units"]
    assert network.num_parameters == summary["num_parameters"] == best["num_parameters"]
    logits = network.logits(DIGITS.test.images)
    accuracy = (logits.argmax(1) == DIGITS.test.labels).mean()
    assert accuracy == pytest.approx(summary["test_accuracy"], abs=1e-6)
    program = jax.export.deserialize((finished / "network.stablehlo").read_bytes())
    images = np.asarray(DIGITS.test.images[:7], np.float32)
    images = images / (255 if DIGITS.test.images.dtype == np.uint8 else 1)
    np.testing.assert_allclose(program.call(images), logits[:7], rtol=1e-3, atol=1e-4)
    table = json.loads((finished / "architecture.json").read_text())["layers"]
    assert sum(layer["parameters"] for layer in table) == network.num_parameters
    assert searched.load(finished / "smallest").num_parameters <= network.num_parameters
    page = (finished / "report.html").read_text()
    assert "Layers of the most accurate" in page
    assert page.count('<div class="charts">') == 2


def test_the_recommended_recipe_compares_with_what_a_sceptic_tries(tmp_path):
    few = [
        "--population-size", "4", "--num-children", "2", "--num-generations", "1", "--num-best",
        "2", "--max-length", "6", "--num-images", "500", "--num-epochs", "4", "--final-epochs", "8",
        "--max-weights", "2000",
    ]  # fmt: skip
    where = ["--runs-dir", str(tmp_path), "--name", "run"]
    assert main(["de-nas", "--recipe", "recommended", "--finalists", "2", *few, *where]) == 0
    run = tmp_path / "run"
    summary = json.loads((run / "summary.json").read_text())
    size = summary["num_parameters"]
    network = searched.load(run)
    assert network.num_parameters == size
    assert network.network.head == "linear"
    assert network.network.normalization == "batch"
    assert network.network.skip
    for name in ("baseline_vgg", "baseline_resnet"):
        assert 0.8 * size <= summary[name]["num_parameters"] <= size
        assert 0 < summary[name]["test_accuracy"] <= 1
    assert summary["test_accuracy"] > summary["baseline_vgg"]["test_accuracy"] + 0.1
    assert summary["baseline_random"]["test_accuracy"] > 0
    # The finalist that is the most accurate on the validation images is kept.
    folders = [run / "training" / name for name in ("most_accurate", "most_accurate_2")]
    ends = [(folder / "metrics.jsonl").read_text().splitlines()[-1] for folder in folders]
    images, labels = DIGITS.validation.images, DIGITS.validation.labels
    accuracy = (network.logits(images).argmax(1) == labels).mean()
    assert accuracy == pytest.approx(max(json.loads(end)["validation_accuracy"] for end in ends))
    # Random search goes on from the same first population.
    own, random = ([json.loads(line) for line in (run / place / "metrics.jsonl").open()]
                   for place in (".", "random_search"))  # fmt: skip
    assert [line["generation"] for line in own] == [*range(1, 7)]
    assert [line["generation"] for line in random] == [5, 6]
    assert random[0]["population_parameters"] == own[4]["population_parameters"]
    page = (run / "report.html").read_text()
    assert "like ResNet" in page
    assert "made by hand" in page


def test_networks_by_hand_are_as_large_as_they_may_be():
    for parameters in (3000, 40_000, 1_000_000):
        units = de_nas.hand_made(parameters, (28, 28, 1), 10)
        network = SequenceNetwork(10, units, normalization="batch", head="linear")
        shapes = jax.eval_shape(network.init, jax.random.key(0), jnp.zeros((1, 28, 28, 1)))
        size = sum(leaf.size for leaf in jax.tree.leaves(shapes["params"]))
        assert 0.75 * parameters < size <= parameters
        assert [unit.kind for unit in units].count("max") == 3


def test_a_search_with_a_surrogate_is_one_of_its_space(data):
    config = replace(CONFIG, method="surrogate", space=replace(SPACE, filter_step=2))
    _, state, lines = search(config, data)
    assert len(lines) == config.num_candidates
    genomes = jax.device_get(state.genomes)
    assert not (genomes.filters % 2).any()
    assert (genomes.kinds[:, 0] == architectures.CONVOLUTION).all()
    names = {b"".join(row.tobytes() for row in genome) for genome in zip(*genomes, strict=True)}
    assert len(names) >= config.num_candidates - 1  # children are new ones


@pytest.mark.parametrize(
    ("file", "lines"),
    [("metrics.jsonl", 2), ("metrics.jsonl", 6), ("training/most_accurate/metrics.jsonl", 1)],
    ids=["first population", "children", "final training"],
)
def test_killed_and_resumed_it_ends_with_the_same_architecture(
    finished, run_until_killed, tmp_path, file, lines
):
    arguments = [*RUN, "--runs-dir", str(tmp_path)]
    run_until_killed(arguments, tmp_path / "run" / file, lines)
    assert not (tmp_path / "run/summary.json").exists()
    assert main([*arguments, "--resume"]) == 0
    for name in DETERMINISTIC:
        assert (tmp_path / "run" / name).read_bytes() == (finished / name).read_bytes(), name


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--max-filters", "4"], "--max-first-filters must be <= --max-filters = 4, got 12"),
        (["--kernels", "2"], "kernels must be odd and >= 1, got 2"),
        (["--error-weight", "-1"], "--error-weight must be >= 0, got -1.0"),
        (["--max-features", "60"], "--max-features must be >= 64 for images of (8, 8, 1)"),
        (["--max-filters", "32", "--max-features", "100"], "--max-features must be >= 128"),
        (["--rungs", "5", "2"], "rungs must rise within 1..9, below the 10 epochs, got (5, 2)"),
        (["--method", "evosax", "--strategy", "DifferentialEvolutio"], "(did you mean"),
        (["--num-images", "9999"], "9999"),
        (["--network", "ConvNet"], "--network"),
    ],
)
def test_wrong_input_is_one_line_and_exit_code_2(arguments, says, tmp_path, capsys):
    assert main(["de-nas", "--runs-dir", str(tmp_path / "runs"), *arguments]) == 2
    said = capsys.readouterr().err.strip().splitlines()
    assert len(said) == 1
    assert says in said[0]
    assert not (tmp_path / "runs").exists()


def test_a_file_that_describes_no_network_is_refused(finished, tmp_path):
    (tmp_path / "architecture.json").write_text('{"units": []}')
    with pytest.raises(ValueError, match="does not describe a searched network"):
        searched.load(tmp_path)
