"""van den Beemt, Schröder & de Valk 2021, "EComp: Evolutionary Compression of Neural Networks Using
a Novel Similarity Objective".

An individual is a smaller copy of a trained parent network. Its fitness weighs its accuracy, how
differently it represents a batch of images from its parent (t-SNE's divergence, summed over the
hidden layers), and its size (section 3.1.2). The paper's parents are fully connected; the filters
of convolutions are pruned, exchanged and compared as units are.

Step 1 evaluates the initial population, each of the next `num_generations` steps selects,
recombines, mutates and evaluates on a new batch, and, with `final_choice="mean"`, a step for each
batch of the data then evaluates the last population.

Where text and released program differ, the program is the default and the text an option:

- Pruning (section 3.1.1): the text names the least active units of a forward pass, the program
  takes those with the smallest L1 norm of incoming weights (`pruning`).
- Mutation (section 3.1.5): the text names the hidden layers, the program scales the output layer's
  weights too (`mutated_layers`).
- The best network (section 4.2): the text names the highest fitness in the final population, the
  program the highest mean fitness over all batches (`final_choice`).
- From the program alone: rates of compression from 0.1 to 0.8, perplexity 30, images in [0, 1].

Where this differs from the program: the first population is evaluated on the first batch of a
separate epoch, and the perplexity is solved for by Newton's method, to float32 precision instead of
1e-5 in the entropy.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jaxtyping import Bool, Float, Int, Int32, Real

from evojax_suite.data import normalize
from evojax_suite.operators import crowding_distances, non_dominated_ranks, tournament
from evojax_suite.systems.ecomp import compression, feed_forward, similarity
from evojax_suite.systems.ecomp.compression import Population
from evojax_suite.systems.ecomp.config import Config, Params
from evojax_suite.systems.ecomp.feed_forward import Network
from evojax_suite.types import Algorithm, Array, Images, IntScalar, Labels, PRNGKey, PyTree, Scalar


@struct.dataclass
class Data:
    """The parent and the images of evolution, on the device."""

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
    """The state of the search between two steps."""

    population: Population
    scores: Scores  # on the latest batches
    preference: Float[Array, "members"]  # decides which parents are drawn, higher is better
    judged: Scores  # sums over the steps of the final evaluation
    order: Int32[Array, "images"]  # the images of the epoch, batch after batch
    num_steps: Int32[Array, ""]  # done


class Metrics(NamedTuple):
    """Statistics of the population after a step; fitness is higher-is-better."""

    generation: IntScalar  # the step, from 1
    judging: Bool[Array, ""]  # whether it evaluated the last population on a further batch
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
    """The best network, still padded: `compression.trimmed` cuts it."""

    network: Network
    sizes: Int32[Array, "hidden_layers"]
    # For each hidden layer the parent's unit that a bias comes from.
    units: tuple[Int32[Array, "_width"], ...]
    fitness: Scalar  # for which it was chosen
    member: IntScalar  # its place in the last population
    num_mutations: Int32[Array, ""]  # in its line of second parents


def make_data(
    parent: Network,
    images: Real[np.ndarray, "images height width channels"],
    labels: Int[np.ndarray, "images"],
    mean: Float[np.ndarray, "channels"] | None = None,
    std: Float[np.ndarray, "channels"] | None = None,
    pooling: feed_forward.Pooling = "average",
) -> Data:
    """The data of evolution.

    images: uint8, or float in [0, 1]; for a parent without convolutions they are flattened row by
    row, channels last. mean, std: by which the parent's inputs are normalised, in the paper 0 and
    1, the default. pooling: after each convolution of the parent.
    """
    channels = images.shape[-1]
    mean = np.zeros(channels) if mean is None else mean
    inputs = normalize(images, mean, np.ones(channels) if std is None else std)
    if not feed_forward.is_convolutional(parent):
        inputs = inputs.reshape(len(images), -1)
    images_and_labels = jnp.asarray(inputs, jnp.float32), jnp.asarray(labels, jnp.int32)
    return Data(jax.tree.map(jnp.asarray, tuple(parent)), *images_and_labels, pooling)


def check(config: Config, params: Params, parent: Network, num_images: int) -> None:
    """Raise ValueError where parent, images and settings do not fit each other."""
    sizes = feed_forward.hidden_sizes(parent)
    if config.balanced and len(set(sizes)) != 1:
        raise ValueError(
            f"the parent's hidden layers must be equal in size, got {', '.join(map(str, sizes))}; "
            f"balanced off takes any"
        )
    size, batches = config.batch_size, config.batches_per_generation
    if num_images < size * batches or num_images % (size * batches):
        several = f" x batches_per_generation {batches}" if batches > 1 else ""
        multiple = f"batch_size {size}{several}"
        raise ValueError(f"the number of images must be a multiple of {multiple}, got {num_images}")
    if not 1 <= params.perplexity < size - 1:
        allowed = f">= 1 and < {size - 1} with batch_size {size}"
        raise ValueError(f"perplexity must be {allowed}, got {params.perplexity}")
    params.check()


def num_steps(config: Config, num_images: int) -> int:
    """Number of steps of a run: the initial population, the generations, the final evaluation."""
    final = num_images // config.images_per_generation if config.final_choice == "mean" else 0
    return 1 + config.num_generations + final


def initial_sizes(config: Config, parent: Network) -> Int32[np.ndarray, "members hidden_layers"]:
    """Units that members keep: rates of compression evenly spaced, least first."""
    members = config.population_size
    span = config.most_compression - config.least_compression
    rates = config.least_compression + span * np.arange(members) / members
    units = np.array(feed_forward.hidden_sizes(parent))
    kept = units - (rates[:, None] * units + 1e-6).astype(np.int32)
    return np.maximum(kept, 1).astype(np.int32)


_MOST_WIDTHS = 16
"""Sizes of matrix products on the CPU, where members are computed one after the other."""

_VECTOR = 16
"""Floats of a vector register: steps between these sizes are multiples of it, and so are the padded
widths of convolutions, which take half as long again with 29 filters as with 32."""


def _map_members(
    function: Callable[[Array, tuple[int, ...]], PyTree], population: Population, most_widths: int
) -> PyTree:
    """`function(index, widths)` of each member: all at once, or one after the other, each with the
    least of at most `most_widths` widths that holds it."""
    sizes, whole = population.sizes, feed_forward.hidden_sizes(population.layers)
    step = _VECTOR * -(-max(whole) // (_VECTOR * most_widths))
    members = jnp.arange(len(sizes))
    if step >= max(whole):
        on_cpu = jax.default_backend() == "cpu"
        if on_cpu and population.layers[0].weight.ndim == 5:  # a vmap makes grouped convolutions
            return jax.lax.map(lambda index: function(index, whole), members)
        return jax.vmap(lambda index: function(index, whole))(members)
    choices = [
        tuple(min(width, most) for width in whole) for most in range(step, max(whole) + step, step)
    ]
    narrowest = (sizes[:, None] <= jnp.array(choices)).all(-1).argmax(-1)
    branches = [lambda index, widths=widths: function(index, widths) for widths in choices]
    return jax.lax.map(lambda index: jax.lax.switch(narrowest[index], branches, index), members)


def relation(
    config: Config, activations: Float[Array, "images ..."]
) -> Float[Array, "images images"]:
    """A number for each pair of images, by a layer's activations: the input of the similarity."""
    relate = similarity.centred_gram if config.similarity == "cka" else similarity.squared_distances
    return relate(activations.reshape(len(activations), -1))


def targets_of(config: Config, params: Params, activations: list[Array]) -> list[Any]:
    """Targets of the similarity: for each hidden layer of the parent, by its activations."""
    relations = [relation(config, layer) for layer in activations]
    if config.similarity == "cka":
        return relations
    return [similarity.joint_probabilities(layer, params.perplexity) for layer in relations]


def similarity_losses(
    config: Config,
    params: Params,
    targets: list[Any],
    relations: list[Float[Array, "members images images"]],
    sizes: Int[Array, "members hidden_layers"],
) -> Float[Array, "members"]:
    """How much the members' representations differ from the parent's, summed over hidden layers.

    targets: from `targets_of`. relations: from `relation`, for each hidden layer. sizes: units.
    """

    def loss(target: PyTree, relation: PyTree, size: Array):
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

    each = jax.vmap(loss, in_axes=(None, 0, 0))
    layers = zip(targets, relations, sizes.T, strict=True)
    return jnp.stack([each(*layer) for layer in layers]).sum(0)


def relations_and_accuracy(
    config: Config, outputs: list[Array], labels: Labels
) -> tuple[list[Float[Array, "_images _images"]], Scalar]:
    """The `relation` of each hidden layer of a network, and its accuracy, NaN where a logit is not
    finite. outputs: activations of the hidden layers, then logits."""
    *hidden, logits = outputs
    accuracy = (logits.argmax(-1) == labels).mean()
    accuracy = jnp.where(jnp.isfinite(logits).all(), accuracy, jnp.nan)
    return [relation(config, activations) for activations in hidden], accuracy


def _members_of(population: Population, data: Data, images: Array):
    """A function of a member's index and widths that returns its hidden activations and logits."""
    if feed_forward.is_convolutional(data.parent):

        def convolutional(index: Array, widths: tuple[int, ...]):
            network = compression.member(population, index)
            network = compression.cut(network, population.sizes[index], widths)
            return feed_forward.forward(network, images, data.pooling)

        return convolutional
    first, rest = compression.first_activations(population, images), population.layers[1:]

    def fully_connected(index: Array, widths: tuple[int, ...]):
        layers, sizes = jax.tree.map(lambda leaf: leaf[index], (rest, population.sizes))
        return compression.hidden_and_logits(first[:, index], layers, sizes, widths)

    return fully_connected


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
        sizes = jnp.stack([*map(jax.random.permutation, keys, sizes.T)], 1)
    if config.pruning == "incoming_l1":
        importance = [compression.incoming_norms(layer.weight) for layer in data.parent[:-1]]
    else:
        images = data.images[: config.batch_size]
        *hidden, _ = feed_forward.forward(data.parent, images, data.pooling)
        importance = [layer.reshape(-1, layer.shape[-1]).mean(0) for layer in hidden]
    population = compression.pruned(data.parent, tuple(importance), jnp.asarray(sizes), widths)
    members = config.population_size
    if config.selection == "nsga2":  # children are beside their parents for a while
        room = jnp.zeros((members, *population.tails.shape[1:]))
        population = replace(population, tails=jnp.concatenate([population.tails, room]))
    zeros, preference = Scores(*[jnp.zeros(members)] * len(Scores._fields)), jnp.zeros(members)
    order = jnp.arange(len(data.labels), dtype=jnp.int32)
    return State(population, zeros, preference, judged=zeros, order=order, num_steps=jnp.int32(0))


def evaluate(
    config: Config,
    population: Population,
    params: Params,
    data: Data,
    batches: Int[Array, "batches batch_size"],
) -> Scores:
    """The scores of a population, averaged over batches of images."""

    def scores_on(batch: PyTree):
        images, labels = data.images[batch], data.labels[batch]
        *hidden, _ = feed_forward.forward(data.parent, images, data.pooling)
        targets = targets_of(config, params, hidden)
        compute = _members_of(population, data, images)

        def member(index: Array, widths: tuple[int, ...]):
            return relations_and_accuracy(config, compute(index, widths), labels)

        most_widths = _MOST_WIDTHS if jax.default_backend() == "cpu" else 1
        relations, accuracy = _map_members(member, population, most_widths)
        sizes = population.sizes
        losses = similarity_losses(config, params, targets, relations, sizes)
        relative_size = sizes.sum(1) / sum(feed_forward.hidden_sizes(data.parent))
        count = jnp.asarray(feed_forward.num_parameters(data.parent, sizes.T))
        parameters = count / sum(array.size for layer in data.parent for array in layer)
        fitness = params.fitness(accuracy, losses, relative_size)
        return Scores(fitness, accuracy, losses, relative_size, parameters)

    if len(batches) == 1:
        return scores_on(batches[0])
    return jax.tree.map(lambda values: values.mean(0), jax.lax.map(scores_on, batches))


def objectives(scores: Scores) -> Float[Array, "members 3"]:
    """Error, similarity loss and relative parameters; lower is better."""
    error = 1 - scores.accuracy
    return jnp.stack([error, scores.similarity_loss, scores.relative_parameters], 1)


def preferences(config: Config, scores: Scores) -> Float[Array, "members"]:
    """Each member's preference as a parent: higher is better, -inf where its evaluation failed."""
    failed = ~jnp.isfinite(scores.fitness)
    if config.selection == "softmax":
        return jnp.where(failed, -jnp.inf, scores.fitness)
    valid = jnp.where(failed[:, None], jnp.nan, objectives(scores))
    ranks = non_dominated_ranks(valid)
    crowding = crowding_distances(valid, ranks)
    within = jnp.where(jnp.isfinite(crowding), crowding / (1 + crowding), 1.0)
    return jnp.where(failed, -jnp.inf, within - 2.0 * ranks)


def choose_parents(
    config: Config, key: PRNGKey, preference: Float[Array, "members"]
) -> tuple[Int[Array, "members//2"], Int[Array, "members//2"]]:
    """Parents of each pair of children: by the softmax of preference, or by binary tournaments."""
    members = config.population_size
    if config.selection == "softmax":
        log_odds = jnp.where(jnp.isfinite(preference).any(), preference, 0.0)
        first, second = jax.random.categorical(key, log_odds, shape=(2, members // 2))
    else:
        first, second = tournament(key, preference, members, 2).reshape(2, members // 2)
    return first, second


def _next_population(
    config: Config, key: PRNGKey, state: State, params: Params, data: Data, batch: Array
) -> Population:
    """The children, mutated; with nsga2 their parents before them."""
    key_children, key_mutation = jax.random.split(key)
    key_parents, key_crossover = jax.random.split(key_children)
    key_who, key_factors, key_shrinks, key_parts = jax.random.split(key_mutation, 4)
    population = state.population
    pairs = choose_parents(config, key_parents, state.preference)
    if config.crossover == "cut_off":
        children = compression.cut_off_crossover(key_crossover, population, *pairs)
    else:
        compute = _members_of(population, data, data.images[batch])
        *hidden, _ = _map_members(compute, population, 1)
        children = compression.aligned_crossover(key_crossover, population, *pairs, hidden)
    is_child = jnp.ones(config.population_size, bool)
    if config.selection == "nsga2":
        children = compression.joined(population, children)
        is_child = jnp.concatenate([~is_child, is_child])
    chosen = is_child & (jax.random.uniform(key_who, is_child.shape) < params.mutation_rate)
    children = compression.scaling_mutation(
        key_factors, children, chosen, params.mutation_span, config.mutated_layers == "hidden"
    )
    if not config.shrinking:
        return children
    shrinks = is_child & (jax.random.uniform(key_shrinks, is_child.shape) < params.shrink_rate)
    return compression.shrinking_mutation(
        key_parts, children, shrinks, params.shrink_span, config.balanced
    )


def step(
    config: Config, key: Array, state: State, params: Params, data: Data
) -> tuple[State, Metrics]:
    """One generation, or an evaluation of the last population on a further batch."""
    key_order, key_children = jax.random.split(key)
    num_images, together = len(data.labels), config.images_per_generation
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

    def scored(population: Population):
        scores = evaluate(config, population, params, data, batches)
        return population, scores, preferences(config, scores)

    def reproduce():
        return _next_population(config, key_children, state, params, data, batches[0])

    def reproduce_and_select():
        both, scores, preference = scored(reproduce())
        best = jnp.argsort(-preference, stable=True)[: config.population_size]
        scores = jax.tree.map(lambda values: values[best], scores)
        return compression.selected(both, best), scores, preference[best]

    if config.selection == "softmax":
        population = jax.lax.cond(evolving, reproduce, lambda: state.population)
        population, scores, preference = scored(population)
    else:
        population, scores, preference = jax.lax.cond(
            evolving, reproduce_and_select, lambda: scored(state.population)
        )
    judged = jax.tree.map(
        lambda total, values: total + jnp.where(judging, values, 0.0), state.judged, scores
    )
    state = State(population, scores, preference, judged, order, state.num_steps + 1)

    valid = jnp.isfinite(scores.fitness)
    mean = jax.tree.map(partial(jnp.mean, where=valid), scores)
    least = jax.tree.map(partial(jnp.min, where=valid, initial=jnp.inf), scores)
    most = jax.tree.map(partial(jnp.max, where=valid, initial=-jnp.inf), scores)
    return state, Metrics(
        generation=state.num_steps,
        judging=judging,
        fitness_best=most.fitness,
        fitness_mean=mean.fitness,
        accuracy_best=most.accuracy,
        accuracy_mean=mean.accuracy,
        accuracy_worst=least.accuracy,
        similarity_loss_best=least.similarity_loss,
        similarity_loss_mean=mean.similarity_loss,
        similarity_loss_worst=most.similarity_loss,
        relative_size_least=least.relative_size,
        relative_size_mean=mean.relative_size,
        relative_size_most=most.relative_size,
        num_failed=(~valid).sum(),
    )


def result(config: Config, state: State, params: Params, data: Data) -> Compressed:
    """The best member of the last population."""
    del params, data
    fitness = final_scores(config, state).fitness
    fitness = jnp.where(jnp.isfinite(fitness), fitness, -jnp.inf)
    best, population = fitness.argmax(), state.population
    network = compression.member(population, best)
    sizes, units, num_mutations = jax.tree.map(
        lambda leaf: leaf[best], (population.sizes, population.units, population.num_mutations)
    )
    return Compressed(network, sizes, units, fitness[best], best, num_mutations)


def finished(config: Config, state: State) -> Array:
    """Whether all steps are done."""
    return state.num_steps >= num_steps(config, len(state.order))


def build(config: Config) -> Algorithm[State, Params, Data, Metrics, Compressed]:
    """The algorithm for any parent and images: their shapes are those of the data."""
    start, advance = partial(init, config), partial(step, config)
    return Algorithm(start, advance, partial(result, config), partial(finished, config))


def final_scores(config: Config, state: State) -> Scores:
    """Scores by which the best is chosen: means over the final evaluation, or the latest ones."""
    number = state.num_steps - 1 - config.num_generations

    def final(total: Array, latest: Array):
        return jnp.where(number > 0, total / jnp.maximum(number, 1), latest)

    return jax.tree.map(final, state.judged, state.scores)
