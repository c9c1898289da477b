"""Architecture search by differential evolution (DE-NAS, Pei et al. 2022)."""

from evojax_suite.systems.de_nas import architectures as architectures, networks as networks
from evojax_suite.systems.de_nas.algorithm import (
    Metrics as Metrics,
    SearchResult as SearchResult,
    State as State,
    best_first as best_first,
    build as build,
    num_workers as num_workers,
    scores as scores,
)
from evojax_suite.systems.de_nas.artifact import SearchedNetwork as SearchedNetwork, load as load
from evojax_suite.systems.de_nas.candidates import (
    COMPILER_OPTIONS as COMPILER_OPTIONS,
    Data as Data,
    EvaluatedCandidate as EvaluatedCandidate,
    candidate_evaluator as candidate_evaluator,
    costs_of as costs_of,
    hand_made as hand_made,
    known_networks as known_networks,
    make_data as make_data,
    make_evaluator as make_evaluator,
    network_of as network_of,
    padded_work as padded_work,
)
from evojax_suite.systems.de_nas.config import (
    TRAINING as TRAINING,
    Config as Config,
    Params as Params,
)
from evojax_suite.systems.de_nas.final_training import (
    FinalMetrics as FinalMetrics,
    FinalState as FinalState,
    build_final as build_final,
)
