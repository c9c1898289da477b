"""`python -m evojax_suite` is the command `evojax-suite`."""

from evojax_suite.cli.main import run

run()
