"""The fitness functions that are functions of one solution, as evosax problems.

Any evosax algorithm searches them by evosax's own protocol: `problem.init`, `problem.sample`,
`problem.eval`; fitness is lower-is-better there. Data are in the problem's state, never captured.
"""

from __future__ import annotations

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
from evojax_suite.systems.ecomp import feed_forward
from evojax_suite.systems.ecomp.feed_forward import Network
from evojax_suite.training import judge_each, map_members
from evojax_suite.types import Array, Dataset, PyTree


@struct.dataclass
class State:
    """What `eval` needs beside the solutions."""

    counter: Array  # () int32: evaluations of a population so far
    data: Any


class _WithData(Problem):
    """evosax's protocol over a pure function `losses(key, solutions, counter, data)`."""

    data: Any

    def init(self, key: Array) -> State:  # pyright: ignore[reportIncompatibleVariableOverride]
        """The first state; `key` is not used."""
        del key
        return State(jnp.int32(0), self.data)

    @partial(jax.jit, static_argnames=("self",))
    def eval(self, key: Array, solutions: PyTree, state: State) -> tuple[Array, State, dict]:
        """Fitness (P,), lower is better, NaN where an evaluation failed; the next state; nothing
        else."""
        fitness = self.losses(key, solutions, state.counter, state.data)
        return fitness, replace(state, counter=state.counter + 1), {}

    def losses(self, key: Array, solutions: PyTree, counter: Array, data: Any) -> Array:
        """(P,) float32 of solutions with leading axis P: lower is better, NaN where one failed.
        counter: evaluations before this one."""
        raise NotImplementedError


class DistillationProblem(_WithData):
    """Distil a dataset (paper 002): a solution (D,) is the synthetic images, flat and normalised,
    and their labels where they evolve; fitness is minus that of `ga_distillation`.

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
        """(D,) of real training images."""
        return ga_distillation.random_individuals(key, self.config, self.num_classes, self.data, 1)[
            0
        ]

    def losses(self, key, solutions, counter, data):
        """(P,) of solutions (P, D): minus the fitness of networks trained on them, in [-1, 0] or,
        as a cross-entropy, from 0."""
        del counter
        return -ga_distillation.score_population(
            key, self.config, self.num_classes, self.image_shape, solutions, data
        ).fitness

    def decode(self, solution: Array) -> ga_distillation.Individual:
        """The images (n, H, W, C) and labels (n, num_classes) that a solution (D,) is."""
        return ga_distillation.decode(
            self.config, self.num_classes, self.image_shape, solution, self.data
        )


class CompressionProblem(_WithData):
    """Weights of a smaller copy of a trained network (paper 003) at a fixed shape.

    A solution is a `Network` with `hidden_units` units in its hidden layers; fitness is minus that
    of `ecomp`, on a batch of images: another one each time, in their order, round and round.
    `sample` gives the parent without its units of least importance, a little changed.
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
        batch size; labels: (N,) int in 0..K-1. mean, std: (C,) that the parent takes out of images
        in [0, 1], nothing by default. deviation: of the relative change of a weight in `sample`.
        Raises ValueError where `hidden_units` is not in 1..the parent's."""
        self.config, self.params = config or ecomp.Config(), params or ecomp.Params()
        whole = feed_forward.hidden_sizes(parent)
        fits = len(hidden_units) == len(whole) and all(
            1 <= units <= most for units, most in zip(hidden_units, whole, strict=True)
        )
        if not fits:
            raise ValueError(
                f"hidden_units must be {len(whole)} numbers in 1..{whole}, got {hidden_units}"
            )
        if len(images) < self.config.batch_size:
            raise ValueError(
                f"images must be at least batch_size {self.config.batch_size}, got {len(images)}"
            )
        self.hidden_units, self.deviation = hidden_units, deviation
        self.data = ecomp.make_data(parent, images, labels, mean, std, pooling)

    def sample(self, key: Array) -> Network:  # pyright: ignore[reportIncompatibleVariableOverride]
        """The pruned parent, each weight multiplied by 1 + deviation * a normal deviate."""
        pruned = _pruned(self.data.parent, self.hidden_units)
        leaves, structure = jax.tree.flatten(pruned)
        keys = jax.random.split(key, len(leaves))
        changed = [
            leaf * (1 + self.deviation * jax.random.normal(k, leaf.shape))
            for k, leaf in zip(keys, leaves, strict=True)
        ]
        return jax.tree.unflatten(structure, changed)

    def losses(self, key, solutions, counter, data):
        """(P,) of networks with leading axis P: minus their fitness on the batch of this
        evaluation."""
        del key
        size = self.config.batch_size
        start = (counter % (len(data.labels) // size)) * size
        images, labels = (
            jax.lax.dynamic_slice_in_dim(array, start, size) for array in (data.images, data.labels)
        )
        *hidden, _ = feed_forward.forward(data.parent, images, data.pooling)
        targets = ecomp.targets_of(self.config, self.params, hidden)

        def member(network):
            *own, logits = feed_forward.forward(network, images, data.pooling)
            accuracy = (logits.argmax(-1) == labels).mean()
            accuracy = jnp.where(jnp.isfinite(logits).all(), accuracy, jnp.nan)
            return [ecomp.relation(self.config, layer) for layer in own], accuracy

        in_flight = 1 if jax.default_backend() == "cpu" else 64
        relations, accuracy = map_members(member, (solutions,), in_flight)
        sizes = jnp.broadcast_to(
            jnp.asarray(self.hidden_units), (len(accuracy), len(self.hidden_units))
        )
        losses = ecomp.similarity_losses(self.config, self.params, targets, relations, sizes)
        relative = sum(self.hidden_units) / sum(feed_forward.hidden_sizes(data.parent))
        return -(
            self.params.accuracy_weight * accuracy
            - self.params.similarity_weight * losses
            + self.params.compression_weight * (1 - relative)
        )


def _pruned(parent: Network, hidden_units: tuple[int, ...]) -> Network:
    """`parent` with only the units of the largest L1 norm of incoming weights, in their order."""
    layers, kept = list(parent), None
    for index, layer in enumerate(parent):
        weight, bias = layer.weight, layer.bias
        if kept is not None:
            weight = weight[:, kept]
        if index < len(hidden_units):
            norms = jnp.abs(layer.weight).reshape(len(layer.weight), -1).sum(1)
            kept = jnp.sort(jnp.argsort(-norms)[: hidden_units[index]])
            weight, bias = weight[kept], bias[kept]
        layers[index] = layer._replace(weight=weight, bias=bias)
    return tuple(layers)


@struct.dataclass
class FrozenPredator:
    """What `SubsetProblem` needs: how hard each example is, and which may stand where."""

    difficulty: Array  # (N,)
    groups: Groups


class SubsetProblem(_WithData):
    """The subset of examples that is hardest for a trained network (paper 001): CEST's prey
    against a predator that does not learn.

    A solution (N,) ranks the training examples: the subset is the highest of all, or of each class
    where it is balanced, so that a continuous search can move through subsets. Fitness is minus
    the mean loss, or error rate, of the subset; the least there is, is known: rank by
    `difficulty`.
    """

    def __init__(
        self,
        network: nn.Module,
        variables: PyTree,
        dataset: Dataset,
        config: cest.Config | None = None,
    ):
        """network, variables: flax's, the predator. Raises ValueError where a class is smaller than
        its share of the subset."""
        config = config or cest.Config()
        train = dataset.train
        size = cest.subset_size(config, len(train))
        groups = subsets.make_groups(
            train.labels, size, dataset.num_classes, config.balanced and config.selection != "full"
        )
        images = jnp.asarray(normalize(train.images, dataset.mean, dataset.std))
        batch_size = config.engine.resolved_evaluation_batch_size(dataset.image_shape)
        seen = judge_each(network, variables, images, jnp.asarray(train.labels), batch_size)
        by_loss = config.difficulty == "loss"
        difficulty = seen.losses if by_loss else (~seen.correct).astype(jnp.float32)
        self.data = FrozenPredator(difficulty, groups)

    def sample(self, key: Array) -> Array:  # pyright: ignore[reportIncompatibleVariableOverride]
        """(N,) uniform ranks: a random subset."""
        return jax.random.uniform(key, self.data.difficulty.shape)

    def losses(self, key, solutions, counter, data):
        """(P,) of solutions (P, N): minus the mean difficulty of the subsets that they are."""
        del key, counter
        chosen = jax.vmap(lambda solution: subsets.ranked(solution, data.groups))(solutions)
        return -cest.prey_fitness(chosen, data.difficulty)

    def decode(self, solution: Array) -> Array:
        """The subset (m,) of positions that a solution (N,) is."""
        return subsets.ranked(solution, self.data.groups)
