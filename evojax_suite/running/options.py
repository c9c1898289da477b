"""The options that the commands share."""

from __future__ import annotations

import atexit
import os
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import field, fields, replace
from pathlib import Path
from typing import Annotated, Any, Literal, Self

import jax
import tyro
from annotated_types import Ge, Le
from pydantic import AllowInfNan, NonNegativeInt, PositiveInt

from evojax_suite.configuration import configuration
from evojax_suite.reporting.loggers import Logger, check
from evojax_suite.reporting.progress import LogFormat, console
from evojax_suite.runtime import devices
from evojax_suite.runtime.devices import Devices
from evojax_suite.runtime.results import to_jsonable

Seed = Annotated[int, Ge(0), Le(2**32 - 1)]
"""One of the seeds that JAX tells apart."""

Scale = Literal["auto", "paper", "small"]
"""auto is small on a machine without accelerator."""


_MOST_SEEDS = 10_000  # runs of one command, each with its directory


def is_small(scale: Scale) -> bool:
    """Whether the paper's sizes are to be reduced."""
    return scale == "small" or (scale == "auto" and jax.default_backend() == "cpu")


@configuration
class Command:
    """Options of any command."""

    typed: tyro.conf.Suppress[tuple[str, ...]] = field(default=(), kw_only=True)
    """The arguments that were typed."""
    named: tyro.conf.Suppress[tuple[str, ...]] = field(default=(), kw_only=True)
    """The options that those, a recipe or a file name, such as --learning-rate."""

    def from_command_line(self, typed: Sequence[str], completed: Sequence[str]) -> Self:
        """Returns these options, which came from the arguments `typed`, `completed` with those of a
        recipe and a file, with ~ in paths as the home folder."""

        def at_home(value: Any) -> Any:
            if isinstance(value, tuple):
                return tuple(map(at_home, value))
            return Path(os.path.expanduser(value)) if isinstance(value, Path) else value

        settings = {each.name: at_home(getattr(self, each.name)) for each in fields(self)}
        flags = (word.partition("=")[0].replace("_", "-") for word in completed if word[:2] == "--")
        return replace(self, **settings | {"typed": tuple(typed), "named": tuple(sorted({*flags}))})

    def here(self) -> Self:
        """Returns these options as this process follows them."""
        return self


@configuration
class Placement(Command):
    """Where a run computes and what it prints. The devices are taken before anything else
    (`cli.main`), as some libraries start them when they are imported."""

    devices: Devices = "auto"
    """Devices of this process that share the population, of a CPU so many are made; all: every
    accelerator, or as many as the CPU has cores; auto: all, but one of a CPU with --distributed."""
    distributed: bool = False
    """Run as one of many processes, on other machines or on this one: each starts the same command.
    Process 0 writes the run. SLURM, Open MPI and Kubernetes tell the next three; else they are
    given."""
    coordinator: str | None = None
    """Host:port of process 0."""
    num_processes: int | None = None
    process_id: int | None = None
    """Which of them this is, from 0."""
    quiet: bool = False
    """Say nothing but errors, and what was asked for."""
    log_format: LogFormat = "text"
    """json: all that is told as a line of JSON each; results are on standard output, the rest on
    standard error."""

    def __post_init__(self):
        for name in ("coordinator", "num_processes", "process_id"):
            if getattr(self, name) is not None and not self.distributed:
                raise ValueError(f"{name} needs --distributed, got {getattr(self, name)}")

    def settle(self) -> None:
        """Meet the other processes and take the devices. Raises ValueError or ProcessLost."""
        if self.distributed:
            devices.join(self.coordinator, self.num_processes, self.process_id)
        devices.take(self.devices)
        if self.distributed:
            # JAX may end this process before it can say so itself.
            message = "evojax-suite: process {} of {}; when another is lost this one ends, and {}"
            number, total = jax.process_index(), jax.process_count()
            print(message.format(number, total, devices.HOW_TO_GO_ON), file=sys.stderr, flush=True)

    def here(self) -> Self:
        """A process that does not write is silent."""
        quiet = self.quiet or not devices.is_first()
        console.choose(quiet=quiet, log_format=self.log_format)
        return self


@configuration
class RunOptions(Placement):
    """The options of every command that makes the directory of a run."""

    dataset: str = "digits"
    """digits, mnist, fashion_mnist, cifar10, a MedMNIST set, ..., or the path of your own."""
    data_dir: Path | None = None
    """Folder of the datasets; by default that in the environment variable EVOJAX_SUITE_DATA."""
    image_size: PositiveInt | None = None
    """Height and width to which images in class folders of your own are resized, each cut to the
    square in its middle; for folders of images of several sizes."""
    cache_data: bool = True
    """Keep the pixels of archives and folders of images, which are slow to read, in the user's
    cache folder."""
    seed: Seed = 0
    """Seed of everything random in the run."""
    seeds: str | None = None
    """Several seeds, as 0:10 (0 to 9) or 0,3,5: a run of each, and a page that compares them."""
    seeds_in_flight: PositiveInt | Literal["auto"] = "auto"
    """Runs of seeds in one program, where the system has one for all, divided over the devices:
    auto is all that fit on accelerators, one on a CPU or where there are several processes."""
    seed_processes: PositiveInt = 1
    """Processes that share the runs of --seeds, each with its part of the cores or accelerators;
    one that is lost goes on from what it saved."""
    shard: str | None = None
    """Which of the runs of --seeds are this command's, as 0/4 for the first of four parts: for
    arrays of jobs, which share nothing but the folder of runs."""
    config_file: Annotated[Path | None, tyro.conf.arg(name="config")] = None
    """Options in a YAML or JSON file, such as a run's config.json; those given beside it win."""
    name: str | None = None
    """Name of the run; system, dataset and seed by default."""
    runs_dir: Path = Path("runs")
    """Folder in which the directory of the run is made."""
    resume: bool = False
    """Go on with an interrupted run, or with more generations."""
    restart: bool = False
    """Begin anew where there is a run already, whose directory gets another name."""
    checkpoint_seconds: Annotated[float, Ge(0), AllowInfNan()] = 30.0
    """Least time between two checkpoints."""
    dry_run: bool = False
    """Do the first steps of the run in a folder that is deleted, and say what it would take."""
    loggers: tuple[Logger, ...] = ()
    """Send metrics to TensorBoard (runs/<name>/tensorboard) or Weights & Biases as well."""

    def __post_init__(self):
        name = self.name
        if name is not None and (name in ("", ".", "..") or Path(name).name != name):
            raise ValueError(f"name must be that of a folder in runs_dir, got {self.name!r}")
        if self.seeds is not None and self.seed:
            raise ValueError(f"one of seed and seeds, got {self.seed} and {self.seeds}")
        if self.resume and self.restart:
            raise ValueError("one of resume and restart, got both")
        self.each()
        for name, value in option_difference(self, "shard", "seed_processes").items():
            if self.seeds is None:
                raise ValueError(f"{name} needs --seeds, got {value}")
        for other in option_difference(self, "distributed", "dry_run"):
            if self.seed_processes > 1:
                raise ValueError(f"one of seed_processes and {other}, got both")
        if self.seeds_in_flight not in ("auto", 1) and self.seeds is None:
            raise ValueError(f"seeds_in_flight needs --seeds, got {self.seeds_in_flight}")
        check(self.loggers)
        super().__post_init__()

    def each(self) -> list[Self]:
        """Returns the options of each seed."""
        if self.seeds is None:
            return [self]
        start, colon, end = self.seeds.partition(":")
        try:
            ends = (int(start or 0), int(end)) if colon else (0, 0)
            listed = () if colon else map(int, self.seeds.split(","))
            numbers = [*range(ends[0], min(ends[1], ends[0] + _MOST_SEEDS + 1)), *listed]
        except ValueError:
            numbers = []
        if len(numbers) > _MOST_SEEDS:
            raise ValueError(f"seeds must be at most {_MOST_SEEDS:,} numbers, got {self.seeds:.40}")
        fits = numbers and min(numbers) >= 0 and max(numbers) < 2**32
        if not fits or len(set(numbers)) < len(numbers):
            raise ValueError(
                f"seeds must be a range such as 0:10 or different numbers >= 0 such as 0,3,5, got "
                f"{self.seeds}"
            )
        alone = replace(self, seeds=None, seeds_in_flight="auto", shard=None, seed_processes=1)
        name = self.name and f"{self.name}-seed"
        numbers = numbers[self._place_of_shard()]
        return [replace(alone, seed=n, name=name and f"{name}{n}") for n in numbers]

    def _place_of_shard(self) -> slice:
        """Returns which of the seeds are this command's."""
        if self.shard is None:
            return slice(None)
        number, slash, total = self.shard.partition("/")
        if not (slash and number.isdecimal() and total.isdecimal() and int(number) < int(total)):
            raise ValueError(f"shard must be such as 0/4, 1/4, 2/4 or 3/4, got {self.shard}")
        return slice(int(number), None, int(total))

    def resolved_seeds_in_flight(self) -> int:
        """Returns how many runs of seeds are to be in one program."""
        num_devices, num_seeds = devices.take(self.devices), len(self.each())
        alone = jax.process_count() == 1
        if self.seeds_in_flight == "auto":
            if jax.default_backend() == "cpu" or not alone:
                return 1
            return max(1, num_seeds - num_seeds % min(num_devices, num_seeds or 1))
        if self.seeds_in_flight > 1 and not alone:
            raise ValueError(
                f"seeds_in_flight > 1 needs one process, got {self.seeds_in_flight} in "
                f"{jax.process_count()}"
            )
        return self.seeds_in_flight

    def here(self) -> Self:
        """A process that does not write leaves its copy of the run in a folder that is deleted."""
        super().here()
        if devices.is_first():
            return self
        folder = tempfile.TemporaryDirectory(prefix="evojax-suite-")
        atexit.register(folder.cleanup)
        return replace(self, runs_dir=Path(folder.name))

    def directory(self, system: str, dataset: str) -> Path:
        """Returns the directory of a run of `system` on the dataset of this name."""
        return self.runs_dir / (self.name or f"{system}-{Path(dataset).name}-seed{self.seed}")

    def settings(self) -> dict[str, Any]:
        """Returns the options that decide the result, for config.json."""
        return {
            name: setting
            for name, setting in to_jsonable(self, non_finite=str).items()
            if name in ("dataset", "seed") or name not in RunOptions.__dataclass_fields__
        }


@configuration
class JudgedRunOptions(RunOptions):
    """The options of every command that makes datasets."""

    num_networks: NonNegativeInt = 10
    """Networks that judge a dataset on the test split; devs and coreset take 0 for none."""


def option_difference(options: Command, *names: str) -> dict[str, Any]:
    """Returns the options among `names` that are not left at their defaults."""
    values = {name: getattr(options, name) for name in names}
    return {name: v for name, v in values.items() if v != getattr(type(options), name)}


def config_difference(value: object, default: object) -> dict[str, Any]:
    """Returns the settings of a configuration that differ from those of `default`, but for those
    that say how it is computed."""
    differences, defaults = {}, to_jsonable(default)
    for name, setting in to_jsonable(value).items():
        if name in ("engine", "convolution"):
            continue
        if isinstance(setting, dict):
            inner = config_difference(setting, defaults[name])
            prefix = f"{name}." if name.startswith("feature") else ""
            differences |= {f"{prefix}{key}": item for key, item in inner.items()}
        elif setting != defaults[name]:
            differences[name] = setting
    return differences
