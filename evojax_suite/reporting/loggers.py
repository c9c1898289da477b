"""Loggers that send metrics to TensorBoard and Weights & Biases; metrics.jsonl has them anyway."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

from evojax_suite.data.errors import first_line
from evojax_suite.runtime.loop import StepReport

Logger = Literal["tensorboard", "wandb"]
_MODULES: dict[Logger, str] = {"tensorboard": "tensorboardX", "wandb": "wandb"}


def check(names: Sequence[Logger]) -> None:
    """Raises ValueError if a package or a login that a logger needs is missing."""
    for name in names:
        if importlib.util.find_spec(_MODULES[name]) is None:
            raise ValueError(f"logger {name} needs: pip install 'evojax-suite[{name}]'")
    if "wandb" in names and os.environ.get("WANDB_MODE", "online") == "online":
        import wandb
        from wandb.errors import Error

        try:
            wandb.Api()
        except Error as error:
            hint = "WANDB_MODE=offline needs no login"
            raise ValueError(f"logger wandb: {first_line(error)} {hint}") from None


@contextmanager
def logged(
    names: Sequence[Logger], directory: Path, settings: dict[str, Any]
) -> Generator[Callable[[StepReport], None]]:
    """Yields a function that logs a report. directory: the folder of the run, whose name it has."""
    writer = run = None

    def log(report: StepReport) -> None:
        nonlocal writer, run
        for row in report.rows:
            step = int(row["generation"])
            numbers = dict(row)
            del numbers["generation"]
            if "tensorboard" in names:
                from tensorboardX import SummaryWriter

                # Steps that an interrupted run logged after its checkpoint are done again.
                folder = str(directory / "tensorboard")
                writer = writer or SummaryWriter(folder, purge_step=step, flush_secs=10)
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
