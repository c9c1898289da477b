"""Selection of survivors and parents, and of examples. Fitness is evosax's, lower is better, unless
a function says otherwise."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float, Int

from evojax_suite.types import Array, PRNGKey


def truncation(
    fitness: Float[Array, "population"], num_survivors: int
) -> Int[Array, "{num_survivors}"]:
    """Indices of the lowest fitness, best first; NaN counts as worst."""
    return jnp.argsort(jnp.where(jnp.isnan(fitness), jnp.inf, fitness))[:num_survivors]


def uniform_parents(
    key: PRNGKey, num_parents: int, num_pairs: int
) -> tuple[Int[Array, "{num_pairs}"], Int[Array, "{num_pairs}"]]:
    """Two arrays of indices, uniform over 0..num_parents-1, drawn with replacement."""
    pairs = jax.random.randint(key, (2, num_pairs), 0, num_parents)
    return pairs[0], pairs[1]


def tournament(
    key: PRNGKey, fitness: Float[Array, "population"], num_chosen: int, size: int
) -> Int[Array, "{num_chosen}"]:
    """Indices of the winners of tournaments, each the fittest of `size` members drawn with
    replacement, as DEAP's `selTournament`; higher fitness is better here."""
    rivals = jax.random.randint(key, (num_chosen, size), 0, fitness.shape[0])
    return jnp.take_along_axis(rivals, fitness[rivals].argmax(1)[:, None], 1)[:, 0]


def non_dominated_ranks(
    objectives: Float[Array, "population objectives"],
) -> Int[Array, "population"]:
    """The front of each member, 0 the best, in NSGA-II (Deb et al. 2002); lower values are better.

    A member that is no better than another in any objective and worse in one is in a later front.
    Rows that are not finite come after all that are.

    >>> non_dominated_ranks(jnp.array([[1, 4], [2, 2], [3, 3], [4, 1], [jnp.nan, 0]])).tolist()
    [0, 0, 1, 0, 2]
    """
    failed = ~jnp.isfinite(objectives).all(1)
    objectives = jnp.where(failed[:, None], jnp.inf, objectives)
    no_worse = (objectives[:, None] <= objectives[None]).all(-1)
    dominates = no_worse & (objectives[:, None] < objectives[None]).any(-1)

    def peel(carry: tuple[Array, Array]):
        front, ranks = carry
        left = ranks < 0
        dominated = (dominates & left[:, None]).any(0)
        return front + 1, jnp.where(left & ~dominated, front, ranks)

    start = jnp.int32(0), jnp.full(len(objectives), -1, jnp.int32)
    return jax.lax.while_loop(lambda carry: (carry[1] < 0).any(), peel, start)[1]


def crowding_distances(
    objectives: Float[Array, "population objectives"], ranks: Int[Array, "population"]
) -> Float[Array, "population"]:
    """The distance between the neighbours of each member in its front, infinite at the ends.

    It is the sum over the objectives of the gap between the next lower and the next higher value,
    each divided by the population's range (in NSGA-II the front's).
    """

    def gaps(values: Array):
        finite = jnp.isfinite(values)
        low = jnp.where(finite, values, jnp.inf).min()
        spread = jnp.where(finite, values, -jnp.inf).max() - low
        scaled = jnp.where(finite, values - low, 0.0) / jnp.where(spread > 0, spread, 1.0)
        order = jnp.lexsort((scaled, ranks))
        sorted_values, sorted_ranks = scaled[order], ranks[order]
        same = sorted_ranks[1:] == sorted_ranks[:-1]
        steps = jnp.where(same, sorted_values[1:] - sorted_values[:-1], jnp.inf)
        ends = jnp.array([jnp.inf])
        both = jnp.concatenate([ends, steps]) + jnp.concatenate([steps, ends])
        return jnp.zeros_like(both).at[order].set(both)

    return jax.vmap(gaps, in_axes=1)(objectives).sum(0)


def class_shares(num_samples: int, num_classes: int) -> tuple[int, ...]:
    """The number of samples of each class among `num_samples`: equal, the first classes one more.

    >>> class_shares(8, 3)
    (3, 3, 2)
    """
    share, more = divmod(num_samples, num_classes)
    return tuple(share + (label < more) for label in range(num_classes))


def check_shares(
    labels: Int[np.ndarray, "examples"], num_samples: int, num_classes: int, balanced: bool
) -> None:
    """Raise ValueError where examples of `labels`, on the host, cannot give `num_samples`."""
    if not 1 <= num_samples < len(labels):
        raise ValueError(f"num_samples must be in 1..{len(labels) - 1}, got {num_samples}")
    if balanced:
        counts = np.bincount(labels, minlength=num_classes)
        short = np.array(class_shares(num_samples, num_classes)) - counts
        if short.max() > 0:
            raise ValueError(
                f"num_samples is {num_samples}, but class {short.argmax()} has only "
                f"{counts[short.argmax()]} samples; unbalanced selection takes what there is"
            )


def highest_scores(
    scores: Float[Array, "examples"],
    labels: Int[Array, "examples"],
    num_samples: int,
    num_classes: int,
    balanced: bool = True,
) -> Int[Array, "{num_samples}"]:
    """Indices of the highest scores, best first.

    Balanced, they are ordered by class, each with its share (`class_shares`); a class that has too
    few is filled up with samples of others (`check_shares` refuses that beforehand).

    >>> highest_scores(jnp.array([0.1, 0.9, 0.8, 0.2]), jnp.array([0, 1, 1, 0]), 2, 2).tolist()
    [3, 1]
    """
    if not balanced:
        return jax.lax.top_k(scores, num_samples)[1]
    shares = class_shares(num_samples, num_classes)
    of_class = labels == jnp.arange(num_classes)[:, None]
    _, indices = jax.lax.top_k(jnp.where(of_class, scores, -jnp.inf), max(shares))
    return jnp.concatenate([indices[label, :share] for label, share in enumerate(shares)])


def random_examples(
    key: PRNGKey,
    labels: Int[Array, "examples"],
    num_samples: int,
    num_classes: int,
    balanced: bool = True,
) -> Int[Array, "{num_samples}"]:
    """Indices of examples drawn uniformly without replacement, balanced as `highest_scores`."""
    priorities = jax.random.uniform(key, labels.shape)
    return highest_scores(priorities, labels, num_samples, num_classes, balanced)
