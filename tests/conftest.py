"""Tests run on the CPU unless JAX_PLATFORMS says otherwise; tests marked `data` run where
EVOJAX_SUITE_DATA names a folder with the real datasets."""

from __future__ import annotations

import gc
import importlib
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from importlib.metadata import version
from pathlib import Path

import pytest
from jaxtyping import install_import_hook
from packaging.version import Version

os.environ.setdefault("JAX_PLATFORMS", "cpu")
# The workers of pytest share the cores, and what a test finds shall not depend on their number.
os.environ.setdefault("JAX_NUM_CPU_DEVICES", "1")

# Compiling takes longer than running here: two thirds of the time at the lowest level, half of that
# with the older way to compile fusions, which later versions do not have.
_FLAGS = os.environ.get("XLA_FLAGS", "")
if "xla_backend_optimization_level" not in _FLAGS:
    _FLAGS += " --xla_backend_optimization_level=0"
    if Version(version("jaxlib")) < Version("0.11"):
        _FLAGS += " --xla_cpu_use_fusion_emitters=false"
    os.environ["XLA_FLAGS"] = _FLAGS

# No test sees the datasets that the user has in the cache, nor leaves its own there.
# matplotlib goes on with the user's list of fonts, which takes seconds to make.
_CACHE = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
os.environ.setdefault("MPLCONFIGDIR", os.path.join(_CACHE, "matplotlib"))
_DATASETS = os.environ["XDG_CACHE_HOME"] = tempfile.mkdtemp(prefix="evojax-suite-datasets-")

# Many tests compile the same programs: the processes of a session share them, and no session those
# of another.
_OWN_CACHE = None
if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
    _OWN_CACHE = tempfile.mkdtemp(prefix="evojax-suite-tests-")
    os.environ["JAX_COMPILATION_CACHE_DIR"] = _OWN_CACHE
    os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.1")

# Here alone, not for users: `shape_checks` says what is checked.
install_import_hook("evojax_suite", "shape_checks.checked")


def pytest_unconfigure():
    for folder in filter(None, (_OWN_CACHE, _DATASETS)):
        shutil.rmtree(folder, ignore_errors=True)


def pytest_collection_finish():
    """What was imported stays: the garbage collector looks at the rest, and less often, which saves
    a fifteenth of the time."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(100_000, 50, 100)


def pytest_collection_modifyitems(items):
    if os.environ.get("EVOJAX_SUITE_DATA"):
        return
    for item in items:
        if item.get_closest_marker("data"):
            item.add_marker(pytest.mark.skip(reason="EVOJAX_SUITE_DATA is not set"))


@pytest.fixture(scope="module", autouse=True)
def _compiled_programs_are_dropped():
    """After each module: a process may hold 65,530 mappings (`vm.max_map_count`), and those of all
    modules together are more; the next program then ends it with a segmentation fault."""
    yield
    import jax

    jax.clear_caches()


@pytest.fixture(scope="module")
def import_script():
    """Imports a script below experiments/, beside which it finds its neighbours as it does when it
    is run; the next module of tests does not see it."""
    experiments = Path(__file__).parents[1] / "experiments"

    def script(name: str):
        path = experiments / name
        patch.syspath_prepend(path.parent)
        return importlib.import_module(path.stem)

    with pytest.MonkeyPatch.context() as patch:
        yield script
    for name, module in list(sys.modules.items()):
        if str(getattr(module, "__file__", None)).startswith(str(experiments)):
            del sys.modules[name]


@pytest.fixture
def small_disk(tmp_path):
    """A folder on a disk of its own of 64 kB; where mounting is not allowed the test is skipped."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mounting = ["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(folder)]
    try:
        if subprocess.run(mounting, capture_output=True).returncode:
            pytest.skip("mounting is not allowed here")
    except FileNotFoundError:
        pytest.skip("there is no mount here")
    try:
        yield folder
    finally:
        subprocess.run(["umount", "--lazy", str(folder)], check=True)


@pytest.fixture
def run_until_killed():
    """A function of a command's arguments, a file and a number of lines: it runs the command in
    another process and kills that, by SIGKILL, as soon as the file has so many lines."""

    def run(arguments, path, lines):
        process = subprocess.Popen(
            [sys.executable, "-m", "evojax_suite", *arguments], stderr=subprocess.DEVNULL
        )
        deadline = time.monotonic() + 120
        while not path.exists() or path.read_bytes().count(b"\n") < lines:
            assert process.poll() is None, "the run ended before it was killed"
            assert time.monotonic() < deadline, "the run did not come that far"
            time.sleep(0.002)
        process.send_signal(signal.SIGKILL)
        assert process.wait() == -signal.SIGKILL

    return run
