"""Settings whose annotations say which values are allowed, and the one line that says what is wrong
with a value, such as `survival_ratio must be in (0, 1), got 1.5`."""

from __future__ import annotations

import dataclasses
import functools
import json
import typing
from collections.abc import Callable, Iterable
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, TypeVar, Union, get_args, get_origin

import pydantic.dataclasses
from annotated_types import Ge, Le
from jax.core import Tracer
from pydantic import ConfigDict, TypeAdapter, ValidationError

T = TypeVar("T")

Share = Annotated[float, Ge(0), Le(1)]
"""A share of a whole, or a probability."""

_SETTINGS = ConfigDict(strict=True, allow_inf_nan=False, extra="forbid")
_hints = functools.cache(functools.partial(typing.get_type_hints, include_extras=True))


@typing.dataclass_transform(frozen_default=True, field_specifiers=(dataclasses.field,))
def configuration(kind: type[T]) -> type[T]:
    """The frozen dataclass `kind`, whose values are checked against its annotations, those of
    `annotated_types` too.

    Numbers of NumPy and JAX become Python's, lists tuples; nothing else is converted. Numbers must
    be finite except where `pydantic.AllowInfNan` allows others. Raises ValueError, one line.
    """
    checked: Any = pydantic.dataclasses.dataclass(frozen=True, config=_SETTINGS)(kind)
    validate = checked.__init__

    @functools.wraps(validate)
    def init(self: Any, *values: Any, **named: Any):
        try:
            validate(self, *map(_plain, values), **{name: _plain(v) for name, v in named.items()})
        except ValidationError as error:
            raise ValueError(_in_one_line(error, checked)) from None

    checked.__init__ = init
    checked.__repr__ = _changed
    return checked


def _changed(settings: Any) -> str:
    """The settings that differ from their defaults, as Python would make them again."""
    fields = dataclasses.fields(settings)
    pairs = ((field, getattr(settings, field.name)) for field in fields)
    given = (f"{field.name}={value!r}" for field, value in pairs if value != _default(field))
    return f"{type(settings).__qualname__}({', '.join(given)})"


def _default(field: dataclasses.Field[Any]) -> Any:
    """A field's default, or what marks that it has none."""
    factory = field.default_factory
    return field.default if factory is dataclasses.MISSING else factory()


class Scalars:
    """Base of a dataclass of numbers, any of which may be traced. A Python number is checked when
    it is given, an array where `check` is called."""

    def __post_init__(self):
        for name, hint in _hints(type(self)).items():
            if type(value := getattr(self, name)) in (int, float):
                _valid(name, hint, TypeAdapter.validate_python, value)

    def check(self) -> None:
        """Raise ValueError where a number that is not traced is not what its field declares."""
        for name, hint in _hints(type(self)).items():
            if not isinstance(getattr(self, name), Tracer):
                _valid(name, hint, TypeAdapter.validate_python, _plain(getattr(self, name)))


def from_json(kind: type, content: dict[str, Any], names: Iterable[str]) -> dict[str, Any]:
    """The fields `names` of the dataclass `kind`, from the content of a JSON file. Raises
    ValueError, one line, for a wrong one, and KeyError for one that is missing."""
    hints, validate = _hints(kind), TypeAdapter.validate_json
    return {name: _valid(name, hints[name], validate, json.dumps(content[name])) for name in names}


def _valid(
    name: str, hint: Any, validate: Callable[[TypeAdapter[Any], Any], Any], value: Any
) -> Any:
    try:
        return validate(_adapter(hint), value)
    except ValidationError as error:
        raise ValueError(_in_one_line(error, hint, name)) from None


@functools.cache
def _adapter(hint: Any) -> TypeAdapter[Any]:
    """The validator of a type; a configuration brings its settings itself."""
    return TypeAdapter(hint, config=None if dataclasses.is_dataclass(hint) else _SETTINGS)


def _plain(value: Any) -> Any:
    if isinstance(value, list | tuple):
        return tuple(map(_plain, value))
    scalar = getattr(value, "shape", None) == () and not isinstance(value, Tracer)
    return value.item() if scalar else value


def _in_one_line(error: ValidationError, hint: Any, name: str = "") -> str:
    """The first error in a value of type `hint`: its name, what is allowed, and its value."""
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
    """A type without annotations, and without None."""
    inner = [each for each in get_args(hint) if each is not NoneType]
    alone = get_origin(hint) in (Union, UnionType) and len(inner) == 1
    return _without_notes(inner[0]) if alone or get_origin(hint) is Annotated else hint


def _allowed(hint: Any, within: bool) -> str:
    """The allowed values: the type or, where the value is `within` the type, the range."""
    kind, inner = get_origin(hint), get_args(hint)
    if kind is Annotated:
        return (within and _range(*inner)) or _allowed(inner[0], within)
    if kind is Literal:
        return f"{'one of ' if len(inner) > 1 else ''}{', '.join(map(str, inner))}"
    if kind in (Union, UnionType):
        return " or ".join(_allowed(each, within) for each in inner if each is not NoneType)
    if kind is tuple:
        items = ("..." if each is ... else _allowed(each, False) for each in inner)
        return f"tuple[{', '.join(items)}]"
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
