"""Evolutionary operators: pure functions of arrays, the key first."""

from evojax_suite.operators.crossover import LaplaceSign, laplace_crossover
from evojax_suite.operators.selection import (
    check_shares,
    class_shares,
    highest_scores,
    truncation,
    uniform_parents,
)

__all__ = [
    "LaplaceSign",
    "check_shares",
    "class_shares",
    "highest_scores",
    "laplace_crossover",
    "truncation",
    "uniform_parents",
]
