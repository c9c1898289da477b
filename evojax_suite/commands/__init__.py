"""What the command line runs: one module a system, from its options to its run directory."""
