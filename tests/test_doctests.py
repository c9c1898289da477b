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
