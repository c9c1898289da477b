"""The fixed stratified hold-out."""

from __future__ import annotations

import numpy as np
import pytest

from evojax_suite.data import hold_out


def check(labels: np.ndarray, one_in: int) -> tuple[np.ndarray, np.ndarray]:
    """What holds for every split: a partition in order, and proportional in every class."""
    kept, held = hold_out(labels, one_in)
    np.testing.assert_array_equal(np.sort(np.concatenate([kept, held])), np.arange(len(labels)))
    for part in (kept, held):
        assert (np.diff(part) > 0).all()
    counts = np.bincount(labels)
    share = np.bincount(labels[held], minlength=len(counts))
    assert (np.abs(share - counts / one_in) < 1).all()
    return kept, held


@pytest.mark.parametrize(("total", "kept", "held"), [(60_000, 48_000, 12_000),
                                                     (50_000, 40_000, 10_000)])  # fmt: skip
def test_sizes_of_the_papers_split(total, kept, held):
    labels = np.random.default_rng(3).choice(10, total, p=np.arange(1, 11) / 55)
    parts = check(labels, 5)
    assert (len(parts[0]), len(parts[1])) == (kept, held)


def test_balanced_classes_are_split_exactly():
    labels = np.tile(np.arange(100), 500)
    _, held = check(labels, 5)
    assert (np.bincount(labels[held]) == 100).all()


@pytest.mark.parametrize("one_in", [2, 3, 4, 5, 10])
@pytest.mark.parametrize("seed", range(5))
def test_uneven_classes(one_in, seed):
    labels = np.random.default_rng(seed).integers(0, 7, 501)
    _, held = check(labels, one_in)
    assert len(held) == round(501 / one_in + 1e-9)


def test_no_class_loses_its_last_image():
    labels = np.arange(10)
    kept, held = hold_out(labels, 5)
    assert (len(kept), len(held)) == (10, 0)


def test_fixed_for_ever():
    """A changed choice would make published runs irreproducible."""
    labels = np.arange(40) % 4
    first, second = hold_out(labels, 5), hold_out(labels, 5)
    np.testing.assert_array_equal(first[1], second[1])
    np.testing.assert_array_equal(first[1], [4, 10, 11, 15, 20, 22, 25, 29])


def test_the_choice_is_no_pattern_of_positions():
    _, held = hold_out(np.zeros(1000, int), 5)
    assert len(set(np.diff(held))) > 5
    assert 400 < held.mean() < 600
