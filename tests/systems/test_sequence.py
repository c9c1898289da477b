"""One program for all architectures computes what each one's own program computes."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from scipy import stats

from evojax_suite.systems.de_nas import architectures
from evojax_suite.systems.de_nas.architectures import Space, Unit
from evojax_suite.systems.de_nas.networks import (
    PaddedNetwork,
    SequenceNetwork,
    for_genome,
    fresh,
    unpadded,
)
from evojax_suite.training import TrainingConfig, fit_epochs, start_fit

SPACE = Space(
    min_length=3,
    max_length=6,
    kernels=(1, 3, 5),
    min_first_filters=2,
    max_first_filters=4,
    max_filters=6,
    max_features=200,
)
SHAPE = (9, 8, 2)
PADDED = PaddedNetwork(3, SPACE, SHAPE, dropout=0.0)
random_genome = jax.jit(lambda key: architectures.random_genome(key, SPACE, SHAPE))
TRAINING = TrainingConfig(num_epochs=3, batch_size=8, optimizer="sgd", learning_rate=0.05)


def examples():
    key_images, key_labels = jax.random.split(jax.random.key(7))
    images = jax.random.normal(key_images, (20, *SHAPE))
    return images, jax.nn.one_hot(jax.random.randint(key_labels, (20,), 0, 3), 3)


@pytest.fixture(scope="module")
def train_padded():
    images, labels = examples()

    @jax.jit
    def train(genome):
        start = start_fit(jax.random.key(0), PADDED, TRAINING, SHAPE)
        parameters = for_genome(PADDED, start.parameters, genome)
        start = start.replace(parameters=parameters, statistics={"genome": genome._asdict()})
        fit, seen = fit_epochs(jax.random.key(1), PADDED, TRAINING, 9, start, images, labels, 20, 3)
        return start, fit, seen.losses

    return train


@pytest.mark.parametrize("seed", range(4))
def test_masked_training_is_training_of_the_network_itself(train_padded, seed):
    genome = random_genome(jax.random.key(seed))
    start, fit, losses = train_padded(genome)
    own = SequenceNetwork(3, architectures.to_units(genome), dropout=0.0)
    images, labels = examples()
    own_start = start_fit(jax.random.key(0), own, TRAINING, SHAPE)
    own_start = own_start.replace(parameters=unpadded(PADDED, start.parameters, genome))
    own_fit, own_seen = fit_epochs(
        jax.random.key(1), own, TRAINING, 9, own_start, images, labels, 20, 3
    )
    np.testing.assert_allclose(losses, own_seen.losses, rtol=2e-4)
    trained = unpadded(PADDED, fit.parameters, genome)
    assert jax.tree.structure(trained) == jax.tree.structure(own_fit.parameters)
    jax.tree.map(
        lambda ours, theirs: np.testing.assert_allclose(ours, theirs, rtol=1e-3, atol=1e-5),
        trained,
        own_fit.parameters,
    )
    moved = [
        bool(jnp.any(before != after))
        for before, after in zip(
            jax.tree.leaves(own_start.parameters), jax.tree.leaves(trained), strict=True
        )
    ]
    assert sum(moved) > len(moved) / 2  # something was learned that could differ


def test_one_compilation_serves_all_genomes(train_padded):
    for seed in range(10, 13):
        train_padded(random_genome(jax.random.key(seed)))
    assert train_padded._cache_size() == 1


def test_fresh_weights_have_pytorchs_spread(train_padded):
    genome = random_genome(jax.random.key(5))
    start, _, _ = train_padded(genome)
    for layer in unpadded(PADDED, start.parameters, genome).values():
        bound = np.prod(layer["kernel"].shape[:-1]) ** -0.5
        for values in layer.values():
            assert np.abs(values).max() <= bound
        if layer["kernel"].size > 50:
            assert np.abs(layer["kernel"]).max() > 0.8 * bound


@pytest.mark.parametrize("initialization", ["pytorch", "kaiming"])
def test_one_draw_is_as_the_layers_own(initialization):
    units = (Unit("convolution", 3, 30), Unit("max"), Unit("convolution", 5, 20))
    network = SequenceNetwork(3, units, normalization="batch")
    found = fresh(jax.random.key(0), network, (8, 8, 2), initialization)
    expected = network.init(jax.random.key(0), jnp.zeros((1, 8, 8, 2)))
    assert jax.tree.map(jnp.shape, found) == jax.tree.map(jnp.shape, expected)
    for name, layer in found["params"].items():
        if "kernel" not in layer:
            jax.tree.map(np.testing.assert_array_equal, layer, expected["params"][name])
            continue
        fan_in = np.prod(layer["kernel"].shape[:-1])
        scale = {"pytorch": 1, "kaiming": 6**0.5}[initialization] * fan_in**-0.5
        assert stats.kstest(np.ravel(layer["kernel"]) / scale, "uniform", (-1, 2)).pvalue > 1e-3
        assert (np.abs(layer["bias"]) > 0).all() == (initialization == "pytorch")
    jax.tree.map(np.testing.assert_array_equal, found["batch_stats"], expected["batch_stats"])


def test_a_network_is_the_one_that_pytorch_would_build():
    torch = pytest.importorskip("torch")
    units = (
        Unit("convolution", 3, 5), Unit("max"), Unit("convolution", 5, 4), Unit("average"),
    )  # fmt: skip
    network = SequenceNetwork(3, units)
    images = jax.random.normal(jax.random.key(0), (4, 8, 8, 2))
    variables = network.init(jax.random.key(1), images)
    modules = [
        torch.nn.Conv2d(2, 5, 3, padding=1), torch.nn.ReLU(), torch.nn.MaxPool2d(2),
        torch.nn.Conv2d(5, 4, 5, padding=2), torch.nn.ReLU(), torch.nn.AvgPool2d(2),
    ]  # fmt: skip
    dense = [torch.nn.Linear(16, 10), torch.nn.Linear(10, 10), torch.nn.Linear(10, 3)]
    parameters = variables["params"]
    with torch.no_grad():
        for index, module in enumerate((modules[0], modules[3])):
            kernel = np.asarray(parameters[f"Conv_{index}"]["kernel"])
            module.weight.copy_(torch.from_numpy(kernel.transpose(3, 2, 0, 1).copy()))
            module.bias.copy_(torch.from_numpy(np.array(parameters[f"Conv_{index}"]["bias"])))
        for index, module in enumerate(dense):
            kernel = np.array(parameters[f"Dense_{index}"]["kernel"])
            module.weight.copy_(torch.from_numpy(kernel.T.copy()))
            module.bias.copy_(torch.from_numpy(np.array(parameters[f"Dense_{index}"]["bias"])))
        maps = torch.from_numpy(np.asarray(images).transpose(0, 3, 1, 2).copy())
        for module in modules:
            maps = module(maps)
        flat = maps.permute(0, 2, 3, 1).reshape(4, -1)  # ours is channels last
        hidden = dense[1](dense[0](flat).relu()).relu()
        expected = dense[2](hidden).numpy()
    np.testing.assert_allclose(network.apply(variables, images), expected, rtol=1e-4, atol=1e-5)


def test_dropout_and_the_options_take_part():
    units = (Unit("convolution", 3, 4), Unit("convolution", 3, 4), Unit("max"))
    images, labels = examples()
    plain = SequenceNetwork(3, units)
    variables = plain.init(jax.random.key(0), images)

    def trained(network, seed):
        rngs = {"dropout": jax.random.key(seed)}
        return network.apply(variables, images, train=True, rngs=rngs)

    assert not np.allclose(trained(plain, 0), trained(plain, 1))
    assert np.allclose(trained(plain.clone(dropout=0.0), 0), plain.apply(variables, images))
    skipping = plain.clone(skip=True)
    assert not np.allclose(skipping.apply(variables, images), plain.apply(variables, images))
    batch = plain.clone(normalization="batch")
    assert "batch_stats" in batch.init(jax.random.key(0), images)
    losses = optax.softmax_cross_entropy(plain.apply(variables, images), labels)
    assert np.isfinite(losses).all()
