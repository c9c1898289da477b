"""The one error that the data modules raise, the shortening of other libraries' errors, and what
JSON files are held to."""

from __future__ import annotations

import functools
import numbers
import types
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

_hints = functools.cache(get_type_hints)


class DataError(ValueError):
    """A dataset cannot be read; the message is one line naming the place and what is allowed."""

    def __init__(self, message: str):
        super().__init__(" ".join(message.splitlines()))  # names in files may have several


def first_line(error: BaseException) -> str:
    """The first non-empty line of an error's message, or its type's name where it has none."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0][:300] if lines else type(error).__name__


def check_types(values: dict[str, Any], kind: type) -> None:
    """Raise ValueError where one of `values`, by field, is not what the class `kind` annotates."""
    hints = _hints(kind)
    for name, value in values.items():
        if name in hints and not _fits(value, hints[name]):
            hint = hints[name]
            if get_origin(hint) is Literal:
                allowed = f"one of {', '.join(map(str, get_args(hint)))}"
            else:
                allowed = hint.__name__ if type(hint) is type else str(hint)
            raise ValueError(
                f"{name} must be {allowed.replace('typing.', '')}, got {str(value)[:40]!r}"
            )


def _fits(value: Any, hint: Any) -> bool:
    kind, inner = get_origin(hint), get_args(hint)
    if hint is Any:
        return True
    if kind is None:
        number = {int: numbers.Integral, float: numbers.Real}.get(hint)
        return isinstance(value, number or hint) and (number is None or not isinstance(value, bool))
    if kind is Literal:
        return value in inner
    if kind is tuple:
        if type(value) is not tuple:
            return False
        inner = inner[:1] * len(value) if inner[-1] is ... else inner
        return len(value) == len(inner) and all(map(_fits, value, inner))
    if kind in (Union, types.UnionType):
        return any(_fits(value, one) for one in inner)
    return isinstance(value, kind)


def as_tuple(value: Any) -> Any:
    """A list, as JSON has it, as a tuple; all else as it is."""
    return tuple(value) if isinstance(value, list) else value
