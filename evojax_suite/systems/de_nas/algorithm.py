"""Pei, Chang & Tian 2022, "Neural Architecture Search Based on Differential Evolution for Image
Classification Problems". Implements its sections 1 to 3 and the final training.

A population of architectures (`architectures`) is evaluated by short trainings. Each generation
adds children of differential evolution on lists of units, and the best of parents and children by a
weighted sum of error rate and size survive. The most accurate and the smallest of the last
generation are trained at length (`build_final`).

One step evaluates one candidate, so that a run is interrupted between any two. The candidates of a
generation, with the key of each one's training, are drawn in its first step; the next ones compile
and train in other threads meanwhile, which changes no result.

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

- Selection uses a validation split of the training set. The program selects by the test set.
- `Space.max_features` bounds the first dense layer, without which a network has up to 43 billion
  parameters.
- A candidate whose training fails (a loss that is not finite, too little memory) comes last.

Beyond the paper, off by default: other methods and survivals, `screen`, `rungs`, and `inherit`, by
which children begin with the weights of a survivor (`inheritance`) and the final training with
those that the search left.
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import cached_property, partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jaxtyping import Float, Int, Int32, Num, UInt32

from evojax_suite.operators import selection
from evojax_suite.runtime import devices
from evojax_suite.systems.de_nas import architectures, candidates, methods, units
from evojax_suite.systems.de_nas.architectures import Genome, Space
from evojax_suite.systems.de_nas.candidates import Data, EvaluatedCandidate
from evojax_suite.systems.de_nas.config import Config, Params
from evojax_suite.systems.de_nas.evosax_search import Encoded, EvosaxSearch, evosax_search
from evojax_suite.systems.de_nas.inheritance import Elder, most_alike
from evojax_suite.training import Evaluation
from evojax_suite.types import Algorithm, Array, Dataset, PyTree


@struct.dataclass
class State:
    """All candidates in the order in which they are made, and the places of the population."""

    genomes: Genome  # leading axis that of candidates, END beyond those that were made
    keys: UInt32[Array, "candidates 2"]  # of each one's training
    accuracy: Float[Array, "candidates"]  # on the validation split; NaN before that, or failed
    rungs: Float[Array, "candidates rungs_and_end"]  # the same at each, NaN where not reached
    num_epochs: Int32[Array, "candidates"]  # of each one's training
    population: Int32[Array, "population"]  # from the best to the worst; -1 before the first
    num_judged: Int32[Array, ""]  # candidates that are evaluated
    encoded: Encoded | None  # method evosax only
    # Where children inherit: of the population, then of the candidates of the generation.
    weights: PyTree = None


class Metrics(NamedTuple):
    """The metrics of one evaluated candidate, and of the population."""

    generation: np.generic  # the step: the candidate's number, from 1
    search_generation: np.generic  # in which it was made, 0 for the first population
    accuracy: np.generic  # on the validation split
    loss: np.generic  # there, in nats
    num_parameters: np.generic
    num_multiplications: np.generic  # of one image, forward
    num_epochs: np.generic  # of its training
    accuracy_best: np.generic  # of all so far
    population_accuracy: np.generic  # mean, NaN before the first selection
    population_parameters: np.generic  # mean
    num_failed: np.generic
    stage_seconds: dict[str, float]  # of the candidate, in its thread; no part of the result


class SearchResult(NamedTuple):
    """The last population of a search, from the best score to the worst."""

    genomes: Genome  # leading axis that of the population
    accuracy: Float[np.ndarray, "population"]  # on the validation split, NaN where training failed
    most_accurate: int  # its place
    smallest: int  # its place, of those whose training did not fail
    parameters: PyTree = None  # of `PaddedNetwork`, where children inherit; with the same axis

    def finalists(self, number: int) -> list[int]:
        """The places of the `number` most accurate networks, the most accurate first; fewer where
        fewer differ."""
        places: dict[tuple[architectures.Unit, ...], int] = {}
        for place in np.argsort(-np.nan_to_num(self.accuracy, nan=-1.0), kind="stable").tolist():
            places.setdefault(
                architectures.to_units(architectures.member(self.genomes, place)), place
            )
        return [*places.values()][:number]


def scores(
    accuracy: Float[np.ndarray, "candidates"],
    sizes: Num[np.ndarray, "candidates"],
    params: Params,
    scale: int | None = None,
) -> Float[np.ndarray, "candidates"]:
    """The weighted sum of error rate and size, lower is better ("Natural selection").

    Error and size go from 0 to 1 over the candidates, or over the first `scale` of them, which
    makes the scores of several generations comparable. Infinite where the accuracy is not finite.
    """
    usable = np.isfinite(accuracy)
    setting = usable & (np.arange(len(usable)) < (scale or len(usable)))

    def scaled(values: np.ndarray):
        values = np.asarray(values, np.float64)
        span = np.ptp(values[setting]) if setting.any() else 0
        return (values - values[setting].min()) / span if span > 0 else np.zeros(len(values))

    errors = 1 - np.asarray(accuracy, np.float64)
    total = params.error_weight * scaled(errors) + params.size_weight * scaled(sizes)
    return np.where(usable, total, np.inf)


def best_first(
    accuracy: Float[np.ndarray, "candidates"],
    sizes: Num[np.ndarray, "candidates"],
    params: Params,
    survival: str = "score",
) -> Int[np.ndarray, "candidates"]:
    """The places of candidates from the best to the worst (`Config.survival`)."""
    if survival == "score":
        return np.argsort(scores(accuracy, sizes, params), kind="stable")
    objectives = jnp.stack([1 - jnp.asarray(accuracy), jnp.log(jnp.asarray(sizes, float))], axis=1)
    ranks = selection.non_dominated_ranks(objectives)
    crowding = selection.crowding_distances(objectives, ranks)
    return np.lexsort((-np.asarray(crowding), np.asarray(ranks)))


def num_workers(config: Config, num_devices: int) -> int:
    """The candidates that a process compiles or trains at once: `config.workers`, or enough for
    every device to train one while others compile, which is what the cores of a CPU do."""
    on_cpu = jax.default_backend() == "cpu"
    return config.workers or (max(2, num_devices) if on_cpu else 2 * num_devices)


def first_population(config: Config, state: State, params: Params, dataset: Dataset) -> State:
    """The state that a search had when its first population was evaluated."""
    size, total = config.population_size, config.num_candidates
    early = np.arange(total) < size

    def cut(leaf: Array, nothing: Any) -> Array:
        return jnp.where(early.reshape(-1, *[1] * (leaf.ndim - 1)), leaf, nothing)

    genomes = Genome(*(cut(leaf, 0) for leaf in state.genomes))
    first = architectures.member(genomes, np.arange(size))
    costs = candidates.costs_of(config, first, dataset.image_shape, dataset.num_classes)
    sizes, accuracy = getattr(costs, config.size), np.asarray(state.accuracy)[:size]
    order = best_first(accuracy, sizes, params, config.survival)
    return State(
        genomes=genomes,
        keys=cut(state.keys, 0),
        accuracy=cut(state.accuracy, jnp.nan),
        rungs=cut(state.rungs, jnp.nan),
        num_epochs=cut(state.num_epochs, 0),
        population=jnp.asarray(order.astype(np.int32)),
        num_judged=jnp.int32(size),
        encoded=None,
    )


class _Workers:
    """Threads that evaluate candidates on the devices of this process. Each of several processes
    evaluates its share of the candidates, and sends the others its evaluations.

    parameters: those of a candidate, zeros, where children inherit them.
    """

    def __init__(
        self,
        evaluate: Callable[..., Any],
        num_workers: int,
        num_rungs: int,
        local: list[Any],
        parameters: PyTree,
    ):
        self._evaluate, self._num_workers, self._devices = evaluate, num_workers, local
        self._pool = ThreadPoolExecutor(num_workers, thread_name_prefix="candidate")
        self._ahead: dict[bytes, Future[EvaluatedCandidate]] = {}
        unknown = np.full(num_rungs + 1, np.nan, np.float32)
        self.nothing = EvaluatedCandidate(
            Evaluation(unknown[0], unknown[0]),
            rungs=unknown,
            num_epochs=np.int32(0),
            seconds={"compilation": 0.0, "training": 0.0},
            parameters=parameters,
        )

    def elder_of(self, genome: Genome, genomes: Genome, state: State) -> Elder | None:
        """The survivor that a candidate inherits from, if candidates do. genomes: the state's, on
        the host."""
        if state.weights is None:
            return None
        alive = np.asarray(state.population)
        accuracy = np.asarray(state.accuracy)[alive]
        if alive[0] < 0 or not np.isfinite(accuracy).any():
            empty = jax.tree.map(np.zeros_like, genome)
            return Elder(empty, self.nothing.parameters)
        survivors = architectures.member(genomes, alive)
        alike = np.where(np.isfinite(accuracy), most_alike(genome, survivors), -1)
        place = int(alike.argmax())  # the first of them is the best
        weights = jax.device_get(jax.tree.map(lambda leaf: leaf[place], state.weights))
        return Elder(architectures.member(survivors, place), weights)

    def evaluated(
        self, state: State, data: Data, bars: np.ndarray, first: int, end: int
    ) -> EvaluatedCandidate:
        """Candidate `first`; this process's share of those after it, before `end`, is begun
        meanwhile."""
        num_processes, process = jax.process_count(), jax.process_index()
        genomes, keys = jax.device_get((state.genomes, state.keys))

        def work(index: int) -> EvaluatedCandidate:
            place = index // num_processes % len(self._devices)
            with jax.default_device(self._devices[place]):
                try:
                    key = jax.random.wrap_key_data(jnp.asarray(keys[index]))
                    genome = architectures.member(genomes, index)
                    elder = self.elder_of(genome, genomes, state)
                    return self._evaluate(genome, key, data, bars, elder)
                except jax.errors.JaxRuntimeError as error:
                    if "RESOURCE_EXHAUSTED" not in str(error):
                        raise
                    return self.nothing  # too large for the memory

        names, alive = {}, np.asarray(state.population)
        share = [index for index in range(first, end) if index % num_processes == process]
        for index in share[: self._num_workers]:
            arguments = (*architectures.member(genomes, index), keys[index], bars, alive, index)
            names[index] = name = b"".join(np.asarray(each).tobytes() for each in arguments)
            if name not in self._ahead:
                self._ahead[name] = self._pool.submit(work, index)
        for name in set(self._ahead) - set(names.values()):  # of another state
            self._ahead.pop(name).cancel()
        outcome = self._ahead.pop(names[first]).result() if first in names else self.nothing
        if num_processes == 1:
            return outcome
        return jax.tree.map(lambda leaf: leaf[first % num_processes], devices.gathered(outcome))


@partial(jax.jit, static_argnums=(0, 1))
def _random_genomes(space: Space, shape: tuple[int, int, int], keys: Array) -> Genome:
    """Genomes of the first population, or of random search, one for each of `keys`."""
    return jax.vmap(lambda key: architectures.random_genome(key, space, shape))(keys)


_offspring = jax.jit(architectures.offspring, static_argnums=(3, 4, 5, 6, 7))


@dataclass(frozen=True, eq=False)
class _Search:
    """The functions of `Algorithm`."""

    config: Config
    num_classes: int
    image_shape: tuple[int, int, int]
    evosax: EvosaxSearch | None
    workers: _Workers

    def costs(self, state: State, places: int | np.ndarray) -> architectures.Costs:
        """The costs of the candidates at `places`."""
        genomes = architectures.member(state.genomes, places)
        return candidates.costs_of(self.config, genomes, self.image_shape, self.num_classes)

    def sizes(self, state: State, places: np.ndarray) -> Int[np.ndarray, "places"]:
        """The costs by which candidates are selected."""
        return getattr(self.costs(state, places), self.config.size)

    def scores(self, state: State, params: Params) -> Float[np.ndarray, "judged"]:
        """The scores of all candidates so far, on the scale of the first population."""
        known = np.arange(int(state.num_judged))
        accuracy, sizes = np.asarray(state.accuracy)[known], self.sizes(state, known)
        return scores(accuracy, sizes, params, self.config.population_size)

    def init(self, key: Array, params: Params, data: Data) -> State:
        del params, data
        total, num_rungs = self.config.num_candidates, len(self.config.rungs)
        room = self.config.population_size + max(
            self.config.population_size, self.config.num_children
        )
        empty = jnp.zeros((total, self.config.space.max_length), jnp.int32)
        return State(
            genomes=Genome(empty, empty, empty),
            keys=jnp.zeros((total, 2), jnp.uint32),
            accuracy=jnp.full(total, jnp.nan),
            rungs=jnp.full((total, num_rungs + 1), jnp.nan),
            num_epochs=jnp.zeros(total, jnp.int32),
            population=jnp.full(self.config.population_size, -1, jnp.int32),
            num_judged=jnp.int32(0),
            encoded=self.evosax.start(key) if self.evosax else None,
            weights=jax.tree.map(
                lambda leaf: jnp.zeros((room, *leaf.shape)), self.workers.nothing.parameters
            ),
        )

    def _proposed(self, key: Array, state: State, params: Params) -> Genome:
        """The children of a method of `methods`."""
        fitness = np.full(self.config.num_candidates, -np.inf, np.float32)
        fitness[: int(state.num_judged)] = -self.scores(state, params)
        genomes = units.rows(state.genomes)
        history = methods.History(genomes, jnp.asarray(fitness), state.num_judged)
        return units.genome_of(self.propose(key, history))

    @cached_property
    def propose(self) -> Callable[[Array, methods.History], Array]:
        """The next genomes, from a key and the search so far."""
        operators = units.operators(self.config.space, self.image_shape, self.num_classes)

        @jax.jit
        def propose(key: Array, history: methods.History) -> Array:
            return methods.propose(key, self.config.methods, operators, history, ())[0]

        return propose

    def drawn(self, key: Array, state: State, params: Params) -> State:
        """The state with the candidates of the next generation, and the keys of their trainings."""
        key_genomes, key_training = jax.random.split(key)
        config, space, shape = self.config, self.config.space, self.image_shape
        start = int(state.num_judged)
        number = config.num_children if start else config.population_size
        if self.evosax and state.encoded:
            fitness = self.scores(state, params) if start else np.zeros(0)
            made, encoded = self.evosax.propose(key_genomes, state.encoded, fitness)
            state = replace(state, encoded=encoded)
        elif start and config.method in ("ageing", "surrogate"):
            made = self._proposed(key_genomes, state, params)
        elif start and config.method == "evolution":
            population = architectures.member(state.genomes, state.population)
            order = jnp.arange(config.population_size)
            settings = config.num_children, config.num_best, space, shape, config.compare
            weight = params.differential_weight
            made = _offspring(key_genomes, population, order, *settings, weight)
        else:
            each = 1 if start else config.screen
            made = _random_genomes(space, shape, jax.random.split(key_genomes, each * number))
            if each > 1:
                sizes = candidates.costs_of(config, made, shape, self.num_classes).parameters
                largest = sizes.reshape(number, each).argmax(1) + each * np.arange(number)
                made = architectures.member(made, largest)
        if config.num_known and not start:
            known = candidates.known_networks(space, shape, config.num_known)
            made = jax.tree.map(lambda all, new: all.at[: len(new)].set(new), made, known)
        if not np.all(architectures.fits(made, space, shape)):
            features = np.max(architectures.num_features(made, shape))
            weights = np.max(architectures.num_weights(made, shape[2]).sum(-1))
            raise ValueError(
                f"no random network with at most max_features = {space.max_features} and "
                f"max_weights = {space.max_weights} was found, the last ones have up to {features} "
                f"and {weights}"
            )
        place = slice(start, start + number)
        keys = jax.random.key_data(jax.random.split(key_training, number))
        return replace(
            state,
            genomes=jax.tree.map(lambda all, new: all.at[place].set(new), state.genomes, made),
            keys=state.keys.at[place].set(keys),
        )

    def bars(self, state: State, params: Params) -> Float[np.ndarray, "rungs"]:
        """The accuracy at each rung that a child must reach, of the survivors that did."""
        alive, num_rungs = np.asarray(state.population), len(self.config.rungs)
        if not num_rungs or alive[0] < 0:
            return np.full(num_rungs, -np.inf, np.float32)
        reached = np.asarray(state.rungs)[alive, :num_rungs]
        reached = np.where(np.isfinite(reached).any(0), reached, -np.inf)
        quantile = np.nanquantile(reached, params.stopping_quantile, axis=0, method="lower")
        return quantile.astype(np.float32)

    def step(self, key: Array, state: State, params: Params, data: Data) -> tuple[State, Metrics]:
        config, index = self.config, int(state.num_judged)
        generation = config.generation_of(index)
        start, end = config.candidates_of(generation)
        if index == start:
            state = self.drawn(key, state, params)
        outcome = self.workers.evaluated(state, data, self.bars(state, params), index, end)
        state = replace(
            state,
            accuracy=state.accuracy.at[index].set(outcome.evaluation.accuracy),
            rungs=state.rungs.at[index].set(outcome.rungs),
            num_epochs=state.num_epochs.at[index].set(outcome.num_epochs),
            num_judged=state.num_judged + 1,
            weights=jax.tree.map(
                lambda all, new: all.at[config.population_size + index - start].set(new),
                state.weights,
                outcome.parameters,
            ),
        )
        accuracy = np.asarray(state.accuracy)
        if index + 1 == end:
            old = [] if generation == 0 else np.asarray(state.population)
            merged = np.concatenate([old, np.arange(start, end)]).astype(np.int32)
            sizes = self.sizes(state, merged)
            order = best_first(accuracy[merged], sizes, params, config.survival)
            order = order[: config.population_size]
            places = order if generation else config.population_size + order
            weights = jax.tree.map(
                lambda leaf: leaf.at[: len(places)].set(leaf[places]), state.weights
            )
            state = replace(state, population=jnp.asarray(merged[order]), weights=weights)
        known, alive = accuracy[: index + 1], np.asarray(state.population)
        costs, nothing = self.costs(state, index), np.float32(np.nan)
        mean_accuracy, mean_parameters = nothing, np.float64(np.nan)
        if alive[0] >= 0:
            mean_accuracy = np.nanmean(accuracy[alive])
            mean_parameters = self.costs(state, alive).parameters.mean()
        return state, Metrics(
            generation=np.int32(index + 1),
            search_generation=np.int32(generation),
            accuracy=np.float32(outcome.evaluation.accuracy),
            loss=np.float32(outcome.evaluation.cross_entropy),
            num_parameters=np.int64(costs.parameters),
            num_multiplications=np.int64(costs.multiplications),
            num_epochs=np.int32(outcome.num_epochs),
            accuracy_best=np.nanmax(known) if np.isfinite(known).any() else nothing,
            population_accuracy=mean_accuracy,
            population_parameters=mean_parameters,
            num_failed=np.int32(not np.isfinite(outcome.evaluation.accuracy)),
            stage_seconds=outcome.seconds,
        )

    def result(self, state: State, params: Params, data: Data) -> SearchResult:
        del params, data
        alive, first = np.asarray(state.population), 0
        if alive[0] < 0:  # no generation has ended
            alive, first = np.arange(max(1, int(state.num_judged))), len(alive)
        accuracy, sizes = np.asarray(state.accuracy)[alive], self.sizes(state, alive)
        usable = np.isfinite(accuracy)
        return SearchResult(
            genomes=architectures.member(state.genomes, alive),
            accuracy=accuracy,
            most_accurate=int(np.argmax(np.where(usable, accuracy, -1.0))),
            smallest=int(np.argmin(np.where(usable, sizes, np.inf))),
            parameters=jax.tree.map(lambda leaf: leaf[first : first + len(alive)], state.weights),
        )

    def finished(self, state: State) -> Array:
        return state.num_judged >= self.config.num_candidates


def build(
    config: Config,
    num_classes: int,
    image_shape: tuple[int, int, int],
    num_devices: int | None = None,
) -> Algorithm[State, Params, Data, Metrics, SearchResult]:
    """One step evaluates one candidate. `data` is a Data; the result is a SearchResult.

    num_devices: of each of the run's processes; the candidates of a generation are divided over
    them, and the processes send each other their evaluations. None is all.

    Not scannable: candidates are different programs. Raises ValueError where images of
    `image_shape` (height, width, channels) or the space leave no networks.
    """
    if num_classes < 2:
        raise ValueError(f"a search needs at least 2 classes, got {num_classes}")
    if architectures.most_poolings(image_shape) < 1:
        raise ValueError(f"images must be at least 4x4 for a pooling, got {image_shape}")
    config.space.check(image_shape)
    local = jax.local_devices()[:num_devices]
    shares = config.inherit or config.programs in ("layers", "padded")
    if shares and jax.default_backend() == "cpu":
        local = local[:1]  # every device would compile the programs that candidates share
    evaluate, parameters = candidates.make_evaluator(config, num_classes, image_shape), None
    if config.inherit:
        network = candidates.padded_network(config, num_classes, image_shape)
        shapes = jax.eval_shape(network.init, jax.random.key(0), jnp.zeros((1, *image_shape)))
        parameters = jax.tree.map(lambda leaf: np.zeros(leaf.shape, leaf.dtype), shapes["params"])
    number = num_workers(config, len(local))
    workers = _Workers(evaluate, number, len(config.rungs), local, parameters)
    evosax = evosax_search(config, image_shape) if config.method == "evosax" else None
    search = _Search(config, num_classes, image_shape, evosax, workers)
    return Algorithm(
        search.init,
        search.step,
        search.result,
        search.finished,
        scannable=False,
        num_devices=len(local) * jax.process_count(),
        image_shape=image_shape,
    )
