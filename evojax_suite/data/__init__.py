"""Datasets: loading by name or path, fixed splits, normalisation and augmentation."""

from evojax_suite.data.catalog import NAMES as NAMES
from evojax_suite.data.errors import DataError as DataError
from evojax_suite.data.loader import from_arrays as from_arrays, load as load
from evojax_suite.data.splits import (
    hold_out as hold_out,
    some_images as some_images,
    with_whole_training_set as with_whole_training_set,
)
from evojax_suite.data.transforms import (
    denormalize as denormalize,
    mixup as mixup,
    normalize as normalize,
    random_crop as random_crop,
    random_flip as random_flip,
    random_shift as random_shift,
)
