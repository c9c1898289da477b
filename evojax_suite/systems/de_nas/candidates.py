"""The training and the judgement of one candidate."""

from __future__ import annotations

import functools
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jaxtyping import Float, Int32, UInt8

from evojax_suite.data.transforms import normalize
from evojax_suite.systems.de_nas import architectures
from evojax_suite.systems.de_nas.architectures import Genome, Space, Unit
from evojax_suite.systems.de_nas.config import Config
from evojax_suite.systems.de_nas.networks import PaddedNetwork, SequenceNetwork, for_genome, fresh
from evojax_suite.training import (
    Batches,
    Evaluation,
    batches_of,
    evaluate,
    fit_epochs,
    start_fit_from,
)
from evojax_suite.types import Array, Dataset, Images, Labels, PRNGKey, PyTree

# On the CPU level 3, the default, makes these programs up to twice as slow, and the older way to
# compile fusions, which later versions lack, takes a third less: experiments/de_nas/README.md.
COMPILER_OPTIONS: dict[str, Any] = {"xla_backend_optimization_level": 2}

if jax.__version_info__ < (0, 11):
    COMPILER_OPTIONS["xla_cpu_use_fusion_emitters"] = False

# On two cores both ways take as long at 5e11 (experiments/de_nas/README.md).
_MOST_PADDED_WORK = 3 * 10**11


@struct.dataclass
class Data:
    """Training and validation split on the device."""

    images: (  # floats in [0, 1]
        UInt8[Array, "images height width channels"] | Images
    )
    labels: Labels
    validation: Batches  # normalised
    mean: Float[Array, "channels"]
    std: Float[Array, "channels"]


def make_data(config: Config, dataset: Dataset) -> Data:
    """What a search sees of `dataset`; its test split stays closed."""
    if dataset.num_classes < 2:
        raise ValueError(f"a search needs at least 2 classes, got {dataset.num_classes}")
    return Data(
        images=jnp.asarray(dataset.train.images),
        labels=jnp.asarray(dataset.train.labels),
        validation=batches_of(dataset, dataset.validation, config.engine),
        mean=jnp.asarray(dataset.mean, jnp.float32),
        std=jnp.asarray(dataset.std, jnp.float32),
    )


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


class EvaluatedCandidate(NamedTuple):
    """What the judgement of a candidate found."""

    evaluation: Evaluation
    # Accuracy at each rung and at the end, NaN where not reached.
    rungs: Float[Array | np.ndarray, "rungs_and_end"]
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


def candidate_evaluator(
    config: Config,
    num_classes: int,
    network: SequenceNetwork | PaddedNetwork,
    start: Callable[[Array, Genome], PyTree],
) -> Callable[
    [PRNGKey, Genome, Data, Float[Array, "rungs"]],
    tuple[Evaluation, Float[Array, "rungs_and_end"], Int32[Array, ""]],
]:
    """A pure function that trains and judges a candidate, of its key, its genome, the data and the
    accuracy that lets it pass each rung (minus infinity lets all).

    start: makes the network's variables from a key and the genome. Returns the evaluation, the
    accuracy at each rung and at the end, NaN where not reached, and the epochs trained.
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


def make_evaluator(
    config: Config, num_classes: int, image_shape: tuple[int, int, int]
) -> Callable[[Genome, Array, Data, np.ndarray], EvaluatedCandidate]:
    """A function that compiles and runs `candidate_evaluator`, of a genome, a key, the data and the
    bars; safe to call from several threads."""

    program = functools.partial(candidate_evaluator, config, num_classes)

    def run(compiled, key, genome, data, bars, compile_seconds):
        clock = time.perf_counter()
        evaluation, rungs, num_epochs = jax.device_get(compiled(key, genome, data, bars))
        seconds = {"compilation": compile_seconds, "training": time.perf_counter() - clock}
        return EvaluatedCandidate(evaluation, rungs, num_epochs, seconds)

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
