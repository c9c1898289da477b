"""Evolutionary operators: pure functions of arrays, the key first."""

from evojax_suite.operators.crossover import LaplaceSign, laplace_crossover
from evojax_suite.operators.selection import truncation, uniform_parents

__all__ = ["LaplaceSign", "laplace_crossover", "truncation", "uniform_parents"]
