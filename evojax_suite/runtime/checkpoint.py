"""Checkpoints of the state of a run, with Orbax."""

from __future__ import annotations

import contextlib
import gc
import hashlib
import io
import logging
import re
import shutil
from collections.abc import Callable, Generator
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


def _innermost(message: str) -> str:
    """Returns what an error of TensorStore says of the last file that it names, or the first
    sentence of another error."""
    text = re.sub(r" \[(tensorstore_spec|source locations).*", "", message.splitlines()[0])
    files = [*re.finditer(r"local file \"[^\"]*?([^/\"]+)/?\": ", text)]
    return f"{files[-1][1]}: {text[files[-1].end() :]}" if files else text.split(". ")[0]


@contextlib.contextmanager
def _silent() -> Generator[None]:
    """Drops what a failed restoration leaves behind: Orbax closes its event loop at the first
    error, and the other reads, which TensorStore ends later, print a traceback each."""
    log = logging.getLogger("asyncio")
    level = log.level
    try:
        log.setLevel(logging.CRITICAL + 1)
        with contextlib.redirect_stderr(io.StringIO()):
            try:
                yield
            except Exception:
                gc.collect()  # tasks whose exceptions nobody has asked for
                raise
    finally:
        log.setLevel(level)


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

    def newest(self, like: PyTree, on_note: Callable[[str], None]) -> tuple[int, PyTree]:
        """Returns the newest step whose state can be restored, and the state; 0 and `like` if there
        is no checkpoint. Moves damaged ones that are newer beside the directory; `on_note` is
        called with a sentence about each. Raises DamagedCheckpoint, and moves none, where all are
        damaged."""
        damaged: dict[int, DamagedCheckpoint] = {}
        for step in sorted(self._manager.all_steps() if self._manager else [], reverse=True):
            try:
                state = self.restore(step, like)
            except DamagedCheckpoint as damage:
                damaged[step] = damage
                continue
            for later, damage in damaged.items():
                aside = self._moved_aside(later)
                on_note(f"{damage}; moved to {aside}, the run goes on from {step}")
            return step, state
        if damaged:
            each = "; ".join(map(str, damaged.values()))
            none = "no other is left to go on from, --restart begins anew"
            raise DamagedCheckpoint(f"{self._directory}: {each}; {none}")
        return 0, like

    def _moved_aside(self, step: int) -> Path:
        assert self._manager is not None
        aside = self._directory.with_name(f"damaged-checkpoint-{step}")
        shutil.rmtree(aside, ignore_errors=True)
        (self._directory / str(step)).rename(aside)
        self._manager.reload()
        return aside

    def restore(self, step: int, like: PyTree) -> PyTree:
        """Returns the state of `step`, in the form of `like`. Raises DamagedCheckpoint."""
        assert self._manager is not None
        described = jax.device_get(like) if self._shared else like
        abstract = jax.tree.map(
            lambda leaf: ocp.utils.to_shape_dtype_struct(leaf) if leaf.size else None, described
        )
        abstract = {"state": abstract, "digest": np.zeros(4, np.uint32)}
        try:
            with _silent():
                saved = self._manager.restore(step, args=ocp.args.StandardRestore(abstract))
        except Exception as error:  # whatever each layer below raises
            reason = _innermost(str(error))
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
