"""Types that every module shares: array aliases, datasets, the device view of a dataset."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any, Generic, NamedTuple, Protocol, TypeAlias, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jaxtyping import Float, Float32, Int, Int32, Key, UInt8

PyTree: TypeAlias = Any
Array: TypeAlias = jax.Array
PRNGKey: TypeAlias = Key[Array, ""]
Scalar: TypeAlias = Float[Array, ""]
IntScalar: TypeAlias = Int[Array, ""]
Images: TypeAlias = Float[Array, "images height width channels"]
Labels: TypeAlias = Int[Array, "images"]
Probabilities: TypeAlias = Float[Array, "images classes"]


@dataclass(frozen=True)
class Split:
    """One part of a dataset, on the host.

    images: uint8 in 0..255, or float32 in [0, 1].
    labels: in 0..num_classes-1.
    """

    images: (
        UInt8[np.ndarray, "images height width channels"]
        | Float32[np.ndarray, "images height width channels"]
    )
    labels: Int32[np.ndarray, "images"]

    def __len__(self) -> int:
        return len(self.labels)

    def __repr__(self) -> str:
        height, width, channels = self.images.shape[1:]
        return f"Split({len(self):,} images of {height}x{width}x{channels}, {self.images.dtype})"


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

    def __repr__(self) -> str:
        parts = ("train", "validation", "test")
        sizes = ", ".join(f"{name} {len(getattr(self, name)):,}" for name in parts)
        shape = "x".join(map(str, self.image_shape))
        return f"Dataset({self.name!r}: {self.num_classes} classes of {shape} images; {sizes})"

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

    images: (  # floats in [0, 1]
        UInt8[Array, "images height width channels"] | Images
    )
    labels: Labels
    mean: Float[Array, "channels"]
    std: Float[Array, "channels"]


def training_data(dataset: Dataset) -> TrainingData:
    """The training split of `dataset`: validation and test stay closed."""
    return TrainingData(
        images=jnp.asarray(dataset.train.images),
        labels=jnp.asarray(dataset.train.labels),
        mean=jnp.asarray(dataset.mean, jnp.float32),
        std=jnp.asarray(dataset.std, jnp.float32),
    )


StateT = TypeVar("StateT")
ParamsT = TypeVar("ParamsT")
DataT = TypeVar("DataT")
MetricsT = TypeVar("MetricsT")
ResultT = TypeVar("ResultT")


class StepKeys(NamedTuple):
    """The keys of the three parts of a step, each an array of keys or a tuple of them."""

    ask: PyTree
    evaluate: PyTree
    tell: PyTree


@dataclass(frozen=True)
class Generation(Generic[StateT, ParamsT, DataT, MetricsT]):
    """A step as the ask, evaluate and tell of evosax, so that several devices may evaluate.

    split_key(key) -> StepKeys
    ask(key, state, params, data) -> candidates
    evaluate(key, candidates, params, data, members) -> evaluations of the candidates at `members`
        (n,), arrays whose leading axis is n. This is the work; a candidate has the same evaluation
        whatever the others of the call are.
    tell(key, state, candidates, evaluations, params, data) -> (State, Metrics)
    work(data) -> the floating-point operations of the evaluation of one candidate, roughly
    """

    population_size: int
    split_key: Callable[[Array], StepKeys]
    ask: Callable[[PyTree, StateT, ParamsT, DataT], PyTree]
    evaluate: Callable[[PyTree, PyTree, ParamsT, DataT, Array], PyTree]
    tell: Callable[[PyTree, StateT, PyTree, PyTree, ParamsT, DataT], tuple[StateT, MetricsT]]
    work: Callable[[DataT], float] | None = None
    """None where a part of the population is not evaluated in a part of the time."""
    members_at_once: int = 1
    """Members that a device evaluates at a time."""

    def step(
        self, key: Array, state: StateT, params: ParamsT, data: DataT
    ) -> tuple[StateT, MetricsT]:
        """All three parts, as `Algorithm.step`."""
        keys = self.split_key(key)
        candidates = self.ask(keys.ask, state, params, data)
        everyone = jnp.arange(self.population_size)
        evaluations = self.evaluate(keys.evaluate, candidates, params, data, everyone)
        return self.tell(keys.tell, state, candidates, evaluations, params, data)


class Kept(Protocol):
    """The evaluations of groups of members, in a step that is under way."""

    def get(self, first: int, end: int, like: PyTree) -> PyTree | None:
        """The evaluations of the members from `first` to `end`, or None. like: the shapes of the
        evaluations of all members."""
        ...

    def add(self, first: int, end: int, evaluations: PyTree) -> None:
        """Keep evaluations. Raises what is to end the step."""
        ...


@dataclass(frozen=True)
class _Init:
    """`function(key, params, data)`, of data that the algorithm was built for."""

    function: Callable[[Array, PyTree, PyTree], PyTree]
    image_shape: tuple[int, int, int] | None

    def __call__(self, key: Array, params: PyTree, data: PyTree) -> PyTree:
        if isinstance(data, Dataset):
            raise ValueError(
                "init takes the data that make_data(config, dataset) returns, got a Dataset"
            )
        images = getattr(data, "images", getattr(data, "train_images", None))
        shape = None if images is None else images.shape[-3:]
        if self.image_shape and shape and shape != self.image_shape:
            raise ValueError(f"images must have the shape {self.image_shape}, got {shape}")
        return self.function(key, params, data)


@dataclass(frozen=True)
class Algorithm(Generic[StateT, ParamsT, DataT, MetricsT, ResultT]):
    """What every system's `build(config, ...)` returns: pure functions that the loop drives.

    init(key, params, data) -> State                   cheap: shapes and first individuals
    step(key, state, params, data) -> (State, Metrics) one generation, or one unit of a phase
    result(state, params, data) -> the artefact
    finished(state) -> bool array                      whether further steps would change nothing

    `key` of step g is `fold_in(run_key, g)`, so that going on at g needs nothing but the state.
    """

    init: Callable[[Array, ParamsT, DataT], StateT]
    step: Callable[[Array, StateT, ParamsT, DataT], tuple[StateT, MetricsT]]
    result: Callable[[StateT, ParamsT, DataT], ResultT]
    finished: Callable[[StateT], Array | bool]
    scannable: bool = True
    """Whether `step` may be jitted, scanned and vmapped."""
    compiler_options: dict[str, str | bool] | None = field(default=None, hash=False)
    """The options of XLA under which its program runs fastest."""
    generation: Generation[StateT, ParamsT, DataT, MetricsT] | None = None
    """`step` in its parts, for several devices (`devices.over_devices`)."""
    num_devices: int = 1
    """The devices, of all processes, over which `step` evaluates."""
    in_groups: bool = False
    """Whether `step` evaluates its population in groups, and takes an argument `kept`
    (`devices.over_devices`)."""
    compiled: (
        Callable[
            [Array, StateT, ParamsT, DataT],
            Callable[[Array, StateT, ParamsT, DataT], tuple[StateT, MetricsT]],
        ]
        | None
    ) = None
    """A function of the arguments of `step` that returns a `step` for such arguments, compiled
    already; None where it is scannable or cannot tell."""
    image_shape: tuple[int, int, int] | None = None
    """That of the images of `data` (height, width, channels), which `init` then checks."""

    def __post_init__(self):
        if not isinstance(self.init, _Init):
            object.__setattr__(self, "init", _Init(self.init, self.image_shape))

    def __repr__(self) -> str:
        function = self.init.function if isinstance(self.init, _Init) else self.init
        parts = [getattr(function, "__module__", "of a script")]
        if self.generation:
            parts.append(f"{self.generation.population_size} members")
        parts.append(f"{self.num_devices} device{'s' if self.num_devices > 1 else ''}")
        return f"Algorithm({', '.join(parts)})"


AnyGeneration: TypeAlias = Generation[PyTree, PyTree, PyTree, PyTree]
AnyAlgorithm: TypeAlias = Algorithm[PyTree, PyTree, PyTree, PyTree, Any]
"""An algorithm whose state, params, data, metrics and result the code that drives it does not look
into."""
