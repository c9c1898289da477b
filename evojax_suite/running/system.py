"""What a system tells the runner, and what the command line, comparisons and progress know of it.

A run of any system has four parts, each a function of the system:

1. `prepare(options, dataset, directory)` settles the options, checks them and returns a `Job`.
2. `search(job)` is a generator. It yields a `Phase` for each loop that it needs, receives the
   `LoopResult` of that loop, and returns whatever `finish` wants.
3. `finish(job, result, test_split)` writes the artefacts, judges them on the test split and returns
   a summary. It is the only part that is given the test split: the dataset of a job has none.
4. `present(job, summary)` returns the `Report` of the run, or None where it has no page.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Generic, Protocol, TypeVar

from evojax_suite.data import some_images
from evojax_suite.reporting.comparison import Columns
from evojax_suite.reporting.report import Report
from evojax_suite.running.options import RunOptions
from evojax_suite.runtime.loop import LoopResult
from evojax_suite.types import AnyAlgorithm, Array, Dataset, PyTree, Split

_DRY_RUN_OPERATIONS = 5e10  # of an epoch, a few seconds on a core


@dataclass(frozen=True)
class Phase:
    """A loop of a run: `num_steps` steps of an algorithm."""

    title: str
    algorithm: AnyAlgorithm
    key: Array
    params: PyTree
    data: PyTree
    num_steps: int
    folder: str = "."
    """Where its files lie, below the directory of the run."""
    steps_per_call: int = 1
    """Steps of a compiled call, where the algorithm is scannable."""
    members_per_step: int = 0
    """Members that a step evaluates, for the pace that progress shows; 0 shows none."""
    same_for_seeds: bool = False
    """Whether the algorithm is scannable and the same for every seed: phases whose params and data
    are equal too may then go on in one program."""
    records_resources: bool = False
    """Whether processor and memory are written to resources.jsonl."""
    dry_run_steps: int = 3
    """Largest number of steps that a dry run does."""
    dry_run_factor: float = 1.0
    """How many times as long a step of the run is as one of the dry run, which may have fewer
    members or images. Compilation that the step reports as a stage takes as long in both."""
    dry_run_at_once: int = 1
    """How many steps the run does at once where the dry run does one after the other."""
    dry_run_like: float | None = None
    """How many times as long a step takes as one of the run's first loop, compilation aside. A dry
    run then leaves the loop out, and the search receives the result of the first one. None has the
    loop done."""


def part_for_dry_run(dataset: Dataset, work: float, batch_size: int) -> tuple[Dataset, float]:
    """Returns a part of the training and validation images, on which an epoch takes some seconds,
    and how many times as long all of them take. work: the floating-point operations of the training
    on an image. The part has at least two batches."""
    num_images = len(dataset.train)
    least = max(2 * batch_size, dataset.num_classes, int(_DRY_RUN_OPERATIONS / max(work, 1.0)))
    if 2 * least > num_images:
        return dataset, 1.0
    times = num_images // least
    whole = len(dataset.validation)
    validation = max(1, whole // times) if whole else None
    return some_images(dataset, num_images // times, validation), float(times)


Search = Generator[Phase, LoopResult, Any]

OptionsT = TypeVar("OptionsT", bound=RunOptions, covariant=True)


@dataclass(frozen=True)
class Job(Generic[OptionsT]):
    """A run that can begin. Systems add what their search needs."""

    options: OptionsT
    """The options as `prepare` settled them, which config.json keeps."""
    dataset: Dataset
    """Without its test split."""
    directory: Path
    differences: dict[str, Any] | None = field(default=None, kw_only=True)
    """Settings that are not the paper's; None where there is no paper."""
    notes: tuple[str, ...] = field(default=(), kw_only=True)
    """Lines to say before it begins."""


class Summary(Protocol):
    """What `finish` returns."""

    @property
    def numbers(self) -> dict[str, Any]:
        """What summary.json holds of the run."""
        ...


@dataclass(frozen=True)
class System:
    """All that the rest of the package knows of a system."""

    name: str
    """The name of its folder, its runs and its command (with - in place of _)."""
    options: type[RunOptions]
    prepare: Callable[[Any, Dataset, Path], Job[Any]]
    search: Callable[[Any], Search]
    finish: Callable[[Any, Any, Split], Summary]
    present: Callable[[Any, Any], Report | None]
    columns: Columns = field(default_factory=Columns)
    """What comparisons of its runs show."""
    metrics: Mapping[str, str] = field(default_factory=dict)
    """Further metrics that progress shows, and how they are called there."""
    recipes: Mapping[str, Sequence[str]] = field(default_factory=dict)
    """Options that each value of `--recipe` stands for; those that are typed beside it win."""
    essentials: Sequence[str] = ()
    """The options that --help shows; all where there are none."""
    examples: Sequence[str] = ()
    """Commands, without the program's name, that --help shows."""
    may_grow: str | None = None
    """An option that may be larger when a run goes on than it was when it began."""

    @property
    def command(self) -> str:
        """The name of its command."""
        return self.name.replace("_", "-")
