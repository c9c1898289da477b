"""What an index would be given: the archives, and the package in an environment of its own."""

from __future__ import annotations

import email
import os
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

import evojax_suite

ROOT = Path(__file__).parents[1]


def run(*command: str | Path, cwd: Path) -> str:
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run(
        [*map(str, command)], cwd=cwd, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def archives(tmp_path_factory):
    """The source distribution of the tracked files, and the wheel that is built from it."""
    place = tmp_path_factory.mktemp("build")
    names = ["evojax_suite", "pyproject.toml", "README.md", "LICENSE", "tests"]
    for name in names:
        copy = shutil.copytree if (ROOT / name).is_dir() else shutil.copy
        copy(ROOT / name, place / name)
    run(sys.executable, "-m", "build", "--no-isolation", cwd=place)
    return next(place.glob("dist/*.tar.gz")), next(place.glob("dist/*.whl"))


def test_the_archives_hold_the_package_and_its_metadata(archives):
    source, wheel = archives
    modules = {path.relative_to(ROOT).as_posix() for path in ROOT.glob("evojax_suite/**/*.py")}
    modules.add("evojax_suite/py.typed")
    assert modules
    with zipfile.ZipFile(wheel) as file:
        names = set(file.namelist())
        inside = {name for name in names if ".dist-info/" not in name}
        about = email.message_from_bytes(
            file.read(next(name for name in names if name.endswith("METADATA")))
        )
    assert modules <= inside
    assert not [name for name in inside if "test" in name or not name.startswith("evojax_suite/")]
    assert about["Version"] == evojax_suite.__version__
    assert about["License-Expression"] == "Apache-2.0"
    assert "gpu" in about.get_all("Provides-Extra")
    assert "evolution" in about.get_payload()
    with tarfile.open(source) as file:
        within = {name.partition("/")[2] for name in file.getnames()}
    assert modules | {"LICENSE", "README.md", "pyproject.toml"} <= within


def test_the_wheel_runs_in_an_environment_of_its_own(archives, tmp_path):
    """The libraries are lent from this one; the checkout is not."""
    run(sys.executable, "-m", "venv", "--without-pip", "fresh", cwd=tmp_path)
    python = tmp_path / "fresh/bin/python"
    install = "-m", "pip", "--python", python, "install", "--no-deps", "--no-index", "-q"
    run(sys.executable, *install, archives[1], cwd=tmp_path)
    site = next(tmp_path.glob("fresh/lib/python*/site-packages"))
    lent = [path for path in sys.path if path.endswith("site-packages")]
    (site / "lent.pth").write_text("\n".join(lent))
    where = "import evojax_suite; print(evojax_suite.__file__)"
    assert run(python, "-c", where, cwd=tmp_path).startswith(str(site))
    said = run(tmp_path / "fresh/bin/evojax-suite", "--version", cwd=tmp_path)
    assert evojax_suite.__version__ in said
