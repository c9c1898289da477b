"""Objects that a user names by their import path, package.module:name."""

from __future__ import annotations

import importlib
from typing import Any


def import_object(path: str) -> Any:
    """The object at `path`; its module is run. Raises ValueError where there is none."""
    module, _, name = path.partition(":")
    try:
        return getattr(importlib.import_module(module), name)
    except Exception as error:  # whatever the module does
        reason = " ".join(str(error).split()) or type(error).__name__
        raise ValueError(f"{path!r} cannot be imported: {reason}") from error
