"""The one error that the data modules raise, and the shortening of other libraries' errors."""

from __future__ import annotations


class DataError(ValueError):
    """A dataset cannot be read; the message is one line naming the place and what is allowed."""

    def __init__(self, message: str):
        super().__init__(" ".join(message.splitlines()))  # names in files may have several


def first_line(error: BaseException) -> str:
    """The first non-empty line of an error's message, or its type's name where it has none."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0][:300] if lines else type(error).__name__
