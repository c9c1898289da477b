"""The methods that the papers compare with: selected examples, or images made by gradients."""

from evojax_suite.systems.coresets import (
    forgetting as forgetting,
    gradient_matching as gradient_matching,
    herding as herding,
    k_center as k_center,
    kernel_inducing_points as kernel_inducing_points,
)
