"""Settings whose fields say what they may be, and the one line that says what is wrong with one,
such as `survival_ratio must be in (0, 1), got 1.5`."""

from __future__ import annotations

import dataclasses
import functools
import json
from collections.abc import Callable, Iterable
from types import NoneType, UnionType
from typing import (
    Annotated,
    Any,
    Literal,
    TypeVar,
    Union,
    dataclass_transform,
    get_args,
    get_origin,
    get_type_hints,
)

import pydantic.dataclasses
from annotated_types import Ge, Le
from jax.core import Tracer
from pydantic import ConfigDict, TypeAdapter, ValidationError

T = TypeVar("T")

Share = Annotated[float, Ge(0), Le(1)]
"""A part of something, or a probability."""

_SETTINGS = ConfigDict(strict=True, allow_inf_nan=False, extra="forbid")
_hints = functools.cache(functools.partial(get_type_hints, include_extras=True))


@dataclass_transform(frozen_default=True, field_specifiers=(dataclasses.field,))
def configuration(kind: type[T]) -> type[T]:
    """A frozen dataclass that holds what its annotations allow, those of `annotated_types` too.

    Numbers of NumPy and JAX become Python's, lists tuples; nothing else is converted. Numbers are
    finite but where `pydantic.AllowInfNan` says otherwise. Raises ValueError, one line.
    """
    made: Any = pydantic.dataclasses.dataclass(frozen=True, config=_SETTINGS)(kind)
    validate = made.__init__

    @functools.wraps(validate)
    def init(self, *values, **named):
        try:
            validate(self, *map(_plain, values), **{name: _plain(v) for name, v in named.items()})
        except ValidationError as error:
            raise ValueError(_in_one_line(error, made)) from None

    made.__init__ = init
    return made


class Scalars:
    """Base of a dataclass of numbers, any of which may be traced."""

    def check(self) -> None:
        """Raise ValueError where a number is not what its field declares."""
        for name, hint in _hints(type(self)).items():
            if not isinstance(getattr(self, name), Tracer):
                _valid(name, hint, TypeAdapter.validate_python, _plain(getattr(self, name)))


def from_json(kind: type, content: dict[str, Any], names: Iterable[str]) -> dict[str, Any]:
    """Those fields of the dataclass `kind` that `names` has, of what a JSON file holds. Raises
    ValueError, one line, or KeyError where there is none."""
    return {
        name: _valid(name, _hints(kind)[name], TypeAdapter.validate_json, json.dumps(content[name]))
        for name in names
    }


def _valid(name: str, hint: Any, validate: Callable[[TypeAdapter, Any], Any], value: Any) -> Any:
    try:
        return validate(_adapter(hint), value)
    except ValidationError as error:
        raise ValueError(_in_one_line(error, hint, name)) from None


@functools.cache
def _adapter(hint: Any) -> TypeAdapter:
    """The judge of values; a configuration has settings of its own."""
    return TypeAdapter(hint, config=None if dataclasses.is_dataclass(hint) else _SETTINGS)


def _plain(value: Any) -> Any:
    if isinstance(value, list | tuple):
        return tuple(map(_plain, value))
    scalar = getattr(value, "shape", None) == () and not isinstance(value, Tracer)
    return value.item() if scalar else value


def _in_one_line(error: ValidationError, hint: Any, name: str = "") -> str:
    """The first thing that is wrong with a value of type `hint`: its name, what is allowed, what it
    is."""
    wrong: Any = error.errors(include_url=False)[0]
    kind, places, value = wrong["type"], [*wrong["loc"]], wrong["input"]
    if kind == "value_error":
        return str(wrong["ctx"]["error"])
    if kind in ("unexpected_keyword_argument", "extra_forbidden"):
        return f"there is no setting {places[-1]!r}"
    last = places.pop() if kind == "missing" else None
    if isinstance(last, str):
        return f"{last} is missing"
    for place in places:
        whole = _without_notes(hint)
        fields = _hints(whole) if isinstance(whole, type) else {}
        if isinstance(place, int) and place < len(fields):  # given without its name
            place = [*fields][place]
        if place in fields:
            name, hint = str(place), fields[str(place)]
        elif isinstance(place, int) and get_origin(whole) is tuple:
            items = get_args(whole)
            hint = items[0 if items[-1] is ... else place]
    within = not kind.endswith(("_type", "missing"))
    verb = "name" if kind == "too_short" else "be"
    return f"{name} must {verb} {_allowed(hint, within)}, got {value!r:.60}"


def _without_notes(hint: Any) -> Any:
    """A type without what is annotated, and without None."""
    inner = [one for one in get_args(hint) if one is not NoneType]
    alone = get_origin(hint) in (Union, UnionType) and len(inner) == 1
    return _without_notes(inner[0]) if alone or get_origin(hint) is Annotated else hint


def _allowed(hint: Any, within: bool) -> str:
    """What a value may be: its type or, of values `within` that, the range."""
    kind, inner = get_origin(hint), get_args(hint)
    if kind is Annotated:
        return (within and _range(*inner)) or _allowed(inner[0], within)
    if kind is Literal:
        return f"{'one of ' if len(inner) > 1 else ''}{', '.join(map(str, inner))}"
    if kind in (Union, UnionType):
        return " or ".join(_allowed(one, within) for one in inner if one is not NoneType)
    if kind is tuple:
        return f"tuple[{', '.join('...' if one is ... else _allowed(one, False) for one in inner)}]"
    return "finite" if within and hint is float else getattr(hint, "__name__", str(hint))


def _range(kind: Any, *notes: Any) -> str:
    names = "gt", "ge", "lt", "le", "multiple_of", "min_length"
    bounds = {n: getattr(note, n) for note in notes for n in names if hasattr(note, n)}
    if "min_length" in bounds:
        item = _without_notes(get_args(kind)[0])
        return f"at least {_allowed(item, False) if get_origin(item) is Literal else 'one'}"
    if kind is int and "gt" in bounds:
        bounds["ge"] = bounds.pop("gt") + 1
    low, high = (bounds.get(f"{end}e", bounds.get(f"{end}t")) for end in "gl")
    words = ["even"] if "multiple_of" in bounds else []
    if high is not None:
        begin, end = "[" if "ge" in bounds else "(", "]" if "le" in bounds else ")"
        words.append(f"in {low}..{high}" if kind is int else f"in {begin}{low}, {high}{end}")
    elif low is not None:
        words.append(f"{'>=' if 'ge' in bounds else '>'} {low}")
    return " and ".join(words)
