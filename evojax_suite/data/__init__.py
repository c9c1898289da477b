"""Datasets: loading by name or path, fixed splits, normalisation and augmentation."""

from evojax_suite.data.catalog import NAMES
from evojax_suite.data.errors import DataError
from evojax_suite.data.loader import from_arrays, load
from evojax_suite.data.splits import hold_out, some_images, with_whole_training_set
from evojax_suite.data.transforms import (
    denormalize,
    mixup,
    normalize,
    random_crop,
    random_flip,
    random_shift,
)

__all__ = [
    "NAMES",
    "DataError",
    "denormalize",
    "from_arrays",
    "hold_out",
    "load",
    "mixup",
    "normalize",
    "random_crop",
    "random_flip",
    "random_shift",
    "some_images",
    "with_whole_training_set",
]
