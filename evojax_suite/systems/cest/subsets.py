"""Subsets of a training set as arrays of indices: drawn, ranked, and evolved as prey.

A subset is an array of indices of examples. Each of its places belongs to a group of examples, all
or those of a class, and holds one of them, so that subsets of balanced classes stay balanced
whatever is drawn or exchanged (`Groups`).

Sources: Ryan et al. 2024, CEST, section III-A; the operators are those that DEAP defines
(`cxTwoPoint`, `mutUniformInt`), as the paper names DEAP and no operators.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jaxtyping import Float, Int, Int32

from evojax_suite.operators.selection import class_shares
from evojax_suite.types import Array, PRNGKey, Scalar


@struct.dataclass
class Groups:
    """The examples that each place of a subset may hold."""

    members: Int32[Array, "groups most"]  # examples of each group, padded
    counts: Int32[Array, "groups"]
    group_of: Int32[Array, "examples"]
    places: Int32[Array, "places"]  # the group of each place of a subset


def make_groups(
    labels: Int[np.ndarray, "examples"], num_samples: int, num_classes: int, balanced: bool
) -> Groups:
    """Groups of subsets of `num_samples` places: a group for each class, whose share of the places
    is equal, where `balanced`, else one group of all examples. Raises ValueError where there are
    more places than examples, or none, or a class has fewer examples than its share."""
    if not 1 <= num_samples <= len(labels):
        raise ValueError(f"a subset must have 1..{len(labels)} examples, got {num_samples}")
    group_of = labels if balanced else np.zeros(len(labels), np.int32)
    shares = class_shares(num_samples, num_classes) if balanced else [num_samples]
    counts = np.bincount(group_of, minlength=len(shares))
    for group, (share, count) in enumerate(zip(shares, counts, strict=True)):
        if share > count:
            message = f"class {group} has {count} examples, its share of a subset is {share}"
            raise ValueError(message)
    members = np.zeros((len(shares), counts.max()), np.int32)
    for group, count in enumerate(counts):
        members[group, :count] = np.flatnonzero(group_of == group)
    return Groups(
        members=jnp.asarray(members),
        counts=jnp.asarray(counts, jnp.int32),
        group_of=jnp.asarray(group_of, jnp.int32),
        places=jnp.asarray(np.repeat(np.arange(len(shares)), shares), jnp.int32),
    )


def drawn(key: PRNGKey, groups: Groups, num_subsets: int) -> Int[Array, "{num_subsets} places"]:
    """Subsets of independent uniform draws; an example may occur twice."""
    places = groups.places
    draw = jax.random.randint(key, (num_subsets, len(places)), 0, groups.counts[places])
    return groups.members[places, draw]


def ranked(scores: Float[Array, "examples"], groups: Groups) -> Int[Array, "places"]:
    """The subset of the highest scores of each group; ties go to the lower index."""
    order = jnp.lexsort((-scores, groups.group_of))  # by group, highest first
    starts = jnp.cumsum(groups.counts) - groups.counts
    places = groups.places
    within = jnp.arange(len(places)) - jnp.searchsorted(places, places)
    return order[starts[places] + within].astype(jnp.int32)


def sampled(
    key: PRNGKey, weights: Float[Array, "examples"], groups: Groups
) -> Int[Array, "places"]:
    """A subset drawn without replacement, each example with probability proportional to its weight
    (>= 0) among those of its group that are left; examples of weight 0 come last."""
    noise = jax.random.gumbel(key, weights.shape)
    logits = jnp.where(weights > 0, jnp.log(jnp.where(weights > 0, weights, 1.0)), -1e9)
    return ranked(logits + noise, groups)


def random_subset(key: PRNGKey, groups: Groups) -> Int[Array, "places"]:
    """A uniformly drawn subset without repetition."""
    return ranked(jax.random.uniform(key, groups.group_of.shape), groups)


def two_point_crossover(
    key: PRNGKey,
    first: Int[Array, "pairs places"],
    second: Int[Array, "pairs places"],
    rate: float | Scalar,
) -> tuple[Int[Array, "pairs places"], Int[Array, "pairs places"]]:
    """Children of pairs of subsets: with probability `rate` a pair exchanges the places between two
    cut points, which are drawn uniformly as in DEAP."""
    pairs, size = first.shape
    key_rate, key_low, key_high = jax.random.split(key, 3)
    a = jax.random.randint(key_low, (pairs, 1), 1, size + 1)
    b = jax.random.randint(key_high, (pairs, 1), 1, max(size, 2))
    low, high = jnp.where(b >= a, a, b), jnp.where(b >= a, b + 1, a)
    place = jnp.arange(size)
    swapped = (place >= low) & (place < high)
    swapped &= jax.random.uniform(key_rate, (pairs, 1)) < rate
    return jnp.where(swapped, second, first), jnp.where(swapped, first, second)


def uniform_mutation(
    key: PRNGKey,
    subsets: Int[Array, "population places"],
    groups: Groups,
    rate: float | Scalar,
    gene_rate: float | Scalar,
) -> Int[Array, "population places"]:
    """Mutated subsets: with probability `rate` a subset mutates, and each of its places is then
    drawn anew with probability `gene_rate`."""
    key_who, key_where, key_what = jax.random.split(key, 3)
    who = jax.random.uniform(key_who, (len(subsets), 1)) < rate
    where = jax.random.uniform(key_where, subsets.shape) < gene_rate
    return jnp.where(who & where, drawn(key_what, groups, len(subsets)), subsets)


def repaired(key: PRNGKey, subset: Int[Array, "places"], groups: Groups) -> Int[Array, "places"]:
    """The subset with each repetition replaced by a uniformly drawn example of the same group that
    the subset does not hold."""
    size = subset.shape[0]
    first = jnp.full(groups.group_of.shape, size, jnp.int32)
    first = first.at[subset].min(jnp.arange(size, dtype=jnp.int32))
    repeated = first[subset] != jnp.arange(size)
    unused = jnp.where(first == size, jax.random.uniform(key, first.shape), -1.0)
    fresh = ranked(unused, groups)  # of each group as many as it has places, unused first
    starts = jnp.searchsorted(groups.places, groups.places)
    before = jnp.cumsum(repeated) - repeated
    rank = before - before[starts]  # the number of repetitions of its group before it
    return jnp.where(repeated, fresh[starts + rank], subset)
