"""What a system needs of a run: its options, and the parts that the one runner of all calls."""

from evojax_suite.reporting.comparison import Columns, Quantity, accuracy
from evojax_suite.reporting.report import Figure, Report, Table
from evojax_suite.running.options import JudgedRunOptions, RunOptions
from evojax_suite.running.system import Job, Phase, Search, Summary, System

__all__ = [
    "Columns",
    "Figure",
    "Job",
    "JudgedRunOptions",
    "Phase",
    "Quantity",
    "Report",
    "RunOptions",
    "Search",
    "Summary",
    "System",
    "Table",
    "accuracy",
]
