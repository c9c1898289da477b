"""Types that every module shares: array aliases, datasets, the device view of a dataset."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct

PyTree: TypeAlias = Any
Array: TypeAlias = jax.Array


@dataclass(frozen=True)
class Split:
    """One part of a dataset, on the host.

    images: (N, H, W, C) uint8 in 0..255, or float32 in [0, 1].
    labels: (N,) int32 in 0..num_classes-1.
    """

    images: np.ndarray
    labels: np.ndarray

    def __len__(self) -> int:
        return len(self.labels)


@dataclass(frozen=True)
class Dataset:
    """A classification dataset with its three parts, on the host.

    `mean` and `std` are the per-channel normalisation constants for images scaled to [0, 1];
    each has as many entries as the images have channels. `train` starts individuals,
    `validation` is what selection sees, `test` is opened once, by the final report.
    """

    name: str
    train: Split
    validation: Split
    test: Split
    class_names: tuple[str, ...]
    mean: tuple[float, ...]
    std: tuple[float, ...]

    @property
    def num_classes(self) -> int:
        return len(self.class_names)

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """Height, width, channels."""
        height, width, channels = self.train.images.shape[1:]
        return height, width, channels

    def without_test(self) -> Dataset:
        """This dataset with an empty test split, for what must not see it."""
        return replace(self, test=Split(self.test.images[:0], self.test.labels[:0]))


@struct.dataclass
class TrainingData:
    """The training part on the device, for algorithms that need no other."""

    images: Array  # (N, H, W, C), uint8 or float in [0, 1]
    labels: Array  # (N,) int32
    mean: Array  # (C,)
    std: Array  # (C,)


def training_data(dataset: Dataset) -> TrainingData:
    """The training part of `dataset`: validation and test stay closed."""
    return TrainingData(
        images=jnp.asarray(dataset.train.images),
        labels=jnp.asarray(dataset.train.labels),
        mean=jnp.asarray(dataset.mean, jnp.float32),
        std=jnp.asarray(dataset.std, jnp.float32),
    )


class Divided(NamedTuple):
    """A step in two parts, of which the first, the work, is done for some members at a time."""

    population_size: int
    keys: Callable[[Array], tuple[Any, Any]]
    """The key of a step -> the keys of its two parts."""
    evaluate: Callable[..., Any]
    """(keys, state, params, data, members) -> what was found, leading axis that of members (n,)."""
    advance: Callable[..., tuple[Any, Any]]
    """(keys, state, found of the whole population, params, data) -> (State, Metrics)."""

    def step(self, key: Array, state: Any, params: Any, data: Any) -> tuple[Any, Any]:
        """Both parts, as `Algorithm.step`."""
        keys_evaluate, keys_advance = self.keys(key)
        everyone = jnp.arange(self.population_size)
        found = self.evaluate(keys_evaluate, state, params, data, everyone)
        return self.advance(keys_advance, state, found, params, data)


@dataclass(frozen=True)
class Algorithm:
    """What every system's `build(config, ...)` returns: pure functions that the loop drives.

    init(key, params, data) -> State                   cheap: shapes and first individuals
    step(key, state, params, data) -> (State, Metrics) one generation, or one unit of a phase
    result(state, params, data) -> the artefact
    finished(state) -> bool array                      whether further steps would change nothing

    `key` of step g is `fold_in(run_key, g)`, so that going on at g needs nothing but the state.
    `scannable`: `step` may be jitted, scanned and vmapped; `compiler_options`: those of XLA under
    which its program runs fastest; `divided`: `step` in two parts, for several devices
    (`devices.over_devices`); `num_devices`: those of all processes over which `step` is divided;
    `compiled`: of the arguments of `step` -> a `step` for such arguments that is compiled already,
    where it is not scannable and can tell.
    """

    init: Callable[..., Any]
    step: Callable[..., tuple[Any, Any]]
    result: Callable[..., Any]
    finished: Callable[[Any], Any]
    scannable: bool = True
    compiler_options: dict[str, Any] | None = field(default=None, hash=False)
    divided: Divided | None = None
    num_devices: int = 1
    compiled: Callable[..., Callable[..., tuple[Any, Any]]] | None = None
