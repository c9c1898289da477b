"""Training on subsets of examples that coevolve with the network (CEST, Ryan et al. 2024)."""

from evojax_suite.systems.cest import predator_prey as predator_prey, subsets as subsets
from evojax_suite.systems.cest.algorithm import (
    Data as Data,
    Metrics as Metrics,
    State as State,
    build as build,
    cost_seconds as cost_seconds,
    epochs_of_equal_gradients as epochs_of_equal_gradients,
    evolve as evolve,
    make_data as make_data,
    num_gradient_examples as num_gradient_examples,
    prey_fitness as prey_fitness,
    select as select,
    subset_size as subset_size,
)
from evojax_suite.systems.cest.config import (
    Config as Config,
    Params as Params,
    Selection as Selection,
)
