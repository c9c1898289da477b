"""Evolutionary operators: pure functions of arrays, the key first."""

from evojax_suite.operators.crossover import LaplaceSign, laplace_crossover
from evojax_suite.operators.selection import (
    check_shares,
    class_shares,
    crowding_distances,
    highest_scores,
    non_dominated_ranks,
    random_examples,
    tournament,
    truncation,
    uniform_parents,
)

__all__ = [
    "LaplaceSign",
    "check_shares",
    "class_shares",
    "crowding_distances",
    "highest_scores",
    "laplace_crossover",
    "non_dominated_ranks",
    "random_examples",
    "tournament",
    "truncation",
    "uniform_parents",
]
