"""What a user names by its import path: package.module:name."""

from __future__ import annotations

import importlib
from typing import Any


def imported(path: str) -> Any:
    """What `path` names; its module is run. Raises ValueError where there is no such thing."""
    module, _, name = path.partition(":")
    try:
        return getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError, ValueError) as error:
        raise ValueError(f"{path!r} cannot be imported: {error}") from error
