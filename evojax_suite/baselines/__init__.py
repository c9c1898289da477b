"""What the papers compare with: pure selections, usable alone."""
