"""What tests hold the shapes that evojax_suite annotates to: `conftest` checks by it each call of a
function, `fields_fit` the fields of a state, its metrics or data."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any, get_args, get_type_hints

import jaxtyping
from beartype import BeartypeConf, beartype
from beartype.door import is_bearable

_CONF = BeartypeConf(is_pep484_tower=True)  # an int is a float, too
_hints = functools.cache(get_type_hints)


def checked(function):
    """`function`, refusing what does not have the shapes that it annotates.

    Other annotations are left to pyright, so that what a function says of wrong input can be
    tested; so are the constructors of dataclasses, which JAX calls with all kinds of leaves: with
    axes that vmap added, shapes without arrays, None.
    """
    if function.__name__ == "__init__":
        return function
    hints = {
        name: hint if _tells_shape(hint) else Any for name, hint in function.__annotations__.items()
    }
    if all(hint is Any for hint in hints.values()):
        return function
    function.__annotations__ = hints
    return beartype(function, conf=_CONF)


def _tells_shape(hint: Any) -> bool:
    is_array = isinstance(hint, type) and issubclass(hint, jaxtyping.AbstractArray)
    return is_array or any(map(_tells_shape, get_args(hint)))


def misfits(tree: Any, name: str = "") -> list[str]:
    """The fields of a dataclass or NamedTuple, and of those in it, that are not annotated so; an
    axis has one size in all fields of one of them."""
    kind = type(tree)
    if dataclasses.is_dataclass(kind):
        values = {field.name: getattr(tree, field.name) for field in dataclasses.fields(kind)}
    elif hasattr(tree, "_asdict"):
        values = tree._asdict()
    elif isinstance(tree, tuple):
        return [each for i, part in enumerate(tree) for each in misfits(part, f"{name}[{i}]")]
    else:
        return []
    found = []
    with jaxtyping.jaxtyped("context"):
        for field, value in values.items():
            hint = _hints(kind).get(field, Any)
            if _tells_shape(hint) and not is_bearable(value, hint, conf=_CONF):
                about = f"{getattr(value, 'dtype', type(value))}{getattr(value, 'shape', '')}"
                found.append(f"{name}.{field} is {about}, annotated {hint}")
    for field, value in values.items():
        found += misfits(value, f"{name}.{field}")
    return found
