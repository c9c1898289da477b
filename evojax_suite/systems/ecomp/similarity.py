"""Similarity of the representations of the same inputs in two networks, whatever their sizes.

A layer's activations on n inputs become a distribution over the pairs of inputs, so that layers of
different widths compare (van den Beemt et al. 2021, section 3.1.2; van der Maaten & Hinton 2008).
Distances are symmetric: sums run over the first axis, which vectorises where the last does not.
"""

from __future__ import annotations

from typing import NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
from jaxtyping import Float, Num

from evojax_suite.types import Array, PyTree, Scalar

Pairwise: TypeAlias = Float[Array, "points points"]

_LEAST_PROBABILITY = 2.220446e-16
"""Least probability of a pair: the double's machine epsilon, as in scikit-learn."""

_FIRST_LOG_PRECISION = 1.6  # for distances about 1, close to what layers of ReLU need
_LARGEST_LOG_PRECISION = 69.0  # e^69 is 2^100: where scikit-learn's hundred doublings end
_TOLERANCE = 1e-3  # of the entropy before Newton's last step, which squares it
_MOST_STEPS = 50


def squared_distances(points: Float[Array, "points features"]) -> Pairwise:
    """Squared Euclidean distances; those within rounding of 0 are 0."""
    squares = (points * points).sum(-1)
    sums = squares[:, None] + squares[None, :]
    distances = sums - 2 * (points @ points.T)
    return jnp.where(distances > 2e-6 * sums, distances, 0.0)


def _log_precisions(
    distances: Pairwise, perplexity: float | Scalar, start: Float[Array, "points"]
) -> Float[Array, "points"]:
    """The logarithm of the precision at which the Gaussian of each column has the perplexity.

    distances: 0 on the diagonal and, in each column, once more. Newton's method, kept inside a
    bracket. Where more points than the perplexity lie at distance 0 no precision has it, and the
    largest is returned.
    """
    n = distances.shape[0]
    target = jnp.log(perplexity)
    tied = (distances <= 0).sum(0) - 1 >= perplexity

    def step(carry: PyTree):
        index, log_precision, low, high, _ = carry
        precision = jnp.exp(log_precision)
        weights = jnp.exp(-precision * distances)
        total = weights.sum(0) - 1  # the point itself
        first = (weights * distances).sum(0) / total
        second = (weights * distances * distances).sum(0) / total
        error = jnp.where(tied, 0.0, jnp.log(total) + precision * first - target)
        low = jnp.where(error > 0, log_precision, low)
        high = jnp.where(error > 0, high, log_precision)
        slope = precision * precision * (second - first * first)
        proposed = log_precision + error / jnp.maximum(slope, 1e-6)
        # The error's sign, computed twice, may differ where it is rounding: no bracket then.
        settled = jnp.abs(error) <= _TOLERANCE
        inside = settled | ((proposed >= low) & (proposed <= high))
        log_precision = jnp.where(inside, proposed, (low + high) / 2)
        return index + 1, log_precision, low, high, jnp.abs(error).max()

    def unfinished(carry: PyTree):
        return (carry[0] < _MOST_STEPS) & (carry[-1] > _TOLERANCE)

    start = jnp.where(jnp.abs(start) < 20, start, _FIRST_LOG_PRECISION)
    carry = jnp.int32(0), start, jnp.full(n, -20.0), jnp.full(n, 20.0), jnp.float32(jnp.inf)
    log_precisions = jax.lax.while_loop(unfinished, step, carry)[1]
    return jnp.where(tied, _LARGEST_LOG_PRECISION, log_precisions)


class Joint(NamedTuple):
    """Probabilities of pairs of points, and the precision of each point's Gaussian."""

    probabilities: Float[Array, "points points"]
    # Distances are scaled point by point, so that precisions compare between layers.
    log_precisions: Float[Array, "points"]


def joint_probabilities(
    distances: Pairwise, perplexity: float | Scalar, start: Float[Array, "points"] | None = None
) -> Joint:
    """Symmetric joint probabilities of pairs of points, as in t-SNE.

    Each point's Gaussian has the given perplexity, at least 1 and less than the number of points;
    the conditional probabilities are symmetrised and sum to 1 over all ordered pairs. The diagonal
    is 0. Distances that are not finite give NaN. distances: squared. start: the `log_precisions` of
    a similar layer, from where the search is short; it changes nothing else.
    """
    n = distances.shape[0]
    if start is None:
        start = jnp.full(n, _FIRST_LOG_PRECISION)
    others = ~jnp.eye(n, dtype=bool)
    # Neither a constant nor a scale changes a point's probabilities.
    nearest = jnp.where(others, distances, jnp.inf).min(0)
    distances = jnp.where(others, distances - nearest, 0.0)
    mean = distances.sum(0) / (n - 1)
    distances = distances * (1 / jnp.where(mean > 0, mean, 1.0))
    log_precisions = _log_precisions(distances, perplexity, start)
    weights = jnp.exp(-jnp.exp(log_precisions) * distances)
    conditional = weights / (2 * n * (weights.sum(0) - 1))
    joint = conditional + conditional.T
    joint = jnp.where(others, jnp.maximum(joint, _LEAST_PROBABILITY), 0.0)
    return Joint(joint, log_precisions)


def student_t_probabilities(
    distances: Pairwise, degrees_of_freedom: float | Num[Array, ""]
) -> Pairwise:
    """Probabilities of pairs of points under Student's t, summing to 1; distances: squared.

    The released program takes as many degrees of freedom as the layer has units.
    """
    others = ~jnp.eye(len(distances), dtype=bool)
    logits = -(degrees_of_freedom + 1) / 2 * jnp.log1p(distances / degrees_of_freedom)
    weights = jnp.where(others, jnp.exp(logits - jnp.where(others, logits, -jnp.inf).max()), 0.0)
    probabilities = weights / weights.sum()
    return jnp.where(others, jnp.maximum(probabilities, _LEAST_PROBABILITY), 0.0)


def divergence(reference: Pairwise, other: Pairwise) -> Scalar:
    """Kullback-Leibler divergence KL(reference || other) over pairs, in nats."""
    others = ~jnp.eye(len(reference), dtype=bool)
    logs = [jnp.log(jnp.where(others, p, 1.0)) for p in (reference, other)]
    return (reference * (logs[0] - logs[1])).sum(0).sum()


def centred_gram(points: Float[Array, "points features"]) -> Pairwise:
    """Inner products of points about their mean."""
    points = points - points.mean(0)
    return points @ points.T


def centred_kernel_alignment(first: Pairwise, second: Pairwise) -> Scalar:
    """Linear CKA of two layers from their centred Gram matrices, in [0, 1]; Kornblith et al. 2019,
    Eq. 3. 0 where one layer is constant."""
    norm = jnp.sqrt((first * first).sum() * (second * second).sum())
    return jnp.where(norm > 0, (first * second).sum() / jnp.where(norm > 0, norm, 1.0), 0.0)
