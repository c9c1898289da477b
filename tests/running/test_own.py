"""What users bring: networks and fitness functions by import path, evosax problems, exports."""

from __future__ import annotations

import csv
import itertools
import json
import re
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
from evosax.algorithms import SNES
from PIL import Image

from evojax_suite import (
    NetworkConfig,
    TrainingConfig,
    cest,
    ecomp,
    exports,
    from_arrays,
    ga_distillation,
    load,
    networks,
)
from evojax_suite.cli.main import main
from evojax_suite.data import denormalize, normalize
from evojax_suite.distilled import LITERATURE, DistilledDataset
from evojax_suite.problems import CompressionProblem, DistillationProblem, SubsetProblem
from evojax_suite.systems.ecomp import compression, feed_forward
from evojax_suite.systems.ecomp.feed_forward import Layer
from evojax_suite.training import evaluate, make_batches

OWN = """
import flax.linen as nn
import jax.numpy as jnp

class Tiny(nn.Module):
    num_classes: int
    dropout: float = 0.5

    @nn.compact
    def __call__(self, images, train=False):
        flat = nn.Dense(16)(images.reshape(len(images), -1))
        flat = nn.BatchNorm(use_running_average=not train)(flat)
        flat = nn.Dropout(self.dropout, deterministic=not train)(nn.relu(flat))
        return nn.Dense(self.num_classes)(flat)

class WithoutTrain(nn.Module):
    num_classes: int

    @nn.compact
    def __call__(self, images):
        return nn.Dense(self.num_classes)(images.reshape(len(images), -1))

class Wrong(Tiny):
    @nn.compact
    def __call__(self, images, train=False):
        return nn.Dense(3)(images.reshape(len(images), -1))

class Fails(Tiny):
    @nn.compact
    def __call__(self, images, train=False):
        return images @ jnp.ones((3, 3))

class Typo(Tiny):
    @nn.compact
    def __call__(self, images, train=False):
        return nn.Dense(self.num_classes)(images.reshap(len(images), -1))

class FailsInTraining(Tiny):
    @nn.compact
    def __call__(self, images, train=False):
        flat = images.reshape(len(images), -1)
        return nn.Dense(self.num_classes)(flat @ jnp.ones((3, 3)) if train else flat)

class HiddenDropout(nn.Module):
    num_classes: int

    @nn.compact
    def __call__(self, images, train=False):
        flat = nn.Dropout(0.5, deterministic=not train)(images.reshape(len(images), -1))
        return nn.Dense(self.num_classes)(flat)

class NoClasses(nn.Module):
    pass

def margin(logits, labels):
    own = jnp.take_along_axis(logits, labels[:, None], 1)[:, 0]
    return jnp.tanh(own - logits.mean(1))

def weighted(logits, labels):
    return (jnp.arange(10.0) * logits).sum(-1)

def one_number(logits, labels):
    return logits.mean()

def fails(logits):
    return logits

def nearest(images, labels, real_images, real_labels):
    own, real = (each.reshape(len(each), -1) for each in (images, real_images))
    apart = ((own[None] - real[:, None]) ** 2).sum(-1)
    return (labels.argmax(1)[apart.argmin(1)] == real_labels).mean()

def of_each(images, labels, real_images, real_labels):
    return images

number = 3
"""


@pytest.fixture
def own(tmp_path, monkeypatch):
    (tmp_path / "own_parts.py").write_text(OWN)
    (tmp_path / "no_python.py").write_text("def broken(:\n")
    (tmp_path / "undefined.py").write_text("print(nothing)\n")
    monkeypatch.syspath_prepend(tmp_path)


@pytest.fixture(scope="module")
def digits():
    return load("digits")


@pytest.fixture(scope="module")
def small():
    rng = np.random.default_rng(0)
    return DistilledDataset(
        images=rng.normal(0.1, 2.0, (6, 5, 4, 1)).astype(np.float32),
        labels=rng.dirichlet(np.ones(3), 6).astype(np.float32),
        dataset="mine",
        class_names=("cat", "dög", "a cow"),
        mean=(0.5,),
        std=(0.25,),
        network=NetworkConfig(width=4),
        training=LITERATURE,
        seed=1,
    )


GA = ga_distillation.Config(
    population_size=3,
    network=NetworkConfig(network="MLP", width=4),
    training=TrainingConfig(num_epochs=2),
)


def test_a_network_of_ones_own_through_a_whole_run(own, tmp_path, capsys):
    run = ["ga-distillation", "--network", "own_parts:Tiny", "--population-size", "3",
           "--num-epochs", "2", "--generations", "2", "--num-networks", "2",
           "--strong-random-repeats", "0", "--runs-dir", str(tmp_path)]  # fmt: skip
    assert main(run) == 0
    folder = tmp_path / "ga_distillation-digits-seed0"
    data = DistilledDataset.load(folder / "distilled.npz")
    assert data.network.network == "own_parts:Tiny"
    capsys.readouterr()
    path = str(folder / "distilled.npz")
    assert main(["evaluate", path, "--network", "own_parts:Tiny", "--num-networks", "2"]) == 0
    assert "own_parts:Tiny" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("path", "says"),
    [
        ("Tiny", "network must be one of ConvNet, "),
        ("no_such_module:Tiny", "'no_such_module:Tiny' cannot be imported: No module named"),
        ("own_parts:Nothing", "cannot be imported"),
        ("own_parts:number", "must be a class of flax.linen modules, got 3"),
        ("own_parts:margin", "must be a class of flax.linen modules"),
        ("own_parts:NoClasses", "must have a field num_classes"),
        ("own_parts:WithoutTrain", "must take train"),
        ("own_parts:Wrong", r"must give logits \(N, 10\) .* got \(1, 3\)"),
        ("own_parts:Fails", r"does not fit images of \(8, 8, 1\)"),
        ("own_parts:Typo", "does not fit images .* no attribute reshap"),
        ("own_parts:FailsInTraining", r"does not fit images of \(8, 8, 1\)"),
        ("own_parts:HiddenDropout", "does not fit images .*dropout"),
        ("no_python:Tiny", "'no_python:Tiny' cannot be imported: invalid syntax"),
        ("undefined:Tiny", "cannot be imported: name 'nothing' is not defined"),
        (":", "cannot be imported"),
    ],
)
def test_what_is_no_network_is_one_line(own, path, says):
    with pytest.raises(ValueError, match=says) as caught:
        networks.create(NetworkConfig(network=path), 10, (8, 8, 1))
    assert "\n" not in str(caught.value)


def test_a_fitness_of_ones_own_is_the_mean_of_its_scores(own, digits):
    import own_parts

    config = replace(GA, fitness="own_parts:margin", fitness_subset_size=50)
    data = ga_distillation.make_data(digits)
    key = jax.random.key(3)
    population = ga_distillation.random_individuals(key, config, 10, data, 3)
    scores = ga_distillation.score_population(key, config, 10, (8, 8, 1), population, data)
    accuracy = ga_distillation.score_population(
        key, replace(config, fitness="accuracy"), 10, (8, 8, 1), population, data
    )
    np.testing.assert_allclose(scores.accuracy, accuracy.fitness)
    assert np.all(np.abs(scores.fitness) <= 1)

    network = networks.create(config.network, 10, (8, 8, 1))
    variables = network.init(key, jnp.zeros((1, 8, 8, 1)))
    images, labels = digits.test.images[:23] / 255, digits.test.labels[:23]
    found = evaluate(network, variables, make_batches(images, labels, 10), own_parts.margin)
    expected = own_parts.margin(network.apply(variables, images), labels).mean()
    np.testing.assert_allclose(found.score, expected, rtol=1e-5)


def test_a_judge_of_ones_own_sees_images_and_needs_no_gradient(own, digits, capsys, tmp_path):
    import own_parts

    config = replace(GA, fitness="own_parts:nearest", holdout_ratio=0.25, levels=4)
    data = ga_distillation.make_data(digits)
    key = jax.random.key(3)
    population = ga_distillation.random_individuals(key, config, 10, data, 3)
    found = ga_distillation.score_population(key, config, 10, (8, 8, 1), population, data)
    sizes = [round(part * len(digits.validation)) for part in (0.75, 0.25)]
    for scores, size in zip((found.fitness, found.holdout), sizes, strict=True):
        correct = np.asarray(scores) * size
        np.testing.assert_allclose(correct, correct.round(), atol=1e-3)  # fractions of each part
        assert np.all((scores > 0.3) & (scores < 0.9))
    one = ga_distillation.decode(config, 10, (8, 8, 1), population[1], data)
    real = normalize(digits.validation.images, digits.mean, digits.std)
    all_of_one = own_parts.nearest(*map(np.asarray, one), real, digits.validation.labels)
    parts = np.array([found.fitness[1], found.holdout[1]]) @ sizes / sum(sizes)
    assert float(all_of_one) == pytest.approx(parts, abs=1e-5)

    run = ["ga-distillation", "--dataset", "digits", "--fitness", "own_parts:nearest"]
    run += ["--population-size", "4", "--generations", "3", "--strong-random-repeats", "0"]
    run += ["--num-networks", "1", "--num-epochs", "1", "--network", "MLP", "--width", "4"]
    assert main([*run, "--runs-dir", str(tmp_path), "--name", "judged"]) == 0
    summary = json.loads((tmp_path / "judged" / "summary.json").read_text())
    assert 0.3 < summary["test_score"] < 0.9
    assert "nan" not in capsys.readouterr().out


def test_a_fitness_may_know_how_many_classes_there_are(own):
    config = replace(GA, fitness="own_parts:weighted")
    ga_distillation.build(config, 10, (8, 8, 1))
    with pytest.raises(ValueError, match="must take logits"):
        ga_distillation.build(config, 3, (8, 8, 1))


@pytest.mark.parametrize(
    ("path", "says"),
    [
        (
            "fast",
            "fitness must be one of accuracy, cross_entropy, kernel_regression, or "
            "package.module:function",
        ),
        ("own_parts:nothing", "cannot be imported"),
        ("own_parts:one_number", r"must give \(n,\) numbers, got \(\)"),
        ("own_parts:fails", "must take logits"),
        ("own_parts:number", "must take logits"),
        ("own_parts:of_each", r"must give a number for images \(n, H, W, C\)"),
    ],
)
def test_what_is_no_fitness_is_one_line(own, path, says):
    with pytest.raises(ValueError, match=says) as caught:
        ga_distillation.build(replace(GA, fitness=path), 10, (8, 8, 1))
    assert "\n" not in str(caught.value)


def search(problem, num_generations, population_size=8, std=0.3):
    key_sample, key = jax.random.split(jax.random.key(0))
    strategy = SNES(population_size=population_size, solution=problem.sample(key_sample))
    params = strategy.default_params.replace(std_init=std)
    state = strategy.init(key, problem.sample(key_sample), params)
    problem_state, best = problem.init(key), []
    for generation in range(num_generations):
        key_ask, key_eval, key_tell = jax.random.split(jax.random.fold_in(key, generation), 3)
        solutions, state = strategy.ask(key_ask, state, params)
        fitness, problem_state, _ = problem.eval(key_eval, solutions, problem_state)
        state, _ = strategy.tell(key_tell, solutions, fitness, state, params)
        best.append(float(fitness.mean()))
    assert int(problem_state.counter) == num_generations
    return best


def test_distillation_is_a_problem_of_evosax(digits):
    problem = DistillationProblem(digits, GA)
    assert problem.num_dims == 10 * 64
    key = jax.random.key(1)
    solutions = jnp.stack([problem.sample(k) for k in jax.random.split(key, 3)])
    fitness, state, _ = problem.eval(key, solutions, problem.init(key))
    data = ga_distillation.make_data(digits)
    expected = ga_distillation.score_population(key, GA, 10, (8, 8, 1), solutions, data).fitness
    np.testing.assert_allclose(fitness, -expected)
    assert int(state.counter) == 1
    assert problem.decode(solutions[0]).images.shape == (10, 8, 8, 1)
    assert len(search(problem, 2, 3)) == 2
    with pytest.raises(ValueError, match="images_per_class is 1000"):
        DistillationProblem(digits, replace(GA, images_per_class=1000))


def parent(rng, sizes=(64, 12, 9, 10)):
    return tuple(
        Layer(
            rng.normal(0, before**-0.5, (after, before)).astype(np.float32),
            rng.normal(0, 0.1, after).astype(np.float32),
        )
        for before, after in itertools.pairwise(sizes)
    )


def test_a_parent_that_takes_normalised_images_is_compressed_on_them(digits):
    network = parent(np.random.default_rng(0))
    config = ecomp.Config(batch_size=40, balanced=False)
    images, labels = digits.train.images[:40], digits.train.labels[:40]
    shared = (labels, (12, 9), config)
    mean, std = np.array(digits.mean), np.array(digits.std)
    normalized = CompressionProblem(network, images, *shared, mean=mean, std=std)
    by_hand = (images / np.float32(255) - mean) / std
    np.testing.assert_allclose(
        normalized.data.images, by_hand.reshape(40, -1), rtol=1e-5, atol=1e-6
    )


def test_compression_is_a_problem_of_evosax(digits):
    network = parent(np.random.default_rng(0))
    config = ecomp.Config(batch_size=40, balanced=False)
    images, labels = digits.train.images[:100], digits.train.labels[:100]
    whole = CompressionProblem(network, images, labels, (12, 9), config, deviation=0.0)
    key = jax.random.key(0)
    alone = jax.tree.map(lambda leaf: leaf[None], whole.sample(key))
    jax.tree.map(np.testing.assert_array_equal, whole.sample(key), network)
    state, accuracies = whole.init(key), []
    for batch in range(3):  # the parent is like itself: no loss, nothing gained by size
        fitness, state, _ = whole.eval(key, alone, state)
        chosen = slice(40 * (batch % 2), 40 * (batch % 2) + 40)
        flat = jnp.asarray(images[chosen].reshape(40, -1) / np.float32(255))
        logits = feed_forward.forward(network, flat)[-1]
        accuracies.append(float((logits.argmax(-1) == labels[chosen]).mean()))
        assert float(-fitness[0]) == pytest.approx(accuracies[-1], abs=2e-4)

    problem = CompressionProblem(network, images, labels, (7, 5), config)
    sample = problem.sample(key)
    assert feed_forward.hidden_sizes(sample) == (7, 5)
    importance = tuple(np.abs(layer.weight).sum(1) for layer in network[:-1])
    pruned = compression.pruned(
        jax.tree.map(jnp.asarray, network),
        tuple(map(jnp.asarray, importance)),
        jnp.array([[7, 5]]),
        (7, 5),
    )
    expected = compression.trimmed(compression.member(pruned, 0), np.array([7, 5]))
    exact = CompressionProblem(network, images, labels, (7, 5), config, deviation=0.0).sample(key)
    for own, other in zip(exact, expected, strict=True):  # units may stand in another order
        np.testing.assert_allclose(np.sort(own.bias), np.sort(other.bias), rtol=1e-6)
    found = search(problem, 30, 16, 0.05)
    assert np.mean(found[-5:]) < np.mean(found[:5])
    with pytest.raises(ValueError, match=r"hidden_units must be 2 numbers in 1..\(12, 9\), got"):
        CompressionProblem(network, images, labels, (13, 9), config)
    with pytest.raises(ValueError, match="at least batch_size 40, got 10"):
        CompressionProblem(network, images[:10], labels[:10], (3, 3), config)


@pytest.mark.parametrize("balanced", [False, True])
def test_the_hardest_subset_is_a_problem_of_evosax(digits, balanced):
    config = cest.Config(balanced=balanced, fraction=0.25)
    network = networks.create(NetworkConfig(network="MLP", width=4), 10, (8, 8, 1))
    variables = network.init(jax.random.key(0), jnp.zeros((1, 8, 8, 1)))
    problem = SubsetProblem(network, variables, digits, config)
    key = jax.random.key(1)
    difficulty = np.asarray(problem.data.difficulty)
    solutions = jnp.stack([problem.sample(key), problem.data.difficulty])
    fitness, _, _ = problem.eval(key, solutions, problem.init(key))
    subset = np.asarray(problem.decode(solutions[0]))
    assert len(set(subset.tolist())) == len(subset) == round(0.25 * len(difficulty))
    assert float(-fitness[0]) == pytest.approx(difficulty[subset].mean(), rel=1e-5)
    labels = digits.train.labels
    if balanced:
        counts = np.bincount(labels[subset])
        assert counts.max() - counts.min() <= 1
        hardest = [np.sort(difficulty[labels == c])[::-1][:n] for c, n in enumerate(counts)]
    else:
        hardest = [np.sort(difficulty)[::-1][: len(subset)]]
    assert float(-fitness[1]) == pytest.approx(np.concatenate(hardest).mean(), rel=1e-5)
    found = search(problem, 40, 32)
    assert np.mean(found[-5:]) < np.mean(found[:5])


def test_tensors_for_pytorch(small, tmp_path):
    exports.save_safetensors(tmp_path / "set.safetensors", small)
    arrays = safetensors.numpy.load_file(tmp_path / "set.safetensors")
    np.testing.assert_array_equal(arrays["images"], small.images.transpose(0, 3, 1, 2))
    np.testing.assert_array_equal(arrays["labels"], small.labels)
    np.testing.assert_array_equal(arrays["mean"], np.float32([0.5]))
    with safetensors.safe_open(tmp_path / "set.safetensors", "np") as file:
        recipe = json.loads(file.metadata()["recipe"])
    assert recipe["class_names"] == ["cat", "dög", "a cow"]
    assert recipe["network"]["width"] == 4


def test_images_in_class_folders_come_back(small, tmp_path):
    cut = exports.save_image_folder(tmp_path / "set", small)
    pixels = denormalize(small.images, small.mean, small.std)
    outside = (pixels < -0.5 / 255) | (pixels > 1 + 0.5 / 255)
    assert cut == pytest.approx(outside.mean())
    with (tmp_path / "set/labels.csv").open(encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 6
    for row, image, label in zip(rows, pixels, small.labels, strict=True):
        assert row["file_name"].split("/")[1] == small.class_names[label.argmax()]
        shown = np.asarray(Image.open(tmp_path / "set" / row["file_name"])) / 255
        assert np.abs(shown - np.clip(image[..., 0], 0, 1)).max() <= 0.5001 / 255
        probabilities = [float(row[name]) for name in small.class_names]
        np.testing.assert_allclose(probabilities, label, rtol=1e-6)


def test_what_a_killed_export_left_is_no_part_of_the_next(small, tmp_path):
    left = tmp_path / ".set.partial/train/old/9.png"
    left.parent.mkdir(parents=True)
    left.write_bytes(b"")
    exports.save_image_folder(tmp_path / "set", small)
    assert not [*(tmp_path / "set").rglob("old")]


def test_an_image_folder_is_a_dataset_again(tmp_path):
    images = np.random.default_rng(0).normal(0, 0.5, (12, 6, 6, 3)).astype(np.float32)
    data = DistilledDataset(
        images, np.eye(3, dtype=np.float32)[np.arange(12) % 3], "mine", ("a", "b", "c"),
        (0.5,) * 3, (0.2,) * 3, NetworkConfig(), LITERATURE, 0,
    )  # fmt: skip
    exports.save_image_folder(tmp_path / "set", data)
    again = load(tmp_path / "set")
    assert again.class_names == ("a", "b", "c")
    assert sum(map(len, (again.train, again.validation, again.test))) == 12


def test_export_by_command(small, tmp_path, capsys):
    small.save(tmp_path / "set.npz")
    path = str(tmp_path / "set.npz")
    assert main(["export", path, str(tmp_path / "new/set.safetensors")]) == 0
    assert main(["export", path, str(tmp_path / "folder"), "--format", "image_folder"]) == 0
    assert "% of the pixels lay beyond" in capsys.readouterr().out
    for output, kind in (("new/set.safetensors", "safetensors"), ("folder", "image_folder")):
        assert main(["export", path, str(tmp_path / output), "--format", kind]) == 2
        assert "exists" in capsys.readouterr().err
    bad = replace(small, class_names=("cat", "a/b", "c"))
    bad.save(tmp_path / "bad.npz")
    arguments = ["export", str(tmp_path / "bad.npz"), str(tmp_path / "x")]
    assert main([*arguments, "--format", "image_folder"]) == 2
    assert "class 'a/b' cannot be the name of a folder" in capsys.readouterr().err
    assert not (tmp_path / "x").exists()


def test_arrays_are_a_dataset():
    rng = np.random.default_rng(0)
    images, labels = rng.integers(0, 256, (50, 6, 7), np.uint8), np.arange(50) % 2
    dataset = from_arrays((images, labels), class_names=("cat", "dog"), name="pets")
    assert dataset.image_shape == (6, 7, 1)
    assert (len(dataset.train), len(dataset.validation), len(dataset.test)) == (32, 8, 10)
    assert dataset.class_names == ("cat", "dog")
    held = from_arrays((images[:30], labels[:30]), test=(images[30:], labels[30:]))
    np.testing.assert_array_equal(held.test.images[..., 0], images[30:])
    assert held.class_names == ("0", "1")
    assert abs(held.mean[0] - held.train.images.mean() / 255) < 1e-4


@pytest.mark.parametrize(
    ("images", "labels", "says"),
    [
        (np.zeros((4, 6)), np.arange(4), "mine (train): images have shape (4, 6)"),
        (np.zeros((4, 6, 6), int), np.arange(4), "images have type int64"),
        (np.full((4, 6, 6), np.nan), np.arange(4), "contain NaN"),
        (np.full((4, 6, 6), 2.0), np.arange(4), "lie in [2, 2]"),
        (np.zeros((4, 6, 6)), np.arange(4) / 2, "type float64"),
        (np.zeros((4, 6, 6)), np.arange(3), "4 images but 3 labels"),
        (np.zeros((4, 6, 6)), np.array([0, 1, 3, 3]), "label 3 is out of range"),
        (np.zeros((4, 6, 6)), np.array([0, -1, 0, 0]), "label -1 is out of range"),
        (np.zeros((0, 6, 6)), np.zeros(0, int), "the part has no images"),
    ],
)
def test_what_is_no_dataset_is_one_line(images, labels, says):
    with pytest.raises(ValueError, match=re.escape(says)) as caught:
        from_arrays((images, labels), name="mine")
    assert "\n" not in str(caught.value)
