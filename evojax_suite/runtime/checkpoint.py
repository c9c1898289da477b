"""Checkpoints of the state of a run, with Orbax."""

from __future__ import annotations

import contextlib
import hashlib
import logging
import shutil
from collections.abc import Generator
from pathlib import Path

import jax
import numpy as np
import orbax.checkpoint as ocp

from evojax_suite.types import PyTree


class DamagedCheckpoint(ValueError):
    """A checkpoint cannot be read, or is not what was written."""


def _digest(state: PyTree) -> np.ndarray:
    """Returns a digest (4,) of the bytes of a state: storage may return others without an error."""
    digest = hashlib.blake2b(digest_size=16)
    for leaf in jax.tree.leaves(state):
        digest.update(np.asarray(leaf).tobytes())
    return np.frombuffer(digest.digest(), np.uint32)


class Checkpoints:
    """The newest states of a run in `directory`. A state that was not written to its end never
    counts, and one that was damaged later is moved aside. Of several processes the first alone
    writes and reads, and sends the state to the others (`devices.from_first`)."""

    def __init__(self, directory: Path, max_to_keep: int = 2):
        self._manager = None
        if jax.process_index() > 0:
            return
        self._shared = jax.process_count() > 1
        self._directory = directory.absolute()
        self._directory.mkdir(parents=True, exist_ok=True)
        active = ocp.options.MultiprocessingOptions(active_processes={0} if self._shared else None)
        options = ocp.CheckpointManagerOptions(
            max_to_keep=max_to_keep, create=False, multiprocessing_options=active
        )
        self._manager = ocp.CheckpointManager(self._directory, options=options)

    @property
    def latest(self) -> int | None:
        """The newest complete step, or None."""
        return self._manager.latest_step() if self._manager else None

    def save(self, step: int, state: PyTree) -> None:
        """Start to write `state`; returns before it is on disk."""
        if self._manager is None:
            return
        filled = jax.tree.map(lambda leaf: leaf if leaf.size else None, state)  # Orbax's limit
        on_host = jax.device_get(filled)
        # Orbax expects that arrays on devices are spread over all processes.
        saved = {"state": on_host if self._shared else filled, "digest": _digest(on_host)}
        with self._saving():
            self._manager.save(step, args=ocp.args.StandardSave(saved))

    def newest(self, like: PyTree) -> tuple[int, PyTree]:
        """Returns the newest step whose state can be restored, and the state; 0 and `like` if there
        is none. Moves damaged checkpoints beside the directory, with a warning."""
        while self._manager and (step := self._manager.latest_step()) is not None:
            try:
                return step, self.restore(step, like)
            except DamagedCheckpoint as damage:
                aside = self._directory.with_name(f"damaged-checkpoint-{step}")
                shutil.rmtree(aside, ignore_errors=True)
                (self._directory / str(step)).rename(aside)
                self._manager.reload()
                logging.getLogger(__name__).warning("%s; moved to %s", damage, aside)
        return 0, like

    def restore(self, step: int, like: PyTree) -> PyTree:
        """Returns the state of `step`, in the form of `like`. Raises DamagedCheckpoint."""
        assert self._manager is not None
        described = jax.device_get(like) if self._shared else like
        abstract = jax.tree.map(
            lambda leaf: ocp.utils.to_shape_dtype_struct(leaf) if leaf.size else None, described
        )
        abstract = {"state": abstract, "digest": np.zeros(4, np.uint32)}
        try:
            saved = self._manager.restore(step, args=ocp.args.StandardRestore(abstract))
        except Exception as error:  # whatever each layer below raises
            reason = str(error).splitlines()[0].split(". ")[0]
            raise DamagedCheckpoint(f"checkpoint {step} cannot be read: {reason}") from None
        if (_digest(saved["state"]) != np.asarray(saved["digest"])).any():
            raise DamagedCheckpoint(f"checkpoint {step} is not what was written")
        return jax.tree.map(lambda old, new: new if old.size else old, like, saved["state"])

    def close(self) -> None:
        """Wait until everything is on disk."""
        if self._manager:
            with self._saving():
                self._manager.wait_until_finished()
                self._manager.close()

    @contextlib.contextmanager
    def _saving(self) -> Generator[None]:
        """Raises OSError for a failed save, which Orbax reports at the next call."""
        try:
            yield
        except (OSError, ValueError, RuntimeError) as error:
            reason = str(error).splitlines()[0]
            reason = "no space is left" if "No space left" in str(error) else reason
            rest = f"{reason}; --resume goes on from step {self.latest or 0}"
            raise OSError(f"{self._directory}: the state cannot be saved: {rest}") from None
