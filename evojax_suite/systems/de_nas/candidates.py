"""The training and the evaluation of one candidate."""

from __future__ import annotations

import functools
import itertools
import threading
import time
from collections.abc import Callable, Iterable
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jaxtyping import Float, Int32, UInt8

from evojax_suite import training as engine
from evojax_suite.data.transforms import normalize
from evojax_suite.systems.de_nas import architectures, layered
from evojax_suite.systems.de_nas.architectures import Genome, Space, Unit
from evojax_suite.systems.de_nas.config import Config
from evojax_suite.systems.de_nas.inheritance import Elder, inherited
from evojax_suite.systems.de_nas.layered import COMPILER_OPTIONS
from evojax_suite.systems.de_nas.networks import PaddedNetwork, SequenceNetwork, for_genome, fresh
from evojax_suite.types import Array, Dataset, Images, Labels, PRNGKey, PyTree, training_data

# On two cores both ways take as long at 5e11 (experiments/de_nas/README.md).
_MOST_PADDED_WORK = 3 * 10**11


@struct.dataclass
class Data:
    """Training and validation split on the device."""

    images: UInt8[Array, "images height width channels"] | Images  # floats in [0, 1]
    labels: Labels
    validation: engine.Batches  # normalised
    mean: Float[Array, "channels"]
    std: Float[Array, "channels"]


def make_data(config: Config, dataset: Dataset) -> Data:
    """The training and validation split of `dataset`; the test split stays closed."""
    if dataset.num_classes < 2:
        raise ValueError(f"a search needs at least 2 classes, got {dataset.num_classes}")
    validation = engine.batches_of(dataset, dataset.validation, config.engine)
    return Data(**vars(training_data(dataset)), validation=validation)


def _in_pairs(widths: Iterable[int], kernel: int) -> tuple[Unit, ...]:
    """Pairs of convolutions of these widths, max pooling between the pairs."""
    pairs = [[Unit("convolution", kernel, width)] * 2 for width in widths]
    return tuple(itertools.chain(pairs[0], *([Unit("max"), *pair] for pair in pairs[1:])))


def known_networks(space: Space, image_shape: tuple[int, int, int], number: int) -> Genome:
    """Returns `number` networks like VGG: pairs of 3x3 convolutions (or of the kernel of `space`
    nearest to 3), max pooling after each pair, twice the filters in the next; widths from the least
    to the most."""
    kernel = min(space.kernels, key=lambda size: abs(size - 3))
    poolings = architectures.most_poolings(image_shape)
    genomes, length, step = [], space.max_length, space.filter_step
    for width in np.geomspace(space.least_filters, space.max_filters, number + 1)[1:]:
        sizes = (round(width / step / 2 ** (poolings - stage)) for stage in range(poolings + 1))
        widths = [min(space.max_filters // step, max(1, size)) * step for size in sizes]
        units = _in_pairs(widths, kernel)
        genomes.append(architectures.from_units(units[:length], length))
    return jax.tree.map(lambda *leaves: jnp.stack(leaves), *genomes)


def hand_made(
    parameters: int, image_shape: tuple[int, int, int], num_classes: int
) -> tuple[Unit, ...]:
    """The network that one would try first, at a number of parameters, or the most below it: pairs
    of 3x3 convolutions with batch normalisation, max pooling between the pairs, twice the filters
    after it, and the linear head."""
    stages = architectures.most_poolings(image_shape) + 1

    def of_width(width: float) -> tuple[Unit, ...]:
        return _in_pairs([max(1, int(width * 2**stage)) for stage in range(stages)], 3)

    def size(width: float) -> int:
        units = of_width(width)
        genome = architectures.from_units(units, len(units))
        costs = architectures.costs(genome, image_shape, num_classes, "linear", normalized=True)
        return int(costs.parameters)

    least, most = 0.0, 2.0
    while size(most) <= parameters:
        least, most = most, 2 * most
    for _ in range(20):
        middle = (least + most) / 2
        least, most = (middle, most) if size(middle) <= parameters else (least, middle)
    return of_width(least)


class EvaluatedCandidate(NamedTuple):
    """The evaluation of a candidate after its training."""

    evaluation: engine.Evaluation
    rungs: Float[Array | np.ndarray, "rungs_and_end"]  # accuracy at each, NaN where not reached
    num_epochs: Any  # of its training
    seconds: dict[str, float]
    parameters: PyTree = None  # after its training, where others inherit them


def network_of(config: Config, units: tuple[Unit, ...], num_classes: int) -> SequenceNetwork:
    """The flax module of one architecture."""
    settings = config.dropout, config.normalization, config.skip
    dtype = jnp.dtype(config.compute_dtype)
    return SequenceNetwork(num_classes, units, *settings, dtype=dtype, head=config.head)


def costs_of(
    config: Config, genome: Genome, image_shape: tuple[int, int, int], num_classes: int
) -> architectures.Costs:
    """The costs of networks that `config` builds."""
    normalized = config.normalization != "none"
    return architectures.costs(genome, image_shape, num_classes, config.head, normalized)


def padded_work(config: Config, image_shape: tuple[int, int, int], num_images: int) -> int:
    """The most multiplications of a candidate's training in the padded program, forward."""
    space = config.space
    most = PaddedNetwork(2, space, image_shape).most_features
    convolutions = space.max_length * (max(space.kernels) * space.max_filters) ** 2
    each = convolutions * image_shape[0] * image_shape[1] + most**2 * 5 // 8
    return each * num_images * config.training.num_epochs


def programs_of(
    config: Config, image_shape: tuple[int, int, int], num_images: int
) -> Literal["separate", "padded", "layers"]:
    """`config.programs`, auto decided."""
    if config.inherit:
        return "padded"
    if config.programs != "auto":
        return config.programs
    short = padded_work(config, image_shape, num_images) <= _MOST_PADDED_WORK
    suits = short and config.can_be_padded and jax.default_backend() == "cpu"
    return "padded" if suits else "separate"


def candidate_evaluator(
    config: Config,
    num_classes: int,
    network: SequenceNetwork | PaddedNetwork,
    start: Callable[[Array, Genome], PyTree],
) -> Callable[
    ...,
    tuple[engine.Evaluation, Float[Array, "rungs_and_end"], Int32[Array, ""], PyTree],
]:
    """A pure function that trains and evaluates a candidate. Its arguments are a key, the genome,
    the data, the accuracies that a candidate must reach at each rung (minus infinity: any) and, in
    the padded network, the one that it may inherit from.

    start: makes the network's variables from a key and the genome. The function returns the
    evaluation, the accuracy at each rung and at the end, NaN where not reached, the number of
    epochs trained and, where others may inherit them, the parameters.
    """
    training = config.training
    ends = np.array([*config.rungs, training.num_epochs])

    def evaluate(
        key: PRNGKey, genome: Genome, data: PyTree, bars: Array, elder: Elder | None = None
    ):
        key_start, key_fit = jax.random.split(key)
        num_images, num_epochs = len(data.labels), training.num_epochs
        variables = start(key_start, genome)
        if elder is not None and isinstance(network, PaddedNetwork):
            variables |= {"params": inherited(network, genome, variables["params"], elder)}
            child_epochs = config.child_epochs or num_epochs
            num_epochs = jnp.where(elder.exists, child_epochs, num_epochs)
        images = normalize(data.images, data.mean, data.std)
        labels = jax.nn.one_hot(data.labels, num_classes)
        fit = engine.start_fit_from(variables, training)
        num_steps = num_epochs * training.num_batches(num_images)

        def train(
            key: PRNGKey, fit: engine.FitState, num_epochs: int | Array
        ) -> tuple[engine.FitState, engine.Evaluation]:
            arguments = network, training, num_steps, fit, images, labels, num_images
            fit, _ = engine.fit_epochs(key, *arguments, num_epochs)
            return fit, engine.evaluate(network, fit.variables, data.validation)

        if not config.rungs:
            fit, evaluation = train(key_fit, fit, num_epochs)
            parameters = None if elder is None else fit.variables["params"]
            return evaluation, evaluation.accuracy[None], jnp.int32(num_epochs), parameters

        def passes(carry: PyTree):
            rung, _, _, accuracies = carry
            before = jnp.maximum(rung - 1, 0)
            return (rung < len(ends)) & ((rung == 0) | (accuracies[before] >= bars[before]))

        def climb(carry: PyTree) -> PyTree:
            rung, fit, _, accuracies = carry
            length = jnp.diff(ends, prepend=0)[rung]
            fit, evaluation = train(jax.random.fold_in(key_fit, rung), fit, length)
            return rung + 1, fit, evaluation, accuracies.at[rung].set(evaluation.accuracy)

        nothing = jnp.full(len(ends), jnp.nan)
        carry = jnp.int32(0), fit, engine.Evaluation(nothing[0], nothing[0]), nothing
        rung, _, evaluation, accuracies = jax.lax.while_loop(passes, climb, carry)
        return evaluation, accuracies, jnp.asarray(ends, jnp.int32)[rung - 1], None

    return evaluate


def padded_network(
    config: Config, num_classes: int, image_shape: tuple[int, int, int]
) -> PaddedNetwork:
    """The network that is any candidate of a search."""
    return PaddedNetwork(num_classes, config.space, image_shape, config.dropout)


def make_evaluator(
    config: Config, num_classes: int, image_shape: tuple[int, int, int]
) -> Callable[..., EvaluatedCandidate]:
    """A function that compiles and runs `candidate_evaluator`, or the programs of its layers, for a
    genome, a key, the data, the accuracies to reach at the rungs and, where candidates inherit, the
    network to inherit from; safe to call from several threads."""
    program = functools.partial(candidate_evaluator, config, num_classes)
    of_all = padded_network(config, num_classes, image_shape)

    def start_padded(key: PRNGKey, genome: Genome):
        parameters = of_all.init(key, jnp.zeros((1, *image_shape)))["params"]
        parameters = for_genome(of_all, parameters, genome, config.initialization)
        return {"params": parameters, "genome": genome._asdict()}

    padded = jax.jit(program(of_all, start_padded))
    lock, programs = threading.Lock(), {}

    def shared(*arguments: PyTree) -> tuple[Any, float]:
        """The program of all candidates, and the seconds of its compilation, which the first one
        has."""
        shapes = tuple(np.shape(leaf) for leaf in jax.tree.leaves(arguments))
        name, clock = (jnp.zeros(()).device, shapes), time.perf_counter()
        with lock:
            if name in programs:
                return programs[name], 0.0
            programs[name] = padded.lower(*arguments).compile(COMPILER_OPTIONS)
            return programs[name], time.perf_counter() - clock

    def own(network: SequenceNetwork, *arguments: PyTree) -> tuple[Any, float]:
        """The program of one candidate, and the seconds of its compilation."""

        def start(key: PRNGKey, genome: Genome):
            return fresh(key, network, image_shape, config.initialization)

        clock = time.perf_counter()
        compiled = jax.jit(program(network, start)).lower(*arguments).compile(COMPILER_OPTIONS)
        return compiled, time.perf_counter() - clock

    def evaluate(
        genome: Genome, key: Array, data: Data, bars: np.ndarray, elder: Elder | None = None
    ) -> EvaluatedCandidate:
        arguments: tuple[PyTree, ...] = key, genome, data, bars, elder
        network = network_of(config, architectures.to_units(genome), num_classes)
        match programs_of(config, image_shape, len(data.labels)):
            case "layers":
                ends = *config.rungs, config.training.num_epochs
                how = network, config.training, ends, config.initialization
                return EvaluatedCandidate(*layered.evaluate_candidate(key, *how, data, bars))
            case "padded":
                compiled, compilation = shared(*arguments)
            case _:
                compiled, compilation = own(network, *arguments)
        clock = time.perf_counter()
        found = jax.device_get(compiled(*arguments))
        seconds = {"compilation": compilation, "training": time.perf_counter() - clock}
        evaluation, rungs, num_epochs, parameters = found
        return EvaluatedCandidate(evaluation, rungs, num_epochs, seconds, parameters)

    return evaluate
