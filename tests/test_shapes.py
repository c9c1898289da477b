"""Annotated shapes are checked in these tests."""

from __future__ import annotations

import jax.numpy as jnp
import pytest
from jaxtyping import TypeCheckError

from evojax_suite.operators import truncation


def test_a_wrong_shape_is_refused():
    with pytest.raises(TypeCheckError, match=r"fitness"):
        truncation(jnp.zeros((2, 3)), 1)
