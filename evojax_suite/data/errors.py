"""The one error that the data modules raise, and the shortening of other libraries' errors."""

from __future__ import annotations

import contextlib
from collections.abc import Generator


class DataError(ValueError):
    """A dataset cannot be read; the message is one line naming the place and what is allowed."""

    def __init__(self, message: str):
        super().__init__(" ".join(message.splitlines()))  # names in files may have several


def first_line(error: BaseException) -> str:
    """The first non-empty line of an error's message, or its type's name where it has none."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0][:300] if lines else type(error).__name__


@contextlib.contextmanager
def data_error(message: str, *kinds: type[Exception], advice: str = "") -> Generator[None]:
    """A context that raises errors as DataError: `message`, their first line in brackets, `advice`.

    kinds: the errors to convert; by default all, as readers of damaged files raise nearly any.
    """
    try:
        yield
    except Exception as error:
        if isinstance(error, DataError) or not isinstance(error, kinds or Exception):
            raise
        raise DataError(f"{message} ({first_line(error)}){advice}") from error
