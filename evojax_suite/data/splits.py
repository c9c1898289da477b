"""Fixed stratified parts of a dataset: the 8:2 split, the whole training set, a subset of it."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from evojax_suite.data.source import joined, part_of
from evojax_suite.operators.selection import check_shares, class_shares
from evojax_suite.types import Dataset


def hold_out(labels: np.ndarray, one_in: int) -> tuple[np.ndarray, np.ndarray]:
    """The sorted positions, int64, of a kept part and of a held-out part of one in `one_in`.

    labels: (N,) integers >= 0. The held-out part has round(N / one_in) positions; each class gives
    its exact share or one more (the classes with the largest remainders, lower labels first), and
    never its last image. The choice depends on the labels and their order alone, not on a run's
    seed, so every run and every machine sees the same split of the same source.
    """
    counts = np.bincount(labels)
    share, remainder = np.divmod(counts, one_in)
    missing = (2 * len(labels) + one_in) // (2 * one_in) - int(share.sum())
    may_give_one_more = (remainder > 0) & (share + 1 < counts)
    by_remainder = np.argsort(-remainder, kind="stable")
    share[by_remainder[may_give_one_more[by_remainder]][:missing]] += 1
    held_out = np.zeros(len(labels), bool)
    for positions, size in zip(_shuffled_classes(labels, len(share)), share, strict=True):
        held_out[positions[:size]] = True
    return np.flatnonzero(~held_out), np.flatnonzero(held_out)


def _shuffled_classes(labels: np.ndarray, num_classes: int) -> list[np.ndarray]:
    """The positions of each class in an order that is always the same."""
    # RandomState, not default_rng: numpy promises that its stream never changes.
    order = np.random.RandomState(0).permutation(len(labels))
    return [order[labels[order] == label] for label in range(num_classes)]


def with_whole_training_set(dataset: Dataset, num_images: int | None = None) -> Dataset:
    """`dataset` with its validation split joined to its training part, for methods that select
    nothing by validation; the validation split is left empty.

    num_images: keep a fixed part of this many images, in which each class has its share up to one
    image. Raises ValueError where there are fewer.
    """
    train = joined([dataset.train, dataset.validation])
    if num_images is not None:
        if not 1 <= num_images <= len(train):
            present = f"{dataset.name} has {len(train)} training images"
            raise ValueError(f"{present}, got num_images {num_images}")
        rank = np.empty(len(train))
        for positions in _shuffled_classes(train.labels, dataset.num_classes):
            rank[positions] = (np.arange(len(positions)) + 0.5) / len(positions)
        train = part_of(train, np.sort(np.argsort(rank, kind="stable")[:num_images]))
    return replace(dataset, train=train, validation=part_of(train, slice(0)))


def balanced_subset(labels: np.ndarray, num_images: int, num_classes: int) -> np.ndarray:
    """The sorted positions (num_images,) of a fixed part in which each class has its equal share.

    labels: (N,) integers; the first classes give one more where num_images is no multiple of
    num_classes. Raises ValueError where a class has too few.

    >>> labels = np.array([0, 0, 0, 1, 1, 1, 1])
    >>> np.bincount(labels[balanced_subset(labels, 4, 2)]).tolist()
    [2, 2]
    """
    check_shares(labels, num_images, num_classes, balanced=True)
    shares = class_shares(num_images, num_classes)
    classes = _shuffled_classes(labels, num_classes)
    return np.sort(np.concatenate([c[:share] for c, share in zip(classes, shares, strict=True)]))


def some_images(
    dataset: Dataset, num_images: int | None, num_validation_images: int | None = None
) -> Dataset:
    """`dataset` with a fixed, balanced part of the training images and the first validation images;
    None is all. Raises ValueError where there are no more than `num_images`, or fewer than
    `num_validation_images`."""
    train, most = dataset.train, len(dataset.validation)
    if num_images is not None:
        if not 1 <= num_images < len(train):
            raise ValueError(f"num_images must be in 1..{len(train) - 1}, got {num_images}")
        train = part_of(train, balanced_subset(train.labels, num_images, dataset.num_classes))
    if num_validation_images is not None and not 1 <= num_validation_images <= most:
        raise ValueError(f"num_validation_images must be in 1..{most}, got {num_validation_images}")
    validation = part_of(dataset.validation, slice(num_validation_images))
    return replace(dataset, train=train, validation=validation)
