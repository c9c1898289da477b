"""How a run is shown: progress, loggers, charts, pages, comparisons."""
