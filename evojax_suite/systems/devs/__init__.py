"""Training sets shrunk by clustering and averaging (DEvS, Shvai et al. 2022)."""

from evojax_suite.systems.devs import clustering as clustering
from evojax_suite.systems.devs.algorithm import (
    DistilledSet as DistilledSet,
    Metrics as Metrics,
    State as State,
    average as average,
    build as build,
    merge as merge,
    num_steps as num_steps,
)
from evojax_suite.systems.devs.config import (
    NETWORK as NETWORK,
    RECIPE as RECIPE,
    Config as Config,
    size_sequence as size_sequence,
)
