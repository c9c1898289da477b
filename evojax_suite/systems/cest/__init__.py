"""Training on subsets of examples that coevolve with the network (CEST, Ryan et al. 2024)."""

from evojax_suite.systems.cest import predator_prey, subsets
from evojax_suite.systems.cest.algorithm import (
    Data,
    Metrics,
    State,
    build,
    cost_seconds,
    epochs_of_equal_gradients,
    evolve,
    make_data,
    num_gradient_examples,
    prey_fitness,
    select,
    subset_size,
)
from evojax_suite.systems.cest.config import Config, Params, Selection

__all__ = [
    "Config",
    "Data",
    "Metrics",
    "Params",
    "Selection",
    "State",
    "build",
    "cost_seconds",
    "epochs_of_equal_gradients",
    "evolve",
    "make_data",
    "num_gradient_examples",
    "predator_prey",
    "prey_fitness",
    "select",
    "subset_size",
    "subsets",
]
