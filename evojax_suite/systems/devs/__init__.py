"""Training sets shrunk by clustering and averaging (DEvS, Shvai et al. 2022)."""

from evojax_suite.systems.devs import clustering
from evojax_suite.systems.devs.algorithm import (
    DistilledSet,
    Metrics,
    State,
    average,
    build,
    merge,
    num_steps,
)
from evojax_suite.systems.devs.config import NETWORK, RECIPE, Config, size_sequence

__all__ = [
    "NETWORK",
    "RECIPE",
    "Config",
    "DistilledSet",
    "Metrics",
    "State",
    "average",
    "build",
    "clustering",
    "merge",
    "num_steps",
    "size_sequence",
]
