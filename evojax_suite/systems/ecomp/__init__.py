"""Compression of trained networks by evolution (EComp, van den Beemt et al. 2021)."""

from evojax_suite.systems.ecomp import (
    compression as compression,
    feed_forward as feed_forward,
    graph as graph,
    mask_search as mask_search,
    refit as refit,
    similarity as similarity,
)
from evojax_suite.systems.ecomp.algorithm import (
    Compressed as Compressed,
    Data as Data,
    Metrics as Metrics,
    Scores as Scores,
    State as State,
    build as build,
    check as check,
    final_scores as final_scores,
    initial_sizes as initial_sizes,
    make_data as make_data,
    num_steps as num_steps,
    relation as relation,
    relations_and_accuracy as relations_and_accuracy,
    similarity_losses as similarity_losses,
    targets_of as targets_of,
)
from evojax_suite.systems.ecomp.artifact import (
    CompressedNetwork as CompressedNetwork,
    Inputs as Inputs,
    constants as constants,
    load as load,
)
from evojax_suite.systems.ecomp.config import (
    WEIGHTINGS as WEIGHTINGS,
    Config as Config,
    Params as Params,
    RefitConfig as RefitConfig,
    RefitParams as RefitParams,
)
