"""What any run needs: the loop, checkpoints, devices, the files of a run; no system, no report."""
