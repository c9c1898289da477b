"""Evolution over thousands of small neural networks, in JAX."""

from evojax_suite.data import from_arrays, load
from evojax_suite.networks import NetworkConfig
from evojax_suite.training import EngineConfig, TrainingConfig
from evojax_suite.types import Algorithm, Dataset, Split

__version__ = "0.1.0"

__all__ = [
    "Algorithm",
    "Dataset",
    "EngineConfig",
    "NetworkConfig",
    "Split",
    "TrainingConfig",
    "__version__",
    "from_arrays",
    "load",
]
