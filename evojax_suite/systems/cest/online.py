"""Selection within each step: gradients of the best of many candidates.

A step takes the losses of its share of the training set, in a forward pass, and learns from a batch
of them: from those of the highest reducible loss (Mindermann et al. 2022, RHO-LOSS, algorithm 1),
or from a sample by the rank of the loss (Jiang et al. 2019, "Accelerating Deep Learning by Focusing
on the Biggest Losers"). Where the latter decides over each example by itself, with probability
rank^beta of which 1 in 1 + beta passes, here as many are drawn without replacement.
"""

from __future__ import annotations

from collections.abc import Callable

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax
from jaxtyping import Float, Int

from evojax_suite import training
from evojax_suite.types import Array, Images, IntScalar, Labels, PRNGKey, Scalar

Priorities = Callable[
    [PRNGKey, Float[Array, "candidates"], Int[Array, "candidates"]], Float[Array, "candidates"]
]
"""A function of key, losses and places in the training set to priorities, high ones first."""


def reducible_losses(
    key: PRNGKey,
    losses: Float[Array, "candidates"],
    irreducible: Float[Array, "candidates"],
    temperature: float | Scalar,
) -> Float[Array, "candidates"]:
    """Priorities by the loss less the irreducible one. temperature: in nats; above 0 examples are
    drawn with probabilities proportional to exp(reducible loss / temperature), as far as any are
    left."""
    noise = jax.random.gumbel(key, losses.shape)
    return losses - irreducible + temperature * noise


def loss_ranks(
    key: PRNGKey, losses: Float[Array, "candidates"], beta: float
) -> Float[Array, "candidates"]:
    """Priorities of a sample with probabilities proportional to rank^beta; ranks rise with the
    loss."""
    ranks = (losses.argsort().argsort() + 1) / len(losses)
    return beta * jnp.log(ranks) + jax.random.gumbel(key, losses.shape)


def steps_and_batch(config: training.TrainingConfig, num_gradients: int) -> tuple[int, int]:
    """The steps of an epoch that computes at most `num_gradients`, and those of each."""
    batch_size = min(config.batch_size or num_gradients, num_gradients)
    return num_gradients // batch_size, batch_size


def num_candidates(config: training.TrainingConfig, num_images: int, num_gradients: int) -> int:
    """The examples of which an epoch takes the loss to choose from."""
    steps, _ = steps_and_batch(config, num_gradients)
    return steps * (num_images // steps)


def fit_epoch(
    key: PRNGKey,
    network: nn.Module,
    config: training.TrainingConfig,
    total_steps: int | IntScalar,
    state: training.FitState,
    images: Images,
    labels: Labels,
    num_gradients: int,
    priorities: Priorities,
) -> tuple[training.FitState, training.ExampleStatistics]:
    """An epoch over a training set of which `num_gradients` examples, or a few less, are learnt
    from. total_steps: of the whole training, for the schedule. images: normalised. Returns the
    statistics of these, infinite losses where training failed, and NaN and False of the others."""
    num_images = len(images)
    steps, batch_size = steps_and_batch(config, num_gradients)
    share = num_images // steps
    key_order, key_steps = jax.random.split(key)
    order = jax.random.permutation(key_order, num_images)
    num_classes = jax.eval_shape(network.apply, state.variables, images[:1]).shape[-1]

    def step(number: Array, carry: tuple[training.FitState, training.ExampleStatistics]):
        state, seen = carry
        key_choose, key_fit = jax.random.split(jax.random.fold_in(key_steps, number))
        places = jax.lax.dynamic_slice(order, (number * share,), (share,))
        logits = jnp.asarray(network.apply(state.variables, images[places]))
        losses = optax.softmax_cross_entropy_with_integer_labels(logits, labels[places])
        values = priorities(key_choose, losses, places)
        values = jnp.where(jnp.isfinite(values), values, -jnp.inf)
        chosen = places[jax.lax.top_k(values, batch_size)[1]]
        batch = images[chosen], jax.nn.one_hot(labels[chosen], num_classes), jnp.ones(batch_size)
        state, new = training.fit_step(key_fit, network, config, total_steps, state, *batch)
        new = new._replace(losses=jnp.nan_to_num(new.losses, nan=jnp.inf, posinf=jnp.inf))
        return state, jax.tree.map(lambda old, part: old.at[chosen].set(part), seen, new)

    nothing = training.ExampleStatistics(jnp.full(num_images, jnp.nan), jnp.zeros(num_images, bool))
    return jax.lax.fori_loop(0, steps, step, (state, nothing))
