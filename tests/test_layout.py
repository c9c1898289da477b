"""Imports flow one way, and no list of systems is kept anywhere but in their folders."""

from __future__ import annotations

import ast
import importlib
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest

import evojax_suite
from evojax_suite import systems

PACKAGE = Path(evojax_suite.__file__).parent
# Each row may import itself and the rows before it.
ROWS = (
    ("types", "imports", "inference", "configuration", "names"),
    ("operators",),
    ("data",),
    ("strategies", "networks", "training"),
    ("proxy_network", "runtime"),
    ("distilled", "robust_scores", "exports"),
    ("reporting",),
    ("running",),
    ("systems",),
    ("problems",),
    ("cli", "__main__"),
)
LEVEL = {part: level for level, row in enumerate(ROWS) for part in row}


def imports(file: Path) -> Iterator[tuple[str, ...]]:
    """The modules of the package that a file imports, as their parts below `evojax_suite`."""
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("evojax_suite"):
            inside = node.module.split(".")[1:]
            for name in node.names:
                full = [*inside, name.name]
                place = PACKAGE.joinpath(*full)
                is_module = place.is_dir() or place.with_suffix(".py").exists()
                found = full if is_module else inside
                if found:
                    yield tuple(found)
        elif isinstance(node, ast.Import):
            yield from (
                tuple(name.name.split(".")[1:])
                for name in node.names
                if name.name.startswith("evojax_suite.")
            )


FILES = {
    file.relative_to(PACKAGE).with_suffix("").parts: file
    for file in PACKAGE.rglob("*.py")
    if file.relative_to(PACKAGE).parts != ("__init__.py",)
}


@pytest.mark.parametrize("module", FILES, ids=".".join)
def test_imports_flow_one_way(module):
    for imported in imports(FILES[module]):
        assert LEVEL[imported[0]] <= LEVEL[module[0]], f"{'.'.join(imported)} lies above"


def test_every_part_has_its_row():
    assert {module[0] for module in FILES} == set(LEVEL)


def test_no_module_imports_itself_in_a_circle():
    """By modules: a system may use another, but not both each other."""
    graph = {
        module: {
            target
            for imported in imports(file)
            for target in (imported, (*imported, "__init__"))
            if target in FILES and target != module
        }
        for module, file in FILES.items()
    }
    done: set[tuple[str, ...]] = set()

    def visit(module, path):
        assert module not in path, " -> ".join(".".join(one) for one in (*path, module))
        if module not in done:
            for other in graph[module]:
                visit(other, (*path, module))
            done.add(module)

    for module in graph:
        visit(module, ())


SCRIPTS = sorted(PACKAGE.parent.glob("experiments/**/*.py"))


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: f"{path.parent.name}/{path.stem}")
def test_scripts_use_names_that_exist(script):
    """What a script imports of the package, and what it uses of the modules that it imports."""
    nodes = list(ast.walk(ast.parse(script.read_text())))
    modules: dict[str, ModuleType] = {}
    for node in nodes:
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("evojax_suite"):
            for name in node.names:
                origin = importlib.import_module(node.module)
                if not hasattr(origin, name.name):
                    importlib.import_module(f"{node.module}.{name.name}")
                if isinstance(value := getattr(origin, name.name), ModuleType):
                    modules[name.asname or name.name] = value
    for node in nodes:
        if isinstance(node, ast.Attribute) and ast.unparse(node.value) in modules:
            assert hasattr(modules[ast.unparse(node.value)], node.attr), ast.unparse(node)


def test_the_public_names_are_the_systems():
    folders = {path.parent.name for path in PACKAGE.glob("systems/*/experiment.py")}
    assert folders == {
        name for name in evojax_suite.__all__ if (PACKAGE / "systems" / name).is_dir()
    }
    for name in folders:
        module = getattr(evojax_suite, name)
        assert module.__name__ == f"evojax_suite.systems.{name}"
    found = systems.find()
    assert len(found) >= len(folders)
    assert all(command == system.command for command, system in found.items())
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = evojax_suite.nothing
