"""Shapes in annotations are checked in the tests, and say what is so."""

from __future__ import annotations

import importlib
import inspect
import pkgutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jaxtyping import TypeCheckError
from shape_checks import misfits, shapes

import evojax_suite
from evojax_suite.operators import crowding_distances, truncation
from evojax_suite.strategies.block_es import averaged
from evojax_suite.systems.ga_distillation import Individual
from evojax_suite.training import EngineConfig, ExampleStatistics

MODULES = [
    module.name
    for module in pkgutil.walk_packages(evojax_suite.__path__, "evojax_suite.")
    if not module.name.endswith("__main__")
]


def test_wrong_shapes_are_refused():
    with pytest.raises(TypeCheckError, match="parameter 'fitness'"):
        truncation(jnp.zeros((3, 2)), 1)
    with pytest.raises(TypeCheckError, match="return value"):
        truncation(jnp.zeros(3), 4)  # as many as there are come back
    with pytest.raises(TypeCheckError, match="parameter 'ranks'"):
        crowding_distances(jnp.zeros((3, 2)), jnp.zeros(4, jnp.int32))
    with pytest.raises(TypeCheckError, match="parameter 'latest'"):
        jax.jit(averaged)(jnp.zeros((3, 2)), jnp.zeros(3), 1)


def test_wrong_types_of_numbers_are_refused():
    with pytest.raises(TypeCheckError, match="parameter 'ranks'"):
        crowding_distances(jnp.zeros((3, 2)), jnp.zeros(3))


def test_right_shapes_are_not():
    np.testing.assert_array_equal(truncation(np.array([2.0, 1.0]), 1), [1])
    mapped = jax.vmap(lambda fitness: truncation(fitness, 1))(jnp.eye(3))
    np.testing.assert_array_equal(mapped, [[1], [0], [0]])


def test_all_else_in_annotations_is_left_to_the_functions():
    with pytest.raises(ValueError, match="members_in_flight must be"):
        EngineConfig(members_in_flight="3")  # pyright: ignore


def test_fields_that_do_not_fit_are_named():
    images, labels = jnp.zeros((3, 8, 8, 1)), jnp.zeros((3, 10))
    assert misfits(Individual(images, labels)) == []
    assert len(misfits(Individual(images, labels[1:]))) == 1
    (found,) = misfits((ExampleStatistics(jnp.zeros(3), jnp.zeros(3)),), "seen")
    assert found.startswith("seen[0].correct is float32(3,), annotated")


@pytest.mark.parametrize("name", MODULES)
def test_annotations_are_read(name):
    """One that cannot be evaluated would not be checked, without a word."""
    module = importlib.import_module(name)
    for value in vars(module).values():
        if getattr(value, "__module__", None) == name:
            members = [value]
            if inspect.isclass(value):  # but for its constructor, which is not checked
                members += [each for key, each in vars(value).items() if key != "__init__"]
            for each in map(inspect.unwrap, members):
                if getattr(each, "__module__", None) == name and callable(each):
                    shapes(each)
