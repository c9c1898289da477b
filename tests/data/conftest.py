"""Small synthetic sets, and the comparison of what was written with what was loaded."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest

from evojax_suite.types import Dataset

Arrays = tuple[np.ndarray, np.ndarray]


@pytest.fixture(autouse=True)
def _no_outside_data(monkeypatch, tmp_path):
    """Tests see neither the user's data nor the network's; real-data tests name their folder."""
    monkeypatch.delenv("EVOJAX_SUITE_DATA", raising=False)
    monkeypatch.setenv("TFDS_DATA_DIR", str(tmp_path / "tfds"))


@pytest.fixture
def arrays() -> Callable[..., Arrays]:
    """Random uint8 images, all different, and labels that cycle through the classes."""

    def make(count: int, num_classes: int, shape: tuple[int, ...], seed: int = 0) -> Arrays:
        images = np.random.default_rng(seed).integers(0, 256, (count, *shape), np.uint8)
        return images, np.arange(count) % num_classes

    return make


@pytest.fixture
def assert_holds() -> Callable[[Dataset, Arrays, Arrays], None]:
    """Checks that train + validation and test hold exactly the written images, each once, with
    their labels, and the 8:2 share of the validation split."""

    def pairs(images: np.ndarray, labels: np.ndarray) -> list[tuple[bytes, int]]:
        return sorted((i.tobytes(), int(k)) for i, k in zip(images, labels, strict=True))

    def check(dataset: Dataset, train: Arrays, test: Arrays) -> None:
        loaded = pairs(dataset.train.images, dataset.train.labels)
        loaded += pairs(dataset.validation.images, dataset.validation.labels)
        assert sorted(loaded) == pairs(*train)
        assert pairs(dataset.test.images, dataset.test.labels) == pairs(*test)
        assert len(dataset.validation) == round(len(train[1]) / 5)
        for split in (dataset.train, dataset.validation, dataset.test):
            assert split.images.ndim == 4
            assert split.images.dtype == np.uint8
            assert split.labels.dtype == np.int32

    return check
