"""Tests run on the CPU unless JAX_PLATFORMS says otherwise; tests marked `data` run where
EVOJAX_SUITE_DATA names a folder with the real datasets."""

from __future__ import annotations

import os

import pytest

os.environ.setdefault("JAX_PLATFORMS", "cpu")


def pytest_collection_modifyitems(items):
    if os.environ.get("EVOJAX_SUITE_DATA"):
        return
    for item in items:
        if item.get_closest_marker("data"):
            item.add_marker(pytest.mark.skip(reason="EVOJAX_SUITE_DATA is not set"))
