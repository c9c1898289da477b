"""Save and restore the state of a run with Orbax."""

from __future__ import annotations

from pathlib import Path

import jax
import orbax.checkpoint as ocp

from evojax_suite.types import PyTree


class Checkpoints:
    """The newest states of a run in `directory`; one not written to its end never counts.

    Of several processes the first alone writes and reads; the others find nothing here
    (`devices.from_first`).
    """

    def __init__(self, directory: Path, max_to_keep: int = 2):
        self._manager = None
        if jax.process_index() > 0:
            return
        self._shared = jax.process_count() > 1
        directory.mkdir(parents=True, exist_ok=True)
        self._manager = ocp.CheckpointManager(
            directory.absolute(),
            options=ocp.CheckpointManagerOptions(
                max_to_keep=max_to_keep,
                create=False,
                multiprocessing_options=ocp.options.MultiprocessingOptions(
                    active_processes={0} if self._shared else None
                ),
            ),
        )

    @property
    def latest(self) -> int | None:
        """The newest complete step, None where there is none."""
        return self._manager.latest_step() if self._manager else None

    def save(self, step: int, state: PyTree) -> None:
        """Start to write `state`; returns before it is on disk."""
        if self._manager is None:
            return
        filled = jax.tree.map(lambda leaf: leaf if leaf.size else None, state)  # Orbax's limit
        if self._shared:  # else Orbax expects arrays that are spread over the processes
            filled = jax.device_get(filled)
        self._manager.save(step, args=ocp.args.StandardSave(filled))

    def restore(self, step: int, like: PyTree) -> PyTree:
        """The state of `step`, with the structure, shapes and types of `like`."""
        if self._manager is None:
            return like
        described = jax.device_get(like) if self._shared else like
        abstract = jax.tree.map(
            lambda leaf: ocp.utils.to_shape_dtype_struct(leaf) if leaf.size else None, described
        )
        restored = self._manager.restore(step, args=ocp.args.StandardRestore(abstract))
        return jax.tree.map(lambda empty, leaf: leaf if empty.size else empty, like, restored)

    def close(self) -> None:
        """Wait until everything is on disk."""
        if self._manager:
            self._manager.wait_until_finished()
            self._manager.close()
