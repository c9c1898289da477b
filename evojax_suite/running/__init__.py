"""What a system needs of a run: its options, and the parts that the one runner of all calls."""

from evojax_suite.running.options import JudgedRunOptions, RunOptions
from evojax_suite.running.system import Job, Phase, Search, Summary, System

__all__ = ["Job", "JudgedRunOptions", "Phase", "RunOptions", "Search", "Summary", "System"]
