"""DD-Ranking's scores of a distilled set: its merit without soft labels and augmentation.

Li et al. 2025, "DD-Ranking: Rethinking the Evaluation of Dataset Distillation", arXiv 2505.13300.
The formulas are those of github.com/NUS-HPC-AI-Lab/DD-Ranking, ddranking 0.2.0, commit b8b0966
(doc/introduction.md; `compute_metrics` of ddranking/metrics/soft_label.py, hard_label.py and
aug_robust.py), for accuracies in [0, 1]. That code takes per cent, for which scores leave [0, 1].
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypeAlias

import numpy as np

Accuracies: TypeAlias = float | np.ndarray
"""An accuracy in [0, 1] of one network, or of several (P,), each compared with its counterpart."""


@dataclass(frozen=True)
class Judged:
    """Test accuracies of networks trained on the real set, the distilled and a random one."""

    real_hard: Accuracies
    """On the whole real training set with its labels."""
    set_hard: Accuracies
    """On the distilled set, all weight of each label on the most probable class."""
    set_own: Accuracies
    """On the distilled set with its labels, trained as its recipe says."""
    random_own: Accuracies
    """On as many random real images, labelled and trained in the same way."""
    set_augmented: Accuracies
    """The accuracies of `set_own`, with augmentation."""
    random_augmented: Accuracies
    set_plain: Accuracies
    """The accuracies of `set_own`, without augmentation."""
    random_plain: Accuracies


def normalized(difference: Accuracies) -> Accuracies:
    """The convex map (exp(x) - exp(-1)) / (exp(1) - exp(-1)) of [-1, 1] to [0, 1].

    >>> round(float(normalized(0)), 4)
    0.2689
    """
    return (np.exp(difference) - np.exp(-1)) / (np.exp(1) - np.exp(-1))


def hard_label_recovery(results: Judged) -> Accuracies:
    """HLR: how far the set falls short of the real one, both with hard labels; less is better."""
    return results.real_hard - results.set_hard


def improvement_over_random(results: Judged) -> Accuracies:
    """IOR: how far the set is above random images, both trained as its recipe says."""
    return results.set_own - results.random_own


def label_robust_score(results: Judged, weight: float = 0.5) -> Accuracies:
    """LRS in [0, 1]: `weight` times IOR less (1 - weight) times HLR, normalised."""
    recovery, improvement = hard_label_recovery(results), improvement_over_random(results)
    return normalized(weight * improvement - (1 - weight) * recovery)


def augmentation_robust_score(results: Judged, weight: float = 0.5) -> Accuracies:
    """ARS in [0, 1]: `weight` times the set's lead over random images with augmentation, plus
    (1 - weight) times that without, normalised."""
    augmented = results.set_augmented - results.random_augmented
    plain = results.set_plain - results.random_plain
    return normalized(weight * augmented + (1 - weight) * plain)


def scores(results: Judged) -> dict[str, Accuracies]:
    """All four scores, with DD-Ranking's weights of a half."""
    return {
        "HLR": hard_label_recovery(results),
        "IOR": improvement_over_random(results),
        "LRS": label_robust_score(results),
        "ARS": augmentation_robust_score(results),
    }
