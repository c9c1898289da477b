"""Examples in docstrings are true."""

from __future__ import annotations

import doctest
import importlib
import inspect
from pathlib import Path

import pytest

import evojax_suite

ROOT = Path(evojax_suite.__file__).parent
MODULES = sorted(
    ".".join(("evojax_suite", *path.relative_to(ROOT).with_suffix("").parts)).removesuffix(
        ".__init__"
    )
    for path in ROOT.rglob("*.py")
    if ">>>" in path.read_text()
)
SYSTEMS = [f".systems.{path.parent.name}" for path in ROOT.glob("systems/*/__init__.py")]


class Finder(doctest.DocTestFinder):
    """Finds functions in the module in which they are written, not in that which checks shapes."""

    def _from_module(self, module, object):
        return super()._from_module(module, inspect.unwrap(object))


@pytest.mark.parametrize("name", MODULES)
def test_examples(name):
    runner = doctest.DocTestRunner()
    for example in Finder().find(importlib.import_module(name)):
        runner.run(example)
    assert runner.tries
    assert not runner.failures


@pytest.mark.parametrize(
    "name", ["", ".data", ".networks", ".operators", ".running", ".strategies", *SYSTEMS]
)
def test_packages_name_what_they_give(name):
    package = importlib.import_module(f"evojax_suite{name}")
    names = package.__all__
    for each in names:
        if not hasattr(package, each):
            importlib.import_module(f"evojax_suite{name}.{each}")
