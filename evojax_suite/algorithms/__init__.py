"""One module a paper, all of one shape: Config, Params, State, Metrics and `build`."""

from evojax_suite.algorithms import cest, de_nas, devs, ecomp, ga_distillation, predator_prey

__all__ = ["cest", "de_nas", "devs", "ecomp", "ga_distillation", "predator_prey"]
