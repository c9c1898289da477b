"""What the papers compare small sets with: examples that are selected, or images that are made by
gradients."""

from evojax_suite.systems.coresets import (
    forgetting,
    gradient_matching,
    herding,
    k_center,
    kernel_inducing_points,
)

__all__ = [
    "forgetting",
    "gradient_matching",
    "herding",
    "k_center",
    "kernel_inducing_points",
]
