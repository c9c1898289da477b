"""The directory of a run: config.json, metrics.jsonl, timing.jsonl, summary.json, artefacts."""

from __future__ import annotations

import dataclasses
import itertools
import json
import math
import os
import re
from collections.abc import Callable, Generator, Iterable, Mapping
from contextlib import ExitStack, contextmanager
from contextvars import ContextVar
from pathlib import Path
from typing import Any

import flax.traverse_util
import jax
import numpy as np
import safetensors.numpy

from evojax_suite.names import did_you_mean
from evojax_suite.types import PyTree


def to_jsonable(value: Any, non_finite: Callable[[float], Any] = lambda number: None) -> Any:
    """Returns `value` as JSON has it: dataclasses as objects, tuples and arrays as lists, NaN and
    infinity as `non_finite` of them, by default null.

    >>> to_jsonable({"shape": (1, 2), "loss": float("nan"), "path": Path("a") / "b"})
    {'shape': [1, 2], 'loss': None, 'path': 'a/b'}
    """
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        value = {field.name: getattr(value, field.name) for field in dataclasses.fields(value)}
    if isinstance(value, dict):
        return {str(name): to_jsonable(item, non_finite) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [to_jsonable(item, non_finite) for item in value]
    if hasattr(value, "tolist") and not isinstance(value, str):
        return to_jsonable(np.asarray(value).tolist(), non_finite)
    if isinstance(value, float) and not math.isfinite(value):
        return non_finite(value)
    if isinstance(value, Path):
        return str(value)
    return value


def write_atomically(path: Path, content: bytes | str) -> None:
    """Write the file `path` as a whole or not at all."""
    temporary = path.with_name(f".{path.name}.partial")
    try:
        with temporary.open("wb") as file:
            file.write(content.encode() if isinstance(content, str) else content)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except OSError as error:  # the error of a full disk names no file
        raise type(error)(error.errno, error.strerror, str(path)) from error
    finally:
        temporary.unlink(missing_ok=True)


def write_json(path: Path, value: Any) -> None:
    """Write `value` as indented JSON, atomically."""
    write_atomically(path, json.dumps(to_jsonable(value), indent=2) + "\n")


class Lines:
    """A file of JSON lines, cut back to those whose `generation` is at most `keep_up_to`."""

    def __init__(self, path: Path, keep_up_to: int):
        kept = [line for line in read_lines(path) if line["generation"] <= keep_up_to]
        write_atomically(path, "".join(json.dumps(line) + "\n" for line in kept))
        self._file = path.open("a")

    def write(self, lines: Iterable[dict[str, Any]]) -> None:
        """Append `lines`, which readers of the file see at once."""
        self._file.writelines(json.dumps(to_jsonable(line)) + "\n" for line in lines)
        self._file.flush()

    def sync(self) -> None:
        """Wait until everything written so far is on disk."""
        os.fsync(self._file.fileno())

    def close(self) -> None:
        self.sync()
        self._file.close()


def read_lines(path: Path) -> list[dict[str, Any]]:
    """Returns the complete lines of a file of JSON lines; none if it does not exist."""
    if not path.exists():
        return []
    lines = []
    for line in path.read_text().splitlines():
        try:
            lines.append(json.loads(line))
        except json.JSONDecodeError:  # torn by an interruption: nothing after it counts
            break
    return lines


class Rows:
    """The rows of a study in one JSON file, written as they come. A study that was interrupted goes
    on; it starts again with other `options`, a dataclass, but for its fields named in `without`."""

    def __init__(self, path: Path, options: Any, *without: str):
        path.parent.mkdir(parents=True, exist_ok=True)
        self.path = path
        self.about = to_jsonable(options) | {"device": jax.devices()[0].device_kind}
        for name in without:
            del self.about[name]
        before = json.loads(path.read_text()) if path.exists() else {}
        self.rows: list[dict[str, Any]] = (
            before["rows"] if before.get("about") == self.about else []
        )

    def __iter__(self):
        return iter(self.rows)

    def add(self, row: dict[str, Any]) -> None:
        """Append a row, as it will be read again, and write the file."""
        self.rows.append(json.loads(json.dumps(to_jsonable(row))))
        write_atomically(self.path, json.dumps({"about": self.about, "rows": self.rows}) + "\n")


def spread(values: Iterable[float], digits: int = 1) -> str:
    """Returns `mean ± standard deviation` over runs, for a table."""
    values = np.asarray(list(values), float)
    return f"{values.mean():,.{digits}f} ± {values.std():,.{digits}f}"


def flat(settings: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Returns a nested mapping as a flat one, whose keys are paths joined by dots.

    >>> flat({"seed": 0, "config": {"width": 8}})
    {'seed': 0, 'config.width': 8}
    """
    result = {}
    for name, value in settings.items():
        path = f"{prefix}{name}"
        result |= flat(value, f"{path}.") if isinstance(value, dict) else {path: value}
    return result


def typed_option(flag: str, value: Any) -> list[str]:
    """Returns the arguments that give the option `flag` the value `value` on the command line."""
    if isinstance(value, bool):
        group, dot, name = flag.removeprefix("--").rpartition(".")
        return [flag if value else f"--{group}{dot}no-{name}"]
    values = [str(item) for item in value] if isinstance(value, list) else [str(value)]
    values = [re.sub(r"^([-+]?)\.(inf|nan)$", r"\1\2", item, flags=re.I) for item in values]
    return [flag, *([",".join(values)] if flag == "--seeds" else values)]


class RunExists(ValueError):
    """The directory of a run is taken."""


_OWNED: ContextVar[ExitStack | None] = ContextVar("owned", default=None)


@contextmanager
def owned_runs() -> Generator[None]:
    """Until the context ends, no other process can open a run that was opened in it."""
    with ExitStack() as stack:
        token = _OWNED.set(stack)
        try:
            yield
        finally:
            _OWNED.reset(token)


def _lock(directory: Path, stack: ExitStack) -> None:
    """Locks `directory` for this process until `stack` is closed. Raises RunExists."""
    try:
        import fcntl
    except ImportError:  # not on Windows
        return
    file = os.open(directory, os.O_RDONLY)
    stack.callback(os.close, file)
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise RunExists(f"{directory}: another process is at work in this run") from None
    except OSError:  # a file system without locks
        pass


def check_has_begun(directory: Path) -> None:
    """Raises ValueError, with the names that are most like it, where `directory` does not exist."""
    if directory.exists() and any(directory.iterdir()):
        return
    names = [path.parent.name for path in sorted(directory.parent.glob("*/config.json"))]
    near = did_you_mean(directory.name, names, 3)
    raise ValueError(f"{directory} is no run to go on with; without --resume it begins{near}")


def set_aside(directory: Path) -> Path | None:
    """Rename the directory of a run, so that another can begin there, and return its new place, or
    None where there is none. Raises RunExists where another process is at work in it."""
    if not (directory / "config.json").exists():
        return None
    numbered = (directory.with_name(f"{directory.name}-before-{n}") for n in itertools.count(1))
    place = next(path for path in numbered if not path.exists())
    with ExitStack() as stack:
        _lock(directory, stack)
        directory.rename(place)
    return place


def open_run(
    directory: Path, config: dict[str, Any], resume: bool, may_grow: str | None = None
) -> None:
    """Create the directory of a run, or check that it was started with `config`, in which the entry
    `may_grow` (the generations) may be larger than it was. Raises RunExists where the directory is
    taken, where another process is at work in it (`owned_runs`), or where `resume` is set and the
    configuration is another."""
    config = to_jsonable(config)
    _check_run(directory, config, resume, may_grow)
    directory.mkdir(parents=True, exist_ok=True)
    with ExitStack() as stack:
        _lock(directory, stack)
        _check_run(directory, config, resume, may_grow)  # alone now
        try:
            write_json(directory / "config.json", config)
        except OSError:
            if not any(directory.iterdir()):
                directory.rmdir()
            raise
        if owned := _OWNED.get():
            owned.enter_context(stack.pop_all())


def _check_run(directory: Path, config: dict[str, Any], resume: bool, may_grow: str | None) -> None:
    path = directory / "config.json"
    if path.exists():
        if not resume:
            ways = "--resume goes on with it, --name starts another"
            raise RunExists(f"{directory} holds a run already: {ways}")
        try:
            content = json.loads(path.read_text())
        except ValueError as error:
            raise ValueError(f"{path} is damaged: {error}") from None
        if not isinstance(content, dict):
            raise ValueError(f"{path} is damaged: it holds no settings")
        before, now = flat(content), flat(config)
        changed = [
            f"{name} was {before.get(name)!r} and is {now.get(name)!r}"
            for name in sorted(before.keys() | now.keys())
            if before.get(name) != now.get(name)
            and not (name == may_grow and name in before and now[name] > before[name])
        ]
        if changed:
            raise RunExists(f"{directory} was started with other options: {'; '.join(changed)}")
    elif directory.exists() and any(directory.iterdir()):
        raise RunExists(f"{directory} exists and is not a run: choose another --name or --runs-dir")


def save_variables(path: Path, variables: PyTree) -> None:
    """Write flax variables as safetensors, with their paths joined by `/` as names."""
    named = flax.traverse_util.flatten_dict(jax.device_get(variables), sep="/")
    arrays = {name: np.ascontiguousarray(array) for name, array in named.items()}
    write_atomically(path, safetensors.numpy.save(arrays))


def load_variables(path: Path) -> PyTree:
    """Returns the flax variables that `save_variables` wrote."""
    return flax.traverse_util.unflatten_dict(safetensors.numpy.load_file(path), sep="/")
