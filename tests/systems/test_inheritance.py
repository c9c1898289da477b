"""Weights that a child takes over: it computes what its elder does where it only has more, and goes
on from there."""

from __future__ import annotations

import operator
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from evojax_suite import de_nas, load
from evojax_suite.systems.de_nas import architectures, candidates
from evojax_suite.systems.de_nas.architectures import Genome, Space, Unit
from evojax_suite.systems.de_nas.inheritance import Elder, inherited, most_alike
from evojax_suite.systems.de_nas.networks import PaddedNetwork, for_genome, unpadded
from evojax_suite.training import evaluate

SPACE = Space(
    min_length=3, max_length=6, kernels=(1, 3, 5), min_first_filters=2, max_first_filters=4,
    max_filters=6, max_features=200,
)  # fmt: skip
SHAPE = (9, 8, 2)
NETWORK = PaddedNetwork(3, SPACE, SHAPE, dropout=0.0)
IMAGES = jax.random.normal(jax.random.key(7), (5, *SHAPE))
ELDER = Unit("convolution", 3, 3), Unit("max"), Unit("convolution", 1, 4), Unit("average")


def genome_of(*units):
    return architectures.from_units(units, SPACE.max_length)


def parameters_of(genome, seed=0):
    drawn = NETWORK.init(jax.random.key(seed), IMAGES[:1])["params"]
    return for_genome(NETWORK, drawn, genome)


def outputs(genome, parameters):
    variables = {"params": parameters, "genome": genome._asdict()}
    return NETWORK.apply(variables, IMAGES)


@pytest.fixture(scope="module")
def elder():
    genome = genome_of(*ELDER)
    return Elder(genome, parameters_of(genome))


@pytest.fixture(scope="module")
def child_of(elder):
    take = jax.jit(lambda genome, fresh: inherited(NETWORK, genome, fresh, elder))

    def child(*units):
        genome = genome_of(*units)
        return genome, take(genome, parameters_of(genome, 1))

    return child


@pytest.mark.parametrize(
    "units",
    [
        ELDER,
        (Unit("convolution", 5, 3), *ELDER[1:]),  # a wider kernel
        (Unit("convolution", 3, 5), *ELDER[1:]),  # more filters
        (*ELDER[:2], Unit("convolution", 3, 6), ELDER[3]),  # which the dense layers read
        (*ELDER, Unit("convolution", 3, 4)),  # another unit
        (*ELDER, Unit("convolution", 5, 6), Unit("convolution", 1, 6)),
    ],
)
def test_what_only_grew_computes_what_it_did(units, elder, child_of):
    np.testing.assert_allclose(
        outputs(*child_of(*units)), outputs(elder.genome, elder.parameters), atol=1e-5
    )


def test_what_was_added_learns(child_of):
    """The weights that are 0 have a gradient, and so have those of the new filters then."""
    genome, parameters = child_of(Unit("convolution", 5, 5), *ELDER[1:])

    def loss(parameters):
        return (outputs(genome, parameters) ** 2).sum()

    for _ in range(2):
        gradient = jax.grad(loss)(parameters)
        parameters = jax.tree.map(lambda leaf, g: leaf - 1e-2 * g, parameters, gradient)
    assert (jnp.abs(gradient["first"][:, :, :, :5]) > 0).all()
    assert (jnp.abs(gradient["kernels"][1, 2, 2, :5, :4]) > 0).all()


def test_what_is_left_stays_and_other_poolings_have_fresh_dense_layers(elder, child_of):
    fewer, parameters = child_of(Unit("convolution", 1, 2), *ELDER[1:])
    np.testing.assert_array_equal(
        parameters["first"][2, 2, :, :2], elder.parameters["first"][2, 2, :, :2]
    )
    np.testing.assert_array_equal(
        parameters["kernels"][1, 2, 2, :2, :4], elder.parameters["kernels"][1, 2, 2, :2, :4]
    )
    assert int(architectures.num_features(fewer, SHAPE)) > 0
    other, parameters = child_of(*ELDER[:3])
    middle = np.s_[1:4, 1:4, :, :3]  # the elder's kernel
    np.testing.assert_array_equal(parameters["first"][middle], elder.parameters["first"][middle])
    np.testing.assert_array_equal(parameters["dense_0"], parameters_of(other, 1)["dense_0"])


def test_without_an_elder_everything_is_fresh(elder):
    genome = genome_of(*ELDER)
    nothing = Elder(Genome(*map(jnp.zeros_like, genome)), elder.parameters)
    fresh = parameters_of(genome, 1)
    for name, leaf in inherited(NETWORK, genome, fresh, nothing).items():
        np.testing.assert_array_equal(leaf, fresh[name])


def test_the_elder_is_the_most_alike_from_the_first_unit_on():
    child = genome_of(*ELDER)
    others = [
        (Unit("convolution", 1, 3), *ELDER[1:]),
        (*ELDER[:2], Unit("convolution", 3, 4), ELDER[3]),
        ELDER[:2],
    ]
    survivors = Genome(*map(np.stack, zip(*(genome_of(*each) for each in others), strict=True)))
    alike = most_alike(Genome(*map(np.asarray, child)), survivors)
    assert alike.argmax() == 1
    assert alike.argmin() == 0


DIGITS = load("digits")


def found(config, epochs, stop=None):
    """The accuracies of the children, and the last state."""
    algorithm = de_nas.build(config, 10, DIGITS.image_shape)
    data = de_nas.make_data(config, DIGITS)
    state = algorithm.init(jax.random.key(0), de_nas.Params(), data)
    for number in range(config.num_candidates):
        if number == stop:  # as after an interruption
            algorithm = de_nas.build(config, 10, DIGITS.image_shape)
            state = jax.tree.map(jnp.array, jax.device_get(state))
        key = jax.random.fold_in(jax.random.key(1), number)
        state, metrics = algorithm.step(key, state, de_nas.Params(), data)
        is_child = number >= config.population_size
        assert metrics.num_epochs == (epochs if is_child else config.training.num_epochs)
    return np.asarray(state.accuracy)[config.population_size :], state


def assert_final_trainings_go_on(config, state):
    """They begin with networks that are as accurate as the search says."""
    data, shape = de_nas.make_data(config, DIGITS), DIGITS.image_shape
    result = de_nas.build(config, 10, shape).result(state, de_nas.Params(), data)
    padded = candidates.padded_network(config, 10, shape)
    for place, accuracy in enumerate(result.accuracy):
        genome = architectures.member(result.genomes, place)
        parameters = jax.tree.map(operator.itemgetter(place), result.parameters)
        parameters = unpadded(padded, parameters, genome)
        units = architectures.to_units(genome)
        start = de_nas.build_final(config, units, 10, shape).init(
            jax.random.key(0), parameters, data
        )
        network = candidates.network_of(config, units, 10)
        found = evaluate(network, start.fit.variables, data.validation).accuracy
        assert found == pytest.approx(accuracy, abs=1.1 / len(DIGITS.validation))


def test_children_go_on_where_survivors_were_and_so_does_a_resumed_search():
    training = replace(
        de_nas.TRAINING, num_epochs=10, crop_padding=1, flip=False, optimizer="adam",
        learning_rate=4e-3,
    )  # fmt: skip
    space = replace(
        SPACE, min_first_filters=4, max_first_filters=8, max_filters=8, max_features=256
    )
    config = de_nas.Config(
        population_size=4, num_children=4, num_generations=2, num_best=2, space=space,
        training=training, initialization="kaiming", dropout=0.0, inherit=True, child_epochs=2,
    )  # fmt: skip
    inheriting, state = found(config, 2)
    _, resumed = found(config, 2, stop=6)
    for one, other in zip(jax.tree.leaves(state), jax.tree.leaves(resumed), strict=True):
        np.testing.assert_array_equal(one, other)
    assert_final_trainings_go_on(config, state)
    short = replace(
        config, inherit=False, child_epochs=None, training=replace(training, num_epochs=2)
    )
    anew, _ = found(short, 2)
    assert inheriting.mean() > anew.mean() + 0.15


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"inherit": True, "skip": True}, "inherit needs normalization none"),
        ({"inherit": True, "programs": "layers"}, "inherit needs programs padded, got layers"),
        ({"inherit": True, "rungs": (1,)}, r"inherit takes no rungs, got \(1,\)"),
        ({"child_epochs": 3}, "child_epochs needs inherit, got 3"),
    ],
)
def test_a_wrong_configuration_is_refused(changes, says):
    with pytest.raises(ValueError, match=says):
        de_nas.Config(**changes)
