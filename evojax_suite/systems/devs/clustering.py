"""Mini-batch k-means on the device (Sculley 2010, k-means++ of Arthur & Vassilvitskii 2007)."""

from __future__ import annotations

from functools import partial
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Bool, Float, Int, Int32

from evojax_suite.types import Array, PRNGKey, Scalar

ClusteringMethod = Literal["auto", "jax", "sklearn"]

# scikit-learn's constants.
_MAX_NO_IMPROVEMENT = 10
_REASSIGNMENT_RATIO = 0.01
# Point-centre distances held at once: 128 MiB.
_MAX_DISTANCES = 2**25
# N * D * K from which "auto" is jax.
_JAX_PAYS_FROM = {"cpu": 5e9, "accelerator": 1e8}


class Clustering(NamedTuple):
    """A partition of points into clusters, on the host."""

    assignments: Int32[np.ndarray, "points"]
    """The cluster of each point, from 0 on; every cluster has a point."""
    num_empty: int
    """Clusters that were empty before they were refilled."""
    inertia: float
    """Sum of squared distances to the nearest centre, of the centres k-means found."""
    num_steps: int
    """Mini-batch steps done."""


class _State(NamedTuple):
    step: Int32[Array, ""]
    centers: Float[Array, "clusters features"]
    counts: Float[Array, "clusters"]  # points each centre has seen
    num_since_reassigned: Int32[Array, ""]  # points drawn since the last reassignment
    inertia: Scalar  # exponentially weighted average, per point
    lowest_inertia: Scalar
    num_no_improvement: Int32[Array, ""]
    converged: Bool[Array, ""]


def _check(shape: tuple[int, ...], num_clusters: int, batch_size: int, max_iterations: int):
    if len(shape) != 2:
        raise ValueError(f"points must have 2 dimensions, got {len(shape)}")
    if not 1 <= num_clusters < shape[0]:
        raise ValueError(f"num_clusters must be >= 1 and < {shape[0]} points, got {num_clusters}")
    for name, value in (("batch_size", batch_size), ("max_iterations", max_iterations)):
        if value < 1:
            raise ValueError(f"{name} must be >= 1, got {value}")


def _dot(
    a: Float[Array, "first features"], b: Float[Array, "second features"]
) -> Float[Array, "first second"]:
    return jnp.matmul(a, b.T, precision="highest")


def k_means_plus_plus(
    key: PRNGKey,
    points: Float[Array, "points features"],
    num_clusters: int,
    num_trials: int | None = None,
) -> Int[Array, "{num_clusters}"]:
    """Greedy k-means++ (Arthur & Vassilvitskii 2007): indices of the points to start from.

    Each centre is the best of `num_trials` points drawn in proportion to their squared distance to
    the nearest centre so far; None is scikit-learn's 2 + floor(ln num_clusters).
    """
    num_points = points.shape[0]
    num_trials = num_trials or 2 + int(np.log(num_clusters))
    key_first, key_others = jax.random.split(key)
    norms = (points**2).sum(1)

    def distances_to(indices: Int[Array, "trials"]) -> Float[Array, "trials points"]:
        products = _dot(points[indices], points)
        return jnp.maximum(norms[indices][:, None] - 2 * products + norms, 0)

    def choose(closest, uniform):
        cumulative = jnp.cumsum(closest)
        # Unrolled: a loop would start many small kernels for each centre.
        candidates = jnp.searchsorted(
            cumulative, uniform * cumulative[-1], method="scan_unrolled"
        ).clip(max=num_points - 1)
        distances = jnp.minimum(closest, distances_to(candidates))
        best = distances.sum(1).argmin()
        # Rounding leaves the chosen point a distance to itself, and so a chance to be chosen again.
        return distances[best].at[candidates[best]].set(0), candidates[best]

    first = jax.random.randint(key_first, (1,), 0, num_points)
    closest = distances_to(first)[0].at[first].set(0)
    uniforms = jax.random.uniform(key_others, (num_clusters - 1, num_trials))
    _, others = jax.lax.scan(choose, closest, uniforms)
    return jnp.concatenate([first, others.astype(first.dtype)])


def _nearest(
    points: Float[Array, "points features"], centers: Float[Array, "clusters features"]
) -> tuple[Int32[Array, "points"], Float[Array, "points"]]:
    """The nearest centre of each point, and the squared distance to it."""
    norms = (centers**2).sum(1)

    def nearest_of(block):
        labels = (norms - 2 * _dot(block, centers)).argmin(1).astype(jnp.int32)
        return labels, ((block - centers[labels]) ** 2).sum(1)

    num_points, block_size = points.shape[0], max(1, _MAX_DISTANCES // centers.shape[0])
    if block_size >= num_points:
        return nearest_of(points)

    def body(block, carry):
        # The last block overlaps the one before it.
        start = jnp.minimum(block * block_size, num_points - block_size)
        found = nearest_of(jax.lax.dynamic_slice_in_dim(points, start, block_size))
        return tuple(
            jax.lax.dynamic_update_slice_in_dim(all, new, start, 0)
            for all, new in zip(carry, found, strict=True)
        )

    empty = jnp.zeros(num_points, jnp.int32), jnp.zeros(num_points, points.dtype)
    return jax.lax.fori_loop(0, -(-num_points // block_size), body, empty)


def _move_centers(
    centers: Float[Array, "clusters features"],
    counts: Float[Array, "clusters"],
    batch: Float[Array, "batch features"],
    labels: Int[Array, "batch"],
) -> tuple[Float[Array, "clusters features"], Float[Array, "clusters"]]:
    """Each centre becomes the mean of all points it has seen."""
    num_clusters = centers.shape[0]
    # By matrix product rather than by scattered addition, whose order varies on a GPU.
    clusters = labels if num_clusters > len(labels) else jnp.arange(num_clusters)
    members = clusters[:, None] == labels
    sizes = members.sum(1).astype(counts.dtype)
    sums = jnp.matmul(members.astype(batch.dtype), batch, precision="highest")
    totals = counts[clusters] + sizes
    means = (centers[clusters] * counts[clusters][:, None] + sums) / totals[:, None]
    targets = jnp.where(sizes > 0, clusters, num_clusters)
    if clusters is labels:
        is_first = members.argmax(1) == jnp.arange(len(labels))
        targets = jnp.where(is_first, labels, num_clusters)
    return (
        centers.at[targets].set(means, mode="drop"),
        counts.at[targets].set(totals, mode="drop"),
    )


def _reassign(
    key: PRNGKey,
    centers: Float[Array, "clusters features"],
    counts: Float[Array, "clusters"],
    batch: Float[Array, "batch features"],
) -> tuple[Float[Array, "clusters features"], Float[Array, "clusters"]]:
    """Centres that have seen few points become points of the batch, at most half of it."""
    num_clusters = centers.shape[0]
    num_candidates = min(batch.shape[0] // 2, num_clusters)
    candidates = jnp.argsort(counts)[:num_candidates]
    is_low = counts[candidates] < _REASSIGNMENT_RATIO * counts.max()
    targets = jnp.where(is_low, candidates, num_clusters)
    chosen = jax.random.choice(key, batch.shape[0], (num_candidates,), replace=False)
    others = counts.at[targets].set(jnp.inf, mode="drop")
    return (
        centers.at[targets].set(batch[chosen], mode="drop"),
        counts.at[targets].set(others.min(), mode="drop"),
    )


@partial(jax.jit, static_argnames=("num_clusters", "batch_size", "max_iterations"))
def mini_batch_k_means(
    key: PRNGKey,
    points: Float[Array, "*points"],
    num_clusters: int,
    batch_size: int = 1028,
    max_iterations: int = 200,
    tolerance: float | Scalar = 1e-4,
) -> tuple[
    Float[Array, "{num_clusters} features"], Int32[Array, "points"], Scalar, Int32[Array, ""]
]:
    """Mini-batch k-means (Sculley 2010) as scikit-learn's MiniBatchKMeans does it, once.

    points: (points, features), finite. num_clusters: less than the points. batch_size: points a
    step, drawn with replacement. max_iterations: most passes over the points. tolerance: >= 0;
    stops where a step moves the centres, in all, by a squared distance of at most this times the
    features' mean variance; 0 is never. It stops too when the averaged inertia has not improved for
    10 steps.

    Returns the centres; the nearest one of each point, some perhaps of none; the sum of squared
    distances to it; and the number of steps. Memory beyond N points of D features is O(N log K +
    K D) for K clusters, and the distances of one block. Raises ValueError.
    """
    _check(points.shape, num_clusters, batch_size, max_iterations)
    num_points = points.shape[0]
    batch_size = min(batch_size, num_points)
    key_sample, key_start, key_steps = jax.random.split(key, 3)
    # |x|^2 - 2 x.c + |c|^2 cancels less around the mean.
    offset = points.mean(0)
    points = points - offset

    sample_size = 3 * batch_size if 3 * batch_size >= num_clusters else 3 * num_clusters
    sample = points
    if sample_size < num_points:
        sample = points[jax.random.randint(key_sample, (sample_size,), 0, num_points)]
    centers = sample[k_means_plus_plus(key_start, sample, num_clusters)]
    max_shift = tolerance * points.var(0).mean()
    smoothing = min(1.0, batch_size * 2.0 / (num_points + 1))
    max_steps = max_iterations * num_points // batch_size

    def step(state: _State) -> _State:
        key_batch, key_reassign = jax.random.split(jax.random.fold_in(key_steps, state.step))
        batch = points[jax.random.randint(key_batch, (batch_size,), 0, num_points)]
        labels, distances = _nearest(batch, state.centers)
        num_since_reassigned = state.num_since_reassigned + batch_size
        due = (state.counts == 0).any() | (num_since_reassigned >= 10 * num_clusters)
        centers, counts = jax.lax.cond(
            due,
            lambda centers, counts: _reassign(key_reassign, centers, counts, batch),
            lambda centers, counts: (centers, counts),
            *_move_centers(state.centers, state.counts, batch, labels),
        )
        shift = ((centers - state.centers) ** 2).sum()

        # The first step's inertia is the start's and is left out.
        inertia = distances.mean()
        averaged = state.inertia + smoothing * (inertia - state.inertia)
        averaged = jnp.where(state.step <= 1, inertia, averaged)
        improved = averaged < state.lowest_inertia
        num_no_improvement = jnp.where(improved, 0, state.num_no_improvement + 1)
        stalled = num_no_improvement >= _MAX_NO_IMPROVEMENT
        settled = (max_shift > 0) & (shift <= max_shift)
        is_first = state.step == 0
        return _State(
            step=state.step + 1,
            centers=centers,
            counts=counts,
            num_since_reassigned=jnp.where(due, 0, num_since_reassigned),
            inertia=averaged,
            lowest_inertia=jnp.where(
                is_first, jnp.inf, jnp.minimum(averaged, state.lowest_inertia)
            ),
            num_no_improvement=jnp.where(is_first, 0, num_no_improvement),
            converged=~is_first & (stalled | settled),
        )

    zero, infinity = jnp.int32(0), jnp.asarray(jnp.inf, points.dtype)
    start = _State(
        zero,
        centers,
        jnp.zeros(num_clusters, points.dtype),
        zero,
        infinity,
        infinity,
        zero,
        jnp.bool_(False),
    )
    state = jax.lax.while_loop(
        lambda state: (state.step < max_steps) & ~state.converged, step, start
    )
    assignments, distances = _nearest(points, state.centers)
    return state.centers + offset, assignments, distances.sum(), state.step


def refill_empty(
    assignments: Int[np.ndarray, "points"],
    distances: Float[np.ndarray, "points"],
    num_clusters: int,
) -> Int32[np.ndarray, "points"]:
    """Give every empty cluster one point, as scikit-learn relocates empty clusters.

    distances: of each point to its centre. The empty clusters, in order, take the points farthest
    from their centres among those that do not leave their own cluster empty. Returns new
    assignments. Raises ValueError for more clusters than points.
    """
    if num_clusters > len(assignments):
        raise ValueError(f"num_clusters must be <= {len(assignments)} points, got {num_clusters}")
    assignments = np.array(assignments, np.int32)
    sizes = np.bincount(assignments, minlength=num_clusters)
    empty = iter(np.flatnonzero(sizes == 0))
    cluster = next(empty, None)
    for point in np.argsort(-np.asarray(distances), kind="stable"):
        if cluster is None:
            break
        if sizes[assignments[point]] > 1:
            sizes[assignments[point]] -= 1
            assignments[point] = cluster
            cluster = next(empty, None)
    return assignments


def _resolve(
    method: ClusteringMethod, shape: tuple[int, ...], num_clusters: int
) -> ClusteringMethod:
    if method not in ("auto", "jax", "sklearn"):
        raise ValueError(f"method must be auto, jax or sklearn, got {method!r}")
    if method != "auto":
        return method
    smallest = _JAX_PAYS_FROM["cpu" if jax.default_backend() == "cpu" else "accelerator"]
    return "jax" if shape[0] * shape[1] * num_clusters >= smallest else "sklearn"


def cluster(
    key: PRNGKey,
    points: Float[np.ndarray | Array, "..."],
    num_clusters: int,
    method: ClusteringMethod = "auto",
    batch_size: int = 1028,
    max_iterations: int = 200,
    tolerance: float = 1e-4,
) -> Clustering:
    """Cut points (points, features) into `num_clusters` clusters of one point or more by mini-batch
    k-means.

    method: "jax" is `mini_batch_k_means`, on the default device; "sklearn" is scikit-learn on the
    CPU, seeded from the key; "auto" takes the one expected to be sooner done, its compilation
    counted. The rest: see `mini_batch_k_means`. Raises ValueError.
    """
    shape = np.shape(points)
    _check(shape, num_clusters, batch_size, max_iterations)
    if not tolerance >= 0:
        raise ValueError(f"tolerance must be >= 0, got {tolerance}")
    method = _resolve(method, shape, num_clusters)
    host_points = np.asarray(points, np.float32)
    num_bad = int((~np.isfinite(host_points)).sum())
    if num_bad:
        raise ValueError(f"points must be finite, got {num_bad} elements that are not")
    if method == "jax":
        result = mini_batch_k_means(
            key,
            jnp.asarray(points, jnp.float32),
            num_clusters,
            batch_size=batch_size,
            max_iterations=max_iterations,
            tolerance=tolerance,
        )
        centers, assignments, inertia, num_steps = jax.device_get(result)
    else:
        from sklearn.cluster import MiniBatchKMeans  # most of a second: not for every command

        model = MiniBatchKMeans(
            num_clusters,
            init="k-means++",
            n_init=1,  # pyright: ignore[reportArgumentType]
            batch_size=batch_size,
            max_iter=max_iterations,
            tol=tolerance,
            max_no_improvement=_MAX_NO_IMPROVEMENT,
            reassignment_ratio=_REASSIGNMENT_RATIO,
            random_state=int(jax.random.bits(key)),
        ).fit(host_points)
        centers, assignments = np.asarray(model.cluster_centers_), np.asarray(model.labels_)
        inertia, num_steps = model.inertia_, model.n_steps_
    num_empty = num_clusters - len(np.unique(assignments))
    if num_empty:
        # A block at a time: the differences are as large as the points.
        distances = [
            ((host_points[block] - centers[assignments[block]]) ** 2).sum(1)
            for block in np.array_split(np.arange(shape[0]), -(-shape[0] // 4096))
        ]
        assignments = refill_empty(assignments, np.concatenate(distances), num_clusters)
    return Clustering(assignments.astype(np.int32), num_empty, float(inertia), int(num_steps))
