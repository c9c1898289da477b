"""The options that runs share, and the runner of all systems."""
