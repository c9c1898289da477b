"""Fixed stratified hold-out: the 8:2 split into train and validation parts."""

from __future__ import annotations

import numpy as np


def hold_out(labels: np.ndarray, one_in: int) -> tuple[np.ndarray, np.ndarray]:
    """Split positions into a kept part and a held-out part of one in `one_in`, class by class.

    The held-out part has round(N / one_in) positions; each class gives its exact share or one more
    (the classes with the largest remainders, lower labels first), and never its last image.
    The choice depends on the labels and their order alone, not on a run's seed, so every run and
    every machine sees the same split of the same source.

    labels: (N,) integers >= 0. Returns (kept, held_out): sorted positions, int64.
    """
    counts = np.bincount(labels)
    share, remainder = np.divmod(counts, one_in)
    missing = (2 * len(labels) + one_in) // (2 * one_in) - int(share.sum())
    may_give_one_more = (remainder > 0) & (share + 1 < counts)
    by_remainder = np.argsort(-remainder, kind="stable")
    share[by_remainder[may_give_one_more[by_remainder]][:missing]] += 1
    # RandomState, not default_rng: numpy promises that its stream never changes.
    order = np.random.RandomState(0).permutation(len(labels))
    held_out = np.zeros(len(labels), bool)
    for label, size in enumerate(share):
        held_out[order[labels[order] == label][:size]] = True
    return np.flatnonzero(~held_out), np.flatnonzero(held_out)
