"""Metrics for TensorBoard and Weights & Biases as they come; metrics.jsonl has them anyway."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

from evojax_suite.data.errors import first_line
from evojax_suite.runtime.loop import StepReport

Logger = Literal["tensorboard", "wandb"]
_MODULES: dict[Logger, str] = {"tensorboard": "tensorboardX", "wandb": "wandb"}


def check(names: Sequence[Logger]) -> None:
    """Raise ValueError where what a logger needs is not there."""
    for name in names:
        if importlib.util.find_spec(_MODULES[name]) is None:
            raise ValueError(f"logger {name} needs: pip install 'evojax-suite[{name}]'")
    if "wandb" in names and os.environ.get("WANDB_MODE", "online") == "online":
        import wandb
        from wandb.errors import Error

        try:
            wandb.Api()
        except Error as error:
            raise ValueError(
                f"logger wandb: {first_line(error)} WANDB_MODE=offline needs no login"
            ) from None


def _numbers(row: dict[str, Any]) -> dict[str, float]:
    return {
        name: value
        for name, value in row.items()
        if isinstance(value, int | float) and name != "generation"
    }


@contextmanager
def logged(
    names: Sequence[Logger], directory: Path, settings: dict
) -> Iterator[Callable[[StepReport], None]]:
    """Give a function that logs a report; directory: of the run, which names it."""
    writer = run = None

    def log(report: StepReport) -> None:
        nonlocal writer, run
        for row in report.rows:
            step, numbers = int(row["generation"]), _numbers(row)
            if "tensorboard" in names:
                from tensorboardX import SummaryWriter

                # What an interrupted run logged after its checkpoint is done again.
                writer = writer or SummaryWriter(
                    str(directory / "tensorboard"), purge_step=step, flush_secs=10
                )
                for name, value in numbers.items():
                    writer.add_scalar(name, value, step)
            if "wandb" in names:
                import wandb

                run = run or wandb.init(
                    project="evojax_suite",
                    name=directory.name,
                    dir=directory,
                    config=settings,
                    reinit="create_new",
                )
                run.log(numbers, step=step)

    try:
        yield log
    finally:
        if writer is not None:
            writer.close()
        if run is not None:
            run.finish()
