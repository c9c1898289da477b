"""What the papers compare with: pure selections, usable alone."""

__all__ = [
    "forgetting",
    "gradient_matching",
    "herding",
    "k_center",
    "probe",
    "random",
    "strong_random",
]
