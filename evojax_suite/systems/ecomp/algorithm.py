"""van den Beemt, Schröder & de Valk 2021, "EComp: Evolutionary Compression of Neural Networks Using
a Novel Similarity Objective".

An individual is a smaller copy of a trained parent network. Its fitness weighs its accuracy, how
differently it represents a batch of images from its parent (t-SNE's divergence, summed over the
hidden layers), and its size (section 3.1.2). The paper's parents are fully connected; the filters
of convolutions are pruned, exchanged and compared as units are.

Step 1 evaluates the initial population, each of the next `num_generations` steps selects,
recombines, mutates and evaluates on a new batch, and, with `final_choice="mean"`, a step for each
batch of the data then judges the last population.

Where text and released program differ, the program is the default and the text an option:

- Pruning (section 3.1.1): the text names the least active units of a forward pass, the program
  takes those with the smallest L1 norm of incoming weights (`pruning`).
- Mutation (section 3.1.5): the text names the hidden layers, the program scales the output layer's
  weights too (`mutated_layers`).
- The best network (section 4.2): the text names the highest fitness in the final population, the
  program the highest mean fitness over all batches (`final_choice`).
- From the program alone: rates of compression from 0.1 to 0.8, perplexity 30, images in [0, 1].

Where we differ from the program: the first population is evaluated on the first batch of an epoch
of its own, and the perplexity is found by Newton's method, to float32 precision instead of 1e-5 in
the entropy.
"""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jaxtyping import Bool, Float, Int, Int32, UInt8

from evojax_suite.data import normalize
from evojax_suite.operators import crowding_distances, non_dominated_ranks, tournament
from evojax_suite.systems.ecomp import compression, feed_forward, similarity
from evojax_suite.systems.ecomp.compression import Population
from evojax_suite.systems.ecomp.config import Config, Params
from evojax_suite.systems.ecomp.feed_forward import Network
from evojax_suite.types import Algorithm, Array, Images, IntScalar, PRNGKey, Scalar


@struct.dataclass
class Data:
    """The parent and the images that evolution sees, on the device."""

    parent: Network
    # The inputs of the parent, which keep the shape of images where it has convolutions.
    images: Float[Array, "images inputs"] | Images
    labels: Int32[Array, "images"]
    pooling: feed_forward.Pooling = struct.field(pytree_node=False, default="average")


class Scores(NamedTuple):
    """The scores of each member."""

    fitness: Float[Array, "members"]
    accuracy: Float[Array, "members"]
    similarity_loss: Float[Array, "members"]
    relative_size: Float[Array, "members"]  # hidden units over the parent's
    relative_parameters: Float[Array, "members"]


@struct.dataclass
class State:
    """What the next step needs."""

    population: Population
    scores: Scores  # on the latest batches
    preference: Float[Array, "members"]  # by what parents are drawn, higher is better
    judged: Scores  # sums over the judging steps
    order: Int32[Array, "images"]  # those of the epoch, batch after batch
    num_steps: Int32[Array, ""]  # done


class Metrics(NamedTuple):
    """What one step reports of the population; fitness is higher-is-better."""

    generation: IntScalar  # the step, from 1
    judging: Bool[Array, ""]  # the last population on a further batch
    fitness_best: Scalar
    fitness_mean: Scalar
    accuracy_best: Scalar
    accuracy_mean: Scalar
    accuracy_worst: Scalar
    similarity_loss_best: Scalar
    similarity_loss_mean: Scalar
    similarity_loss_worst: Scalar
    relative_size_least: Scalar
    relative_size_mean: Scalar
    relative_size_most: Scalar
    num_failed: IntScalar  # members whose fitness was NaN or infinite


class Compressed(NamedTuple):
    """The best network, still padded: `operators.compression.trimmed` cuts it."""

    network: Network
    sizes: Int32[Array, "hidden_layers"]
    # For each hidden layer the parent's unit that a bias comes from.
    units: tuple[Int32[Array, "_width"], ...]
    fitness: Scalar  # that it was chosen by
    member: IntScalar  # its place in the last population
    num_mutations: Int32[Array, ""]  # in its line of second parents


def make_data(
    parent: Network,
    images: (
        UInt8[np.ndarray, "images height width channels"]
        | Float[np.ndarray, "images height width channels"]
    ),
    labels: Int[np.ndarray, "images"],
    mean: Float[np.ndarray, "channels"] | None = None,
    std: Float[np.ndarray, "channels"] | None = None,
    pooling: feed_forward.Pooling = "average",
) -> Data:
    """images: uint8 or float in [0, 1]; mean and std: what the parent takes out of them, nothing in
    the paper. Where it has no convolutions they are flattened row by row, channels last; where it
    has, pooling follows each."""
    channels = images.shape[-1]
    mean = np.zeros(channels) if mean is None else mean
    std = np.ones(channels) if std is None else std
    inputs = normalize(images, mean, std)
    if not feed_forward.is_convolutional(parent):
        inputs = inputs.reshape(len(images), -1)
    return Data(
        parent=jax.tree.map(jnp.asarray, tuple(parent)),
        images=jnp.asarray(inputs, jnp.float32),
        labels=jnp.asarray(labels, jnp.int32),
        pooling=pooling,
    )


def check(config: Config, params: Params, parent: Network, num_images: int) -> None:
    """Raise ValueError where parent, images and settings do not fit each other."""
    sizes = feed_forward.hidden_sizes(parent)
    if config.balanced and len(set(sizes)) != 1:
        raise ValueError(
            f"the parent's hidden layers must be equal in size, got {', '.join(map(str, sizes))}; "
            f"balanced off takes any"
        )
    if num_images < config.images_per_generation or num_images % config.images_per_generation:
        several = f" x batches_per_generation {config.batches_per_generation}"
        raise ValueError(
            f"the number of images must be a multiple of batch_size {config.batch_size}"
            f"{several if config.batches_per_generation > 1 else ''}, got {num_images}"
        )
    if not 1 <= params.perplexity < config.batch_size - 1:
        raise ValueError(
            f"perplexity must be >= 1 and < {config.batch_size - 1} with batch_size "
            f"{config.batch_size}, got {params.perplexity}"
        )
    params.check()


def num_steps(config: Config, num_images: int) -> int:
    """Number of steps of a whole run: the initial population, the generations, the judging."""
    judging = num_images // config.images_per_generation if config.final_choice == "mean" else 0
    return 1 + config.num_generations + judging


def initial_sizes(config: Config, parent: Network) -> Int32[np.ndarray, "members hidden_layers"]:
    """Units that members keep: rates of compression evenly spaced, least first."""
    span = config.most_compression - config.least_compression
    rates = config.least_compression + span * np.arange(config.population_size) / (
        config.population_size
    )
    units = np.array(feed_forward.hidden_sizes(parent))
    kept = units - (rates[:, None] * units + 1e-6).astype(np.int32)
    return np.maximum(kept, 1).astype(np.int32)


_MOST_WIDTHS = 16
"""Sizes of matrix products on the CPU, where members are computed one after the other."""

_VECTOR = 16
"""Floats of a vector register: steps between these sizes are multiples of it, and so are the padded
widths of convolutions, which take half as long again with 29 filters as with 32."""


def _at_their_widths(function, population: Population, most_widths: int, together: bool):
    """`function(index, widths)` of each member, one after the other and each with the least of
    several widths that holds it; one width may be a vmap of all `together`."""
    sizes, whole = population.sizes, feed_forward.hidden_sizes(population.layers)
    step = _VECTOR * -(-max(whole) // (_VECTOR * most_widths))
    members = jnp.arange(len(sizes))
    if step >= max(whole):
        each = jax.vmap if together else partial(partial, jax.lax.map)
        return each(lambda index: function(index, whole))(members)
    choices = [
        tuple(min(width, most) for width in whole) for most in range(step, max(whole) + step, step)
    ]
    holds = (sizes[:, None] <= jnp.array(choices)).all(-1)
    branches = [lambda index, widths=widths: function(index, widths) for widths in choices]
    return jax.lax.map(
        lambda index: jax.lax.switch(holds[index].argmax(), branches, index), members
    )


def relation(
    config: Config, activations: Float[Array, "images ..."]
) -> Float[Array, "images images"]:
    """Pairs of images by a layer's activations: all that similarity needs."""
    activations = activations.reshape(len(activations), -1)
    if config.similarity == "cka":
        return similarity.centred_gram(activations)
    return similarity.squared_distances(activations)


def targets_of(config: Config, params: Params, activations: list[Array]) -> list[Any]:
    """What each hidden layer of the parent, of these activations, is to be like."""
    found = [relation(config, layer) for layer in activations]
    if config.similarity == "cka":
        return found
    return [similarity.joint_probabilities(layer, params.perplexity) for layer in found]


def similarity_losses(
    config: Config,
    params: Params,
    targets: list[Any],
    relations: list[Float[Array, "members images images"]],
    sizes: Int[Array, "members hidden_layers"],
) -> Float[Array, "members"]:
    """How unlike the parent's the members' representations are, summed over hidden layers.

    relations: of each layer, of `relation`; sizes: hidden units.
    """

    def loss(target, relation, size):
        match config.similarity:
            case "gaussian":
                start = target.log_precisions
                other = similarity.joint_probabilities(relation, params.perplexity, start)
                return similarity.divergence(target.probabilities, other.probabilities)
            case "student_t":
                other = similarity.student_t_probabilities(relation, size)
                return similarity.divergence(target.probabilities, other)
            case "cka":
                alignment = similarity.centred_kernel_alignment(target, relation)
                return jnp.maximum(1 - alignment, 0)  # above 1 by rounding alone
            case _:
                raise ValueError(f"unknown similarity {config.similarity!r}")

    return jnp.stack(
        [
            jax.vmap(loss, in_axes=(None, 0, 0))(target, relation, sizes[:, layer])
            for layer, (target, relation) in enumerate(zip(targets, relations, strict=True))
        ]
    ).sum(0)


def _on_cpu() -> bool:
    return jax.default_backend() == "cpu"


def _importance(config: Config, data: Data) -> tuple[Array, ...]:
    if config.pruning == "incoming_l1":
        return tuple(
            jnp.abs(layer.weight).reshape(len(layer.weight), -1).sum(1)
            for layer in data.parent[:-1]
        )
    hidden = _activations_of_parent(data, data.images[: config.batch_size])
    return tuple(activations.reshape(-1, activations.shape[-1]).mean(0) for activations in hidden)


def _activations_of_parent(data: Data, images: Array) -> list[Array]:
    return feed_forward.forward(data.parent, images, data.pooling)[:-1]


def _members_of(population: Population, data: Data, images: Array):
    """A function of a member's index and widths: its hidden activations and its logits."""
    if feed_forward.is_convolutional(data.parent):

        def convolutional(index, widths):
            network = compression.member(population, index)
            network = compression.cut(network, population.sizes[index], widths)
            return feed_forward.forward(network, images, data.pooling)

        return convolutional
    first, rest = compression.first_activations(population, images), population.layers[1:]
    return lambda index, widths: compression.hidden_and_logits(
        first[:, index],
        jax.tree.map(lambda leaf: leaf[index], rest),
        population.sizes[index],
        widths,
    )


def init(config: Config, key: Array, params: Params, data: Data) -> State:
    """The parent's copies, pruned at rates that are evenly spaced."""
    del params
    sizes = initial_sizes(config, data.parent)
    widths = tuple(int(size) for size in sizes.max(0))
    if feed_forward.is_convolutional(data.parent):
        whole = feed_forward.hidden_sizes(data.parent)
        rounded = (-(-width // _VECTOR) * _VECTOR for width in widths)
        widths = tuple(map(min, rounded, whole))
    if not config.balanced:
        keys = jax.random.split(key, sizes.shape[1])
        columns = [jax.random.permutation(k, sizes[:, i]) for i, k in enumerate(keys)]
        sizes = jnp.stack(columns, 1)
    population = compression.pruned(
        data.parent, _importance(config, data), jnp.asarray(sizes), widths
    )
    members = config.population_size
    if config.selection == "nsga2":  # children are beside their parents for a while
        room = jnp.zeros((members, *population.tails.shape[1:]))
        tails = jnp.concatenate([population.tails, room])
        population = replace(population, tails=tails)
    nothing = Scores(*[jnp.zeros(members)] * len(Scores._fields))
    return State(
        population=population,
        scores=nothing,
        preference=jnp.zeros(members),
        judged=nothing,
        order=jnp.arange(len(data.labels), dtype=jnp.int32),
        num_steps=jnp.int32(0),
    )


def _compute_all(function, population: Population, most_widths: int):
    # The CPU's convolutions would become grouped ones.
    together = not (_on_cpu() and population.layers[0].weight.ndim == 5)
    return _at_their_widths(function, population, most_widths, together)


def _evaluate_on(
    config: Config, population: Population, params: Params, data: Data, batch: Array
) -> Scores:
    images, labels = data.images[batch], data.labels[batch]
    targets = targets_of(config, params, _activations_of_parent(data, images))
    compute = _members_of(population, data, images)

    def member(index, widths):
        *hidden, logits = compute(index, widths)
        accuracy = (logits.argmax(-1) == labels).mean()
        accuracy = jnp.where(jnp.isfinite(logits).all(), accuracy, jnp.nan)
        return [relation(config, activations) for activations in hidden], accuracy

    relations, accuracy = _compute_all(member, population, _MOST_WIDTHS if _on_cpu() else 1)

    sizes = population.sizes
    losses = similarity_losses(config, params, targets, relations, sizes)
    relative_size = sizes.sum(1) / sum(feed_forward.hidden_sizes(data.parent))
    count = jnp.asarray(feed_forward.num_parameters(data.parent, sizes.T))
    parameters = count / sum(array.size for layer in data.parent for array in layer)
    fitness = (
        params.accuracy_weight * accuracy
        - params.similarity_weight * losses
        + params.compression_weight * (1 - relative_size)
    )
    return Scores(fitness, accuracy, losses, relative_size, parameters)


def evaluate(
    config: Config,
    population: Population,
    params: Params,
    data: Data,
    batches: Int[Array, "batches batch_size"],
) -> Scores:
    """The scores of a population, averaged over batches of images."""
    if len(batches) == 1:
        return _evaluate_on(config, population, params, data, batches[0])
    every = jax.lax.map(
        lambda batch: _evaluate_on(config, population, params, data, batch), batches
    )
    return jax.tree.map(lambda values: values.mean(0), every)


def preferences(config: Config, scores: Scores) -> Float[Array, "members"]:
    """Higher is better, minus infinity where an evaluation failed."""
    failed = ~jnp.isfinite(scores.fitness)
    if config.selection == "softmax":
        return jnp.where(failed, -jnp.inf, scores.fitness)
    objectives = [1 - scores.accuracy, scores.similarity_loss, scores.relative_parameters]
    objectives = jnp.where(failed[:, None], jnp.nan, jnp.stack(objectives, 1))
    ranks = non_dominated_ranks(objectives)
    crowding = crowding_distances(objectives, ranks)
    within = jnp.where(jnp.isfinite(crowding), crowding / (1 + crowding), 1.0)
    return jnp.where(failed, -jnp.inf, within - 2.0 * ranks)


def choose_parents(
    config: Config, key: PRNGKey, preference: Float[Array, "members"]
) -> tuple[Int[Array, "members//2"], Int[Array, "members//2"]]:
    """Two for each pair of children: by the softmax of the preference, or by binary tournaments."""
    members = config.population_size
    if config.selection == "softmax":
        log_odds = jnp.where(jnp.isfinite(preference).any(), preference, 0.0)
        first, second = jax.random.categorical(key, log_odds, shape=(2, members // 2))
        return first, second
    first, second = tournament(key, preference, members, 2).reshape(2, members // 2)
    return first, second


def _children_of(config: Config, key: Array, state: State, data: Data, batch: Array) -> Population:
    key_parents, key_crossover = jax.random.split(key)
    population = state.population
    first, second = choose_parents(config, key_parents, state.preference)
    if config.crossover == "cut_off":
        return compression.cut_off_crossover(key_crossover, population, first, second)
    compute = _members_of(population, data, data.images[batch])
    *hidden, _ = _compute_all(compute, population, 1)
    return compression.aligned_crossover(key_crossover, population, first, second, hidden)


def _mutated(
    config: Config,
    key: PRNGKey,
    population: Population,
    may: Bool[Array, "members"],
    params: Params,
) -> Population:
    """may: which members mutation may change."""
    key_who, key_factors, key_shrinks, key_parts = jax.random.split(key, 4)
    chosen = may & (jax.random.uniform(key_who, may.shape) < params.mutation_rate)
    population = compression.scaling_mutation(
        key_factors, population, chosen, params.mutation_span, config.mutated_layers == "hidden"
    )
    if not config.shrinking:
        return population
    shrinks = may & (jax.random.uniform(key_shrinks, may.shape) < params.shrink_rate)
    return compression.shrinking_mutation(
        key_parts, population, shrinks, params.shrink_span, config.balanced
    )


def _next_population(
    config: Config, key: Array, state: State, params: Params, data: Data, batch: Array
):
    """The children; with nsga2 their parents and they."""
    key_children, key_mutation = jax.random.split(key)
    children = _children_of(config, key_children, state, data, batch)
    may = jnp.ones(config.population_size, bool)
    if config.selection == "nsga2":
        children = compression.joined(state.population, children)
        may = jnp.concatenate([~may, may])
    return _mutated(config, key_mutation, children, may, params)


def step(
    config: Config, key: Array, state: State, params: Params, data: Data
) -> tuple[State, Metrics]:
    """One generation, or the judgement of the last population on a further batch."""
    key_order, key_children = jax.random.split(key)
    num_images = len(data.labels)
    together = config.images_per_generation
    generation = state.num_steps  # 0 is the initial population
    judging = generation > config.num_generations
    evolving = (generation > 0) & ~judging
    index = jnp.maximum(generation - 1 - judging * config.num_generations, 0)
    index = index % (num_images // together)
    order = jax.lax.cond(
        index == 0,
        lambda: jax.random.permutation(key_order, num_images).astype(jnp.int32),
        lambda: state.order,
    )
    chosen = jax.lax.dynamic_slice_in_dim(order, index * together, together)
    batches = chosen.reshape(config.batches_per_generation, config.batch_size)

    def keep():
        return state.population

    def reproduce():
        return _next_population(config, key_children, state, params, data, batches[0])

    def keep_and_evaluate():
        scores = evaluate(config, state.population, params, data, batches)
        return state.population, scores, preferences(config, scores)

    def reproduce_and_select():
        both = reproduce()
        scores = evaluate(config, both, params, data, batches)
        preference = preferences(config, scores)
        best = jnp.argsort(-preference, stable=True)[: config.population_size]
        scores = jax.tree.map(lambda values: values[best], scores)
        return compression.selected(both, best), scores, preference[best]

    if config.selection == "softmax":
        population = jax.lax.cond(evolving, reproduce, keep)
        scores = evaluate(config, population, params, data, batches)
        preference = preferences(config, scores)
    else:
        population, scores, preference = jax.lax.cond(
            evolving, reproduce_and_select, keep_and_evaluate
        )
    failed = ~jnp.isfinite(scores.fitness)
    state = State(
        population=population,
        scores=scores,
        preference=preference,
        judged=jax.tree.map(
            lambda total, values: total + jnp.where(judging, values, 0.0), state.judged, scores
        ),
        order=order,
        num_steps=state.num_steps + 1,
    )

    def mean(values):
        return jnp.mean(values, where=~failed)

    def least(values):
        return jnp.min(values, where=~failed, initial=jnp.inf)

    def most(values):
        return jnp.max(values, where=~failed, initial=-jnp.inf)

    return state, Metrics(
        generation=state.num_steps,
        judging=judging,
        fitness_best=most(scores.fitness),
        fitness_mean=mean(scores.fitness),
        accuracy_best=most(scores.accuracy),
        accuracy_mean=mean(scores.accuracy),
        accuracy_worst=least(scores.accuracy),
        similarity_loss_best=least(scores.similarity_loss),
        similarity_loss_mean=mean(scores.similarity_loss),
        similarity_loss_worst=most(scores.similarity_loss),
        relative_size_least=least(scores.relative_size),
        relative_size_mean=mean(scores.relative_size),
        relative_size_most=most(scores.relative_size),
        num_failed=failed.sum(),
    )


def result(config: Config, state: State, params: Params, data: Data) -> Compressed:
    """The best member of the last population."""
    del params, data
    fitness = final_scores(config, state).fitness
    fitness = jnp.where(jnp.isfinite(fitness), fitness, -jnp.inf)
    best = fitness.argmax()
    population = state.population
    return Compressed(
        network=compression.member(population, best),
        sizes=population.sizes[best],
        units=tuple(units[best] for units in population.units),
        fitness=fitness[best],
        member=best,
        num_mutations=population.num_mutations[best],
    )


def finished(config: Config, state: State) -> Array:
    """Whether the generations and the judging steps are done."""
    return state.num_steps >= num_steps(config, len(state.order))


def build(config: Config) -> Algorithm[State, Params, Data, Metrics, Compressed]:
    """The algorithm for any parent and images: their shapes are those of the data."""
    return Algorithm(
        partial(init, config),
        partial(step, config),
        partial(result, config),
        partial(finished, config),
    )


def final_scores(config: Config, state: State) -> Scores:
    """Scores by which the best is chosen: means over the judging steps, or the latest ones."""
    num_judged = state.num_steps - 1 - config.num_generations
    return jax.tree.map(
        lambda total, latest: jnp.where(num_judged > 0, total / jnp.maximum(num_judged, 1), latest),
        state.judged,
        state.scores,
    )
