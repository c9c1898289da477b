"""What people see of a run: progress, loggers, charts, pages, comparisons."""
