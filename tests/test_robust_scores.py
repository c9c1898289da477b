"""DD-Ranking's scores: the formulas, and what `evaluate --robust-scores` trains and says."""

from __future__ import annotations

import dataclasses
import json
import math

import jax
import numpy as np
import pytest

from evojax_suite import EngineConfig, NetworkConfig, TrainingConfig, load
from evojax_suite.cli.main import main
from evojax_suite.data import normalize
from evojax_suite.distilled import DistilledDataset, accuracies_on
from evojax_suite.robust_scores import (
    Judged,
    augmentation_robust_score,
    label_robust_score,
    normalized,
    scores,
)
from evojax_suite.running import robust

SOFT_SET = Judged(
    real_hard=0.9,
    set_hard=np.array([0.5, 0.6]),
    set_own=np.array([0.7, 0.8]),
    random_own=np.array([0.4, 0.6]),
    set_augmented=np.array([0.75, 0.8]),
    random_augmented=np.array([0.45, 0.7]),
    set_plain=np.array([0.6, 0.7]),
    random_plain=np.array([0.5, 0.3]),
)
SPAN = math.e - 1 / math.e


def test_scores_are_those_computed_by_hand():
    found = scores(SOFT_SET)
    assert list(found) == ["HLR", "IOR", "LRS", "ARS"]
    np.testing.assert_allclose(found["HLR"], [0.4, 0.3])
    np.testing.assert_allclose(found["IOR"], [0.3, 0.2])
    # Half of 0.3 - 0.4 and of 0.2 - 0.3; half of 0.3 + 0.1 and of 0.1 + 0.4.
    lrs = (math.exp(-0.05) - 1 / math.e) / SPAN
    ars = [(math.exp(x) - 1 / math.e) / SPAN for x in (0.2, 0.25)]
    np.testing.assert_allclose(found["LRS"], [lrs, lrs])
    np.testing.assert_allclose(found["ARS"], ars)
    np.testing.assert_allclose([lrs, *ars], [0.248192, 0.363139, 0.389783], atol=1e-6)


def test_weights_move_a_score_from_one_part_to_the_other():
    np.testing.assert_allclose(label_robust_score(SOFT_SET, 1), normalized(np.array([0.3, 0.2])))
    np.testing.assert_allclose(label_robust_score(SOFT_SET, 0), normalized(np.array([-0.4, -0.3])))
    only = augmentation_robust_score(SOFT_SET, 0)
    np.testing.assert_allclose(only, normalized(np.array([0.1, 0.4])))


def test_the_scores_end_at_zero_and_one():
    best = Judged(0, 1, 1, 0, 1, 0, 1, 0)
    worst = Judged(1, 0, 0, 1, 0, 1, 0, 1)
    assert label_robust_score(best) == pytest.approx(1)
    assert augmentation_robust_score(best) == pytest.approx(1)
    assert label_robust_score(worst) == pytest.approx(0)
    assert augmentation_robust_score(worst) == pytest.approx(0)


def saved(path, labels, **training) -> DistilledDataset:
    """A real image a class of digits as a distilled set."""
    digits = load("digits")
    first = [np.flatnonzero(digits.train.labels == label)[0] for label in range(10)]
    data = DistilledDataset(
        images=normalize(digits.train.images[first], digits.mean, digits.std),
        labels=labels.astype(np.float32),
        dataset="digits",
        class_names=digits.class_names,
        mean=digits.mean,
        std=digits.std,
        network=NetworkConfig("MLP", width=16),
        training=TrainingConfig(num_epochs=30, learning_rate=0.01, **training),
        seed=0,
    )
    data.save(path)
    return data


@pytest.fixture
def trained(monkeypatch) -> list:
    """What networks are trained on: (images, labels, augmented) of each set."""
    found = []

    def on_test(split, key, images, labels, dataset, network, training, *more):
        found.append((np.asarray(images), np.asarray(labels), bool(training.shift_pixels)))
        return accuracies_on(split, key, images, labels, dataset, network, training, *more)

    monkeypatch.setattr("evojax_suite.distilled.accuracies_on", on_test)
    return found


def judge(path, output, *more) -> dict:
    arguments = ["--robust-scores", "--num-networks", "3", "--output", str(output), *more]
    assert main(["evaluate", str(path), *arguments]) == 0
    return json.loads(output.read_text())


def test_hard_labels_need_no_network_on_the_whole_set(tmp_path, trained, capsys):
    saved(tmp_path / "a.npz", np.eye(10), shift_pixels=1)
    found = judge(tmp_path / "a.npz", tmp_path / "a.json", "--full-accuracy", "0.98")
    said = capsys.readouterr()
    own = found["robust"]["MLP"]
    assert own["augmentation"] == "shift_pixels 1"
    assert own["full_training"] is None
    accuracies = own["accuracies"]
    assert accuracies["real_hard"] == 0.98
    assert accuracies["set_hard"] == accuracies["set_own"] == accuracies["set_augmented"]
    assert accuracies["random_own"] == accuracies["random_augmented"]
    assert found["test_accuracies"]["MLP"] == accuracies["set_own"]
    # Four trainings and no more: the set and random images, with augmentation and without.
    assert [(images.ndim, augmented) for images, _, augmented in trained] == [
        (4, True), (5, True), (4, False), (5, False),
    ]  # fmt: skip
    images, labels, _ = trained[1]
    assert images.shape == (3, 10, 8, 8, 1)
    np.testing.assert_array_equal(labels.sum(1), 1)  # of each set: an image a class
    assert len({one.tobytes() for one in images}) == 3
    judged = Judged(
        **{name: np.array(value) if name != "real_hard" else value
           for name, value in accuracies.items()}
    )  # fmt: skip
    for name, values in scores(judged).items():
        np.testing.assert_allclose(own["scores"][name], values, atol=1e-6)
        assert f"  {name}: {100 * np.mean(values):.2f} ± " in said.out
    for row in ("real set, hard labels: 98.00 %", "random images, augmentation shift_pixels 1: "):
        assert row in said.out
    assert "training on all" not in said.err


def test_images_that_hold_four_each_are_compared_with_as_many_as_are_stored(tmp_path, trained):
    data = saved(tmp_path / "a.npz", np.eye(10))
    dataclasses.replace(data, factor=2).save(tmp_path / "a.npz")
    judge(tmp_path / "a.npz", tmp_path / "a.json", "--full-accuracy", "0.98")
    assert [images.shape[-4] for images, _, _ in trained] == [40, 10, 40, 10]


def test_soft_labels_are_compared_with_those_of_a_teacher(tmp_path, trained, capsys):
    soft = 0.8 * np.eye(10) + 0.02
    data = saved(tmp_path / "a.npz", soft)
    found = judge(tmp_path / "a.npz", tmp_path / "a.json", "--full-epochs", "40")
    assert "training on all 40/40" in capsys.readouterr().err
    own = found["robust"]["MLP"]
    assert own["full_training"]["num_epochs"] == 40
    assert own["full_training"]["batch_size"] == 512
    assert 0.2 < own["accuracies"]["real_hard"] < 1
    assert own["augmentation"].startswith("siamese")
    assert "flip" not in own["augmentation"]  # digits
    assert own["accuracies"]["set_own"] == own["accuracies"]["set_plain"]
    assert own["accuracies"]["set_own"] != own["accuracies"]["set_augmented"]
    kinds = {labels.tobytes(): labels for _, labels, _ in trained}
    assert len(kinds) == 3  # the set's, the teacher's, and the hard ones of the set
    assert any(np.array_equal(labels, np.eye(10)) for labels in kinds.values())
    assert any(np.array_equal(labels, data.labels) for labels in kinds.values())
    (teacher,) = [labels for labels in kinds.values() if labels.ndim == 3]
    np.testing.assert_allclose(teacher.sum(-1), 1, atol=1e-5)
    assert 0.1 < teacher.max() < 1
    # Taken as hard, the same file needs none.
    found = judge(
        tmp_path / "a.npz", tmp_path / "a.json", "--labels", "hard", "--full-accuracy", "1"
    )
    assert found["robust"]["MLP"]["full_training"] is None


def test_a_network_learns_the_whole_set():
    digits = load("digits")
    network, training = NetworkConfig("MLP", width=64), robust.on_all(80)
    assert (training.optimizer, training.schedule, training.l2_penalty) == ("sgd", "step", 5e-4)
    accuracies = [
        robust.train_on_all(jax.random.key(0), digits, network, epochs, EngineConfig()).accuracy
        for epochs in (1, 80)
    ]
    assert accuracies[0] < 0.5
    assert accuracies[1] > 0.8


def test_each_network_may_have_its_own_set():
    digits = load("digits")
    images = normalize(digits.train.images[:60], digits.mean, digits.std).reshape(3, 20, 8, 8, 1)
    labels = np.eye(10, dtype=np.float32)[digits.train.labels[:60]].reshape(3, 20, 10)
    network, training = NetworkConfig("MLP", width=8), TrainingConfig(num_epochs=20)
    key = jax.random.key(0)
    shared = digits, network, training, 3
    together = accuracies_on(digits.test, key, images, labels, *shared)
    alone = [accuracies_on(digits.test, key, images[i], labels[i], *shared)[i] for i in range(3)]
    np.testing.assert_allclose(together, alone, atol=1e-6)


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--full-accuracy", "0.99"], "--full-accuracy needs --robust-scores, got 0.99"),
        (["--full-epochs", "3"], "--full-epochs needs --robust-scores, got 3"),
        (
            ["--robust-scores", "--full-accuracy", "99"],
            "--full-accuracy must be in [0, 1], got 99.0",
        ),
        (
            ["--robust-scores", "--full-accuracy", "nan"],
            "--full-accuracy must be in [0, 1], got nan",
        ),
        (["--robust-scores", "--full-epochs", "0"], "--full-epochs must be >= 1, got 0"),
        (
            ["--robust-scores", "--full-accuracy", "0.9", "--network", "MLP", "ConvNet"],
            "--full-accuracy is of one network, got MLP, ConvNet",
        ),
    ],
)
def test_wrong_input_is_one_line_and_exit_code_2(arguments, says, tmp_path, trained, capsys):
    saved(tmp_path / "a.npz", np.eye(10))
    assert main(["evaluate", str(tmp_path / "a.npz"), *arguments]) == 2
    said = capsys.readouterr().err.strip().splitlines()
    assert len(said) == 1
    assert says in said[0]
    assert not trained


def test_more_images_than_there_are_is_one_line(tmp_path, trained, capsys):
    digits = load("digits")
    np.savez(
        tmp_path / "a.npz", images=np.zeros((1500, 8, 8, 1), np.uint8), labels=np.arange(1500) % 10
    )
    arguments = ["--dataset", "digits", "--robust-scores"]
    assert main(["evaluate", str(tmp_path / "a.npz"), *arguments]) == 2
    most = len(digits.train) + len(digits.validation)
    assert f"as the set has, 1500, of {most}" in capsys.readouterr().err
    assert not trained
