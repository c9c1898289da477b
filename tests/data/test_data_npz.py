"""One .npz file: MedMNIST and Keras names, own sets, every wrong array."""

from __future__ import annotations

import numpy as np
import pytest

from evojax_suite.data import DataError, load


@pytest.fixture
def medmnist(arrays):
    """A small set in MedMNIST's form: labels (N, 1) uint8."""
    content = {}
    for seed, part in enumerate(("train", "val", "test")):
        images, labels = arrays(10 + seed, 2, (6, 6), seed)
        content[f"{part}_images"] = images
        content[f"{part}_labels"] = labels[:, None].astype(np.uint8)
    return content


@pytest.mark.parametrize("place", ["", "medmnist", "pneumoniamnist"])
def test_medmnist_keeps_its_own_parts(tmp_path, medmnist, place):
    folder = tmp_path / place
    folder.mkdir(exist_ok=True)
    np.savez(folder / "pneumoniamnist.npz", **medmnist)
    dataset = load("PneumoniaMNIST", tmp_path)
    for part, split in zip(
        ("train", "val", "test"), (dataset.train, dataset.validation, dataset.test), strict=True
    ):
        np.testing.assert_array_equal(split.images[..., 0], medmnist[f"{part}_images"])
        np.testing.assert_array_equal(split.labels, medmnist[f"{part}_labels"][:, 0])
    assert dataset.class_names == ("normal", "pneumonia")
    assert (dataset.mean, dataset.std) == ((0.5,), (0.5,))


@pytest.mark.parametrize("names", [("train_images", "train_labels"), ("x_train", "y_train")])
def test_missing_parts_are_split_off_an_own_set(tmp_path, arrays, names):
    images, labels = arrays(100, 4, (3, 5, 2))
    np.savez(tmp_path / "own.npz", **dict(zip(names, (images, labels), strict=True)))
    dataset = load(tmp_path / "own.npz")
    parts = (dataset.train, dataset.validation, dataset.test)
    assert [len(part) for part in parts] == [64, 16, 20]
    label_of = {image.tobytes(): label for image, label in zip(images, labels, strict=True)}
    assert len(label_of) == 100
    for part in parts:
        for image, label in zip(part.images, part.labels, strict=True):
            assert label_of.pop(image.tobytes()) == label
    assert dataset.name == "own"
    assert dataset.class_names == ("0", "1", "2", "3")


def test_keras_names_for_a_known_set(tmp_path, arrays, assert_holds):
    train, test = arrays(50, 10, (4, 4)), arrays(10, 10, (4, 4), seed=1)
    content = dict(zip(("x_train", "y_train", "x_test", "y_test"), (*train, *test), strict=True))
    np.savez_compressed(tmp_path / "mnist.npz", **content)
    assert_holds(load("mnist", tmp_path), train, test)


def test_float_images_and_computed_statistics(tmp_path):
    rng = np.random.default_rng(0)
    images = rng.uniform(size=(40, 4, 4, 2))
    images[..., 1] = 0.25
    np.savez(tmp_path / "own.npz", train_images=images, train_labels=np.arange(40) % 2)
    dataset = load(tmp_path / "own.npz")
    assert dataset.train.images.dtype == np.float32
    values = dataset.train.images[..., 0].astype(np.float64)
    assert dataset.mean == (round(values.mean(), 4), 0.25)
    assert dataset.std == (round(values.std(), 4), 0.001)


def test_uint8_statistics_are_for_images_in_0_to_1(tmp_path, arrays):
    images, labels = arrays(50, 2, (6, 6))
    np.savez(tmp_path / "own.npz", train_images=images, train_labels=labels)
    dataset = load(tmp_path / "own.npz")
    scaled = dataset.train.images / 255
    assert dataset.mean == (round(scaled.mean(), 4),)
    assert dataset.std == (round(scaled.std(), 4),)


def floats(value) -> np.ndarray:
    images = np.full((10, 6, 6), 0.5)
    images[3, 2, 1] = value
    return images


WRONG = {
    "float above 1": ({"train_images": floats(1.5)}, r"lie in \[0.5, 1.5\]; allowed"),
    "float below 0": ({"test_images": np.full((12, 6, 6), -0.1)}, r"\(test\): float images lie in"),
    "NaN": ({"train_images": floats(np.nan)}, "contain NaN"),
    "infinity": ({"train_images": floats(np.inf)}, "inf.; allowed"),
    "int64 images": ({"train_images": np.zeros((10, 6, 6), int)}, "type int64; allowed: uint8"),
    "flat images": ({"train_images": np.zeros((10, 36), np.uint8)}, r"shape \(10, 36\); allowed"),
    "channels first": ({"train_images": np.zeros((10, 3, 6, 6), np.uint8)}, "1 to 4 channels"),
    "no pixels": ({"train_images": np.zeros((10, 0, 6), np.uint8)}, r"\(10, 0, 6, 1\); allowed"),
    "counts disagree": ({"val_labels": np.zeros(4, int)}, "11 images but 4 labels"),
    "one-hot labels": ({"train_labels": np.eye(10, dtype=int)}, r"labels have shape \(10, 10\)"),
    "float labels": ({"train_labels": np.zeros(10)}, "type float64; allowed"),
    "negative label": ({"train_labels": np.arange(10) % 2 - 1}, "label -1 is out of range"),
    "huge label": ({"train_labels": np.arange(10) * 2**32}, "label 38654705664 is out of range"),
    "label gap": ({"train_labels": np.arange(10) % 2 * 2}, "2 is out of range; allowed: 0..1"),
    "new label in test": ({"test_labels": np.arange(12) % 3}, r"\(test\): label 2 is out"),
    "part sizes differ": ({"test_images": np.zeros((12, 6, 7), np.uint8)}, "one size and type"),
    "part types differ": ({"test_images": np.zeros((12, 6, 6))}, "one size and type"),
    "empty part": ({"test_images": np.zeros((0, 6, 6), np.uint8), "test_labels": np.zeros(0, int)},
                   r"\(test\): the part has no images"),
    "pickled objects": ({"train_labels": np.array([0, 1] * 5, object)}, "allow_pickle"),
}  # fmt: skip


@pytest.mark.parametrize("wrong", WRONG)
def test_wrong_arrays(tmp_path, medmnist, wrong):
    change, message = WRONG[wrong]
    path = tmp_path / "own.npz"
    np.savez(path, **medmnist)
    load(path)
    np.savez(path, **(medmnist | change))
    with pytest.raises(DataError, match=message) as error:
        load(path)
    assert "\n" not in str(error.value)
    assert str(path) in str(error.value)


@pytest.mark.parametrize(
    ("missing", "message"),
    [
        ("val", "no validation split; pneumoniamnist has an official one"),
        ("test", "no test split; pneumoniamnist has an official one"),
        ("train", "no train_images"),
    ],
)
def test_missing_official_part(tmp_path, medmnist, missing, message):
    content = {name: array for name, array in medmnist.items() if not name.startswith(missing)}
    np.savez(tmp_path / "pneumoniamnist.npz", **content)
    with pytest.raises(DataError, match=message):
        load("pneumoniamnist", tmp_path)


def test_images_without_labels(tmp_path, medmnist):
    del medmnist["val_labels"]
    np.savez(tmp_path / "own.npz", **medmnist)
    with pytest.raises(DataError, match="only one of val_images and val_labels"):
        load(tmp_path / "own.npz")


def test_wrong_number_of_channels_for_a_known_set(tmp_path, medmnist):
    np.savez(tmp_path / "retinamnist.npz", **(medmnist | {"train_labels": np.arange(10) % 5}))
    with pytest.raises(DataError, match="images have 1 channels; retinamnist has 3"):
        load("retinamnist", tmp_path)


@pytest.mark.parametrize("kept", [0, 10, 0.5, 0.99])
def test_truncated_file(tmp_path, medmnist, kept):
    path = tmp_path / "own.npz"
    np.savez(path, **medmnist)
    data = path.read_bytes()
    path.write_bytes(data[: kept if isinstance(kept, int) else int(kept * len(data))])
    with pytest.raises(DataError, match=r"own\.npz: not a readable \.npz") as error:
        load(path)
    assert "\n" not in str(error.value)


def test_a_bare_array_is_no_npz(tmp_path):
    with (tmp_path / "own.npz").open("wb") as file:
        np.save(file, np.zeros(3))
    with pytest.raises(DataError, match=r"not a readable \.npz"):
        load(tmp_path / "own.npz")


def test_too_few_images_to_split(tmp_path):
    images = np.arange(18, dtype=np.uint8).reshape(2, 3, 3)
    np.savez(tmp_path / "own.npz", train_images=images, train_labels=np.array([0, 1]))
    with pytest.raises(DataError, match="too few train images"):
        load(tmp_path / "own.npz")
