"""DD-Ranking's scores of a distilled set: what is left of it without soft labels and augmentation.

Li et al. 2025, "DD-Ranking: Rethinking the Evaluation of Dataset Distillation", arXiv 2505.13300.
The formulas are those of github.com/NUS-HPC-AI-Lab/DD-Ranking, ddranking 0.2.0, commit b8b0966
(doc/introduction.md; `compute_metrics` of ddranking/metrics/soft_label.py, hard_label.py and
aug_robust.py), for accuracies in [0, 1]: the scores end there only so. That code reads them in per
cent.
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
    """The whole real training set with its labels."""
    set_hard: Accuracies
    """The distilled set, all weight of each label on the most probable class."""
    set_own: Accuracies
    """The distilled set with its own labels, trained as its recipe says."""
    random_own: Accuracies
    """The accuracy on as many random real images, labelled and trained in the same way."""
    set_augmented: Accuracies
    """The accuracy of `set_own`, with augmentation."""
    random_augmented: Accuracies
    set_plain: Accuracies
    """The accuracy of `set_own`, without augmentation."""
    random_plain: Accuracies


def normalized(difference: Accuracies) -> Accuracies:
    """Map [-1, 1] to [0, 1], convex: (exp(x) - exp(-1)) / (exp(1) - exp(-1)).

    >>> round(float(normalized(0)), 4)
    0.2689
    """
    return (np.exp(difference) - np.exp(-1)) / (np.exp(1) - np.exp(-1))


def hard_label_recovery(judged: Judged) -> Accuracies:
    """HLR: what the set falls short of the real one, both with hard labels; less is better."""
    return judged.real_hard - judged.set_hard


def improvement_over_random(judged: Judged) -> Accuracies:
    """IOR: what the set is above random images when both are trained as its recipe says."""
    return judged.set_own - judged.random_own


def label_robust_score(judged: Judged, weight: float = 0.5) -> Accuracies:
    """LRS in [0, 1]: `weight` times IOR less (1 - weight) times HLR, normalised."""
    recovery, improvement = hard_label_recovery(judged), improvement_over_random(judged)
    return normalized(weight * improvement - (1 - weight) * recovery)


def augmentation_robust_score(judged: Judged, weight: float = 0.5) -> Accuracies:
    """ARS in [0, 1]: `weight` times what the set is above random images with augmentation, the rest
    times what it is without, normalised."""
    augmented = judged.set_augmented - judged.random_augmented
    return normalized(weight * augmented + (1 - weight) * (judged.set_plain - judged.random_plain))


def scores(judged: Judged) -> dict[str, Accuracies]:
    """All four, with DD-Ranking's weights of a half."""
    return {
        "HLR": hard_label_recovery(judged),
        "IOR": improvement_over_random(judged),
        "LRS": label_robust_score(judged),
        "ARS": augmentation_robust_score(judged),
    }
