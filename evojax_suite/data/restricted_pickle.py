"""An unpickler for the CIFAR python batches that runs nothing: dicts, lists, bytes and uint8.

Pickles name functions to call. numpy's own constructors are not safe on crafted input (a forged
dtype state can make bytes into object pointers), so the four names that a pickled uint8 array
needs lead to the small stand-ins below, and every other name is refused.
"""

from __future__ import annotations

import io
import math
import pickle
import pickletools
from typing import Any

import numpy as np

from evojax_suite.data.errors import DataError, data_error

_OPERATIONS = {operation.code.encode("latin1"): operation for operation in pickletools.opcodes}
_MOST_TUPLES = 10_000  # an array has six


def loads(data: bytes, where: str) -> Any:
    """The pickled dict of lists, tuples, numbers, text and bytes; its values may be uint8 arrays,
    and strings of Python 2 are bytes. Raises DataError for any other name in the pickle and for a
    damaged pickle."""
    with data_error(f"{where}: not a readable pickle"):
        _check_lengths(data)
        unpickler = _Unpickler(io.BytesIO(data), encoding="bytes")
        unpickler.where = where
        loaded = unpickler.load()
        _check(isinstance(loaded, dict), f"a dict was expected, not {type(loaded).__name__}")
        arrays = {key: value.array() for key, value in loaded.items() if isinstance(value, _Array)}
        return loaded | arrays


class _Array:
    """Stand-in for numpy.ndarray: keeps the content of the pickle until `array` checks it."""

    shape: tuple[int, ...] = ()
    content: bytes = b""

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        _version, self.shape, dtype, fortran_order, self.content = state
        _check(isinstance(dtype, _Uint8) and not fortran_order)

    def array(self) -> np.ndarray:
        _check(len(self.content) == math.prod(self.shape))
        return np.frombuffer(self.content, np.uint8).reshape(self.shape)


class _Uint8:
    """Stand-in for numpy.dtype that can only be uint8."""

    def __init__(self, code: str | bytes, *_: Any) -> None:
        _check(code in ("u1", b"u1", "uint8", b"uint8"))

    def __setstate__(self, state: Any) -> None:
        """Ignored: uint8 has no state (byte order, fields) that could matter."""


def _reconstruct(_kind: Any, _shape: Any, _code: Any) -> _Array:
    return _Array()


def _frombuffer(content: Any, dtype: Any, shape: Any, order: str) -> _Array:
    array = _Array()
    array.__setstate__((1, shape, dtype, order != "C", bytes(content)))
    return array


def _encode(text: str, _encoding: str) -> bytes:
    """Stand-in for _codecs.encode, with which Python 3 writes bytes in old pickle protocols."""
    return text.encode("latin1")


def _check_lengths(data: bytes) -> None:
    """Raise an error where the unpickler would take far more memory than `data` (for a place in its
    table that no pickle of that length needs, or for bytes that are not there), or more stack than
    there is (for tuples of tuples in a key)."""
    stream, num_tuples = io.BytesIO(data), 0
    while code := stream.read(1):
        operation = _OPERATIONS[code]
        num_tuples += operation.name.startswith("TUPLE")
        _check(num_tuples <= _MOST_TUPLES, "it has too many tuples")
        if operation.name == "STRING":  # its reader takes ASCII alone
            stream.readline()
        elif operation.arg is not None:
            argument = operation.arg.reader(stream)
            if operation.name in ("PUT", "BINPUT", "LONG_BINPUT"):
                _check(argument <= len(data), f"{argument} things in {len(data)} bytes")
        elif operation.name == "STOP":
            return


def _check(holds: bool, message: str = "an array is not a whole uint8 array in C order") -> None:
    if not holds:
        raise ValueError(message)


_ALLOWED: dict[str, Any] = {"numpy.ndarray": _Array, "numpy.dtype": _Uint8}
_ALLOWED["_codecs.encode"] = _encode
for _core in ("numpy.core", "numpy._core"):  # before NumPy 2 and since
    _ALLOWED[f"{_core}.multiarray._reconstruct"] = _reconstruct
    _ALLOWED[f"{_core}.numeric._frombuffer"] = _frombuffer


class _Unpickler(pickle.Unpickler):
    where = ""

    def find_class(self, module: str, name: str) -> Any:
        if f"{module}.{name}" not in _ALLOWED:
            refused = f"refused, the pickle asks for {module}.{name}"
            allowed = "dicts, lists, bytes and uint8 numpy arrays"
            raise DataError(f"{self.where}: {refused}; allowed: {allowed}")
        return _ALLOWED[f"{module}.{name}"]
