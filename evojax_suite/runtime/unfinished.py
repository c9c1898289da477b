"""What a step that is under way has evaluated, in files, so that a run which is stopped or killed
within a step goes on within it."""

from __future__ import annotations

import io
import time
import zipfile
from collections.abc import Callable
from pathlib import Path

import jax
import numpy as np

from evojax_suite.runtime import devices
from evojax_suite.runtime.results import write_atomically
from evojax_suite.types import PyTree


def _of(leaf: jax.ShapeDtypeStruct, number: int) -> tuple[int, ...]:
    return (number, *leaf.shape[1:])


class Unfinished:
    """The evaluations of groups of members in one step of a run, as `types.Kept`: a file for each
    group. Of several processes the first writes and reads, and sends the others what it reads."""

    def __init__(self, directory: Path, on_group: Callable[[int, float], None]):
        """directory: of the files of this step. on_group: called after each group, with the number
        of members that are evaluated and the seconds that one of the group took; what it raises
        ends the step."""
        self._directory, self._on_group = directory, on_group
        self._clock = 0.0
        self.seconds_before = 0.0
        """That the evaluations took which an earlier session of the run has left."""

    def _path(self, first: int, end: int) -> Path:
        return self._directory / f"{first}-{end}.npz"

    def _read(self, first: int, end: int, like: PyTree) -> tuple[PyTree, float] | None:
        shapes, structure = jax.tree.flatten(like)
        try:
            with np.load(self._path(first, end)) as file:
                leaves = [file[f"arr_{i}"] for i in range(len(shapes))]
                seconds = float(file["seconds"])
        except (OSError, EOFError, ValueError, KeyError, zipfile.BadZipFile):  # none, or damaged
            return None
        expected = [(_of(shape, end - first), shape.dtype) for shape in shapes]
        if [(leaf.shape, leaf.dtype) for leaf in leaves] != expected:
            return None
        return jax.tree.unflatten(structure, leaves), seconds

    def get(self, first: int, end: int, like: PyTree) -> PyTree | None:
        found = self._read(first, end, like) if devices.is_first() else None
        if not devices.from_first(np.array(found is not None)):
            self._clock = time.perf_counter()
            return None
        if found is None:
            nothing = jax.tree.map(lambda leaf: np.zeros(_of(leaf, end - first), leaf.dtype), like)
            found = nothing, 0.0
        evaluations, seconds = devices.from_first(found)
        self.seconds_before += float(seconds)
        self._on_group(end, float(seconds) / (end - first))
        return evaluations

    def add(self, first: int, end: int, evaluations: PyTree) -> None:
        seconds = time.perf_counter() - self._clock
        if devices.is_first():
            buffer = io.BytesIO()
            np.savez(buffer, *jax.tree.leaves(evaluations), seconds=seconds)
            self._directory.mkdir(parents=True, exist_ok=True)
            write_atomically(self._path(first, end), buffer.getvalue())
        self._on_group(end, seconds / (end - first))
