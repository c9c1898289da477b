"""Mini-batch k-means on the device (Sculley 2010; k-means++: Arthur & Vassilvitskii 2007)."""

from __future__ import annotations

from functools import partial
from typing import Literal, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Bool, Float, Int, Int32

from evojax_suite.types import Array, PRNGKey, PyTree, Scalar

ClusteringMethod = Literal["auto", "jax", "sklearn"]
Points: TypeAlias = Float[Array, "points features"]
Batch: TypeAlias = Float[Array, "batch features"]
Centers: TypeAlias = Float[Array, "clusters features"]
Counts: TypeAlias = Float[Array, "clusters"]

# scikit-learn's constants.
_MAX_NO_IMPROVEMENT = 10
_REASSIGNMENT_RATIO = 0.01
# Point-centre distances held at once: 128 MiB.
_MAX_DISTANCES = 2**25
# N * D * K from which "auto" is jax.
_JAX_PAYS_FROM = {"cpu": 5e9, "accelerator": 1e8}


class Clustering(NamedTuple):
    """A partition of points into clusters, on the host."""

    assignments: Int32[np.ndarray, "points"]  # the cluster of each point; no cluster is empty
    num_empty: int  # clusters that were empty before they were refilled
    inertia: float  # sum of squared distances to the nearest centre, before the refilling
    num_steps: int  # mini-batch steps done


class _State(NamedTuple):
    step: Int32[Array, ""]
    centers: Float[Array, "clusters features"]
    counts: Float[Array, "clusters"]  # points each centre has seen
    num_since_reassigned: Int32[Array, ""]  # points drawn since the last reassignment
    inertia: Scalar  # exponentially weighted average, per point
    lowest_inertia: Scalar
    num_no_improvement: Int32[Array, ""]
    converged: Bool[Array, ""]


def _check(
    shape: tuple[int, ...], num_clusters: int, batch_size: int, max_iterations: int
) -> tuple[int, int]:
    """The number of points and of features; raises ValueError where the rest does not fit."""
    if len(shape) != 2:
        raise ValueError(f"points must have 2 dimensions, got {len(shape)}")
    if not 1 <= num_clusters < shape[0]:
        raise ValueError(f"num_clusters must be >= 1 and < {shape[0]} points, got {num_clusters}")
    for name, value in (("batch_size", batch_size), ("max_iterations", max_iterations)):
        if value < 1:
            raise ValueError(f"{name} must be >= 1, got {value}")
    return shape[0], shape[1]


def k_means_plus_plus(
    key: PRNGKey, points: Points, num_clusters: int, num_trials: int | None = None
) -> Int[Array, "{num_clusters}"]:
    """Greedy k-means++ (Arthur & Vassilvitskii 2007): indices of the points to start from.

    Each centre is the best of `num_trials` points drawn in proportion to their squared distance to
    the nearest centre so far; None is scikit-learn's 2 + floor(ln num_clusters).
    """
    num_points = points.shape[0]
    num_trials = num_trials or 2 + int(np.log(num_clusters))
    key_first, key_others = jax.random.split(key)
    norms = (points**2).sum(1)

    def distances_to(indices: Array):
        products = jnp.matmul(points[indices], points.T, precision="highest")
        return jnp.maximum(norms[indices][:, None] - 2 * products + norms, 0)

    def choose(closest: Array, uniform: Array):
        cumulative = jnp.cumsum(closest)
        drawn = uniform * cumulative[-1]
        # Unrolled: a loop would start many small kernels for each centre.
        candidates = jnp.searchsorted(cumulative, drawn, method="scan_unrolled")
        candidates = candidates.clip(max=num_points - 1)
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
    points: Points, centers: Centers
) -> tuple[Int32[Array, "points"], Float[Array, "points"]]:
    """The nearest centre of each point, and the squared distance to it."""
    norms = (centers**2).sum(1)

    def nearest_of(block: Array):
        products = jnp.matmul(block, centers.T, precision="highest")
        labels = (norms - 2 * products).argmin(1).astype(jnp.int32)
        return labels, ((block - centers[labels]) ** 2).sum(1)

    num_points, block_size = points.shape[0], max(1, _MAX_DISTANCES // centers.shape[0])
    if block_size >= num_points:
        return nearest_of(points)

    def body(block: Array, carry: PyTree):
        # The last block overlaps the one before it.
        start = jnp.minimum(block * block_size, num_points - block_size)
        nearest = nearest_of(jax.lax.dynamic_slice_in_dim(points, start, block_size))
        return tuple(
            jax.lax.dynamic_update_slice_in_dim(all, new, start, 0)
            for all, new in zip(carry, nearest, strict=True)
        )

    empty = jnp.zeros(num_points, jnp.int32), jnp.zeros(num_points, points.dtype)
    return jax.lax.fori_loop(0, -(-num_points // block_size), body, empty)


def _move_centers(
    centers: Centers, counts: Counts, batch: Batch, labels: Int[Array, "batch"]
) -> tuple[Centers, Counts]:
    """Centres moved to the mean of all points that they have seen, and the numbers of these."""
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
    centers = centers.at[targets].set(means, mode="drop")
    return centers, counts.at[targets].set(totals, mode="drop")


def _reassign(
    key: PRNGKey, centers: Centers, counts: Counts, batch: Batch
) -> tuple[Centers, Counts]:
    """Centres, and the numbers of points that they have seen, after those with few points became
    points of the batch, at most half of it."""
    num_clusters = centers.shape[0]
    num_candidates = min(batch.shape[0] // 2, num_clusters)
    candidates = jnp.argsort(counts)[:num_candidates]
    is_low = counts[candidates] < _REASSIGNMENT_RATIO * counts.max()
    targets = jnp.where(is_low, candidates, num_clusters)
    chosen = jax.random.choice(key, batch.shape[0], (num_candidates,), replace=False)
    least = counts.at[targets].set(jnp.inf, mode="drop").min()  # of the other centres
    centers = centers.at[targets].set(batch[chosen], mode="drop")
    return centers, counts.at[targets].set(least, mode="drop")


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
    """Mini-batch k-means (Sculley 2010) like scikit-learn's MiniBatchKMeans, started once.

    points: (points, features), finite.
    num_clusters: less than the number of points.
    batch_size: points in a step, drawn with replacement.
    max_iterations: largest number of passes over the points.
    tolerance: >= 0; stops where a step moves the centres, in all, by a squared distance of at most
        this times the features' mean variance; 0 is never. It stops, too, when the averaged inertia
        has not improved for 10 steps.

    Returns the centres; the nearest centre of each point, where some centres may have none; the sum
    of squared distances to it; and the number of steps. Memory beyond N points of D features is
    O(N log K + K D) for K clusters, and the distances of one block. Raises ValueError.
    """
    num_points, _ = _check(points.shape, num_clusters, batch_size, max_iterations)
    batch_size = min(batch_size, num_points)
    key_sample, key_start, key_steps = jax.random.split(key, 3)
    # |x|^2 - 2 x.c + |c|^2 cancels less around the mean.
    offset = points.mean(0)
    points = points - offset

    sample, size = points, 3 * (batch_size if 3 * batch_size >= num_clusters else num_clusters)
    if size < num_points:
        sample = points[jax.random.randint(key_sample, (size,), 0, num_points)]
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
        moved = _move_centers(state.centers, state.counts, batch, labels)
        centers, counts = jax.lax.cond(
            due,
            lambda centers, counts: _reassign(key_reassign, centers, counts, batch),
            lambda centers, counts: (centers, counts),
            *moved,
        )
        shift = ((centers - state.centers) ** 2).sum()

        # The first step's inertia is the start's and is left out.
        inertia = distances.mean()
        averaged = state.inertia + smoothing * (inertia - state.inertia)
        averaged = jnp.where(state.step <= 1, inertia, averaged)
        lowest = jnp.minimum(averaged, state.lowest_inertia)
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
            lowest_inertia=jnp.where(is_first, jnp.inf, lowest),
            num_no_improvement=jnp.where(is_first, 0, num_no_improvement),
            converged=~is_first & (stalled | settled),
        )

    def going(state: _State) -> Array:
        return (state.step < max_steps) & ~state.converged

    zero, infinity = jnp.int32(0), jnp.asarray(jnp.inf, points.dtype)
    counts, converged = jnp.zeros(num_clusters, points.dtype), jnp.bool_(False)
    start = _State(zero, centers, counts, zero, infinity, infinity, zero, converged)
    state = jax.lax.while_loop(going, step, start)
    assignments, distances = _nearest(points, state.centers)
    return state.centers + offset, assignments, distances.sum(), state.step


def refill_empty(
    assignments: Int[np.ndarray, "points"],
    distances: Float[np.ndarray, "points"],
    num_clusters: int,
) -> Int32[np.ndarray, "points"]:
    """Assignments in which every empty cluster got one point, as scikit-learn relocates them.

    distances: of each point to its centre. The empty clusters, in order, take the points farthest
    from their centres among those that do not leave their cluster empty. Raises ValueError for more
    clusters than points.
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
    CPU, seeded from the key; "auto" takes the one that is expected to be faster, compilation
    included. The other parameters are those of `mini_batch_k_means`. Raises ValueError.
    """
    num_points, num_features = _check(np.shape(points), num_clusters, batch_size, max_iterations)
    if not tolerance >= 0:
        raise ValueError(f"tolerance must be >= 0, got {tolerance}")
    if method not in ("auto", "jax", "sklearn"):
        raise ValueError(f"method must be auto, jax or sklearn, got {method!r}")
    if method == "auto":
        smallest = _JAX_PAYS_FROM["cpu" if jax.default_backend() == "cpu" else "accelerator"]
        method = "jax" if num_points * num_features * num_clusters >= smallest else "sklearn"
    host_points = np.asarray(points, np.float32)
    num_bad = int((~np.isfinite(host_points)).sum())
    if num_bad:
        raise ValueError(f"points must be finite, got {num_bad} elements that are not")
    if method == "jax":
        limits = num_clusters, batch_size, max_iterations, tolerance
        result = mini_batch_k_means(key, jnp.asarray(points, jnp.float32), *limits)
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
            for block in np.array_split(np.arange(num_points), -(-num_points // 4096))
        ]
        assignments = refill_empty(assignments, np.concatenate(distances), num_clusters)
    return Clustering(assignments.astype(np.int32), num_empty, float(inertia), int(num_steps))
