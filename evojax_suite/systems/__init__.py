"""A folder for each system: what it evolves, and the run of its command.

The `SYSTEM` record in a folder's `experiment.py` is all that the rest of the package knows of it. A
package of one's own adds a system by an entry point of the group `evojax_suite.systems` that names
such a record.
"""

from __future__ import annotations

import importlib
import pkgutil
from importlib.metadata import entry_points
from typing import TYPE_CHECKING

if TYPE_CHECKING:  # evosax starts the devices when it is imported, and systems import it
    from evojax_suite.running.system import System


def find() -> dict[str, System]:
    """All systems by the name of their command: those of this package, then those of others. Raises
    ValueError where one of these is no system, or two have one name."""
    from evojax_suite.running.system import System

    records = [
        importlib.import_module(f"{__name__}.{module.name}.experiment").SYSTEM
        for module in pkgutil.iter_modules(__path__)
    ]
    for point in entry_points(group="evojax_suite.systems"):
        record = point.load()
        if not isinstance(record, System):
            raise ValueError(f"entry point {point.value} must name a System, got {record!r:.40}")
        records.append(record)
    found: dict[str, System] = {}
    for record in records:
        if record.command in found:
            raise ValueError(f"two systems are called {record.name}")
        found[record.command] = record
    return found
