"""The loop of any run, with its checkpoints, devices and files; no system, no report."""
