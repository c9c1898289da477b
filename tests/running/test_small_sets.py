"""`devs`, `coreset` and `evaluate` on the command line: artefacts, resume, protocols, errors."""

from __future__ import annotations

import json
from typing import get_args

import jax
import numpy as np
import pytest
from scipy.special import softmax

from evojax_suite import NetworkConfig, TrainingConfig, load, networks, proxy_network
from evojax_suite.cli.main import main
from evojax_suite.data import with_whole_training_set
from evojax_suite.distilled import DistilledDataset
from evojax_suite.runtime.checkpoint import Checkpoints
from evojax_suite.systems.coresets import experiment as coreset
from evojax_suite.types import training_data

NETWORK = ["--width", "4", "--depth", "1", "--num-epochs", "2", "--num-networks", "2"]
DEVS = [
    "devs", "--num-images", "150", "--target-sizes", "30", "10", "--feature-epochs", "4",
    "--reduction-factor", "2",
    "--min-training-steps", "250", "--batch-size", "16", "--clustering", "sklearn",
    "--checkpoint-seconds", "0", "--name", "run", *NETWORK,
]  # fmt: skip
CORESET = ["coreset", "--num-images", "150", "--probe-epochs", "3", "--name", "run", *NETWORK]
TEACHER = [
    "coreset", "--num-images", "300", "--name", "run", "--width", "8", "--depth", "2",
    "--batch-size", "16", "--learning-rate", "0.05", "--num-epochs", "1", "--num-networks", "1",
    "--probe-epochs", "8", "--num-samples", "30", "--checkpoint-seconds", "0",
]  # fmt: skip
CONDENSATION = [
    "--condensation-iterations", "2", "--dc.real-batch-size", "8", "--dc.network.width", "4",
    "--dc.network.depth", "1", "--dc.outer-loops", "2", "--dc.inner-loops", "1",
    "--kernel-iterations", "2", "--kip.network.depth", "1", "--kip.kernel.kernel-width", "4",
]  # fmt: skip
DETERMINISTIC = ("DEvS-30.npz", "DEvS-10.npz", "random-10.npz", "metrics.jsonl")


@pytest.fixture(scope="module")
def reduced(tmp_path_factory):
    runs = tmp_path_factory.mktemp("devs")
    assert main([*DEVS, "--runs-dir", str(runs)]) == 0
    return runs / "run"


def test_devs_leaves_what_its_user_needs(reduced):
    summary = json.loads((reduced / "summary.json").read_text())
    assert summary["system"] == "devs"
    assert summary["num_training_images"] == 150
    assert summary["sizes"] == [88, 51, 30, 17, 10]
    assert {"training", "features", "clustering", "averaging"} == set(summary["stage_seconds"])
    assert sum(summary["stage_seconds"].values()) <= summary["seconds"]
    rows = {(row["method"], row["num_images"]): row for row in summary["results"]}
    assert set(rows) == {(m, n) for m in ("DEvS", "random") for n in (30, 10)}
    for row in summary["results"]:
        assert row["augmentation"] == "shift_pixels 1, mixup_alpha 0.4"
        assert row["num_networks"] == 2
        assert ("flat maps" in row["features"]) == (row["method"] == "DEvS")
        assert row["labels"] == {"DEvS": "own", "random": "hard"}[row["method"]]
    for size in (30, 10):
        data = DistilledDataset.load(reduced / f"DEvS-{size}.npz")
        assert data.images.shape == (size, 8, 8, 1)
        np.testing.assert_allclose(data.labels.sum(1), 1, atol=1e-5)
        assert data.network.initialization == "kaiming"
        assert not data.training.flip  # digits
        assert data.training.shift_pixels == 1
        assert len(data.test_accuracies) == 2
        assert rows["DEvS", size]["test_accuracy_mean"] == pytest.approx(
            np.mean(data.test_accuracies)
        )
        real = DistilledDataset.load(reduced / f"random-{size}.npz")
        np.testing.assert_array_equal(real.labels.sum(0), size // 10)
    with np.load(reduced / "lineage.npz", allow_pickle=False) as lineage:
        digits = load("digits")
        images = np.concatenate([digits.train.images, digits.validation.images])
        assert lineage["assignments_10"].shape == lineage["weights_10"].shape == (150,)
        np.testing.assert_allclose(
            np.bincount(lineage["assignments_10"], lineage["weights_10"]), 1, atol=1e-5
        )
    assert len(images) == 1438
    for figure in ("accuracy.png", "DEvS-10.png", "random-10.png"):
        assert (reduced / "figures" / figure).read_bytes().startswith(b"\x89PNG")
    page = (reduced / "report.html").read_text()
    assert "shrunk by DEvS" in page
    assert page.count('<div class="charts one">') == 1


@pytest.mark.parametrize("lines", [2, 7])
def test_killed_and_resumed_it_ends_with_the_same_bytes(reduced, run_until_killed, tmp_path, lines):
    arguments = [*DEVS, "--runs-dir", str(tmp_path)]
    run_until_killed(arguments, tmp_path / "run/metrics.jsonl", lines)
    assert not (tmp_path / "run/summary.json").exists()
    assert main([*arguments, "--resume"]) == 0
    for name in DETERMINISTIC:
        assert (tmp_path / "run" / name).read_bytes() == (reduced / name).read_bytes(), name


def test_coreset_runs_every_method(tmp_path, capsys):
    methods = list(get_args(coreset.Method))
    arguments = [
        *CORESET, "--runs-dir", str(tmp_path), "--method", *methods, "--num-samples", "20", "10",
        *CONDENSATION,
    ]  # fmt: skip
    assert main(arguments) == 0
    summary = json.loads((tmp_path / "run/summary.json").read_text())
    found = {(row["method"], row["num_images"]) for row in summary["results"]}
    assert found == {(method, size) for method in methods for size in (20, 10)}
    digits = load("digits")
    for row in summary["results"]:
        assert row["labels"] == "hard"
        data = DistilledDataset.load(tmp_path / f"run/{row['method']}-{row['num_images']}.npz")
        np.testing.assert_array_equal(data.labels.sum(0), row["num_images"] // 10)
        if row["indices"] is not None:
            assert len(set(row["indices"])) == row["num_images"]
            assert max(row["indices"]) < 150
            grey = data.images * data.std[0] + data.mean[0]
            known = {image.tobytes() for image in digits.train.images} | {
                image.tobytes() for image in digits.validation.images
            }
            if digits.train.images.dtype == np.uint8:
                grey = np.round(grey * 255).astype(np.uint8)
                assert all(image.tobytes() in known for image in grey)
    capsys.readouterr()
    again = [*arguments, "--resume"]  # every part is there: the same sets come out
    before = (tmp_path / "run/gradient_matching-10.npz").read_bytes()
    assert main(again) == 0
    assert (tmp_path / "run/gradient_matching-10.npz").read_bytes() == before


@pytest.fixture(scope="module")
def taught(tmp_path_factory):
    runs = tmp_path_factory.mktemp("taught")
    methods = ["--method", "random", "herding", "gradient_matching", *CONDENSATION]
    softer = ["--labels", "teacher", "--label-temperature", "2"]
    assert main([*TEACHER, *methods, *softer, "--runs-dir", str(runs)]) == 0
    return runs / "run"


def logits_of_teacher(folder, num_images, num_epochs, data):
    """Logits for the images of `data`, by the network whose training was kept in `folder`."""
    network = networks.create(data.network, 10, (8, 8, 1))
    training = TrainingConfig(num_epochs=num_epochs, optimizer="sgd", l2_penalty=5e-4)
    start = proxy_network.build(proxy_network.Config(data.network, training), 10, (8, 8, 1)).init(
        jax.random.key(9), None, training_data(with_whole_training_set(load("digits"), num_images))
    )
    done, state = Checkpoints(folder / "checkpoints").newest(start, pytest.fail)
    assert done == num_epochs
    return np.asarray(network.apply(state.fit.variables, data.images), np.float64)


def test_labels_of_a_teacher_are_the_probabilities_that_it_gives(taught):
    summary = json.loads((taught / "summary.json").read_text())
    methods = ["gradient_matching", "herding", "random"]
    assert [row["method"] for row in summary["results"]] == methods
    for row in summary["results"]:
        assert row["labels"] == "teacher"
        assert row["seconds"] > summary["probe_seconds"] > 0
        data = DistilledDataset.load(taught / f"{row['method']}-30-teacher.npz")
        logits = logits_of_teacher(taught / "probe", 300, 8, data)
        np.testing.assert_allclose(data.labels, softmax(logits / 2, axis=1), atol=1e-5)
        np.testing.assert_allclose(data.labels.sum(1), 1, atol=1e-5)
        assert data.labels.max(1).mean() < 0.99  # soft
        if row["indices"] is not None:
            truth = with_whole_training_set(load("digits"), 300).train.labels[row["indices"]]
            assert np.mean(data.labels.argmax(1) == truth) > 0.8
    page = (taught / "report.html").read_text()
    assert "teacher of 8 epochs, augmentation none, temperature 2" in page
    assert ", labelled by a teacher, stand for the 300 training images" in page


def test_random_alone_has_the_same_teacher_killed_or_not(taught, run_until_killed, tmp_path):
    arguments = [*TEACHER, "--method", "random", "--labels", "teacher", "--runs-dir", str(tmp_path)]
    run_until_killed(arguments, tmp_path / "run/probe/metrics.jsonl", 3)
    assert main([*arguments, "--resume"]) == 0
    found = DistilledDataset.load(tmp_path / "run/random-30-teacher.npz")
    softer = DistilledDataset.load(taught / "random-30-teacher.npz")
    np.testing.assert_array_equal(found.images, softer.images)
    roots = np.sqrt(found.labels)  # a temperature of 2 takes roots
    np.testing.assert_allclose(softer.labels, roots / roots.sum(1, keepdims=True), atol=1e-4)


def test_devs_takes_a_teacher_for_the_same_images(reduced, tmp_path):
    arguments = [*DEVS, "--labels", "teacher", "--teacher-epochs", "3", "--runs-dir", str(tmp_path)]
    assert main(arguments) == 0
    summary = json.loads((tmp_path / "run/summary.json").read_text())
    assert {row["labels"] for row in summary["results"]} == {"teacher"}
    assert summary["options"]["labels"] == "teacher"
    assert summary["options"]["teacher_epochs"] == 3
    for row in summary["results"]:
        name = f"{row['method']}-{row['num_images']}"
        data = DistilledDataset.load(tmp_path / f"run/{name}-teacher.npz")
        own = DistilledDataset.load(reduced / f"{name}.npz")
        np.testing.assert_array_equal(data.images, own.images)
        logits = logits_of_teacher(tmp_path / "run/teacher", 150, 3, data)
        np.testing.assert_allclose(data.labels, softmax(logits, axis=1), atol=1e-5)
        assert row["seconds"] > summary["teacher_seconds"] > 0


@pytest.mark.parametrize("temperature", [1e-320, 1e308])
def test_probabilities_stay_numbers_at_any_temperature(temperature):
    config = proxy_network.Config(NetworkConfig(width=4, depth=1))
    network = networks.create(config.network, 10, (8, 8, 1))
    images = np.random.default_rng(0).normal(size=(7, 8, 8, 1)).astype(np.float32)
    variables = network.init(jax.random.key(0), images)
    found = proxy_network.probabilities(config, variables, images, 10, temperature)
    greatest = np.asarray(network.apply(variables, images)).argmax(1)
    np.testing.assert_allclose(found, np.eye(10)[greatest] if temperature < 1 else 0.1)
    nowhere = jax.tree.map(lambda leaf: leaf * np.nan, variables)
    with pytest.raises(ValueError, match="the teacher diverged"):
        proxy_network.probabilities(config, nowhere, images, 10)


def test_sets_can_be_made_without_judging(tmp_path, capsys):
    arguments = [*CORESET, "--runs-dir", str(tmp_path), "--method", "random", "--num-samples", "10"]
    assert main([*arguments, "--num-networks", "0"]) == 0
    path = tmp_path / "run/random-10.npz"
    assert DistilledDataset.load(path).test_accuracies == ()
    assert not (tmp_path / "run/report.html").exists()
    capsys.readouterr()
    assert main(["evaluate", str(path), "--num-networks", "1"]) == 0
    assert "1 networks" in capsys.readouterr().out


def test_evaluate_knows_protocols(reduced, tmp_path, capsys):
    output = tmp_path / "a.json"
    shared = ["--num-networks", "1", "--num-epochs", "30", "--output", str(output)]

    def judge(*more):
        assert main(["evaluate", str(reduced / "DEvS-10.npz"), *shared, *more]) == 0
        return json.loads(output.read_text())

    stored = judge()
    assert stored["training"]["mixup_alpha"] == 0.4
    literature = judge("--protocol", "literature", "--width", "4")
    assert literature["training"]["mixup_alpha"] == 0
    assert literature["training"]["l2_penalty"] == 5e-4
    assert literature["training"]["schedule"] == "step"
    augmented = judge("--protocol", "literature", "--width", "4", "--augmentation", "stored")
    assert augmented["training"]["mixup_alpha"] == 0.4
    assert augmented["training"]["shift_pixels"] == 1
    siamese = judge("--augmentation", "siamese")
    assert len(siamese["training"]["siamese"]) == 6
    assert siamese["training"]["mixup_alpha"] == 0
    capsys.readouterr()
    hard = judge("--labels", "hard")
    assert hard["labels"] == "hard"
    assert hard["test_accuracies"] != stored["test_accuracies"]


@pytest.mark.parametrize("kind", ["bytes", "unit", "normalized"])
def test_evaluate_takes_a_plain_file(kind, tmp_path, capsys):
    digits = load("digits")
    images, labels = digits.train.images[:30], digits.train.labels[:30]
    if images.dtype == np.uint8 and kind != "bytes":
        images = images / np.float32(255)
    if kind == "normalized":
        images = (images - np.float32(digits.mean)) / np.float32(digits.std)
    path = tmp_path / "mine.npz"
    np.savez(path, images=images, labels=labels)
    data = DistilledDataset.load(path, digits)
    assert data.labels.tolist() == np.eye(10)[labels].tolist()
    assert -1 < data.images.mean() < 1
    assert data.images.min() < 0
    arguments = ["evaluate", str(path), "--num-networks", "1", "--num-epochs", "2", "--width", "4"]
    assert main([*arguments, "--dataset", "digits"]) == 0
    assert "ConvNet" in capsys.readouterr().out
    assert main(arguments) == 2
    assert "--dataset" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["devs", "--target-sizes", "10", "20"], "--target-sizes must fall, got 20 after 10"),
        (["devs", "--target-sizes", "2000"], "number of training images, 1438, got 2000"),
        (["devs", "--num-images", "5000"], "1438 training images, got --num-images 5000"),
        (["devs", "--clustering", "sklaern"], "sklearn"),
        (["devs", "--network", "MLP"], "got kaiming with MLP"),
        (["devs", "--dropout", "1"], "dropout must be in [0, 1), got 1.0"),
        (["devs", "--reduction-factor", "1"], "--reduction-factor must be > 1, got 1.0"),
        (["coreset", "--method", "hreding"], "herding"),
        (["coreset", "--num-samples", "1500"], "--num-samples must be in 1..1437, got 1500"),
        (
            ["coreset", "--method", "gradient_matching", "--num-samples", "15"],
            "got --num-samples 15",
        ),
        (["coreset", "--probe-epochs", "0"], "--probe-epochs must be >= 1, got 0"),
        (["coreset", "--labels", "soft"], "teacher"),
        (
            ["coreset", "--labels", "teacher", "--label-temperature", "0"],
            "--label-temperature must be > 0, got 0.0",
        ),
        (
            ["coreset", "--label-temperature", "2"],
            "--label-temperature needs --labels teacher, got 2",
        ),
        (
            ["devs", "--label-temperature", "2"],
            "--label-temperature needs --labels teacher, got 2.0",
        ),
        (["devs", "--teacher-epochs", "5"], "--teacher-epochs needs --labels teacher, got 5"),
        (["evaluate", "x.npz", "--protocol", "mine"], "literature"),
        (["evaluate", "x.npz", "--width", "0"], "width must be >= 1, got 0"),
    ],
)
def test_wrong_input_is_one_line_and_exit_code_2(arguments, says, tmp_path, capsys):
    runs = [] if arguments[0] == "evaluate" else ["--runs-dir", str(tmp_path / "runs")]
    assert main([*arguments, *runs]) == 2
    said = capsys.readouterr().err.strip().splitlines()
    assert len(said) == 1
    assert says in said[0]
    assert not (tmp_path / "runs").exists()
