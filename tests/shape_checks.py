"""What tests hold the shapes that evojax_suite annotates to: `conftest` checks by it each call of a
function, `misfits` the fields of a state, its metrics or data."""

from __future__ import annotations

import dataclasses
import functools
import inspect
import re
import sys
import types
from typing import Any, Union, get_args, get_origin

import jaxtyping
import numpy as np
from beartype import BeartypeConf, beartype
from beartype.door import is_bearable

_CONF = BeartypeConf(is_pep484_tower=True)  # an int is a float, too
_SHAPE = re.compile(r"(Array|ndarray), ['\"]")
_WORD = re.compile(r"\w+")  # which may be an alias of a shape


def checked(function):
    """`function`, refusing what does not have the shapes that it annotates.

    Other annotations are left to pyright, so that what a function says of wrong input can be
    tested, and so is whether an array is NumPy's. Constructors of dataclasses are not checked: JAX
    calls them with all kinds of leaves, with axes that vmap added, shapes without arrays, None.
    """
    if function.__name__ == "__init__":
        return function
    hints = {
        name: _of_numpy_too(hint) if _tells_shape(hint) else Any
        for name, hint in function.__annotations__.items()
    }
    if all(hint is Any for hint in hints.values()):
        return function
    function.__annotations__ = hints
    return beartype(function, conf=_CONF)


def _is_array(hint: Any) -> bool:
    return isinstance(hint, type) and issubclass(hint, jaxtyping.AbstractArray)


def _tells_shape(hint: Any) -> bool:
    return _is_array(hint) or any(map(_tells_shape, get_args(hint)))


def _of_numpy_too(hint: Any) -> Any:
    if get_origin(hint) in (Union, types.UnionType):
        return Union[tuple(map(_of_numpy_too, get_args(hint)))]  # noqa: UP007
    if get_origin(hint) is tuple:
        return tuple[tuple(map(_of_numpy_too, get_args(hint)))]
    return hint | hint.dtype[np.ndarray, hint.dim_str] if _is_array(hint) else hint


def shapes(owner: Any) -> dict[str, Any]:
    """The annotations of a function or class that tell a shape."""
    found = {}
    for name, hint in inspect.get_annotations(owner).items():
        text = getattr(hint, "__forward_arg__", hint)  # so are the fields of a NamedTuple kept
        names = vars(sys.modules[owner.__module__])
        aliases = (names.get(word) for word in _WORD.findall(text)) if isinstance(text, str) else ()
        if isinstance(text, str) and (_SHAPE.search(text) or any(map(_tells_shape, aliases))):
            found[name] = eval(text, names)
    return found


@functools.cache
def _shapes_of_fields(kind: type) -> dict[str, Any]:
    return {name: hint for base in reversed(kind.__mro__) for name, hint in shapes(base).items()}


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
            hint = _shapes_of_fields(kind).get(field, Any)
            if _tells_shape(hint) and not is_bearable(value, _of_numpy_too(hint), conf=_CONF):
                about = f"{getattr(value, 'dtype', type(value))}{getattr(value, 'shape', '')}"
                found.append(f"{name}.{field} is {about}, annotated {hint}")
    for field, value in values.items():
        found += misfits(value, f"{name}.{field}")
    return found
