"""Similarity of representations, against scikit-learn and direct computations in float64."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings, strategies as st
from scipy.spatial.distance import pdist, squareform
from sklearn.manifold._t_sne import _joint_probabilities
from sklearn.metrics import pairwise_distances

from evojax_suite.systems.ecomp import similarity

EPSILON = np.finfo(np.float64).eps
JOINT = jax.jit(similarity.joint_probabilities)


def points(kind: str, seed: int = 0, n: int = 100) -> np.ndarray:
    random = np.random.default_rng(seed)
    normal = random.normal(size=(n, 50))
    match kind:
        case "normal":
            values = normal
        case "relu":
            values = np.maximum(3 * normal, 0)
        case "sparse":
            values = normal * (random.random((n, 50)) < 0.1)
        case "heavy tails":
            values = random.standard_t(3, (n, 50))
        case "skewed":
            values = np.exp(2 * normal)
        case "one unit":
            values = normal[:, :1]
        case "an outlier":
            values = np.where(np.arange(n)[:, None] == 3, 40.0, normal)
        case "pairs of duplicates":
            values = np.repeat(normal[: n // 2], 2, 0)
        case "groups of duplicates":  # larger than the perplexity: no precision has it
            values = np.repeat(normal[:2], n // 2, 0)
        case "constant":
            values = np.full((n, 50), 3.0)
        case "dead":
            values = np.zeros((n, 50))
        case _:
            raise AssertionError(kind)
    return values.astype(np.float32)


KINDS = (
    "normal", "relu", "sparse", "heavy tails", "skewed", "one unit", "an outlier",
    "pairs of duplicates", "groups of duplicates", "constant", "dead",
)  # fmt: skip


def exact_distances(values: np.ndarray) -> np.ndarray:
    """Duplicates at distance 0, which float32 products and scikit-learn's do not promise."""
    return squareform(pdist(values.astype(np.float64), "sqeuclidean")).astype(np.float32)


def scikit_learn(distances: np.ndarray, perplexity: float = 30.0) -> np.ndarray:
    return squareform(_joint_probabilities(distances, perplexity, verbose=0))


@pytest.mark.parametrize("kind", KINDS)
def test_joint_probabilities_are_scikit_learns(kind):
    for seed in range(3):
        distances = exact_distances(points(kind, seed))
        ours = np.asarray(JOINT(distances, 30.0).probabilities)
        theirs = scikit_learn(distances)
        np.testing.assert_allclose(ours, theirs, atol=3e-5 * theirs.max())
        np.testing.assert_allclose(ours.sum(), 1, rtol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_the_loss_is_the_released_programs(kind):
    """2 x the sum over pairs i < j of P log(max(P, eps) / Q)."""
    parent, child = points("relu", 1), points(kind, 2)
    p, q = (_joint_probabilities(exact_distances(v), 30.0, verbose=0) for v in (parent, child))
    expected = 2 * np.dot(p, np.log(np.maximum(p, EPSILON) / q))
    joint = [JOINT(exact_distances(v), 30.0) for v in (parent, child)]
    loss = similarity.divergence(*(one.probabilities for one in joint))
    np.testing.assert_allclose(loss, expected, rtol=1e-3, atol=1e-5)


@given(
    seed=st.integers(0, 10**6),
    n=st.sampled_from([6, 17, 40]),
    part=st.floats(0.05, 0.9),
    spread=st.floats(0.1, 3.0),
)
@settings(max_examples=30, deadline=None)
def test_each_point_has_the_perplexity(seed, n, part, spread):
    random = np.random.default_rng(seed)
    values = np.exp(spread * random.normal(size=(40, 6)))[:n].astype(np.float32)
    perplexity = 1 + part * (n - 2)
    distances = exact_distances(values)
    found = np.asarray(JOINT(distances, perplexity).log_precisions)
    for i in range(n):
        others = np.delete(distances[:, i].astype(np.float64), i)
        scaled = (others - others.min()) / ((others - others.min()).sum() / (n - 1))
        weights = np.exp(-np.exp(np.float64(found[i])) * scaled)
        conditional = weights / weights.sum()
        entropy = -(conditional * np.log(np.maximum(conditional, 1e-300))).sum()
        np.testing.assert_allclose(entropy, np.log(perplexity), atol=2e-4)


def test_where_the_search_starts_changes_nothing():
    distances = exact_distances(points("relu"))
    plain = JOINT(distances, 30.0)
    for start in (plain.log_precisions, jnp.full(100, -15.0), jnp.full(100, 69.0)):
        warm = JOINT(distances, 30.0, start)
        np.testing.assert_allclose(warm.probabilities, plain.probabilities, atol=1e-8)


def test_distances_are_those_of_the_points():
    for kind in KINDS:
        values = points(kind)
        ours = np.asarray(similarity.squared_distances(jnp.asarray(values)))
        theirs = pairwise_distances(values.astype(np.float64), squared=True)
        np.testing.assert_allclose(ours, theirs, atol=1e-5 * (values**2).sum(1).max())
        assert (ours >= 0).all()
    assert (ours == 0).all()  # dead units: nothing but rounding between the images
    duplicates = similarity.squared_distances(jnp.asarray(points("groups of duplicates")))
    assert (np.asarray(duplicates)[:50, :50] == 0).all()


def test_student_t_is_the_released_programs():
    values = points("relu")
    for degrees in (1, 7, 200):
        weights = (1 + pdist(values.astype(np.float64), "sqeuclidean") / degrees) ** (
            -(degrees + 1) / 2
        )
        expected = squareform(np.maximum(weights / (2 * weights.sum()), EPSILON))
        distances = similarity.squared_distances(jnp.asarray(values))
        ours = np.asarray(similarity.student_t_probabilities(distances, degrees))
        np.testing.assert_allclose(ours, expected, rtol=2e-3, atol=1e-7)


def test_a_representation_diverges_from_itself_by_nothing_and_from_others_by_more():
    one, other = (
        JOINT(exact_distances(points(kind)), 30.0).probabilities for kind in ("normal", "skewed")
    )
    assert abs(float(similarity.divergence(one, one))) < 1e-6
    assert float(similarity.divergence(one, other)) > 0.01


def test_distances_that_are_not_finite_give_nan():
    distances = exact_distances(points("normal"))
    distances[2, 5] = distances[5, 2] = np.nan
    joint = JOINT(distances, 30.0).probabilities
    assert not np.isfinite(similarity.divergence(joint, joint))


def test_centred_kernel_alignment_against_its_definition():
    first, second = points("relu", 0, 30), points("skewed", 1, 30)[:, :20]
    centring = np.eye(30) - 1 / 30
    grams = [centring @ (v @ v.T).astype(np.float64) @ centring for v in (first, second)]
    expected = np.trace(grams[0] @ grams[1]) / np.sqrt(
        np.trace(grams[0] @ grams[0]) * np.trace(grams[1] @ grams[1])
    )

    def cka(a, b):
        return float(
            similarity.centred_kernel_alignment(
                *(similarity.centred_gram(jnp.asarray(v)) for v in (a, b))
            )
        )

    np.testing.assert_allclose(cka(first, second), expected, rtol=1e-4)
    rotation = np.linalg.qr(np.random.default_rng(2).normal(size=(50, 50)))[0].astype(np.float32)
    np.testing.assert_allclose(cka(first, 4 * first @ rotation + 2), 1, atol=1e-4)
    assert cka(first, np.full((30, 5), 2.0, np.float32)) == 0


def test_layers_map():
    distances = np.stack([exact_distances(points("relu", seed)) for seed in range(3)])
    mapped = jax.vmap(lambda d: JOINT(d, 30.0).probabilities)(distances)
    for index in range(3):
        single = JOINT(distances[index], 30.0).probabilities
        np.testing.assert_allclose(mapped[index], single, atol=1e-8)
