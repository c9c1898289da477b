"""Evolutionary operators: pure functions of arrays, the key first."""

from evojax_suite.operators.crossover import (
    LaplaceSign as LaplaceSign,
    laplace_crossover as laplace_crossover,
)
from evojax_suite.operators.selection import (
    check_shares as check_shares,
    class_shares as class_shares,
    crowding_distances as crowding_distances,
    highest_scores as highest_scores,
    non_dominated_ranks as non_dominated_ranks,
    random_examples as random_examples,
    tournament as tournament,
    truncation as truncation,
    uniform_parents as uniform_parents,
)
