"""Distilled datasets on disk, and how they are judged."""

from __future__ import annotations

import dataclasses
import json

import jax
import numpy as np
import pytest

from evojax_suite import NetworkConfig, TrainingConfig, load
from evojax_suite.data import DataError
from evojax_suite.distilled import DistilledDataset, accuracies_on
from evojax_suite.runtime.results import (
    Rows,
    RunExists,
    open_run,
    read_lines,
    spread,
    write_atomically,
)


@pytest.fixture
def data() -> DistilledDataset:
    return DistilledDataset(
        images=np.random.default_rng(0).normal(size=(10, 8, 8, 1)).astype(np.float32),
        labels=np.full((10, 10), 0.1, np.float32),
        dataset="digits",
        class_names=tuple("0123456789"),
        mean=(0.3,),
        std=(0.4,),
        network=NetworkConfig(width=7, normalization="batch"),
        training=TrainingConfig(num_epochs=3, shift_pixels=1, siamese=("crop",)),
        seed=5,
        factor=2,
        test_accuracies=(0.5, 0.25),
    )


def test_what_is_saved_is_loaded(data, tmp_path):
    data.save(tmp_path / "a.npz")
    loaded = DistilledDataset.load(tmp_path / "a.npz")
    np.testing.assert_array_equal(loaded.images, data.images)
    np.testing.assert_array_equal(loaded.labels, data.labels)
    for field in dataclasses.fields(data):
        if field.name not in ("images", "labels"):
            assert getattr(loaded, field.name) == getattr(data, field.name), field.name


def test_equal_contents_are_equal_bytes(data, tmp_path):
    data.save(tmp_path / "a.npz")
    data.save(tmp_path / "b.npz")
    assert (tmp_path / "a.npz").read_bytes() == (tmp_path / "b.npz").read_bytes()


def test_the_file_describes_itself(data, tmp_path):
    data.save(tmp_path / "a.npz")
    with np.load(tmp_path / "a.npz", allow_pickle=False) as arrays:
        recipe = json.loads(str(arrays["recipe"]))
    assert recipe["network"]["width"] == 7
    assert recipe["training"]["learning_rate"] == 1e-3
    assert recipe["value_range"] == [float(data.images.min()), float(data.images.max())]


def test_networks_are_trained_on_each_tile(data, tmp_path):
    """Each of one colour, which enlarging keeps; a file from before has one tile an image."""
    tiles = np.arange(40, dtype=np.float32).reshape(10, 2, 2, 1)
    own = dataclasses.replace(data, images=tiles.repeat(4, 1).repeat(4, 2))
    unpacked = own.unpacked()
    assert unpacked.factor == 1
    assert unpacked.images.shape == (40, 8, 8, 1)
    np.testing.assert_allclose(
        unpacked.images, np.arange(40)[:, None, None, None] + np.zeros((40, 8, 8, 1)), atol=1e-4
    )
    np.testing.assert_array_equal(unpacked.labels, data.labels.repeat(4, 0))
    assert unpacked.unpacked() is unpacked
    own.save(tmp_path / "a.npz")
    arrays = dict(np.load(tmp_path / "a.npz"))
    recipe = json.loads(str(arrays["recipe"]))
    for factor, said in ((3, "factor must be >= 1 and divide 8 x 8, got 3"), ("2", "factor")):
        arrays["recipe"] = np.array(json.dumps(recipe | {"factor": factor}))
        np.savez(tmp_path / "b.npz", **arrays)
        with pytest.raises(DataError, match=said):
            DistilledDataset.load(tmp_path / "b.npz")
    del recipe["factor"]
    np.savez(tmp_path / "b.npz", **arrays | {"recipe": np.array(json.dumps(recipe))})
    assert DistilledDataset.load(tmp_path / "b.npz").factor == 1


def test_a_pickle_is_refused(data, tmp_path):
    np.savez(tmp_path / "a.npz", images=np.array([object()], dtype=object), allow_pickle=True)
    with pytest.raises(DataError, match="not a distilled dataset"):
        DistilledDataset.load(tmp_path / "a.npz")


def test_labels_that_disagree_are_refused(data, tmp_path):
    dataclasses.replace(data, labels=data.labels[:9]).save(tmp_path / "a.npz")
    with pytest.raises(DataError, match="disagree"):
        DistilledDataset.load(tmp_path / "a.npz")


def test_real_images_train_better_networks_than_noise(data):
    digits = load("digits")
    first = np.stack([digits.train.images[digits.train.labels == c][:5] for c in range(10)])
    images = (first.reshape(50, 8, 8, 1) / 255 - digits.mean) / digits.std
    labels = np.repeat(np.eye(10), 5, axis=0)
    network, training = NetworkConfig(width=16, depth=2), TrainingConfig(num_epochs=60)

    def judge(images):
        return accuracies_on(
            digits.test,
            jax.random.key(0),
            images,
            labels,
            digits,
            network,
            training,
            num_networks=3,
        )

    real, noise = judge(images), judge(np.random.default_rng(0).normal(size=images.shape))
    assert real.shape == (3,)
    assert real.min() > 0.6
    assert noise.max() < 0.4


def test_a_failed_write_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "summary.json"
    write_atomically(path, "old")

    def full(descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(OSError, match="No space left"):
        write_atomically(path, "new")
    assert path.read_text() == "old"
    assert [item.name for item in tmp_path.iterdir()] == ["summary.json"]


def test_torn_lines_do_not_count(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"generation": 1}\n{"generation": 2}\n{"genera')
    assert read_lines(path) == [{"generation": 1}, {"generation": 2}]
    assert read_lines(tmp_path / "none.jsonl") == []


def test_a_directory_that_is_no_run_is_refused(tmp_path):
    (tmp_path / "thesis.tex").write_text("mine")
    with pytest.raises(RunExists, match="is not a run"):
        open_run(tmp_path, {"seed": 1}, resume=False, may_grow="num_generations")


def test_a_study_goes_on_and_another_one_begins_anew(tmp_path):
    @dataclasses.dataclass(frozen=True)
    class Options:
        width: int = 4
        seeds: tuple[int, ...] = (0,)

    path = tmp_path / "study.json"
    rows = Rows(path, Options(), "seeds")
    rows.add({"seed": 0, "accuracy": np.float32(0.5), "epochs": {10: (1, float("nan"))}})
    assert list(rows) == [{"seed": 0, "accuracy": 0.5, "epochs": {"10": [1, None]}}]
    again = Rows(path, Options(seeds=(0, 1)), "seeds")
    assert list(again) == list(rows)
    again.add({"seed": 1})
    assert [row["seed"] for row in Rows(path, Options(), "seeds")] == [0, 1]
    assert list(Rows(path, Options(width=8), "seeds")) == []
    assert spread([1000, 3000], 0) == "2,000 ± 1,000"
