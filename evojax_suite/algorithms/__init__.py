"""One module a paper, all of one shape: Config, Params, State, Metrics and `build`."""

__all__ = ["cest", "de_nas", "devs", "ecomp", "ga_distillation", "predator_prey"]
