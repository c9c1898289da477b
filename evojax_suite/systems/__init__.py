"""A folder for each system: what it evolves, and the run that its command does."""
