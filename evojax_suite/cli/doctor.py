"""Print what this installation has: versions, devices, datasets, folders that can be written."""

from __future__ import annotations

import os
import platform
import sys
import tempfile
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import psutil

from evojax_suite.configuration import configuration
from evojax_suite.data import NAMES, cache
from evojax_suite.data.catalog import find_known
from evojax_suite.data.errors import DataError, first_line
from evojax_suite.data.loader import DATA_DIR_VARIABLE
from evojax_suite.data.local import find_local
from evojax_suite.networks import compiled
from evojax_suite.running.options import Command
from evojax_suite.runtime.resources import cores

PACKAGES = (
    "evojax-suite", "jax", "jaxlib", "flax", "optax", "evosax", "numpy", "scikit-learn",
    "tensorflow-datasets", "orbax-checkpoint", "tyro", "bokeh",
)  # fmt: skip


@configuration
class Options(Command):
    """Show versions, devices, the datasets that are found, and whether folders can be written."""

    data_dir: Path | None = None
    """Folder of the datasets; by default that in the environment variable EVOJAX_SUITE_DATA."""
    cache_data: bool = True
    """Keep the pixels of archives and folders of images, which are slow to read, in the user's
    cache folder."""
    runs_dir: Path = Path("runs")
    """Folder in which the directories of runs would be made."""


def _writable(folder: Path) -> str:
    """Returns ok, or why nothing can be written in `folder`, or the parent of it that exists."""
    existing = folder
    try:
        while not existing.exists() and existing != existing.parent:
            existing = existing.parent
        with tempfile.TemporaryFile(dir=existing):
            return f"ok, {psutil.disk_usage(str(existing)).free / 2**30:.1f} GiB free"
    except OSError as error:
        return f"cannot be written: {error.strerror}"


def _computes(device: Any) -> str:
    """Returns ok, or what failed in a small product on the device."""
    try:
        ones = jax.device_put(jnp.ones((64, 64)), device)
        return "ok" if float((ones @ ones)[0, 0]) == 64 else "a product came out wrong"
    except Exception as error:  # any failure is to be named
        return f"fails: {first_line(error)}"


def _found(name: str, data_dir: str | Path | None, cache_data: bool) -> str:
    known = find_known(name)
    if known is None or known.files == "bundled":
        return "bundled"
    if not data_dir:
        return f"no --data-dir and {DATA_DIR_VARIABLE} is not set"
    try:
        source = find_local(known, Path(os.path.expanduser(data_dir)), cache_data)
    except (DataError, OSError) as error:
        return str(error)
    if source is None:
        return "not there"
    sizes = ", ".join(f"{part} {len(split):,}" for part, split in source.parts.items())
    return f"{source.where}: {sizes}"


def run(options: Options) -> int:
    """Print the state of the installation; returns 2 if a part that every run needs is broken."""
    broken = False
    print(f"Python {platform.python_version()}, {sys.executable}")
    for package in PACKAGES:
        try:
            print(f"{package} {version(package)}")
        except PackageNotFoundError:
            print(f"{package} not installed")
    memory = f"{psutil.virtual_memory().total / 2**30:.1f} GiB of memory"
    print(f"{cores()} physical CPU cores for this process, {os.cpu_count()} logical ones, {memory}")
    compiler = " ".join(compiled.compiler() or ["none"])
    print(f"C++ compiler, for --convolution compiled: {compiler}")
    for device in jax.devices():
        state = _computes(device)
        broken |= state != "ok"
        print(f"device {device.id}: {device.device_kind} ({device.platform}), {state}")
    for title, folder in (
        ("runs", options.runs_dir),
        ("temporary files", Path(tempfile.gettempdir())),
        ("JAX's cache of programs", os.environ.get("JAX_COMPILATION_CACHE_DIR")),
    ):
        if folder:
            state = _writable(Path(folder).absolute())
            broken |= not state.startswith("ok")
            print(f"folder for {title}, {folder}: {state}")
    if options.cache_data:  # a run goes on without it
        print(f"folder for the cache of datasets, {cache.folder()}: {_writable(cache.folder())}")
    data_dir = options.data_dir or os.environ.get(DATA_DIR_VARIABLE)
    print(f"datasets in {data_dir or 'no folder'}:")
    for name in NAMES:
        print(f"  {name}: {_found(name, data_dir, options.cache_data)}")
    return 2 if broken else 0
