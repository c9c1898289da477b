"""A program for each layer trains a network as the program of the whole network does."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from evojax_suite import training as engine
from evojax_suite.systems.de_nas import candidates, layered
from evojax_suite.systems.de_nas.architectures import Unit
from evojax_suite.systems.de_nas.networks import SequenceNetwork

SHAPE = (8, 8, 1)
UNITS = (
    Unit("convolution", 3, 8),
    Unit("convolution", 5, 8),
    Unit("max"),
    Unit("convolution", 1, 16),
    Unit("average"),
    Unit("convolution", 7, 16),
)
RECIPE = engine.TrainingConfig(
    num_epochs=2, batch_size=32, schedule="cosine", crop_padding=1, optimizer="sgd", flip=True,
    learning_rate=0.05,
)  # fmt: skip


def examples():
    key_images, key_labels = jax.random.split(jax.random.key(7))
    return jax.random.normal(key_images, (70, *SHAPE)), jax.random.randint(key_labels, (70,), 0, 5)


@pytest.mark.parametrize(
    "settings",
    [{}, {"normalization": "batch", "skip": True, "head": "linear", "dropout": 0.2}],
    ids=["the paper's", "recommended"],
)
def test_training_and_evaluation_are_those_of_the_whole_network(settings):
    network = SequenceNetwork(5, UNITS, **settings)
    images, labels = examples()
    key, targets = jax.random.key(1), jax.nn.one_hot(labels, 5)
    start = layered.start(key, network, RECIPE, SHAPE, "kaiming")
    whole = engine.start_fit_from(start.variables, RECIPE)

    def fit(whole):
        return engine.fit_epochs(key, network, RECIPE, 6, whole, images, targets, 70, 1)[0]

    # Compiled alike: batch normalisation of few pixels makes much of a rounding.
    whole = jax.jit(fit, compiler_options=layered.COMPILER_OPTIONS)(whole)
    programs = [layered._forward, layered._backward]
    known = [program._cache_size() for program in programs]
    trained = layered.train(key, start, 6, images, targets, 1)
    for program, number in zip(programs, known, strict=True):
        assert program._cache_size() - number <= len(UNITS)  # none but those of the first step
    before, after, expected = (
        np.concatenate([np.ravel(leaf) for leaf in jax.tree.leaves(tree)])
        for tree in (start.variables, trained.variables, whole.variables)
    )
    assert np.linalg.norm(after - expected) < 1e-3 * np.linalg.norm(expected - before)
    batches = engine.make_batches(images, labels, 32)
    found = layered.evaluate(trained, batches)
    expected = engine.evaluate(network, whole.variables, batches)
    assert float(found.accuracy) == pytest.approx(float(expected.accuracy), abs=0.015)
    assert float(found.cross_entropy) == pytest.approx(float(expected.cross_entropy), rel=1e-3)


def test_networks_share_the_programs_of_layers_of_equal_shape():
    images, labels = examples()
    targets = jax.nn.one_hot(labels, 5)

    def train(units):
        network = SequenceNetwork(5, units, dropout=0.0)
        start = layered.start(jax.random.key(0), network, RECIPE, SHAPE, "kaiming")
        layered.train(jax.random.key(1), start, 3, images, targets, 1)
        return layered._forward._cache_size(), layered._backward._cache_size()

    before = train(UNITS)
    more = tuple(number + 1 for number in before)
    assert train((*UNITS, *[Unit("convolution", 3, 16)] * 3)) == more
    assert train(UNITS[:4]) == more


def test_a_candidate_stops_at_a_rung_that_it_does_not_reach():
    images, labels = examples()
    batches = engine.make_batches(images, labels, 35)
    data = candidates.Data(
        images, labels.astype(jnp.int32), batches, mean=jnp.zeros(1), std=jnp.ones(1)
    )
    network = SequenceNetwork(5, UNITS[:3], dropout=0.0)
    how = jax.random.key(0), network, RECIPE, (1, 2), "kaiming", data
    evaluation, accuracies, epochs, seconds = layered.evaluate_candidate(*how, np.array([1.1]))
    assert epochs == 1
    assert np.isnan(accuracies[1])
    assert accuracies[0] == evaluation.accuracy
    assert seconds["training"] > 0
    _, accuracies, epochs, _ = layered.evaluate_candidate(*how, np.array([0.0]))
    assert epochs == 2
    assert np.isfinite(accuracies).all()
