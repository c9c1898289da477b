"""Subsets by the gradients of the last layer, which a pass over the training set gives for nothing.

The gradient of an example's cross-entropy by the weights and biases of the last layer is the outer
product of p - y, the predicted probabilities less the label, and the layer's inputs. Its inner
products are products of two small ones, so that no gradient is ever written out.

Sources: GraNd and EL2N (Paul, Ganguli & Dziugaite 2021, "Deep Learning on a Data Diet"), CRAIG
(Mirzasoleiman, Bilmes & Leskovec 2020, "Coresets for Data-efficient Training of Machine Learning
Models", algorithm 1) and GradMatch (Killamsetty et al. 2021, "Grad-Match", algorithm 2), the latter
two for each class by itself, as their authors' programs do. A GradMatch step solves for weights >=
0 by cutting negative ones off.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Bool, Float, Int

from evojax_suite.systems.cest.subsets import Groups
from evojax_suite.types import Array, Images, Labels, PRNGKey, PyTree

NUM_SKETCHED = 256
"""Numbers to which a gradient is projected where only sums of gradients matter."""
_GRADMATCH_RIDGE = 0.5  # on the weights, as Killamsetty et al. 2021 set it


class Outputs(NamedTuple):
    """The outputs of a network for each example, without training."""

    losses: Float[Array, "examples"]  # cross-entropy in nats
    correct: Bool[Array, "examples"]
    residuals: Float[Array, "examples classes"]  # p - y
    inputs: Float[Array, "examples features"]  # of the last layer, and 1 for its biases


def last_layer(network: nn.Module, variables: PyTree, images: Images) -> tuple[Array, Array]:
    """The logits of a network whose last layer is fully connected, and that layer's inputs."""
    seen: list[Array] = []

    def note(call: Any, arguments: Any, keywords: Any, context: Any):
        output = call(*arguments, **keywords)
        if context.method_name == "__call__" and getattr(output, "ndim", 0) == 2:
            seen.append(arguments[0])
        return output

    with nn.intercept_methods(note):
        logits = jnp.asarray(network.apply(variables, images))
    inner = [values for values in seen if values.ndim == 2]
    if not inner:
        raise ValueError(f"{type(network).__name__} has no fully connected last layer")
    return logits, inner[-1].astype(jnp.float32)


def outputs(
    network: nn.Module, variables: PyTree, images: Images, labels: Labels, batch_size: int
) -> Outputs:
    """The outputs for each normalised image."""

    def each(example: tuple[Array, Array]) -> Outputs:
        image, label = example
        logits, inputs = (part[0] for part in last_layer(network, variables, image[None]))
        target = jax.nn.one_hot(label, len(logits))
        loss = optax.softmax_cross_entropy_with_integer_labels(logits, label)
        inputs = jnp.append(inputs, 1.0)
        return Outputs(loss, logits.argmax() == label, jax.nn.softmax(logits) - target, inputs)

    return jax.lax.map(each, (images, labels), batch_size=min(batch_size, len(images)))


def norms(found: Outputs) -> Float[Array, "examples"]:
    """The norm of each example's gradient (GraNd, of the last layer)."""
    return error_norms(found) * jnp.linalg.norm(found.inputs, axis=1)


def error_norms(found: Outputs) -> Float[Array, "examples"]:
    """The norm of p - y (EL2N)."""
    return jnp.linalg.norm(found.residuals, axis=1)


def sketched(key: PRNGKey, found: Outputs) -> Float[Array, "examples numbers"]:
    """Random projections of the gradients, whose inner products are theirs in expectation: each
    number is the product of a projection of p - y and one of the inputs."""
    key_residuals, key_inputs = jax.random.split(key)
    residuals = jax.random.normal(key_residuals, (found.residuals.shape[1], NUM_SKETCHED))
    inputs = jax.random.normal(key_inputs, (found.inputs.shape[1], NUM_SKETCHED))
    return (found.residuals @ residuals) * (found.inputs @ inputs) / np.sqrt(NUM_SKETCHED)


def _by_group(groups: Groups, found: Outputs, choose: Any) -> tuple[Array, Array]:
    """Places and weights of a subset, `choose`n for each group from the inner products of its
    gradients. Groups are chosen from as if each had the most places, and cut to their own."""
    places = jnp.searchsorted(groups.places, jnp.arange(len(groups.counts) + 1))
    most = -(-len(groups.places) // len(groups.counts))  # shares are equal, or differ by one

    def group(inputs: tuple[Array, Array]) -> tuple[Array, Array]:
        members, count = inputs
        real = jnp.arange(len(members)) < count
        residuals, features = found.residuals[members], found.inputs[members]
        products = (residuals @ residuals.T) * (features @ features.T)
        chosen, weights = choose(products, real, most)
        return members[chosen], weights

    members, weights = jax.lax.map(group, (groups.members, groups.counts))
    within = jnp.arange(len(groups.places)) - places[groups.places]
    subset, weight = members[groups.places, within], weights[groups.places, within]
    return subset, weight / jnp.maximum(weight.mean(), 1e-12)


def craig(found: Outputs, groups: Groups) -> tuple[Int[Array, "places"], Float[Array, "places"]]:
    """The greedy facility location of gradients, and how many examples each one stands for, on
    average 1. Takes (examples of a group)^2 numbers of memory."""

    def choose(products: Array, real: Array, most: int) -> tuple[Array, Array]:
        square = jnp.diagonal(products)
        distances = jnp.sqrt(jnp.maximum(square[:, None] + square - 2 * products, 0.0))
        similarity = jnp.where(real[:, None], distances.max() - distances, 0.0)

        def add(carry: tuple[Array, Array], _: None):
            nearest, free = carry
            gain = jnp.maximum(similarity - nearest[:, None], 0.0).sum(0)
            new = jnp.where(free, gain, -1.0).argmax()
            return (jnp.maximum(nearest, similarity[:, new]), free.at[new].set(False)), new

        start = jnp.zeros(len(real)), real
        _, chosen = jax.lax.scan(add, start, length=most)
        owner = similarity[:, chosen].argmax(1)
        return chosen, jnp.zeros(most).at[owner].add(real.astype(jnp.float32))

    return _by_group(groups, found, choose)


def grad_match(
    found: Outputs, groups: Groups
) -> tuple[Int[Array, "places"], Float[Array, "places"]]:
    """Orthogonal matching pursuit of each group's summed gradient, and the weights of the chosen,
    on average 1. Takes (examples of a group)^2 numbers of memory."""

    def choose(products: Array, real: Array, most: int) -> tuple[Array, Array]:
        products = jnp.where(real[:, None] & real, products, 0.0)
        products /= jnp.maximum(jnp.trace(products) / jnp.maximum(real.sum(), 1), 1e-12)
        target = products.sum(1)  # inner products with the sum
        place = jnp.arange(most)

        def add(carry: tuple[Array, Array, Array], index: Array):
            chosen, weights, free = carry
            residual = target - products[:, chosen] @ weights
            new = jnp.where(free, residual, -jnp.inf).argmax()
            chosen = chosen.at[index].set(new)
            inside = place <= index
            gram = jnp.where(inside[:, None] & inside, products[chosen][:, chosen], 0.0)
            gram += _GRADMATCH_RIDGE * jnp.eye(most)
            solved = jax.scipy.linalg.solve(gram, target[chosen] * inside, assume_a="pos")
            return (chosen, jnp.maximum(solved, 0.0) * inside, free.at[new].set(False)), None

        start = jnp.zeros(most, jnp.int32), jnp.zeros(most), real
        (chosen, weights, _), _ = jax.lax.scan(add, start, place)
        return chosen, weights

    return _by_group(groups, found, choose)
