"""What the papers compare with: pure selections, usable alone."""

from typing import TYPE_CHECKING

if TYPE_CHECKING:  # import them by name: some of `algorithms` need one, and one needs `algorithms`
    from evojax_suite.baselines import (
        forgetting,
        gradient_matching,
        herding,
        k_center,
        kernel_inducing_points,
        probe,
        random,
        strong_random,
    )

__all__ = [
    "forgetting",
    "gradient_matching",
    "herding",
    "k_center",
    "kernel_inducing_points",
    "probe",
    "random",
    "strong_random",
]
