"""Options in a file, which become arguments, so that one parser checks both."""

from __future__ import annotations

import dataclasses
import os
import re
import types
import typing
from collections.abc import Container
from pathlib import Path
from typing import Literal, NamedTuple

import tyro
import yaml

from evojax_suite.names import did_you_mean
from evojax_suite.runtime.results import flat, typed_option

_OMITTED, _SUPPRESSED = (
    marker[int].__metadata__[0]  # pyright: ignore[reportAttributeAccessIssue]
    for marker in (tyro.conf.OmitArgPrefixes, tyro.conf.Suppress)
)


class _Loader(yaml.SafeLoader):
    """Keeps numbers as they are written: YAML 1.1 would read 1:3 as 63, and 007 as 7."""

    yaml_implicit_resolvers: typing.ClassVar = {}


_WORDS = {"null": r"(null|Null|NULL|~|)$", "bool": r"(true|True|TRUE|false|False|FALSE)$"}
for _name, _pattern in _WORDS.items():
    _Loader.add_implicit_resolver(f"tag:yaml.org,2002:{_name}", re.compile(_pattern), None)


class Option(NamedTuple):
    """A command-line option, as tyro names it."""

    flag: str
    may_be_none: bool
    aliases: tuple[str, ...] = ()


def known(
    options: type, path: str = "", prefix: str = "", omitted: bool = False
) -> dict[str, Option]:
    """Returns the settings of a class of options: the path of each (config.network.width) and its
    option (--width). The other arguments are those of a class within another: its path, the prefix
    of its options, and whether prefixes are omitted."""
    settings = {}
    hints = typing.get_type_hints(options, include_extras=True)
    for field in dataclasses.fields(options):
        hint, place = hints[field.name], f"{path}{field.name}"
        notes = getattr(hint, "__metadata__", ())
        inner = typing.get_args(hint)[0] if notes else hint
        name = next((note.name for note in notes if getattr(note, "name", None)), field.name)
        if _SUPPRESSED in notes:
            continue
        if dataclasses.is_dataclass(inner):
            without = omitted or _OMITTED in notes
            below = "" if without else f"{prefix}{name}."
            settings |= known(typing.cast(type, inner), f"{place}.", below, without)
        else:
            flag = f"--{prefix}{name}".replace("_", "-")
            aliases = [other for note in notes for other in getattr(note, "aliases", None) or ()]
            settings[place] = Option(flag, types.NoneType in typing.get_args(inner), tuple(aliases))
    return settings


def value_of(flag: str, arguments: list[str]) -> str | None:
    """Returns the last value that `arguments` give `flag`, or None."""
    value = None
    for argument, following in zip(arguments, [*arguments, ""][1:], strict=True):
        name, equals, given = argument.partition("=")
        if name == flag:
            value = given if equals else following
    return value


def named_in(arguments: list[str]) -> Path | None:
    """Returns the file that `--config` names among `arguments`; of a folder, a run's, the
    settings."""
    if "--config=" in arguments:
        raise ValueError("--config names no file")
    if not (named := value_of("--config", arguments)):
        return None
    file = Path(os.path.expanduser(named))
    return file / "config.json" if file.is_dir() else file


def arguments_of(
    file: Path, options: type, others: Literal["refuse", "skip"], without: Container[str] = ()
) -> list[str]:
    """Returns the content of a YAML or JSON file as arguments of a command with these options. Keys
    are the options (learning_rate, with - or _), or paths as in a run's config.json. others: what
    to do with keys that `options` does not have. without: flags to leave out. Raises ValueError,
    one line."""
    try:
        content = yaml.load(file.read_text(), _Loader)
        settings = flat(content) if isinstance(content, dict) else {}
    except OSError as error:
        raise ValueError(f"--config cannot read {file}: {error.strerror}") from None
    except (yaml.YAMLError, UnicodeDecodeError, RecursionError) as error:
        raise ValueError(f"{file} is neither YAML nor JSON: {error}") from None
    if not isinstance(content, dict):
        raise ValueError(f"{file} must hold options and their values, got {content!r:.40}")
    by_path = known(options)
    by_name = {
        flag.removeprefix("--"): option
        for option in by_path.values()
        for flag in (option.flag, *option.aliases)
    }
    arguments = []
    for path, value in settings.items():
        name = path.replace("_", "-")
        option = by_path.get(path) or by_name.get(name)
        if option is None and others == "skip":
            continue
        if option is None:
            hint = did_you_mean(path, [*by_name, *by_path])
            raise ValueError(f"{file}: this command has no option {path!r}{hint}")
        if option.flag in without:
            continue
        if value is None and not option.may_be_none:
            raise ValueError(f"{file}: {path} needs a value, got null")
        arguments += typed_option(option.flag, value)
    return arguments
