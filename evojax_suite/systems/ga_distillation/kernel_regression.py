"""Fitness of a synthetic dataset in closed form: kernel regression on features of a network.

Training a network on every candidate makes evolution of datasets slow. Here one network, as it is
initialised, gives features of some real images once and of every candidate's few images; the ridge
regression from the candidate's images to their labels has a closed form (n x n equations) and
predicts the real images. Regression on random features as a substitute for training is the idea of
KIP (Nguyen et al. 2021) and of FRePo (Zhou et al. 2022), which descend its error by gradients of
images; nothing here is differentiated.

Credit is cheap here. Features belong to images, not to datasets: once they are computed, the
images of different candidates combine into new datasets at the price of a small solve. So image s
of a candidate is evaluated alone, in the company of the other images of a few candidates, and its
loss is free of the noise of its siblings. The company is fitted once without image s; adding an
image to a fitted regression is a step of Gaussian elimination (Rasmussen and Williams 2006, A.3),
so that thousands of combinations cost less than the features of a ConvNet-3 do (on images of 8 x 8
they cost more: make `company` smaller).

With one image a class, an image is ranked by the column of its class, not by the sum of all, and
the company evolves as well. Ranked by the sum, with a constant company, images lower the error as
fast, but trained networks lose eight points of a hundred, as images come to depend on what the
solve makes of the others (experiments/ga_distillation, "What decides"). With ten images a class the
sum ranks better (`columns`). A gradient of the sum, by which all images move at once, is faster
than either ("For equal seconds" there).

The error is that of a classifier, not of a regression: predictions f (num_classes,) of an image
become probabilities softmax(temperature * f), and the loss of class c is the mean of
(probability of c - [label is c])^2, column c of the Brier score. Squared error of f itself,
temperature 0, spends most of its effort on images that are classified right already.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from functools import partial
from typing import Any, Literal, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Float, Int, Shaped
from pydantic import NonNegativeFloat, PositiveFloat, PositiveInt

from evojax_suite.configuration import configuration
from evojax_suite.training import EngineConfig, extract_features, map_members
from evojax_suite.types import Array, Images, Labels, PRNGKey, Probabilities, PyTree, Scalar

Columns = Literal["own", "all"]


@dataclass(frozen=True)
class Regression:
    """The settings of a regression; the fields are those of `KernelConfig`."""

    kernel_images: int = 1000
    ridge: float = 1e-3
    temperature: float = 10.0
    company: int = 8
    columns: Columns = "own"


_SUITED = {
    1: Regression(),
    10: Regression(ridge=0.3, temperature=5.0, company=2, columns="all"),
    50: Regression(ridge=1.0, temperature=5.0, company=1, columns="all"),
}
"""The best settings known, by the number of images of each class on which networks train."""


@configuration
class KernelConfig:
    """Sizes and scalars of the regression. None depends on the number of images of each class on
    which networks train: the value for 1, 10 or 50, the nearest at or below it."""

    kernel_width: PositiveInt = 32
    """Filters of the networks whose features are regressed on; all else is as in `network`."""
    kernel_images: PositiveInt = 1000
    """Real images, drawn anew in each generation, that are predicted."""
    ridge: PositiveFloat | None = None
    """Ridge, relative to the mean squared norm of the candidate's features; None is 1e-3, 0.3, 1
    for 1, 10, 50 images of each class."""
    temperature: NonNegativeFloat | None = None
    """Factor of the predictions in the softmax, >= 0; 0 is squared error without a softmax; None is
    10, or 5 from 10 images of each class on."""
    company: PositiveInt | None = None
    """Candidates in whose company each image is evaluated alone, where a strategy takes credit by
    image; None is 8, 2, 1 for 1, 10, 50 images of each class."""
    columns: Columns | None = None
    """Loss by which an image is ranked: own, that of the column of its class, or the mean over all
    columns; None is own for less than 10 images of each class, else all."""

    def regression(self, images_per_class: int) -> Regression:
        """All settings, for that many images of each class on which networks train, >= 1."""
        best = _SUITED[max(known for known in _SUITED if known <= images_per_class)]
        given = {field.name: getattr(self, field.name) for field in fields(Regression)}
        return replace(best, **{name: value for name, value in given.items() if value is not None})


class Credit(NamedTuple):
    """The losses of each image of a candidate in the company of other candidates' images."""

    own: Float[Array, "population images"]  # of the column of the image's class
    all: Float[Array, "population images"] | None  # the mean of all columns


class KernelScores(NamedTuple):
    """Scores of each candidate."""

    losses: Float[Array, "population classes"]  # of each class's column, lower is better
    accuracy: Float[Array, "population"]  # of the class with the largest prediction
    credit: Credit | None


def predict(
    kernel: Float[Array, "points points"],
    labels: Float[Array, "points classes"],
    to_new: Float[Array, "new_points points"],
    penalty: float | Scalar,
) -> Float[Array, "new_points classes"]:
    """The predictions of kernel ridge regression at new points. kernel: of the points with
    themselves. to_new: of the new points with them. penalty: added to the diagonal."""
    kernel += penalty * jnp.eye(len(kernel))
    weights = jax.scipy.linalg.solve(kernel, labels, assume_a="pos")
    return jnp.matmul(to_new, weights, precision="highest")


def class_losses(
    predictions: Probabilities, labels: Labels, temperature: float
) -> Float[Array, "classes"]:
    """The loss of each class's column of predictions."""
    if temperature != 0:
        predictions = jax.nn.softmax(temperature * predictions)
    return ((predictions - jax.nn.one_hot(labels, predictions.shape[1])) ** 2).mean(0)


class Kernels(NamedTuple):
    """Kernels of some candidates' images, and the labels that are regressed on them."""

    own: Float[Array, "population images images"]
    real: Float[Array, "population real_images images"]  # with the real images
    labels: Float[Array, "population images classes"]  # centred


def credit_by_image(
    candidates: Kernels,
    company: Kernels,
    between: Float[Array, "company population images images"],
    classes: Labels,
    real_labels: Int[Array, "real_images"],
    config: Regression,
    all_columns: bool = False,
) -> Credit:
    """The losses of each image of the candidates alone, in place of one of another dataset.

    The datasets are those of `company`, of equal size; losses are averaged over them. between:
    kernels of the candidates' images with those of the company. classes: of the images.
    all_columns: whether to compute the mean over all columns too.
    """
    num_candidates, num_real, num_images = candidates.real.shape
    num_classes = candidates.labels.shape[-1]
    own = jnp.moveaxis(jnp.diagonal(candidates.own, axis1=1, axis2=2), 0, 1)  # (n, P)
    to_real = jnp.moveaxis(candidates.real, 2, 0)  # (n, P, m)
    labels = jnp.moveaxis(candidates.labels, 1, 0)  # (n, P, C)
    product = partial(jnp.einsum, precision="highest")

    def in_company(company: Kernels, between: Array) -> Credit:
        penalty = config.ridge * jnp.trace(company.own) / num_images
        identity = jnp.eye(num_images)
        inverse = jax.scipy.linalg.solve(company.own + penalty * identity, identity, assume_a="pos")

        def of_image(image: Array) -> Credit:
            # The inverse without the image's row and column, which become zero.
            column = inverse[:, image]
            rest = inverse - column[:, None] * column / column[image]
            weights = product("ij,jc->ic", rest, company.labels)
            to_rest = between[:, image]
            projected = product("ij,pj->ip", rest, to_rest)
            without = product("mi,ic->mc", company.real, weights)
            residual = labels[image] - product("pi,ic->pc", to_rest, weights)
            # The part of the candidate's image that the others do not span, and its kernel with
            # the real images.
            variance = own[image] + penalty - product("pi,ip->p", to_rest, projected)
            reach = to_real[image] - product("mi,ip->pm", company.real, projected)
            change = residual / jnp.maximum(variance, penalty)[:, None]
            label = classes[image]
            target = (real_labels == label).astype(jnp.float32)
            if config.temperature == 0:
                predictions = without + 1 / num_classes + reach[:, :, None] * change[:, None]
                errors = ((predictions - jax.nn.one_hot(real_labels, num_classes)) ** 2).mean(1)
                return Credit(errors[:, label], errors.mean(1) if all_columns else None)

            # Odds against the image's class, one class after the other, so that all stays in
            # registers: an array (P, m, C) would be most of the cost of credit.
            without = config.temperature * (without - without[:, label, None])
            change = config.temperature * (change - change[:, label, None])

            def odds(column: Array) -> Array:
                against = without[:, column] + reach * change[:, column, None]
                return jnp.exp(jnp.minimum(against, 80))  # more would overflow

            def summed(terms: Callable[[Array], Array]) -> Array:
                def add(column: Array, total: Array):
                    return total + terms(column)

                zeros, unroll = jnp.zeros_like(reach), min(num_classes, 16)
                return jax.lax.fori_loop(0, num_classes, add, zeros, unroll=unroll)

            total = summed(odds)
            of_class = ((1 / total - target) ** 2).mean(1)
            if not all_columns:
                return Credit(of_class, None)

            def error(column: Array) -> Array:
                return (odds(column) / total - (real_labels == column)) ** 2

            return Credit(of_class, summed(error).mean(1) / num_classes)

        at_once = 2**19 if jax.default_backend() == "cpu" else 2**26
        together = max(1, at_once // (num_candidates * num_real))
        return jax.lax.map(of_image, jnp.arange(num_images), batch_size=together)

    credit = jax.lax.map(lambda pair: in_company(*pair), (company, between))
    # A company whose features are not finite is left out of the mean.
    return jax.tree.map(lambda losses: jnp.nanmean(losses, 0).T, credit)


def solve_labels(
    key: PRNGKey,
    config: Regression,
    network: nn.Module,
    num_networks: int,
    images: Images,
    tiles: int,
    real_images: Shaped[Array, "real_images height width channels"],
    targets: Float[Array, "real_images classes"],
    normalize: Callable[[Array], Array],
    engine: EngineConfig,
) -> Float[Array, "images//{tiles} classes"]:
    """The labels of synthetic images from which the regression predicts `targets` of real images
    with the least squared error, over `num_networks` fresh networks (label solve, Nguyen et al.
    2021).

    images: synthetic, each `tiles` in order share a label. real_images: not yet normalised;
    `config.kernel_images` of them, drawn anew for each network, are predicted.
    """
    number = min(config.kernel_images, len(real_images))

    def equations(key: Array) -> tuple[Array, Array]:
        key_network, key_images = jax.random.split(key)
        variables = jax.tree.map(lambda leaf: leaf[None], network.init(key_network, images[:1]))
        drawn = jax.random.choice(key_images, len(real_images), (number,), replace=False)
        features = features_of(network, variables, images, engine)
        real = features_of(network, variables, normalize(real_images[drawn]), engine)
        product = partial(jnp.matmul, precision="highest")
        kernel = product(features, features.T)
        penalty = config.ridge * jnp.trace(kernel) / len(images)
        # Predictions are linear in labels: real @ features.T @ inverse @ labels.
        inverse = jnp.linalg.inv(kernel + penalty * jnp.eye(len(images)))
        reach = product(product(real, features.T), inverse).reshape(number, -1, tiles).sum(2)
        return product(reach.T, reach), product(reach.T, targets[drawn])

    squares, products = jax.lax.map(equations, jax.random.split(key, num_networks))
    return jnp.linalg.solve(squares.sum(0), products.sum(0))


def features_of(
    network: nn.Module, variables: PyTree, images: Images, engine: EngineConfig
) -> Float[Array, "images features"]:
    """Features of images by several networks, side by side, and 1 for the intercept; their kernel
    is the sum of the networks' kernels. variables: with a leading axis, an entry for each network.
    """
    batch_size = engine.resolved_evaluation_batch_size(images.shape[1:])

    def features(variables: PyTree) -> Array:
        return extract_features(network, variables, images, None, batch_size)

    joined = jnp.moveaxis(jax.lax.map(features, variables), 0, 1).reshape(len(images), -1)
    return jnp.concatenate([joined, jnp.ones((len(images), 1))], -1)


def score_population(
    key: PRNGKey,
    config: Regression,
    network: nn.Module,
    num_networks: int,
    decode: Callable[[Array], Any],
    population: Float[Array, "population dims"],
    members: Int[Array, "members"],
    images: Shaped[Array, "real_images height width channels"],
    labels: Int[Array, "real_images"],
    normalize: Callable[[Array], Array],
    engine: EngineConfig,
    classes: Labels | None = None,
    all_columns: bool = False,
) -> KernelScores:
    """Scores of candidates by the regression's predictions of real images, with the same
    `num_networks` fresh networks and the same `config.kernel_images` real images for all.

    decode: turns a candidate into images (n, H, W, C) and the labels (n, classes) that are
    regressed on them. members: distinct indices of the candidates to score. images, labels: real
    ones, not yet normalised. classes: of a candidate's images, for credit by image in the company
    of `config.company` candidates, spread evenly over the population; None is no credit.
    all_columns: as in `credit_by_image`.
    """
    image_shape = images.shape[1:]
    key_networks, key_images = jax.random.split(key)
    keys, blank = jax.random.split(key_networks, num_networks), jnp.zeros((1, *image_shape))
    variables = jax.vmap(lambda key: network.init(key, blank))(keys)
    number = min(config.kernel_images, len(images))
    drawn = jax.random.randint(key_images, (number,), 0, len(images))
    real, real_labels = normalize(images[drawn]), labels[drawn]
    real_features = features_of(network, variables, real, engine)
    product = partial(jnp.einsum, precision="highest")

    def prepared(candidates: Array) -> tuple[Array, Kernels]:
        """Features (P, n, F) and kernels of candidates (P, dims)."""
        individuals = jax.eval_shape(decode, population[0])
        num_images, num_classes = individuals.labels.shape
        group = max(1, engine.resolved_evaluation_batch_size(image_shape) // num_images)

        def of_candidate(candidate: Array) -> tuple[Array, Array]:
            individual = decode(candidate)
            features = features_of(network, variables, individual.images, engine)
            return features, individual.labels

        features, labels = map_members(of_candidate, (candidates,), group)
        return features, Kernels(
            own=product("pif,pjf->pij", features, features),
            real=product("mf,pif->pmi", real_features, features),
            labels=labels - 1 / num_classes,  # an error of the intercept would move all columns
        )

    features, kernels = prepared(population[members])

    def score(candidate: Kernels) -> tuple[Array, Array]:
        kernel, to_real, targets = candidate
        penalty = config.ridge * jnp.trace(kernel) / len(kernel)
        predictions = predict(kernel, targets, to_real, penalty) + 1 / targets.shape[-1]
        losses = class_losses(predictions, real_labels, config.temperature)
        return losses, (predictions.argmax(1) == real_labels).mean()

    # On a CPU one after the other: a batch of solves waits for threads that wait for it, and the
    # whole program stands still.
    on_cpu = jax.default_backend() == "cpu"
    at_once = None if on_cpu else max(1, 2**22 // kernels.real[0].size)
    losses, accuracy = jax.lax.map(score, kernels, batch_size=at_once)
    credit = None
    if classes is not None:
        size = min(config.company, len(population))
        chosen = jnp.arange(size) * len(population) // size
        if len(members) == len(population):  # all, in any order: none is computed twice
            places = jnp.argsort(members)[chosen]
            company_features, company = jax.tree.map(lambda leaf: leaf[places], (features, kernels))
        else:
            company_features, company = prepared(population[chosen])
        between = product("pif,rjf->rpij", features, company_features)
        of_images = classes, real_labels, config, all_columns
        credit = credit_by_image(kernels, company, between, *of_images)
    return KernelScores(losses, accuracy, credit)
