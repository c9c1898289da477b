"""experiments/ga_distillation/transfer.py: its table, and that it goes on where it ended."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from evojax_suite import NetworkConfig, TrainingConfig, load
from evojax_suite.distilled import DistilledDataset

SETS = Path(__file__).parents[2] / "experiments/ga_distillation/sets"


@pytest.fixture(scope="module")
def transfer(import_script):
    return import_script("ga_distillation/transfer.py")


@pytest.fixture
def run_folder(tmp_path) -> Path:
    digits = load("digits")
    (tmp_path / "run").mkdir()
    DistilledDataset(
        images=np.random.default_rng(0).normal(size=(10, 8, 8, 1)).astype(np.float32),
        labels=np.eye(10, dtype=np.float32),
        dataset="digits",
        class_names=digits.class_names,
        mean=digits.mean,
        std=digits.std,
        network=NetworkConfig(depth=1, width=4),
        training=TrainingConfig(num_epochs=30, learning_rate=0.01),
        seed=0,
    ).save(tmp_path / "run/distilled.npz")
    return tmp_path / "run"


def test_cells_are_run_once(transfer, run_folder, monkeypatch, capsys):
    judged = []
    original = transfer.distilled.accuracies_on

    def on_test(split, key, images, labels, dataset, network, training, *more):
        judged.append((network.network, network.width, network.depth, training.optimizer))
        return original(split, key, images, labels, dataset, network, training, *more)

    monkeypatch.setattr(transfer.distilled, "accuracies_on", on_test)
    shared = {"num_networks": 2, "num_epochs": 8, "output": run_folder / "transfer.json"}

    def table(**more) -> list[str]:
        judged.clear()
        transfer.main(transfer.Options(sets=(run_folder,), **shared | more))
        return [line for line in capsys.readouterr().out.splitlines() if line.startswith("|")]

    first = table(widths=(4,), networks=("MLP", "VGG11"))
    # The set's own recipe, then the literature's; VGG11 does not fit 8x8 images.
    assert judged == [("ConvNet", 4, 1, "adam"), ("MLP", 128, 3, "sgd")]
    assert first[0] == "| | ConvNet-4, own recipe | MLP | VGG11 |"
    assert first[1] == "|---|---|---|---|"
    assert first[2].startswith(f"| {run_folder} | ")
    assert first[2].count(" ± ") == 2
    assert first[2].endswith("| does not fit |")

    more = table(widths=(4, 8), networks=("MLP", "VGG11"))
    assert judged == [("ConvNet", 8, 1, "adam")]
    assert more[2].split(" | ")[1] == first[2].split(" | ")[1]
    table(widths=(4, 8), networks=("MLP",), seed=2)
    assert len(judged) == 3
    assert table(widths=(4,), networks=("MLP", "VGG11")) == first
    assert judged == []  # other seeds and numbers stand beside each other
    rows = json.loads((run_folder / "transfer.json").read_text())["rows"]
    assert [len(row["accuracies"]) for row in rows] == [2, 2, 0, 2, 2, 2, 2]
    assert all(row["seconds"] > 0 and row["dataset"] == "digits" for row in rows)

    # Another set in the same place is judged anew.
    data = DistilledDataset.load(run_folder / "distilled.npz")
    transfer.replace(data, images=-data.images).save(run_folder / "distilled.npz")
    table(widths=(4,), networks=())
    assert len(judged) == 1


def test_class_means_stand_beside_a_set(transfer, run_folder, capsys):
    transfer.main(
        transfer.Options(
            sets=(run_folder / "distilled.npz",),
            widths=(16,),
            networks=(),
            num_networks=3,
            num_epochs=60,
            class_means=True,
            output=run_folder / "transfer.json",
        )
    )
    rows = json.loads((run_folder / "transfer.json").read_text())["rows"]
    noise, means = (np.mean(row["accuracies"]) for row in rows)
    assert rows[1]["set"] == f"class means beside {run_folder / 'distilled.npz'}"
    assert noise < 0.4 < means
    assert "class means beside" in capsys.readouterr().out


def test_wrong_options_are_refused(transfer, tmp_path):
    with pytest.raises(ValueError, match="num_networks must be >= 1, got 0"):
        transfer.Options(sets=(tmp_path,), num_networks=0)
    with pytest.raises(ValueError, match="at least one folder or file, got none"):
        transfer.Options(sets=())


@pytest.mark.parametrize("file", sorted(SETS.glob("*.npz")), ids=lambda file: file.stem)
def test_the_sets_that_are_kept_are_ten_images_with_a_recipe(file):
    found = DistilledDataset.load(file)
    assert found.images.shape[0] == 10
    np.testing.assert_array_equal(found.labels, np.eye(10))
    assert (found.factor == 2) == ("four" in file.stem)
    assert (found.network.width, found.training.num_epochs) == (128, 300)
    if "one_bit" in file.stem:
        assert len(np.unique(found.images.round(3))) == 2
