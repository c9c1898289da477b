"""One module a paper, all of one shape: Config, Params, State, Metrics and `build`."""
