"""Pei, Chang & Tian 2022, "Neural Architecture Search Based on Differential Evolution for Image
Classification Problems". Implements its sections 1 to 3 and the final training.

A population of architectures (`operators.architectures`) is judged by short trainings. Each
generation adds children of differential evolution on lists of units, and the best of parents and
children by a weighted sum of error rate and size survive. The most accurate and the smallest of the
last generation are trained at length (`build_final`).

One step judges one candidate, so that a run is interrupted between any two. The candidates of a
generation, with the key of each one's training, are drawn in its first step; those that come next
compile and train in other threads meanwhile, which changes no result.

Where the paper is silent or contradicts itself its released program is followed:

- Units are compared by kind: the paper's first rule of differences reads as equality of whole
  units (`compare="unit"`), and gives the unit where its rules of addition need a mark.
- Units have no factor F; `Params.differential_weight` below 1 lets each unit of a difference stay
  with that probability.
- The base of a child is one of the best five; a child that is already among its generation's is
  made anew.
- A random network's filters grow from layer to layer (`Space.growing`).
- Dropout is 0.5 (PyTorch's default), SGD has no momentum, cropping pads by 4 pixels.

Where we differ, and why:

- Selection sees a validation split of the training set. The program selects by the test set.
- `Space.max_features` bounds the first dense layer, without which a network has up to 43 billion
  parameters.
- A candidate whose training fails (a loss that is not finite, too little memory) comes last.
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jaxtyping import Float, Int, Int32, Num, UInt32

from evojax_suite.operators import selection
from evojax_suite.runtime import devices
from evojax_suite.systems.de_nas import architectures
from evojax_suite.systems.de_nas.architectures import Genome, Space
from evojax_suite.systems.de_nas.candidates import (
    Data,
    EvaluatedCandidate,
    known_networks,
    make_evaluator,
)
from evojax_suite.systems.de_nas.config import Config, Params
from evojax_suite.systems.de_nas.evosax_search import Encoded, EvosaxSearch, evosax_search
from evojax_suite.training import Evaluation
from evojax_suite.types import Algorithm, Array


@struct.dataclass
class State:
    """All candidates in the order in which they are made, and who lives."""

    genomes: Genome  # leading axis that of candidates, END beyond those that were made
    keys: UInt32[Array, "candidates 2"]  # of each one's training
    accuracy: Float[Array, "candidates"]  # on the validation split, NaN where not judged or failed
    rungs: Float[Array, "candidates rungs_and_end"]  # the same at each, NaN where not reached
    num_epochs: Int32[Array, "candidates"]  # that each was trained
    population: Int32[Array, "population"]  # from the best to the worst; -1 before the first
    num_judged: Int32[Array, ""]
    encoded: Encoded | None  # method evosax only


class Metrics(NamedTuple):
    """What judging one candidate reports."""

    generation: np.generic  # the step: the candidate's number, from 1
    search_generation: np.generic  # that it was made in, 0 for the first population
    accuracy: np.generic  # on the validation split
    loss: np.generic  # there, in nats
    num_parameters: np.generic
    num_multiplications: np.generic  # of one image, forward
    num_epochs: np.generic  # that it was trained
    accuracy_best: np.generic  # of all so far
    population_accuracy: np.generic  # mean, NaN before the first selection
    population_parameters: np.generic  # mean
    num_failed: np.generic
    stage_seconds: dict[str, float]  # of the candidate, in its own thread; no part of the result


class SearchResult(NamedTuple):
    """What a search ends with: the population, from the best score to the worst."""

    genomes: Genome  # leading axis that of the population
    accuracy: Float[
        np.ndarray, "population"
    ]  # on the validation split, NaN where a training failed
    most_accurate: int  # its place
    smallest: int  # its place, of those whose training did not fail


def scores(
    accuracy: Float[np.ndarray, "candidates"],
    sizes: Num[np.ndarray, "candidates"],
    params: Params,
    scale: int | None = None,
) -> Float[np.ndarray, "candidates"]:
    """The weighted sum of error rate and size, lower is better ("Natural selection").

    Error and size go from 0 to 1 over the candidates, or over the first
    `scale` of them, which makes the scores of several generations comparable. Infinite where the
    accuracy is not finite.
    """
    usable = np.isfinite(accuracy)
    setting = usable & (np.arange(len(usable)) < (scale or len(usable)))

    def scaled(values):
        if not setting.any():
            return np.zeros(len(values))
        low, high = values[setting].min(), values[setting].max()
        return (values - low) / (high - low) if high > low else np.zeros(len(values))

    errors = 1 - np.asarray(accuracy, np.float64)
    total = params.error_weight * scaled(errors)
    total = total + params.size_weight * scaled(np.asarray(sizes, np.float64))
    return np.where(usable, total, np.inf)


def best_first(
    accuracy: Float[np.ndarray, "candidates"],
    sizes: Num[np.ndarray, "candidates"],
    params: Params,
    survival: str = "score",
) -> Int[np.ndarray, "candidates"]:
    """Places of candidates from the best to the worst."""
    if survival == "score":
        return np.argsort(scores(accuracy, sizes, params), kind="stable")
    objectives = jnp.stack([1 - jnp.asarray(accuracy), jnp.log(jnp.asarray(sizes, float))], axis=1)
    ranks = selection.non_dominated_ranks(objectives)
    crowding = selection.crowding_distances(objectives, ranks)
    return np.lexsort((-np.asarray(crowding), np.asarray(ranks)))


def num_workers(config: Config, num_devices: int) -> int:
    """Candidates that a process compiles or trains at once: `config.workers`, or so many that every
    device has something to do while others compile, which is what the cores of a CPU do."""
    on_cpu = jax.default_backend() == "cpu"
    return config.workers or (max(2, num_devices) if on_cpu else 2 * num_devices)


class _Workers:
    """Threads that train and judge candidates, on the devices of this process.

    Of several processes each judges its own candidates, and they tell each other what they found.
    """

    def __init__(
        self,
        judge: Callable[..., EvaluatedCandidate],
        num_workers: int,
        num_rungs: int,
        local: list,
    ):
        self._judge, self._num_workers, self._devices = judge, num_workers, local
        self._pool = ThreadPoolExecutor(num_workers, thread_name_prefix="candidate")
        self._ahead: dict[bytes, Future[EvaluatedCandidate]] = {}
        unknown = np.full(num_rungs + 1, np.nan, np.float32)
        self._nothing = EvaluatedCandidate(
            evaluation=Evaluation(*unknown[[0, 0]]),
            rungs=unknown,
            num_epochs=np.int32(0),
            seconds={"compilation": 0.0, "training": 0.0},
        )

    def judged(
        self, state: State, data: Data, bars: np.ndarray, first: int, end: int
    ) -> EvaluatedCandidate:
        """Candidate `first`; this process's own after it, before `end`, are begun meanwhile."""
        num_processes, process = jax.process_count(), jax.process_index()
        genomes, keys = jax.device_get((state.genomes, state.keys))

        def work(index: int) -> EvaluatedCandidate:
            place = index // num_processes % len(self._devices)
            with jax.default_device(self._devices[place]):
                try:
                    key = jax.random.wrap_key_data(jnp.asarray(keys[index]))
                    return self._judge(architectures.member(genomes, index), key, data, bars)
                except jax.errors.JaxRuntimeError as error:
                    if "RESOURCE_EXHAUSTED" not in str(error):
                        raise
                    return self._nothing  # too large for the memory

        names = {}
        own = [index for index in range(first, end) if index % num_processes == process]
        for index in own[: self._num_workers]:
            about = (*architectures.member(genomes, index), keys[index], bars, np.int64(index))
            name = b"".join(leaf.tobytes() for leaf in about)
            names[index] = name
            if name not in self._ahead:
                self._ahead[name] = self._pool.submit(work, index)
        for name in set(self._ahead) - set(names.values()):  # of another state
            self._ahead.pop(name).cancel()
        found = self._ahead.pop(names[first]).result() if first in names else self._nothing
        if num_processes == 1:
            return found
        everyones = devices.gathered(found)
        return jax.tree.map(lambda leaf: leaf[first % num_processes], everyones)


class _Setup(NamedTuple):
    """What does not change in a search."""

    config: Config
    num_classes: int
    image_shape: tuple[int, int, int]
    evosax: EvosaxSearch | None
    workers: _Workers


@partial(jax.jit, static_argnums=(0, 1))
def _random_genomes(space: Space, shape: tuple[int, int, int], keys: Array) -> Genome:
    """Genomes of the first population, or of random search, one for each of `keys`."""
    return jax.vmap(lambda key: architectures.random_genome(key, space, shape))(keys)


def _sizes_of(setup: _Setup, genomes: Genome) -> np.ndarray:
    return getattr(
        architectures.costs(genomes, setup.image_shape, setup.num_classes), setup.config.size
    )


def _init(setup: _Setup, key: Array, params: Params, data: Data) -> State:
    del params, data
    total, num_rungs = setup.config.num_candidates, len(setup.config.rungs)
    empty = jnp.zeros((total, setup.config.space.max_length), jnp.int32)
    return State(
        genomes=Genome(empty, empty, empty),
        keys=jnp.zeros((total, 2), jnp.uint32),
        accuracy=jnp.full(total, jnp.nan),
        rungs=jnp.full((total, num_rungs + 1), jnp.nan),
        num_epochs=jnp.zeros(total, jnp.int32),
        population=jnp.full(setup.config.population_size, -1, jnp.int32),
        num_judged=jnp.int32(0),
        encoded=setup.evosax.start(key) if setup.evosax else None,
    )


@partial(jax.jit, static_argnums=(0, 1))
def _offspring(
    config: Config,
    shape: tuple[int, int, int],
    key: Array,
    population: Genome,
    weight: Array | float,
) -> Genome:
    return architectures.offspring(
        key,
        population,
        jnp.arange(config.population_size),
        config.num_children,
        config.num_best,
        config.space,
        shape,
        config.compare,
        weight,
    )


def _draw(setup: _Setup, key: Array, state: State, params: Params) -> State:
    """The candidates of the next generation, and the keys of their trainings."""
    key_genomes, key_training = jax.random.split(key)
    space, size = setup.config.space, setup.config.population_size
    start = int(state.num_judged)
    number = setup.config.num_children if start else size
    if setup.evosax and state.encoded:
        fitness = np.zeros(0)
        if start:
            judged = np.arange(start)
            sizes = _sizes_of(setup, architectures.member(state.genomes, judged))
            fitness = scores(np.asarray(state.accuracy)[judged], sizes, params, size)
        made, encoded = setup.evosax.propose(key_genomes, state.encoded, fitness)
        state = replace(state, encoded=encoded)
    elif start and setup.config.method == "evolution":
        population = architectures.member(state.genomes, state.population)
        made = _offspring(
            setup.config, setup.image_shape, key_genomes, population, params.differential_weight
        )
    else:
        made = _random_genomes(space, setup.image_shape, jax.random.split(key_genomes, number))
    if setup.config.num_known and not start:
        known = known_networks(space, setup.image_shape, setup.config.num_known)
        made = jax.tree.map(lambda all, new: all.at[: len(new)].set(new), made, known)
    features = np.asarray(architectures.num_features(made, setup.image_shape))
    if features.max() > space.max_features:
        raise ValueError(
            f"no random network with at most max_features = {space.max_features} was found, "
            f"the last one has {features.max()}"
        )
    place = slice(start, start + number)
    keys = jax.random.key_data(jax.random.split(key_training, number))
    return replace(
        state,
        genomes=jax.tree.map(lambda all, new: all.at[place].set(new), state.genomes, made),
        keys=state.keys.at[place].set(keys),
    )


def _bars_of(setup: _Setup, state: State, params: Params) -> Float[np.ndarray, "rungs"]:
    """The accuracy at each rung that a child must reach, of the survivors that did."""
    alive, num_rungs = np.asarray(state.population), len(setup.config.rungs)
    if not num_rungs or alive[0] < 0:
        return np.full(num_rungs, -np.inf, np.float32)
    found = np.asarray(state.rungs)[alive, :num_rungs]
    found = np.where(np.isfinite(found).any(0), found, -np.inf)
    quantile = np.nanquantile(found, params.stopping_quantile, axis=0, method="lower")
    return quantile.astype(np.float32)


def _step(
    setup: _Setup, key: Array, state: State, params: Params, data: Data
) -> tuple[State, Metrics]:
    index = int(state.num_judged)
    generation = setup.config.generation_of(index)
    start, end = setup.config.candidates_of(generation)
    if index == start:
        state = _draw(setup, key, state, params)
    found = setup.workers.judged(state, data, _bars_of(setup, state, params), index, end)
    accuracy = state.accuracy.at[index].set(found.evaluation.accuracy)
    state = replace(
        state,
        accuracy=accuracy,
        rungs=state.rungs.at[index].set(found.rungs),
        num_epochs=state.num_epochs.at[index].set(found.num_epochs),
        num_judged=state.num_judged + 1,
    )
    if index + 1 == end:
        old = [] if generation == 0 else np.asarray(state.population)
        merged = np.concatenate([old, np.arange(start, end)]).astype(np.int32)
        genomes = architectures.member(state.genomes, merged)
        order = best_first(
            np.asarray(accuracy)[merged], _sizes_of(setup, genomes), params, setup.config.survival
        )
        state = replace(
            state, population=jnp.asarray(merged[order[: setup.config.population_size]])
        )
    known = np.asarray(accuracy)[: index + 1]
    alive = np.asarray(state.population)
    own, everyone = (
        architectures.costs(
            architectures.member(state.genomes, who), setup.image_shape, setup.num_classes
        )
        for who in (index, alive)
    )
    selected = alive[0] >= 0
    return state, Metrics(
        generation=np.int32(index + 1),
        search_generation=np.int32(generation),
        accuracy=np.float32(found.evaluation.accuracy),
        loss=np.float32(found.evaluation.cross_entropy),
        num_parameters=np.int64(own.parameters),
        num_multiplications=np.int64(own.multiplications),
        num_epochs=np.int32(found.num_epochs),
        accuracy_best=np.nanmax(known) if np.isfinite(known).any() else np.float32(np.nan),
        population_accuracy=np.nanmean(np.asarray(accuracy)[alive])
        if selected
        else np.float32(np.nan),
        population_parameters=everyone.parameters.mean() if selected else np.float64(np.nan),
        num_failed=np.int32(not np.isfinite(found.evaluation.accuracy)),
        stage_seconds=found.seconds,
    )


def _result(setup: _Setup, state: State, params: Params, data: Data) -> SearchResult:
    del params, data
    alive = np.asarray(state.population)
    alive = alive if alive[0] >= 0 else np.arange(max(1, int(state.num_judged)))
    genomes = architectures.member(state.genomes, alive)
    accuracy = np.asarray(state.accuracy)[alive]
    usable = np.isfinite(accuracy)
    sizes = _sizes_of(setup, genomes).astype(float)
    return SearchResult(
        genomes=genomes,
        accuracy=accuracy,
        most_accurate=int(np.argmax(np.where(usable, accuracy, -1.0))),
        smallest=int(np.argmin(np.where(usable, sizes, np.inf))),
    )


def _finished(setup: _Setup, state: State) -> Array:
    return state.num_judged >= setup.config.num_candidates


def build(
    config: Config,
    num_classes: int,
    image_shape: tuple[int, int, int],
    num_devices: int | None = None,
) -> Algorithm[State, Params, Data, Metrics, SearchResult]:
    """One step judges one candidate. `data` is a Data; the result is a SearchResult.

    The candidates of a generation are divided over `num_devices` devices (None is all) of each of
    the run's processes, which tell each other what they found.

    Not scannable: candidates are different programs. Raises ValueError where images of
    `image_shape` (height, width, channels) or the space leave no networks.
    """
    if num_classes < 2:
        raise ValueError(f"a search needs at least 2 classes, got {num_classes}")
    if architectures.most_poolings(image_shape) < 1:
        raise ValueError(f"images must be at least 4x4 for a pooling, got {image_shape}")
    config.space.check(image_shape)
    local_devices = jax.local_devices()[:num_devices]
    workers = _Workers(
        make_evaluator(config, num_classes, image_shape),
        num_workers(config, len(local_devices)),
        len(config.rungs),
        local_devices,
    )
    evosax = evosax_search(config, image_shape) if config.method == "evosax" else None
    in_all = len(local_devices) * jax.process_count()
    setup = _Setup(config, num_classes, image_shape, evosax, workers)
    return Algorithm(
        partial(_init, setup),
        partial(_step, setup),
        partial(_result, setup),
        partial(_finished, setup),
        scannable=False,
        num_devices=in_all,
    )
