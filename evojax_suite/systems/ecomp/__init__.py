"""Compression of trained networks by evolution (EComp, van den Beemt et al. 2021)."""

from evojax_suite.systems.ecomp import compression, feed_forward, similarity
from evojax_suite.systems.ecomp.algorithm import (
    Compressed,
    Data,
    Metrics,
    Scores,
    State,
    build,
    check,
    final_scores,
    initial_sizes,
    make_data,
    num_steps,
    relation,
    similarity_losses,
    targets_of,
)
from evojax_suite.systems.ecomp.artifact import CompressedNetwork, Inputs, constants, load
from evojax_suite.systems.ecomp.config import WEIGHTINGS, Config, Params

__all__ = [
    "WEIGHTINGS",
    "Compressed",
    "CompressedNetwork",
    "Config",
    "Data",
    "Inputs",
    "Metrics",
    "Params",
    "Scores",
    "State",
    "build",
    "check",
    "compression",
    "constants",
    "feed_forward",
    "final_scores",
    "initial_sizes",
    "load",
    "make_data",
    "num_steps",
    "relation",
    "similarity",
    "similarity_losses",
    "targets_of",
]
