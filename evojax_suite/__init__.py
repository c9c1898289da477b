"""Evolution over thousands of small neural networks, in JAX.

The systems are attributes that are imported when they are asked for: `ga_distillation`, `devs`,
`coresets`, `cest`, `ecomp` and `de_nas`.
"""

import importlib
from typing import TYPE_CHECKING

from evojax_suite.data import from_arrays, load
from evojax_suite.networks import NetworkConfig
from evojax_suite.training import EngineConfig, TrainingConfig
from evojax_suite.types import Algorithm, Dataset, Split

if TYPE_CHECKING:
    from evojax_suite.systems import cest, coresets, de_nas, devs, ecomp, ga_distillation

__version__ = "0.1.0"

__all__ = [
    "Algorithm",
    "Dataset",
    "EngineConfig",
    "NetworkConfig",
    "Split",
    "TrainingConfig",
    "__version__",
    "cest",
    "coresets",
    "de_nas",
    "devs",
    "ecomp",
    "from_arrays",
    "ga_distillation",
    "load",
]


def __getattr__(name: str):
    # evosax starts the devices when it is imported, so a system is not imported before it is used.
    if name in __all__:
        return importlib.import_module(f"evojax_suite.systems.{name}")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
