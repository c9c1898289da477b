"""The name that a user may have meant."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Mapping


def plain(name: str) -> str:
    """A name without case and separators.

    >>> plain("Fashion-MNIST")
    'fashionmnist'
    """
    return re.sub(r"[-_\s]", "", name).lower()


def did_you_mean(
    name: str, names: Iterable[str], num_names: int = 1, shown: Mapping[str, str] | None = None
) -> str:
    """The end of an error: those of `names` that are most like `name`, whatever the case and the
    separators; "" where none is. shown: how to show each of the names, by default as it is.

    >>> did_you_mean("snes", ["PSO", "SNES"])
    ' (did you mean SNES?)'
    """
    by_plain_name = {plain(each): shown[each] if shown else each for each in names}
    close = difflib.get_close_matches(plain(name), by_plain_name, num_names)
    return f" (did you mean {' or '.join(by_plain_name[each] for each in close)}?)" if close else ""
