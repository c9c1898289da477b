"""Architecture search by differential evolution (DE-NAS, Pei et al. 2022)."""

from evojax_suite.systems.de_nas import architectures, networks
from evojax_suite.systems.de_nas.algorithm import (
    Metrics,
    SearchResult,
    State,
    best_first,
    build,
    num_workers,
    scores,
)
from evojax_suite.systems.de_nas.artifact import SearchedNetwork, load
from evojax_suite.systems.de_nas.candidates import (
    COMPILER_OPTIONS,
    Data,
    EvaluatedCandidate,
    candidate_evaluator,
    known_networks,
    make_data,
    make_evaluator,
    network_of,
    padded_work,
)
from evojax_suite.systems.de_nas.config import TRAINING, Config, Params
from evojax_suite.systems.de_nas.final_training import FinalMetrics, FinalState, build_final

__all__ = [
    "COMPILER_OPTIONS",
    "TRAINING",
    "Config",
    "Data",
    "EvaluatedCandidate",
    "FinalMetrics",
    "FinalState",
    "Metrics",
    "Params",
    "SearchResult",
    "SearchedNetwork",
    "State",
    "architectures",
    "best_first",
    "build",
    "build_final",
    "candidate_evaluator",
    "known_networks",
    "load",
    "make_data",
    "make_evaluator",
    "network_of",
    "networks",
    "num_workers",
    "padded_work",
    "scores",
]
