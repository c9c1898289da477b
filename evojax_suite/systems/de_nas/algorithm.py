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

- Selection sees a validation part of the training set. The program selects by the test set.
- `Space.max_features` bounds the first dense layer, without which a network has up to 43 billion
  parameters.
- A candidate whose training fails (a loss that is not finite, too little memory) comes last.
"""

from __future__ import annotations

from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct

from evojax_suite.operators import selection
from evojax_suite.runtime import devices
from evojax_suite.systems.de_nas import architectures
from evojax_suite.systems.de_nas.architectures import Genome
from evojax_suite.systems.de_nas.candidates import Data, Judged, judges, known_networks
from evojax_suite.systems.de_nas.config import Config, Params
from evojax_suite.systems.de_nas.evosax_search import Encoded, evosax_search
from evojax_suite.training import (
    Evaluation,
)
from evojax_suite.types import Algorithm, Array


@struct.dataclass
class State:
    """All candidates in the order in which they are made, and who lives."""

    genomes: Genome  # (T, L), END beyond those that were made
    keys: Array  # (T, 2) uint32, of each one's training
    accuracy: Array  # (T,) on the validation part, NaN where not judged or failed
    rungs: Array  # (T, R + 1) the same at each rung and at the end, NaN where not reached
    num_epochs: Array  # (T,) int32 that each was trained
    population: Array  # (P,) int32, candidates from the best to the worst; -1 before the first
    num_judged: Array  # () int32
    encoded: Encoded | None  # method evosax only


class Metrics(NamedTuple):
    """What judging one candidate reports."""

    generation: np.generic  # the step: the candidate's number, from 1
    search_generation: np.generic  # that it was made in, 0 for the first population
    accuracy: np.generic  # on the validation part
    loss: np.generic  # there, in nats
    num_parameters: np.generic
    num_multiplications: np.generic  # of one image, forward
    num_epochs: np.generic  # that it was trained
    accuracy_best: np.generic  # of all so far
    population_accuracy: np.generic  # mean, NaN before the first selection
    population_parameters: np.generic  # mean
    num_failed: np.generic
    stage_seconds: dict[str, float]  # of the candidate, in its own thread; no part of the result


class Found(NamedTuple):
    """What a search ends with: the population, from the best score to the worst."""

    genomes: Genome  # (P, L)
    accuracy: np.ndarray  # (P,) on the validation part, NaN where a training failed
    most_accurate: int  # its place
    smallest: int  # its place, of those whose training did not fail


def scores(
    accuracy: np.ndarray, sizes: np.ndarray, params: Params, scale: int | None = None
) -> np.ndarray:
    """The weighted sum (n,) of error rate and size, lower is better ("Natural selection").

    accuracy, sizes: (n,). Error and size go from 0 to 1 over the candidates, or over the first
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
    accuracy: np.ndarray, sizes: np.ndarray, params: Params, survival: str = "score"
) -> np.ndarray:
    """Places (n,) of candidates from the best to the worst."""
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


def build(
    config: Config,
    num_classes: int,
    image_shape: tuple[int, int, int],
    num_devices: int | None = None,
) -> Algorithm:
    """One step judges one candidate. `data` is a Data; the result is a Found.

    The candidates of a generation are divided over `num_devices` devices (None is all) of each of
    the run's processes, which tell each other what they found.

    Not scannable: candidates are different programs. Raises ValueError where images of
    `image_shape` (height, width, channels) or the space leave no networks.
    """
    if num_classes < 2:
        raise ValueError(f"a search needs at least 2 classes, got {num_classes}")
    if architectures.most_poolings(image_shape) < 1:
        raise ValueError(f"images must be at least 4x4 for a pooling, got {image_shape}")
    space = config.space
    space.check(image_shape)
    size, children = config.population_size, config.num_children
    judge = judges(config, num_classes, image_shape)
    local_devices = jax.local_devices()[:num_devices]
    num_processes, process = jax.process_count(), jax.process_index()
    workers = num_workers(config, len(local_devices))
    pool = ThreadPoolExecutor(workers, thread_name_prefix="candidate")
    ahead: dict[bytes, Future[Judged]] = {}
    num_rungs = len(config.rungs)
    unknown = np.full(num_rungs + 1, np.nan, np.float32)
    nothing = Judged(
        evaluation=Evaluation(*unknown[[0, 0]]),
        rungs=unknown,
        num_epochs=np.int32(0),
        seconds={"compilation": 0.0, "training": 0.0},
    )
    evosax = evosax_search(config, image_shape) if config.method == "evosax" else None

    @jax.jit
    @jax.vmap
    def random_genomes(key: Array) -> Genome:
        return architectures.random_genome(key, space, image_shape)

    def sizes_of(genomes: Genome) -> np.ndarray:
        return getattr(architectures.costs(genomes, image_shape, num_classes), config.size)

    def init(key: Array, params: Params, data: Data) -> State:
        del params, data
        total = config.num_candidates
        empty = jnp.zeros((total, space.max_length), jnp.int32)
        return State(
            genomes=Genome(empty, empty, empty),
            keys=jnp.zeros((total, 2), jnp.uint32),
            accuracy=jnp.full(total, jnp.nan),
            rungs=jnp.full((total, num_rungs + 1), jnp.nan),
            num_epochs=jnp.zeros(total, jnp.int32),
            population=jnp.full(size, -1, jnp.int32),
            num_judged=jnp.int32(0),
            encoded=evosax.start(key) if evosax else None,
        )

    @jax.jit
    def offspring(key, population, weight):
        order = jnp.arange(size)
        return architectures.offspring(
            key,
            population,
            order,
            children,
            config.num_best,
            space,
            image_shape,
            config.compare,
            weight,
        )

    def draw(key: Array, state: State, params: Params) -> State:
        """The candidates of the next generation, and the keys of their trainings."""
        key_genomes, key_training = jax.random.split(key)
        start = int(state.num_judged)
        number = children if start else size
        if evosax and state.encoded:
            fitness = np.zeros(0)
            if start:
                judged = np.arange(start)
                sizes = sizes_of(architectures.member(state.genomes, judged))
                fitness = scores(np.asarray(state.accuracy)[judged], sizes, params, size)
            made, encoded = evosax.propose(key_genomes, state.encoded, fitness)
            state = replace(state, encoded=encoded)
        elif start and config.method == "evolution":
            population = architectures.member(state.genomes, state.population)
            made = offspring(key_genomes, population, params.differential_weight)
        else:
            made = random_genomes(jax.random.split(key_genomes, number))
        if config.num_known and not start:
            known = known_networks(space, image_shape, config.num_known)
            made = jax.tree.map(lambda all, new: all.at[: len(new)].set(new), made, known)
        features = np.asarray(architectures.num_features(made, image_shape))
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

    def bars_of(state: State, params: Params) -> np.ndarray:
        """The accuracy (R,) at each rung that a child must reach, of the survivors that did."""
        alive = np.asarray(state.population)
        if not num_rungs or alive[0] < 0:
            return np.full(num_rungs, -np.inf, np.float32)
        found = np.asarray(state.rungs)[alive, :num_rungs]
        found = np.where(np.isfinite(found).any(0), found, -np.inf)
        quantile = np.nanquantile(found, params.stopping_quantile, axis=0, method="lower")
        return quantile.astype(np.float32)

    def judged(state: State, data: Data, bars: np.ndarray, first: int, end: int) -> Judged:
        """Candidate `first`; this process's own after it, before `end`, are begun meanwhile."""
        genomes, keys = jax.device_get((state.genomes, state.keys))

        def request(index):
            return architectures.member(genomes, index), keys[index]

        def work(index):
            genome, key_data = request(index)
            with jax.default_device(local_devices[index // num_processes % len(local_devices)]):
                try:
                    key = jax.random.wrap_key_data(jnp.asarray(key_data))
                    return judge(genome, key, data, bars)
                except jax.errors.JaxRuntimeError as error:
                    if "RESOURCE_EXHAUSTED" not in str(error):
                        raise
                    return nothing  # too large for the memory

        names = {}
        own = [index for index in range(first, end) if index % num_processes == process]
        for index in own[:workers]:
            genome, key_data = request(index)
            about = (*genome, key_data, bars, np.int64(index))
            name = b"".join(leaf.tobytes() for leaf in about)
            names[index] = name
            if name not in ahead:
                ahead[name] = pool.submit(work, index)
        for name in set(ahead) - set(names.values()):  # of another state
            ahead.pop(name).cancel()
        found = ahead.pop(names[first]).result() if first in names else nothing
        if num_processes == 1:
            return found
        everyones = devices.gathered(found)
        return jax.tree.map(lambda leaf: leaf[first % num_processes], everyones)

    def step(key: Array, state: State, params: Params, data: Data) -> tuple[State, Metrics]:
        index = int(state.num_judged)
        generation = config.generation_of(index)
        start, end = config.candidates_of(generation)
        if index == start:
            state = draw(key, state, params)
        found = judged(state, data, bars_of(state, params), index, end)
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
                np.asarray(accuracy)[merged], sizes_of(genomes), params, config.survival
            )
            state = replace(state, population=jnp.asarray(merged[order[:size]]))
        known = np.asarray(accuracy)[: index + 1]
        alive = np.asarray(state.population)
        own, everyone = (
            architectures.costs(architectures.member(state.genomes, who), image_shape, num_classes)
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

    def result(state: State, params: Params, data: Data) -> Found:
        del params, data
        alive = np.asarray(state.population)
        alive = alive if alive[0] >= 0 else np.arange(max(1, int(state.num_judged)))
        genomes = architectures.member(state.genomes, alive)
        accuracy = np.asarray(state.accuracy)[alive]
        usable = np.isfinite(accuracy)
        sizes = sizes_of(genomes).astype(float)
        return Found(
            genomes=genomes,
            accuracy=accuracy,
            most_accurate=int(np.argmax(np.where(usable, accuracy, -1.0))),
            smallest=int(np.argmin(np.where(usable, sizes, np.inf))),
        )

    def finished(state: State) -> Array:
        return state.num_judged >= config.num_candidates

    in_all = len(local_devices) * num_processes
    return Algorithm(init, step, result, finished, scannable=False, num_devices=in_all)
