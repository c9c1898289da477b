"""The fitness functions of a single solution, as evosax problems.

Any evosax algorithm searches them through evosax's protocol: `problem.init`, `problem.sample`,
`problem.eval`; fitness is lower-is-better there. Data are in the problem's state, never captured.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from evosax.problems import Problem
from flax import linen as nn, struct

from evojax_suite.data.transforms import normalize
from evojax_suite.systems import cest, ecomp, ga_distillation
from evojax_suite.systems.cest import subsets
from evojax_suite.systems.cest.subsets import Groups
from evojax_suite.systems.ecomp import compression, feed_forward, graph as graphs, mask_search
from evojax_suite.systems.ecomp.feed_forward import Network
from evojax_suite.training import judge_each, map_members
from evojax_suite.types import Array, Dataset, PRNGKey, PyTree


@struct.dataclass
class State:
    """The state of a problem between two evaluations."""

    counter: Array  # () int32: evaluations of a population so far
    data: Any


class _WithData(Problem, ABC):
    """evosax's protocol over a pure function `losses(key, solutions, counter, data)`."""

    data: Any

    def init(self, key: Array) -> State:  # pyright: ignore[reportIncompatibleVariableOverride]
        """The first state; `key` is not used."""
        del key
        return State(jnp.int32(0), self.data)

    @partial(jax.jit, static_argnames=("self",))
    def eval(
        self, key: Array, solutions: PyTree, state: State
    ) -> tuple[Array, State, dict[str, Any]]:
        """Fitness (P,), lower is better, NaN where an evaluation failed; the next state; an empty
        dictionary."""
        fitness = self.losses(key, solutions, state.counter, state.data)
        return fitness, replace(state, counter=state.counter + 1), {}

    @abstractmethod
    def losses(self, key: Array, solutions: PyTree, counter: Array, data: Any) -> Array:
        """The losses (P,) float32 of solutions with leading axis P: lower is better, NaN where an
        evaluation failed. counter: evaluations before this one."""


class DistillationProblem(_WithData):
    """Dataset distillation (Sato et al. 2026): a solution (D,) is the synthetic images, flat and
    normalised, and their labels where they evolve; fitness is minus that of `ga_distillation`.

    A solution has D = num_classes * images_per_class * H * W * C numbers; `sample` gives real
    images. Raises ValueError where the dataset is too small for the configuration.
    """

    def __init__(self, dataset: Dataset, config: ga_distillation.Config | None = None):
        self.config = config or ga_distillation.Config()
        ga_distillation.check(self.config, dataset)
        self.num_classes, self.image_shape = dataset.num_classes, dataset.image_shape
        ga_distillation.own_score(self.config, self.num_classes)
        if ga_distillation.own_judge(self.config) is not None:
            raise ValueError(
                f"evosax traces a problem, and a function of images is not, got "
                f"{self.config.fitness!r}"
            )
        self.data = ga_distillation.make_data(dataset)

    def sample(self, key: Array) -> Array:  # pyright: ignore[reportIncompatibleVariableOverride]
        """A solution (D,) of real training images."""
        about = self.config, self.num_classes, self.data
        return ga_distillation.random_individuals(key, *about, 1)[0]

    def losses(self, key: PRNGKey, solutions: PyTree, counter: Array, data: PyTree):
        """Minus the fitness (P,) of networks trained on the solutions (P, D), in [-1, 0] or, as a
        cross-entropy, from 0."""
        del counter
        about = self.config, self.num_classes, self.image_shape
        return -ga_distillation.score_population(key, *about, solutions, data).fitness

    def decode(self, solution: Array) -> ga_distillation.Individual:
        """The images (n, H, W, C) and labels (n, num_classes) of a solution (D,)."""
        about = self.config, self.num_classes, self.image_shape
        return ga_distillation.decode(*about, solution, self.data)


def _check_sizes(name: str, sizes: tuple[int, ...], whole: tuple[int, ...]) -> None:
    """Raise ValueError where `sizes` are not numbers of units in 1..the parent's."""
    fits = (1 <= units <= most for units, most in zip(sizes, whole, strict=False))
    if len(sizes) != len(whole) or not all(fits):
        raise ValueError(f"{name} must be {len(whole)} numbers in 1..{whole}, got {sizes}")


class CompressionProblem(_WithData):
    """Compression of a trained network to a fixed shape (van den Beemt et al. 2021).

    A solution is a `Network` with `hidden_units` units in its hidden layers; fitness is minus that
    of `ecomp` on a batch of images, the next one at each evaluation, in a cycle.
    """

    def __init__(
        self,
        parent: Network,
        images: np.ndarray,
        labels: np.ndarray,
        hidden_units: tuple[int, ...],
        config: ecomp.Config | None = None,
        params: ecomp.Params | None = None,
        pooling: feed_forward.Pooling = "average",
        deviation: float = 0.01,
        mean: np.ndarray | None = None,
        std: np.ndarray | None = None,
    ):
        """images: (N, H, W, C), uint8 in 0..255 or float in [0, 1], N at least the configuration's
        batch size. labels: (N,) int in 0..K-1. pooling: after each convolution of the parent.
        deviation: of the relative change of a weight in `sample`. mean, std: (C,) by which the
        parent's inputs are normalised, by default 0 and 1. Raises ValueError where `hidden_units`
        is not in 1..the parent's."""
        self.config, self.params = config or ecomp.Config(), params or ecomp.Params()
        whole = feed_forward.hidden_sizes(parent)
        _check_sizes("hidden_units", hidden_units, whole)
        size = self.config.batch_size
        if len(images) < size:
            raise ValueError(f"images must be at least batch_size {size}, got {len(images)}")
        self.hidden_units, self.deviation = hidden_units, deviation
        self.data = ecomp.make_data(parent, images, labels, mean, std, pooling)

    def sample(self, key: Array) -> Network:  # pyright: ignore[reportIncompatibleVariableOverride]
        """The parent with only the units of the largest L1 norm of incoming weights, each weight
        and bias multiplied by 1 + deviation * a normal deviate."""
        parent = self.data.parent
        norms = [compression.incoming_norms(layer.weight) for layer in parent[:-1]]
        orders = [jnp.argsort(-each) for each in norms]
        kept = [jnp.sort(o[:n]) for o, n in zip(orders, self.hidden_units, strict=True)]
        pruned = compression.part(parent, [slice(None), *kept, slice(None)])

        def changed(leaf: Array, key: PRNGKey):
            return leaf * (1 + self.deviation * jax.random.normal(key, leaf.shape))

        structure = jax.tree.structure(pruned)
        keys = jax.tree.unflatten(structure, jax.random.split(key, structure.num_leaves))
        return jax.tree.map(changed, pruned, keys)

    def losses(self, key: PRNGKey, solutions: PyTree, counter: Array, data: PyTree):
        """Minus the fitness (P,) of networks with leading axis P on this evaluation's batch."""
        del key
        size = self.config.batch_size
        start = (counter % (len(data.labels) // size)) * size
        images, labels = (
            jax.lax.dynamic_slice_in_dim(array, start, size) for array in (data.images, data.labels)
        )
        *hidden, _ = feed_forward.forward(data.parent, images, data.pooling)
        targets = ecomp.targets_of(self.config, self.params, hidden)

        def member(network: Network):
            outputs = feed_forward.forward(network, images, data.pooling)
            return ecomp.relations_and_accuracy(self.config, outputs, labels)

        in_flight = 1 if jax.default_backend() == "cpu" else 64
        relations, accuracy = map_members(member, (solutions,), in_flight)
        units = jnp.asarray(self.hidden_units)
        sizes = jnp.broadcast_to(units, (len(accuracy), len(units)))
        losses = ecomp.similarity_losses(self.config, self.params, targets, relations, sizes)
        relative = sum(self.hidden_units) / sum(feed_forward.hidden_sizes(data.parent))
        return -self.params.fitness(accuracy, losses, relative)


class PruningProblem(_WithData):
    """The units of a trained network to keep, of fixed numbers, with the weights that follow in
    closed form (`ecomp.refit`).

    A solution (D,) is a score for each unit of each group, the inputs first; those of the highest
    scores stay. Fitness is the error of `ecomp.RefitConfig`.
    """

    def __init__(
        self,
        parent: Network,
        images: np.ndarray,
        labels: np.ndarray,
        sizes: tuple[int, ...],
        config: ecomp.RefitConfig | None = None,
        params: ecomp.RefitParams | None = None,
        pooling: feed_forward.Pooling = "average",
        mean: np.ndarray | None = None,
        std: np.ndarray | None = None,
    ):
        """images, labels, pooling, mean, std: as for `CompressionProblem`, in random order. sizes:
        inputs (channels, where the parent is convolutional) and hidden units to keep. Raises
        ValueError where they are not in 1..the parent's."""
        self.config, self.params = config or ecomp.RefitConfig(), params or ecomp.RefitParams()
        mask_search.check(self.params, len(labels))
        graph = graphs.from_network(parent, pooling)
        whole = graphs.group_sizes(graph)
        _check_sizes("sizes", sizes, whole)
        self.sizes, self.whole = sizes, whole
        inputs = ecomp.make_data(parent, images, labels, mean, std, pooling).images
        targets = jax.nn.one_hot(labels, len(graph[-1].bias))
        about = self.config, self.params, graph, inputs, targets, images.shape[1:]
        self.data = mask_search.make_data(jax.random.key(0), *about)

    def sample(self, key: Array) -> Array:  # pyright: ignore[reportIncompatibleVariableOverride]
        """Uniform scores (D,)."""
        return jax.random.uniform(key, (sum(self.whole),))

    def losses(self, key: PRNGKey, solutions: Array, counter: Array, data: mask_search.Data):
        """The errors (P,) of the networks that scores (P, D) stand for."""
        del key, counter
        masks = jax.vmap(self.decode)(solutions)
        return mask_search.errors_of(self.config, self.params, data, masks)

    def decode(self, solution: Array) -> tuple[Array, ...]:
        """The mask of each group that a solution (D,) stands for."""
        scores = jnp.split(solution, np.cumsum(self.whole)[:-1])
        return tuple(map(mask_search.highest, scores, self.sizes))


@struct.dataclass
class FrozenPredator:
    """The data of `SubsetProblem`: the difficulty of each example, and the classes to draw from."""

    difficulty: Array  # (N,)
    groups: Groups


class SubsetProblem(_WithData):
    """The subset of examples that is hardest for a trained network (Ryan et al. 2024): CEST's prey
    against a predator that does not learn.

    A solution (N,) ranks the training examples: the subset is the highest of all, or of each class
    where it is balanced, so that a continuous search can move through subsets. Fitness is minus the
    mean loss, or error rate, of the subset; the optimum is known: rank by `difficulty`.
    """

    def __init__(
        self,
        network: nn.Module,
        variables: PyTree,
        dataset: Dataset,
        config: cest.Config | None = None,
    ):
        """network, variables: the predator, of flax. Raises ValueError where a class is smaller
        than its share of the subset."""
        config = config or cest.Config()
        train, size = dataset.train, cest.subset_size(config, len(dataset.train))
        balanced = config.balanced and config.selection != "full"
        groups = subsets.make_groups(train.labels, size, dataset.num_classes, balanced)
        images = jnp.asarray(normalize(train.images, dataset.mean, dataset.std))
        batch_size = config.engine.resolved_evaluation_batch_size(dataset.image_shape)
        each = judge_each(network, variables, images, jnp.asarray(train.labels), batch_size)
        by_loss = config.difficulty == "loss"
        difficulty = each.losses if by_loss else (~each.correct).astype(jnp.float32)
        self.data = FrozenPredator(difficulty, groups)

    def sample(self, key: Array) -> Array:  # pyright: ignore[reportIncompatibleVariableOverride]
        """Uniform ranks (N,): a random subset."""
        return jax.random.uniform(key, self.data.difficulty.shape)

    def losses(self, key: PRNGKey, solutions: PyTree, counter: Array, data: PyTree):
        """Minus the mean difficulty (P,) of the subsets that the solutions (P, N) stand for."""
        del key, counter
        chosen = jax.vmap(lambda solution: subsets.ranked(solution, data.groups))(solutions)
        return -cest.prey_fitness(chosen, data.difficulty)

    def decode(self, solution: Array) -> Array:
        """The positions (m,) of the subset that a solution (N,) stands for."""
        return subsets.ranked(solution, self.data.groups)
