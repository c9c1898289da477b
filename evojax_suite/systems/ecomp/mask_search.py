"""The search for the units to keep, with the network that follows from them in closed form inside
the fitness (`refit.py`): the version of EComp that is recommended.

An individual is a mask of the units of each group of a parent (`graph.groups`), of any number of
units. Where ranks are searched for, too, the parent is `graph.decomposed`: the principal components
of each layer's output are a group like others, and to lose some of them lowers its rank.

NSGA-II (Deb et al. 2002) looks for the front of error and size: binary tournaments by front and
crowding, both objectives in logarithms; parents and children compete. One operator is crossover and
mutation of subsets: a child keeps, of each group, the units of the highest score

    vote * (the number of its parents that have the unit) + priority + noise * Gumbel,

so that units of both parents stay first, those of one compete, and others come in as the order of
backward elimination and chance will have it. Their number is between its parents', on a logarithmic
scale, and mutates by a log-normal factor.

Error is measured on other images than those of the fits. The paper's evolution (`algorithm.py`)
inherits weights instead and evaluates the parent's on fewer units.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jaxtyping import Bool, Float, Int, Int32

from evojax_suite.operators import crowding_distances, non_dominated_ranks, tournament
from evojax_suite.systems.ecomp import graph as graphs, latency, refit
from evojax_suite.systems.ecomp.config import RefitConfig, RefitParams
from evojax_suite.systems.ecomp.graph import Graph
from evojax_suite.systems.ecomp.refit import Fit, Kept
from evojax_suite.types import (
    Algorithm,
    Array,
    Generation,
    IntScalar,
    PRNGKey,
    Probabilities,
    PyTree,
    Scalar,
    StepKeys,
)

Masks: TypeAlias = tuple[Bool[Array, "members _units"], ...]

_WIDTHS = (1 / 4, 3 / 16), (1 / 2, 3 / 16), (1 / 2, 3 / 8), (1, 3 / 8), (1, 1)
"""Shares of the inputs and of the other groups for which there are programs on the CPU, where
members are computed one after the other, each in the first that holds it."""
_WIDTHS_OF_MAPS = (1, 3 / 8), (1, 1 / 2), (1, 5 / 8), (1, 3 / 4), (1, 1)
"""The same for parents that begin with convolutions."""
_RANKS = 1 / 2, 1
"""Shares of the components of layers that are two, for each of those."""
_IMAGES_AT_ONCE = 500  # of maps
_TOGETHER = 16
"""Members that are computed together elsewhere."""
_LEAST_ERROR = 1e-6  # below it errors count as equal


@struct.dataclass
class Data:
    """The parent, the images of the fits and those on which networks are compared."""

    parent: Graph  # `graph.decomposed` where ranks are searched for
    fit: Fit
    priorities: tuple[Float[Array, "_units"], ...]  # `refit.priorities`
    inputs: Float[Array, "..."]  # `refit.arranged`
    targets: Probabilities  # of the labels, one-hot
    logits: Float[Array, "images classes"]  # the parent's
    image_shape: tuple[int, int, int] = struct.field(pytree_node=False)
    tables: tuple[latency.Table, ...] = ()  # where latency is the size


@struct.dataclass
class State:
    """The state of the search between two generations."""

    masks: Masks
    objectives: Float[Array, "members 2"]  # logarithms of error and size; infinite at the start
    children: Masks  # that the next generation evaluates, at the start the initial individuals
    num_generations: Int32[Array, ""]  # done


class Metrics(NamedTuple):
    """Statistics of the population after a generation, parents and children selected."""

    generation: IntScalar
    log_error: Scalar  # the logarithm of the error, mean along the front, over that of the size
    error_least: Scalar
    error_mean: Scalar
    size_least: Scalar
    size_mean: Scalar
    front_size: IntScalar
    num_failed: IntScalar  # children whose error was NaN or infinite


def num_fitted(config: RefitConfig, num_images: int) -> int:
    """How many of the images of evolution the fits of the search take."""
    return min(config.num_fit_images, 3 * num_images // 5)


def check(params: RefitParams, num_images: int) -> None:
    """Raise ValueError where images and settings do not fit each other."""
    if num_images < 2:
        raise ValueError(f"the search needs at least 2 images, got {num_images}")
    params.check()


def make_data(
    key: PRNGKey,
    config: RefitConfig,
    params: RefitParams,
    parent: Graph,
    inputs: Float[Array, "images ..."],
    targets: Probabilities,
    image_shape: tuple[int, int, int],
    tables: tuple[latency.Table, ...] = (),
) -> Data:
    """The data of a search. inputs, targets: the images of evolution as the parent takes them, in
    random order, and their labels, one-hot. tables: `latency.measured`, where that is the size."""
    count = num_fitted(config, len(inputs))
    others = slice(count, count + config.num_judged_images)
    fit = refit.make_fit(key, parent, inputs[:count], targets[:count], config.num_positions)
    priorities = jax.jit(refit.priorities)(parent, fit, params.ridge)
    judged = inputs[others]
    logits = jax.jit(logits_of)(parent, judged)
    arranged = refit.arranged(parent, judged)
    judged_by = arranged, targets[others], logits
    return Data(parent, fit, priorities, *judged_by, image_shape, tables)


def highest(scores: Float[Array, "units"], count: int | Scalar | IntScalar) -> Bool[Array, "units"]:
    """The mask of the `count` highest scores."""
    return jnp.argsort(jnp.argsort(-scores)) < count


def kept_units(mask: Bool[Array, "units"], width: int) -> Kept:
    """The units of a mask, in their order, padded to `width`, no smaller than their number."""
    places = jnp.argsort(~mask, stable=True)[:width].astype(jnp.int32)
    return Kept(places, mask[places])


def relative_size(kind: str, data: Data, sizes: Sequence[Any]) -> Any:
    """The size of networks over the parent's. kind: as of `RefitConfig.size`; sizes: the units of
    each group, numbers or arrays of members."""

    def size_of(sizes: Sequence[Any]) -> Any:
        match kind:
            case "parameters":
                return graphs.num_parameters(data.parent, sizes)
            case "multiplications":
                return graphs.num_multiplications(data.parent, sizes, data.image_shape)
            case _:
                return latency.seconds_of(data.parent, data.tables, sizes)

    return size_of(sizes) / size_of(graphs.group_sizes(data.parent))


def error_of(
    config: RefitConfig,
    logits: Float[Array, "images classes"],
    targets: Probabilities,
    parents: Float[Array, "images classes"],
) -> Scalar:
    """The error of a network, lower is better; parents: the parent's logits."""
    log_probabilities = jax.nn.log_softmax(logits)
    match config.error:
        case "cross_entropy":
            return -(targets * log_probabilities).sum(-1).mean()
        case "divergence":
            wanted = jax.nn.log_softmax(parents)
            return (jnp.exp(wanted) * (wanted - log_probabilities)).sum(-1).mean()
        case "error_rate":
            right = logits.argmax(-1) == targets.argmax(-1)
            return jnp.where(jnp.isfinite(logits).all(), 1 - right.mean(), jnp.nan)


def widths_of(parent: Graph) -> list[list[int]]:
    """The padded sizes of the groups for which there are programs, the narrowest first; the last
    are the parent's own."""
    whole = graphs.group_sizes(parent)
    if jax.default_backend() != "cpu":
        return [list(whole)]
    between = graphs.groups_between(parent)
    return [
        [
            math.ceil(size * (inputs if group == 0 else rank if group in between else others))
            for group, size in enumerate(whole)
        ]
        for inputs, others in (_WIDTHS_OF_MAPS if parent[0].is_convolution else _WIDTHS)
        for rank in (_RANKS if between else (1,))
    ]


def narrowest(parent: Graph, mask: Sequence[Bool[np.ndarray, "_units"]]) -> list[Kept]:
    """The units that a mask of each group keeps, in the narrowest of the padded sizes."""
    sizes = [int(each.sum()) for each in mask]
    widths = next(each for each in widths_of(parent) if (np.array(sizes) <= each).all())
    kept = []
    for each, width in zip(mask, widths, strict=True):
        places = np.argsort(~each, kind="stable")[:width].astype(np.int32)
        kept.append(Kept(jnp.asarray(places), jnp.asarray(each[places])))
    return kept


def map_masks(function: Callable[[list[Kept]], PyTree], parent: Graph, masks: Masks) -> PyTree:
    """`function(kept)`, `kept` a `Kept` of each group, of each member: together, or one after the
    other in the narrowest of several programs that holds it."""
    choices = widths_of(parent)

    def member(widths: list[int]) -> Callable[[Masks], PyTree]:
        return lambda masks: function([*map(kept_units, masks, widths)])

    if len(choices) == 1:
        return jax.lax.map(member(choices[0]), masks, batch_size=_TOGETHER)
    sizes = jnp.stack([mask.sum(1) for mask in masks], 1)
    first = (sizes[:, None] <= jnp.array(choices)).all(-1).argmax(-1)
    branches = [member(widths) for widths in choices]
    return jax.lax.map(lambda each: jax.lax.switch(each[0], branches, each[1]), (first, masks))


def errors_of(
    config: RefitConfig, params: RefitParams, data: Data, masks: Masks
) -> Float[Array, "members"]:
    """The error of each member."""
    rounds = 0, config.label_rounds

    def error(kept: list[Kept]):
        network = refit.refit(data.parent, kept, data.fit, params.ridge, *rounds)
        logits = logits_of(network, refit.taken(data.inputs, kept[0]))
        return error_of(config, logits, data.targets, data.logits)

    return map_masks(error, data.parent, masks)


def preferences(config: RefitConfig, objectives: Float[Array, "members 2"]) -> Array:
    """NSGA-II's order: by front, then by crowding; higher is better, -inf where there is no error.
    Members that are too large come after all others, the smaller first."""
    failed, size = ~jnp.isfinite(objectives).all(1), objectives[:, 1]
    too_large = size > jnp.log(config.largest)
    valid = jnp.where((failed | too_large)[:, None], jnp.nan, objectives)
    ranks = non_dominated_ranks(valid)
    crowding = crowding_distances(valid, ranks)
    within = jnp.where(jnp.isfinite(crowding), crowding / (1 + crowding), 1.0)
    preference = jnp.where(too_large, -1e6 - size, within - 2.0 * ranks)
    return jnp.where(failed, -jnp.inf, preference)


@dataclass(frozen=True)
class _Search:
    """The functions of `Algorithm` and `Generation` for one configuration."""

    config: RefitConfig

    def init(self, key: PRNGKey, params: RefitParams, data: Data) -> State:
        members = self.config.population_size
        key_share, key_groups = jax.random.split(key)
        # Parameters grow with the square of the units, roughly.
        low, high = (jnp.log(each) / 2 for each in (self.config.smallest, self.config.largest))
        shares = jax.random.uniform(key_share, (members, 1), minval=low, maxval=high)
        groups = len(data.priorities)
        spread = params.initial_span * jax.random.normal(key_groups, (members, groups))
        if between := graphs.groups_between(data.parent):
            # One half loses units, the other one ranks, alone or beside fewer units.
            key_units = jax.random.fold_in(key_share, 0)
            units = jax.random.uniform(key_units, (members, 1))
            both = jnp.arange(members)[:, None] % 2 == 1
            is_rank = jnp.array([group in between for group in range(groups)])
            part = jnp.where(both, jnp.where(is_rank, 2 - units, units), ~is_rank)
            shares, spread = shares * part, jnp.where(both | ~is_rank, spread, 0.0)
        shares = jnp.minimum(jnp.exp(shares + spread), 1.0)
        masks = tuple(
            jax.vmap(highest, (None, 0))(priority, jnp.maximum(jnp.round(share * len(priority)), 1))
            for priority, share in zip(data.priorities, shares.T, strict=True)
        )
        if not self.prunes_inputs(data):
            masks = (jnp.ones_like(masks[0]), *masks[1:])
        none = jnp.full((members, 2), jnp.inf, jnp.float32)
        return State(masks, none, masks, jnp.int32(0))

    def prunes_inputs(self, data: Data) -> bool:
        """Whether inputs are removed: those of a fully connected parent, if at all."""
        return self.config.prune_inputs and not data.parent[0].is_convolution

    @staticmethod
    def split_key(key: PRNGKey) -> StepKeys:
        return StepKeys(None, None, key)

    @staticmethod
    def ask(key: None, state: State, params: RefitParams, data: Data) -> Masks:
        """The initial individuals, then children."""
        del key, params, data
        return state.children

    def children_of(
        self, key: PRNGKey, masks: Masks, preference: Array, params: RefitParams, data: Data
    ) -> Masks:
        """Makes as many children as there are members; see the module."""
        members = self.config.population_size
        key_parents, key_groups = jax.random.split(key)
        pairs = tournament(key_parents, preference, 2 * members, 2).reshape(2, members)
        groups = []
        for index, (mask, priority) in enumerate(zip(masks, data.priorities, strict=True)):
            keys = jax.random.split(jax.random.fold_in(key_groups, index), 4)
            first, second = mask[pairs[0]], mask[pairs[1]]
            between = jax.random.uniform(keys[0], (members,))
            sizes = jnp.log(first.sum(1)), jnp.log(second.sum(1))
            mutates = jax.random.bernoulli(keys[1], 0.5, (members,))
            change = mutates * params.size_span * jax.random.normal(keys[2], (members,))
            size = jnp.exp(between * sizes[0] + (1 - between) * sizes[1] + change)
            size = jnp.clip(jnp.round(size), 1, len(priority))
            votes = first.astype(jnp.float32) + second
            gumbel = jax.random.gumbel(keys[3], mask.shape)
            scores = params.vote * votes + priority + params.noise * gumbel
            groups.append(jax.vmap(highest)(scores, size))
        if not self.prunes_inputs(data):
            groups[0] = masks[0]
        return tuple(groups)

    def evaluate(
        self,
        key: None,
        masks: Masks,
        params: RefitParams,
        data: Data,
        members: Int[Array, "some"],
    ) -> Float[Array, "some"]:
        """The errors of some members."""
        del key
        some = jax.tree.map(lambda mask: mask[members], masks)
        return errors_of(self.config, params, data, some)

    def tell(
        self,
        key: PRNGKey,
        state: State,
        masks: Masks,
        errors: Float[Array, "members"],
        params: RefitParams,
        data: Data,
    ) -> tuple[State, Metrics]:
        """Parents and children compete; those that stay have the next children."""
        sizes = [mask.sum(1).astype(jnp.float32) for mask in masks]  # products pass 2**31
        size = jnp.log(relative_size(self.config.size, data, sizes))
        failed = ~jnp.isfinite(errors)
        error = jnp.where(failed, jnp.inf, jnp.log(jnp.maximum(errors, _LEAST_ERROR)))
        objectives = jnp.concatenate([state.objectives, jnp.stack([error, size], 1)])
        preference = preferences(self.config, objectives)
        best = jnp.argsort(-preference, stable=True)[: self.config.population_size]
        joined = jax.tree.map(
            lambda old, new: jnp.concatenate([old, new])[best], state.masks, masks
        )
        objectives, generation = objectives[best], state.num_generations + 1
        children = self.children_of(key, joined, preference[best], params, data)
        front = preference[best] > -1  # the first front has preferences from 0
        shown = jnp.exp(objectives)
        metrics = Metrics(
            generation=generation,
            log_error=_mean_along(objectives, front, self.config),
            error_least=jnp.min(shown[:, 0], where=front, initial=jnp.inf),
            error_mean=jnp.mean(shown[:, 0], where=front),
            size_least=jnp.min(shown[:, 1], where=front, initial=jnp.inf),
            size_mean=jnp.mean(shown[:, 1], where=front),
            front_size=front.sum(),
            num_failed=failed.sum(),
        )
        return State(joined, objectives, children, generation), metrics

    def result(self, state: State, params: RefitParams, data: Data) -> State:
        """The state itself: its first front is the result."""
        del params, data
        return state

    def finished(self, state: State) -> Array:
        return state.num_generations >= self.config.num_generations


def _mean_along(objectives: Array, front: Bool[Array, "members"], config: RefitConfig) -> Scalar:
    """The mean logarithm of the error along the front, over the logarithm of size from `smallest`
    to `largest`, of the smaller networks at each size."""
    sizes = jnp.linspace(jnp.log(config.smallest), jnp.log(config.largest), 64)
    fits = front & (objectives[:, 1] <= sizes[:, None])
    most = jnp.max(objectives[:, 0], where=front, initial=-jnp.inf)
    return jnp.min(jnp.where(fits, objectives[:, 0], most), 1).mean()


def logits_of(network: Graph, inputs: Float[Array, "images ..."]) -> Float[Array, "images classes"]:
    """The logits of a network, on maps of some images at a time."""
    if inputs.ndim == 2:
        return graphs.forward(network, inputs)[0][-1]

    def one(image: Array):
        return graphs.forward(network, image[None])[0][-1][0]

    return jax.lax.map(one, inputs, batch_size=_IMAGES_AT_ONCE)


def build(config: RefitConfig) -> Algorithm[State, RefitParams, Data, Metrics, State]:
    """The search for any parent and images: their shapes are those of the data."""
    search = _Search(config)
    parts = search.split_key, search.ask, search.evaluate, search.tell
    generation = Generation(config.population_size, *parts)
    functions = search.init, generation.step, search.result, search.finished
    return Algorithm(*functions, generation=generation)


def front_of(config: RefitConfig, state: State) -> Int[np.ndarray, "front"]:
    """At most `front_size` members of the first front, the smallest first."""
    preference, sizes = preferences(config, state.objectives), np.asarray(state.objectives)[:, 1]
    members = np.flatnonzero(np.asarray(preference) > -1)
    members = members[np.unique(sizes[members], return_index=True)[1]]
    wanted = np.linspace(sizes[members[0]], sizes[members[-1]], config.front_size)
    nearest = np.abs(sizes[members] - wanted[:, None]).argmin(1)
    return members[np.unique(nearest)]


def fitted_network(
    config: RefitConfig,
    params: RefitParams,
    parent: Graph,
    fit: Fit,
    kept: Sequence[Kept],
    inputs: Float[Array, "..."],
) -> tuple[Graph, Int32[Array, "images"]]:
    """The final network between some units of each group, padded as they are, and the classes that
    it predicts. kept: as of `narrowest`; inputs: further images, `refit.arranged`."""
    rounds = config.relu_rounds, config.label_rounds
    network = refit.refit(parent, kept, fit, params.ridge, *rounds)
    logits = logits_of(network, refit.taken(inputs, kept[0]))
    return network, logits.argmax(-1).astype(jnp.int32)
