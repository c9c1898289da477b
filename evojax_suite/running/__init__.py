"""What a system needs of a run: its options, and the parts that the one runner of all calls."""

from evojax_suite.reporting.comparison import (
    Columns as Columns,
    Quantity as Quantity,
    accuracy as accuracy,
)
from evojax_suite.reporting.report import Figure as Figure, Report as Report, Table as Table
from evojax_suite.running.options import (
    JudgedRunOptions as JudgedRunOptions,
    RunOptions as RunOptions,
)
from evojax_suite.running.system import (
    Job as Job,
    Phase as Phase,
    Search as Search,
    Summary as Summary,
    System as System,
)
