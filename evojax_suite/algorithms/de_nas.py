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

import functools
import itertools
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct

from evojax_suite import devices, strategies
from evojax_suite.data.errors import check_types
from evojax_suite.data.transforms import normalize
from evojax_suite.networks.sequence import (
    Initialization,
    PaddedNetwork,
    SequenceNetwork,
    for_genome,
    fresh,
)
from evojax_suite.operators import architectures, selection
from evojax_suite.operators.architectures import Genome, Space, Unit
from evojax_suite.training import (
    Batches,
    EngineConfig,
    Evaluation,
    FitState,
    TrainingConfig,
    batches_of,
    evaluate,
    fit_epochs,
    start_fit_from,
)
from evojax_suite.types import Algorithm, Array, Dataset, PyTree

# On the CPU level 3, the default, makes these programs up to twice as slow, and the older way to
# compile fusions, which later versions lack, takes a third less: experiments/de_nas/README.md.
COMPILER_OPTIONS: dict[str, Any] = {"xla_backend_optimization_level": 2}
if jax.__version_info__ < (0, 11):
    COMPILER_OPTIONS["xla_cpu_use_fusion_emitters"] = False

# On two cores both ways take as long at 5e11 (experiments/de_nas/README.md).
_MOST_PADDED_WORK = 3 * 10**11

TRAINING = TrainingConfig(
    num_epochs=10,
    batch_size=64,
    optimizer="sgd",
    learning_rate=0.01,
    momentum=0.0,
    crop_padding=4,
    flip=True,
)
"""Table 2."""


@dataclass(frozen=True)
class Config:
    """Sizes and choices; the paper's (Tables 1 and 2)."""

    population_size: int = 20
    """Architectures that survive a generation."""
    num_children: int = 10
    """New architectures of a generation."""
    num_generations: int = 9
    """Generations after the first population."""
    num_best: int = 5
    """Architectures that a child may be based on, from the best."""
    compare: Literal["kind", "unit"] = "kind"
    """What makes two units alike in a difference: their kind, or kernel and filters too."""
    method: Literal["evolution", "random", "evosax"] = "evolution"
    """Source of children: differential evolution on units (the paper's), the distribution of the
    first population, for comparison, or `strategy`."""
    strategy: str = "DifferentialEvolution"
    """evosax algorithm of the method evosax. It moves normal deviates that `architectures.decode`
    reads through their distribution function, so that standard normal vectors are random networks;
    it starts from the best `num_children` of the first population and minimises the score, on the
    scale of the first population."""
    survival: Literal["score", "nsga2"] = "score"
    """Who survives: the weighted sum (the paper's), or the fronts of error and size, the more
    spread out first (NSGA-II)."""
    size: Literal["parameters", "multiplications"] = "parameters"
    """What counts as size; multiplications are those of one image, forward."""
    num_known: int = 0
    """Networks like VGG of rising width in the first population, in place of random ones."""
    rungs: tuple[int, ...] = ()
    """Epochs after which a child is judged too, and trains on only where it keeps up with the
    survivors (`Params.stopping_quantile`): successive halving in the asynchronous form that stops
    (Li et al. 2020, ASHA). The first population is never stopped; () is the paper's."""
    final_epochs: int = 200
    """Epochs of the training of the most accurate and the smallest architecture; 0 is none."""

    dropout: float = 0.5
    """Probability that an input of the first two dense layers is dropped in training."""
    normalization: Literal["none", "batch", "instance", "layer"] = "none"
    """Normalisation after each convolution."""
    initialization: Initialization = "pytorch"
    """Initialisation of weights; kaiming (He et al. 2015) lets deep networks learn in few steps."""
    skip: bool = False
    """A skip connection around each convolution that keeps the number of filters."""
    compute_dtype: Literal["float32", "bfloat16"] = "float32"
    """Precision of convolutions and matrix products; parameters stay float32."""
    programs: Literal["auto", "separate", "padded"] = "auto"
    """A program for each candidate, or one for all with filters masked; auto is padded on a CPU
    where trainings are so short that compiling takes longer (experiments/de_nas/README.md)."""
    workers: int | None = None
    """Candidates that compile or train at once; None is 2 a device, of a CPU one a
    device and at least 2."""

    space: Space = field(default_factory=Space)
    training: TrainingConfig = TRAINING
    engine: EngineConfig = field(default_factory=EngineConfig)

    def __post_init__(self):
        check_types(vars(self), type(self))
        for name, least in (
            ("population_size", 3),
            ("num_children", 1),
            ("num_generations", 0),
            ("num_known", 0),
            ("final_epochs", 0),
        ):
            if getattr(self, name) < least:
                raise ValueError(f"{name} must be >= {least}, got {getattr(self, name)}")
        for name in ("num_best", "num_known"):
            if getattr(self, name) > self.population_size:
                raise ValueError(
                    f"{name} must be <= population_size = {self.population_size}, "
                    f"got {getattr(self, name)}"
                )
        if self.training.num_epochs < 1:
            raise ValueError(f"num_epochs must be >= 1, got {self.training.num_epochs}")
        if self.method == "evosax":
            if self.num_known:
                raise ValueError(f"method evosax takes no known networks, got {self.num_known}")
            if self.num_children > self.population_size:
                raise ValueError(
                    f"num_children must be <= population_size = {self.population_size} with the "
                    f"method evosax, got {self.num_children}"
                )
        ends = (0, *self.rungs, self.training.num_epochs)
        if any(before >= after for before, after in itertools.pairwise(ends)):
            raise ValueError(
                f"rungs must rise within 1..{self.training.num_epochs - 1}, below the "
                f"{self.training.num_epochs} epochs, got {self.rungs}"
            )
        if self.num_best < 1:
            raise ValueError(f"num_best must be >= 1, got {self.num_best}")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"dropout must be in [0, 1), got {self.dropout}")
        if self.workers is not None and self.workers < 1:
            raise ValueError(f"workers must be >= 1, got {self.workers}")
        if self.programs == "padded" and not self.can_be_padded:
            raise ValueError(
                "programs padded needs normalization none, no skip and compute_dtype float32"
            )

    @property
    def num_candidates(self) -> int:
        """Number of candidates of a whole run."""
        return self.candidates_of(self.num_generations)[1]

    @property
    def can_be_padded(self) -> bool:
        """Whether one padded program computes such networks."""
        return self.normalization == "none" and not self.skip and self.compute_dtype == "float32"

    def generation_of(self, candidate: int) -> int:
        """Generation of a candidate, 0 for the first population; candidates count from 0."""
        return max(0, 1 + (candidate - self.population_size) // self.num_children)

    def candidates_of(self, generation: int) -> tuple[int, int]:
        """The first candidate that is made in a generation, and the one after its last."""
        end = self.population_size + generation * self.num_children
        return (end - self.num_children if generation else 0), end


@struct.dataclass
class Params:
    """Scalars that users sweep."""

    error_weight: float = 0.7
    """Weight of the error rate in the score, >= 0."""
    size_weight: float = 0.3
    """Weight of the size in the score, >= 0."""
    differential_weight: float = 1.0
    """Probability that a unit of a difference takes part, in [0, 1]."""
    stopping_quantile: float = 0.5
    """Share of the survivors' accuracies at a rung that a child must reach, in [0, 1]: half of
    them, as in halving."""

    def check(self) -> None:
        """Raise ValueError where a value is out of range."""
        for name in ("error_weight", "size_weight"):
            if not getattr(self, name) >= 0:
                raise ValueError(f"{name} must be >= 0, got {getattr(self, name)}")
        for name in ("differential_weight", "stopping_quantile"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name} must be in [0, 1], got {getattr(self, name)}")


@struct.dataclass
class Data:
    """Training and validation part on the device."""

    images: Array  # (N, H, W, C), uint8 or float in [0, 1]
    labels: Array  # (N,) int32
    validation: Batches  # normalised
    mean: Array  # (C,)
    std: Array  # (C,)


def make_data(config: Config, dataset: Dataset) -> Data:
    """What a search sees of `dataset`; its test part stays closed."""
    if dataset.num_classes < 2:
        raise ValueError(f"a search needs at least 2 classes, got {dataset.num_classes}")
    return Data(
        images=jnp.asarray(dataset.train.images),
        labels=jnp.asarray(dataset.train.labels),
        validation=batches_of(dataset, dataset.validation, config.engine),
        mean=jnp.asarray(dataset.mean, jnp.float32),
        std=jnp.asarray(dataset.std, jnp.float32),
    )


@struct.dataclass
class Encoded:
    """The candidates as an evosax algorithm sees them."""

    vectors: Array  # (T, D) that the genomes are decoded from
    strategy: PyTree  # the algorithm's own state


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


def known_networks(space: Space, image_shape: tuple[int, int, int], number: int) -> Genome:
    """`number` networks like VGG: pairs of 3x3 convolutions (or of the kernel of `space` nearest to
    3), a maximum after each pair, twice the filters in the next; widths from the least to the most.
    """
    kernel = min(space.kernels, key=lambda size: abs(size - 3))
    poolings = architectures.most_poolings(image_shape)
    genomes = []
    for width in np.geomspace(space.min_first_filters, space.max_filters, number + 1)[1:]:
        units: list[Unit] = []
        for stage in range(poolings + 1):
            filters = min(space.max_filters, max(1, round(width / 2 ** (poolings - stage))))
            units += [Unit("convolution", kernel, filters)] * 2
            units += [Unit("max")] if stage < poolings else []
        genomes.append(architectures.from_units(tuple(units[: space.max_length]), space.max_length))
    return jax.tree.map(lambda *leaves: jnp.stack(leaves), *genomes)


class _Judged(NamedTuple):
    evaluation: Evaluation
    rungs: Any  # (R + 1,) accuracy at each rung and at the end, NaN where not reached
    num_epochs: Any  # trained
    seconds: dict[str, float]


def network_of(config: Config, units: tuple[Unit, ...], num_classes: int) -> SequenceNetwork:
    """The flax module of one architecture."""
    return SequenceNetwork(
        num_classes,
        units,
        config.dropout,
        config.normalization,
        config.skip,
        dtype=jnp.dtype(config.compute_dtype),
    )


def padded_work(config: Config, image_shape: tuple[int, int, int], num_images: int) -> int:
    """Multiplications of a candidate's training in the padded program, forward, at the most."""
    space = config.space
    most = PaddedNetwork(2, space, image_shape).most_features
    convolutions = space.max_length * (max(space.kernels) * space.max_filters) ** 2
    each = convolutions * image_shape[0] * image_shape[1] + most**2 * 5 // 8
    return each * num_images * config.training.num_epochs


def judging(
    config: Config,
    num_classes: int,
    network: SequenceNetwork | PaddedNetwork,
    start: Callable[[Array, Genome], PyTree],
) -> Callable[[Array, Genome, Data, Array], tuple[Evaluation, Array, Array]]:
    """A pure function that trains and judges a candidate, of its key, its genome, the data and the
    accuracy (R,) that lets it pass each rung (minus infinity lets all).

    start: makes the network's variables from a key and the genome. Returns the evaluation, the
    accuracy (R + 1,) at each rung and at the end, NaN where not reached, and the epochs trained.
    """
    training = config.training
    ends = np.array([*config.rungs, training.num_epochs])

    def judge(key, genome, data, bars):
        key_start, key_fit = jax.random.split(key)
        num_images = len(data.labels)
        images = normalize(data.images, data.mean, data.std)
        labels = jax.nn.one_hot(data.labels, num_classes)
        fit = start_fit_from(start(key_start, genome), training)

        def train(key, fit, num_epochs):
            num_steps = training.num_epochs * training.num_batches(num_images)
            arguments = network, training, num_steps, fit, images, labels, num_images
            fit, _ = fit_epochs(key, *arguments, num_epochs)
            return fit, evaluate(network, fit.variables, data.validation)

        if not config.rungs:
            _, evaluation = train(key_fit, fit, training.num_epochs)
            return evaluation, evaluation.accuracy[None], jnp.int32(training.num_epochs)

        def passes(carry):
            rung, _, _, found = carry
            before = jnp.maximum(rung - 1, 0)
            return (rung < len(ends)) & ((rung == 0) | (found[before] >= bars[before]))

        def climb(carry):
            rung, fit, _, found = carry
            length = jnp.diff(ends, prepend=0)[rung]
            fit, evaluation = train(jax.random.fold_in(key_fit, rung), fit, length)
            return rung + 1, fit, evaluation, found.at[rung].set(evaluation.accuracy)

        nothing = jnp.full(len(ends), jnp.nan)
        carry = jnp.int32(0), fit, Evaluation(nothing[0], nothing[0]), nothing
        rung, _, evaluation, found = jax.lax.while_loop(passes, climb, carry)
        return evaluation, found, jnp.asarray(ends, jnp.int32)[rung - 1]

    return judge


def judges(
    config: Config, num_classes: int, image_shape: tuple[int, int, int]
) -> Callable[[Genome, Array, Data, np.ndarray], _Judged]:
    """A function that compiles and runs `judging`, of a genome, a key, the data and the bars; safe
    to call from several threads."""

    program = functools.partial(judging, config, num_classes)

    def run(compiled, key, genome, data, bars, compile_seconds):
        clock = time.perf_counter()
        evaluation, rungs, num_epochs = jax.device_get(compiled(key, genome, data, bars))
        seconds = {"compilation": compile_seconds, "training": time.perf_counter() - clock}
        return _Judged(evaluation, rungs, num_epochs, seconds)

    def separate(genome, key, data, bars):
        clock = time.perf_counter()
        network = network_of(config, architectures.to_units(genome), num_classes)
        judge = jax.jit(
            program(network, lambda key, _: fresh(key, network, image_shape, config.initialization))
        )
        compiled = judge.lower(key, genome, data, bars).compile(COMPILER_OPTIONS)
        return run(compiled, key, genome, data, bars, time.perf_counter() - clock)

    one = PaddedNetwork(num_classes, config.space, image_shape, config.dropout)

    def start_padded(key, genome):
        parameters = one.init(key, jnp.zeros((1, *image_shape)))["params"]
        parameters = for_genome(one, parameters, genome, config.initialization)
        return {"params": parameters, "genome": genome._asdict()}

    padded_program = jax.jit(program(one, start_padded), compiler_options=COMPILER_OPTIONS)

    def padded(genome, key, data, bars):
        return run(padded_program, key, genome, data, bars, 0.0)

    def judge(genome, key, data, bars):
        short = padded_work(config, image_shape, len(data.labels)) <= _MOST_PADDED_WORK
        suits = short and config.can_be_padded and jax.default_backend() == "cpu"
        use_padded = config.programs == "padded" or (config.programs == "auto" and suits)
        return (padded if use_padded else separate)(genome, key, data, bars)

    return judge


class _ByEvosax(NamedTuple):
    start: Callable[[Array], Encoded]
    propose: Callable[[Array, Encoded, np.ndarray], tuple[Genome, Encoded]]


def _by_evosax(config: Config, image_shape: tuple[int, int, int]) -> _ByEvosax:
    """Candidates that an evosax algorithm asks for (`Config.strategy`)."""
    space, size, children = config.space, config.population_size, config.num_children
    num_numbers = 4 * (space.max_length + 1)
    strategy = strategies.create(config.strategy, children, num_numbers)
    own = strategy.default_params

    @jax.jit
    @jax.vmap
    def random_vectors(key: Array) -> Array:
        numbers = architectures.random_numbers(key, space, image_shape).ravel()
        return jax.scipy.stats.norm.ppf(jnp.clip(numbers, 1e-6, 1 - 1e-6))

    @jax.jit
    @jax.vmap
    def decoded(vector: Array) -> Genome:
        numbers = jax.scipy.stats.norm.cdf(vector).reshape(-1, 4)
        return architectures.decode(numbers, space, image_shape)

    def started(key: Array, vectors: Array, fitness: Array) -> PyTree:
        population_based = strategies.is_population_based(strategy)
        start = (vectors, fitness) if population_based else (vectors.mean(0),)
        return strategies.strong(strategy.init(key, *start, own))

    def start(key: Array) -> Encoded:
        vectors = jnp.zeros((config.num_candidates, num_numbers))
        nothing = vectors[:children], jnp.full(children, jnp.inf)
        return Encoded(vectors=vectors, strategy=started(key, *nothing))

    def ask(key: Array, state: PyTree) -> tuple[Array, PyTree]:
        key_first, key_again = jax.random.split(key)
        vectors, asked = strategy.ask(key_first, state, own)
        for attempt in range(architectures.MOST_ATTEMPTS):
            large = architectures.num_features(decoded(vectors), image_shape) > space.max_features
            if not large.any():
                break
            others, _ = strategy.ask(jax.random.fold_in(key_again, attempt), state, own)
            vectors = jnp.where(large[:, None], others, vectors)
        return vectors, strategies.strong(asked)

    def propose(key: Array, encoded: Encoded, fitness: np.ndarray) -> tuple[Genome, Encoded]:
        """The next candidates; fitness: (n,) of all before, infinite where one failed. The first
        population is that of the other methods."""
        number, state = len(fitness), encoded.strategy
        if number == 0:
            vectors = random_vectors(jax.random.split(key, size))
        else:
            key_tell, key_ask = jax.random.split(key)
            first = number == size
            best = np.argsort(fitness, kind="stable")[:children]
            told = best if first else np.arange(number)[-children:]
            known = jnp.asarray(np.where(np.isfinite(fitness), fitness, np.nan)[told])
            if first:
                state = started(key_tell, encoded.vectors[told], known)
            else:
                state, _ = strategy.tell(key_tell, encoded.vectors[told], known, state, own)
            vectors, state = ask(key_ask, state)
        everyone = encoded.vectors.at[number : number + len(vectors)].set(vectors)
        return decoded(vectors), Encoded(vectors=everyone, strategy=state)

    return _ByEvosax(start, propose)


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
    ahead: dict[bytes, Future[_Judged]] = {}
    num_rungs = len(config.rungs)
    unknown = np.full(num_rungs + 1, np.nan, np.float32)
    nothing = _Judged(
        evaluation=Evaluation(*unknown[[0, 0]]),
        rungs=unknown,
        num_epochs=np.int32(0),
        seconds={"compilation": 0.0, "training": 0.0},
    )
    evosax = _by_evosax(config, image_shape) if config.method == "evosax" else None

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

    def judged(state: State, data: Data, bars: np.ndarray, first: int, end: int) -> _Judged:
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


@struct.dataclass
class FinalState:
    """A network in its final training."""

    fit: FitState
    epoch: Array  # () int32 done


class FinalMetrics(NamedTuple):
    """What one epoch of the final training reports."""

    generation: Array  # the epoch, from 1
    loss: Array  # of the augmented training images, as training saw them
    accuracy: Array
    validation_loss: Array
    validation_accuracy: Array
    num_failed: Array  # examples whose loss was NaN or infinite


def build_final(
    config: Config, units: tuple[Unit, ...], num_classes: int, image_shape: tuple[int, int, int]
) -> Algorithm:
    """The final training of one architecture, `final_epochs` long; one step is one epoch.

    `params` is None, `data` a Data; the result is the network's flax variables.
    """
    training = replace(config.training, num_epochs=config.final_epochs)
    network = network_of(config, units, num_classes)

    def init(key: Array, params: None, data: Data) -> FinalState:
        del params, data
        variables = fresh(key, network, image_shape, config.initialization)
        return FinalState(start_fit_from(variables, training), jnp.int32(0))

    def step(
        key: Array, state: FinalState, params: None, data: Data
    ) -> tuple[FinalState, FinalMetrics]:
        del params
        num_images = len(data.labels)
        images = normalize(data.images, data.mean, data.std)
        labels = jax.nn.one_hot(data.labels, num_classes)
        fit, seen = fit_epochs(
            key,
            network,
            training,
            training.num_epochs * training.num_batches(num_images),
            state.fit,
            images,
            labels,
            num_images,
            1,
        )
        validation = evaluate(network, fit.variables, data.validation)
        failed = ~jnp.isfinite(seen.losses)
        metrics = FinalMetrics(
            generation=state.epoch + 1,
            loss=jnp.mean(seen.losses, where=~failed),
            accuracy=seen.correct.mean(),
            validation_loss=validation.cross_entropy,
            validation_accuracy=validation.accuracy,
            num_failed=failed.sum(),
        )
        return FinalState(fit=fit, epoch=state.epoch + 1), metrics

    def result(state: FinalState, params: None, data: Data) -> PyTree:
        del params, data
        return state.fit.variables

    def finished(state: FinalState) -> Array:
        return state.epoch >= training.num_epochs

    return Algorithm(init, step, result, finished, compiler_options=COMPILER_OPTIONS)
