"""The help of a command: first what it is for and the options that matter, all of them on request.

Everything comes from the options themselves: their types, defaults and docstrings.
"""

from __future__ import annotations

import dataclasses
import functools
import shutil
import textwrap
import typing
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, NamedTuple, Union, get_args, get_origin

import docstring_parser
import tyro

from evojax_suite.cli import config_file

_POSITIONAL = tyro.conf.Positional  # a marker, whatever it is to a type checker
PURPOSE = "Evolution over thousands of small neural networks, in JAX."
_TITLES = {"config": "search", "params": "search", "engine": "speed and memory"}
_OF_A_RUN = {
    "Placement": "devices and processes",
    "RunOptions": "the run and its folder",
    "JudgedRunOptions": "evaluation",
}
_OF_DATA = "dataset", "data_dir", "image_size", "cache_data", "num_images", "num_validation_images"
_LAST = "data", "the run and its folder", "devices and processes", "speed and memory"


class Entry(NamedTuple):
    """An option in the help."""

    group: str
    flag: str
    values: str
    about: str
    default: str


def entries(options: type) -> list[Entry]:
    """The options of a class of options, those of a group together, the machine's last."""
    found = [_entry(options, path, option) for path, option in config_file.known(options).items()]
    names = dict.fromkeys(entry.group for entry in found)
    order = [name for name in names if name not in _LAST] + [n for n in _LAST if n in names]
    return sorted(found, key=lambda entry: order.index(entry.group))


def _entry(options: type, path: str, option: config_file.Option) -> Entry:
    kind, default, names = options, dataclasses.MISSING, path.split(".")
    owner, hint, positional = options, None, False
    for name in names:
        owner = kind
        hint = typing.get_type_hints(owner, include_extras=True)[name]
        notes = getattr(hint, "__metadata__", ())
        positional = _POSITIONAL in notes
        kind = get_args(hint)[0] if notes else hint
        default = getattr(default, name, None) or _default(owner, name)
    prefix = option.flag.removeprefix("--").rpartition(".")[0]
    if names[0] in _OF_DATA:
        group = "data"
    elif prefix or len(names) > 1:
        group = f"--{prefix}.*" if prefix else _TITLES.get(names[-2], names[-2].replace("_", " "))
    else:
        group = _OF_A_RUN.get(_declaring(options, path).__name__, "what is done")
    about = " ".join(_documented(owner).get(names[-1], "").split())
    flag = names[-1].upper() if positional else option.flag
    if kind is bool and default:
        flag = flag.replace("--", "--[no-]", 1)
    return Entry(group, flag, "" if positional else _values(hint), about, _shown(default))


def _default(owner: type, name: str) -> Any:
    """The default of a field, or None where it has none."""
    field = next(field for field in dataclasses.fields(owner) if field.name == name)
    if field.default_factory is not dataclasses.MISSING:
        return field.default_factory()
    return None if field.default is dataclasses.MISSING else field.default


def _declaring(kind: type, name: str) -> type:
    """The class, of a class and its bases, that declares a field."""
    bases = reversed(kind.__mro__)
    return next(base for base in bases if name in vars(base).get("__annotations__", {}))


@functools.cache
def _documented(kind: type) -> dict[str, str]:
    """The docstrings of the fields of a dataclass and of its bases."""
    found: dict[str, str] = {}
    for base in reversed(kind.__mro__[:-1]):
        if dataclasses.is_dataclass(base):
            parsed = docstring_parser.parse_from_object(base)
            found |= {field.arg_name: field.description or "" for field in parsed.params}
    return found


def _values(hint: Any) -> str:
    """What may follow an option."""
    origin, inner = get_origin(hint), get_args(hint)
    if origin is Annotated:
        return _values(inner[0])
    if origin is Literal:
        return ", ".join(map(str, inner))
    if origin in (Union, UnionType):
        return " or ".join(_values(each) for each in inner if each is not NoneType)
    if origin is tuple:
        return f"{_values(inner[0])} ..."
    if hint is bool:
        return ""
    return {int: "INT", float: "FLOAT", str: "TEXT", Path: "PATH"}.get(hint, "TEXT")


def _shown(default: Any) -> str:
    if default is True:
        return "yes"
    if default in (None, False, ()) or default is dataclasses.MISSING:
        return ""
    if isinstance(default, tuple):
        return " ".join(map(str, default))
    return f"{default:g}" if isinstance(default, float) else str(default)


def overview(commands: Mapping[str, type]) -> str:
    """The help of the program: its commands, by name."""
    lines = ["usage: evojax-suite COMMAND [options]", "", PURPOSE, ""]
    for name, options in commands.items():
        about = docstring_parser.parse(options.__doc__ or "").short_description or ""
        lines += _lines(Entry("", name, "", " ".join(about.split()), ""), _width(), 20)
    ending = "evojax-suite COMMAND --help says what matters of one, --help-all everything"
    return "\n".join([*lines, "", f"{ending}; --version the version."])


def text(
    name: str,
    options: type,
    essentials: Sequence[str] = (),
    examples: Sequence[str] = (),
    everything: bool = False,
) -> str:
    """The help of the command `name`; all of its options where none are essential."""
    width = _width()
    about = docstring_parser.parse(options.__doc__ or "")
    paragraphs = [about.short_description, about.long_description]
    every = entries(options)
    chosen = every
    if essentials and not everything:
        paragraphs = paragraphs[:1]
        chosen = [next(entry for entry in every if entry.flag == flag) for flag in essentials]
    lines = [f"usage: evojax-suite {name} [options]", ""]
    for paragraph in filter(None, paragraphs):
        lines += [*textwrap.wrap(" ".join(paragraph.split()), width), ""]
    lines += [*(f"  $ evojax-suite {example}" for example in examples), *[""] * bool(examples)]
    if chosen is not every:
        for entry in chosen:
            lines += _lines(entry, width)
        counts: dict[str, int] = {}
        for entry in every:
            counts[entry.group] = counts.get(entry.group, 0) + 1
        others = ", ".join(f"{group} ({count})" for group, count in counts.items())
        rest = f"--help-all lists all {len(every)} options: {others}."
        return "\n".join([*lines, "", *textwrap.wrap(rest, width)])
    group = None
    for entry in every:
        if entry.group != group:
            group = entry.group
            lines += ["", f"{group}:"]
        lines += _lines(entry, width)
    return "\n".join(lines)


def _width() -> int:
    return min(100, shutil.get_terminal_size((100, 24)).columns)


def _lines(entry: Entry, width: int, column: int = 27) -> Iterator[str]:
    start = f"  {entry.flag} {entry.values}".rstrip()
    default = f" ({entry.default})" if entry.default else ""
    indent = " " * column
    shown = textwrap.wrap(
        entry.about + default, width, initial_indent=indent, subsequent_indent=indent
    )
    if len(start) < len(indent) - 1 and shown:
        shown[0] = start + shown[0][len(start) :]
    else:
        yield from textwrap.wrap(start, width, subsequent_indent=" " * 6, break_on_hyphens=False)
    yield from shown
