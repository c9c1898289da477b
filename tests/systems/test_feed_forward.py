"""Feed-forward networks: files of every naming, and one clear line for what is none."""

from __future__ import annotations

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy

from evojax_suite.networks import MLP, ConvNet
from evojax_suite.systems.ecomp import feed_forward

RANDOM = np.random.default_rng(0)
SIZES = (12, 7, 7, 7, 4)
SHAPE = (2, 3, 2)


def network(sizes=SIZES):
    return tuple(
        feed_forward.Layer(
            RANDOM.normal(size=(b, a)).astype(np.float32), RANDOM.normal(size=b).astype(np.float32)
        )
        for a, b in itertools.pairwise(sizes)
    )


NETWORK = network()


def torch_names(one, names):
    return {
        f"{name}.{role}": array
        for name, layer in zip(names, one, strict=True)
        for role, array in (("weight", layer.weight), ("bias", layer.bias))
    }


def flax_names(one, names, separator="/"):
    return {
        f"params{separator}{name}{separator}{role}": array
        for name, layer in zip(names, one, strict=True)
        for role, array in (("kernel", np.ascontiguousarray(layer.weight.T)), ("bias", layer.bias))
    }


def assert_same(first, second):
    jax.tree.map(np.testing.assert_array_equal, tuple(first), tuple(second))


@pytest.mark.parametrize(
    "arrays",
    [
        torch_names(NETWORK, ("0", "2", "4", "6")),
        torch_names(NETWORK, ("layer_1_linear", "layer_2_linear", "layer_10_linear", "output")),
        torch_names(NETWORK, ("zero.in", "h.2", "h.10", "a.head")),
        flax_names(NETWORK, ("Dense_0", "Dense_1", "Dense_2", "Dense_3")),
        flax_names(NETWORK, ("Dense_0", "Dense_1", "Dense_2", "Dense_3"), "."),
    ],
    ids=["sequential", "numbered", "by shape", "flax", "flax with dots"],
)
def test_names_of_pytorch_and_flax_in_any_order(arrays, tmp_path):
    shuffled = {name: arrays[name] for name in sorted(arrays, reverse=True)}
    assert_same(feed_forward.from_arrays(shuffled, SHAPE, 4), NETWORK)
    safetensors.numpy.save_file(shuffled, tmp_path / "parent.safetensors")
    np.savez(tmp_path / "parent.npz", **shuffled)
    for name in ("parent.safetensors", "parent.npz"):
        assert_same(feed_forward.load(tmp_path / name, SHAPE, 4), NETWORK)


def test_what_is_saved_is_loaded_bit_for_bit(tmp_path):
    path = tmp_path / "network.safetensors"
    feed_forward.save(path, NETWORK)
    assert_same(feed_forward.load(path, SHAPE, 4), NETWORK)
    assert [p.name for p in tmp_path.iterdir()] == ["network.safetensors"]


def test_it_computes_what_the_flax_module_computes():
    module = MLP(4, 7)
    images = RANDOM.normal(size=(5, 2, 3, 2)).astype(np.float32)
    variables = module.init(jax.random.key(0), images)
    arrays = {
        f"{layer}/{role}": np.asarray(array)
        for layer, parts in variables["params"].items()
        for role, array in parts.items()
    }
    found = feed_forward.from_arrays(arrays, SHAPE, 4)
    *hidden, logits = feed_forward.forward(found, jnp.asarray(images.reshape(5, -1)))
    np.testing.assert_allclose(logits, module.apply(variables, images), rtol=1e-5, atol=1e-6)
    assert [values.shape for values in hidden] == [(5, 7), (5, 7)]


CONVOLUTIONAL = ConvNet(4, 5, 2, "none", "max", first_padding=1, bottleneck=6)
IMAGES = RANDOM.normal(size=(3, 8, 10, 2)).astype(np.float32)


def convolutional():
    """flax's variables, and the same arrays as PyTorch has them: maps are flattened by filter."""
    variables = CONVOLUTIONAL.init(jax.random.key(0), IMAGES)
    arrays = {
        f"{layer}.{role}": np.asarray(array)
        for layer, parts in variables["params"].items()
        for role, array in parts.items()
    }
    torch = {name.replace("kernel", "weight"): array for name, array in arrays.items()}
    for name, array in torch.items():
        if name.startswith("bottleneck") and array.ndim == 2:
            array = np.swapaxes(array.reshape(2 * 2, 5, 6), 0, 1).reshape(20, 6)
        if array.ndim > 1:
            torch[name] = np.moveaxis(array, (-1, -2), (0, 1))
    return variables, arrays, torch


@pytest.mark.parametrize("naming", ["flax", "torch"])
def test_convolutions_of_either_naming_compute_what_the_flax_module_does(naming, tmp_path):
    variables, *named = convolutional()
    network = feed_forward.from_arrays(named[naming == "torch"], (8, 10, 2), 4, "max")
    *hidden, logits = feed_forward.forward(network, jnp.asarray(IMAGES), "max")
    expected = CONVOLUTIONAL.apply(variables, IMAGES)
    np.testing.assert_allclose(logits, expected, rtol=1e-4, atol=1e-5)
    assert [values.shape for values in hidden] == [(3, 20, 5), (3, 4, 5), (3, 6)]
    feed_forward.save(tmp_path / "network.safetensors", network)
    again = feed_forward.load(tmp_path / "network.safetensors", (8, 10, 2), 4, "max")
    assert_same(again, network)
    count = sum(array.size for array in jax.tree.leaves(variables))
    assert feed_forward.num_parameters(network, (5, 5, 6)) == count


@pytest.mark.parametrize(
    ("shape", "pooling", "said"),
    [
        ((8, 10, 3), "max", r"leads from images of \(8, 10, 3\) to 4 classes"),
        ((8, 10, 2), "none", "no chain"),  # the dense layer expects smaller maps
        ((2, 2, 2), "max", "no chain"),
    ],
)
def test_convolutions_that_do_not_fit_the_images_get_one_clear_line(shape, pooling, said):
    arrays = convolutional()[1]
    with pytest.raises(ValueError, match=said):
        feed_forward.from_arrays(arrays, shape, 4, pooling)
    arrays["Conv_0.kernel"] = arrays["Conv_0.kernel"][:2]
    with pytest.raises(ValueError, match="convolution of odd size, got 2x3"):
        feed_forward.from_arrays(arrays, shape, 4, pooling)


def test_parameters_are_counted():
    count = sum(array.size for layer in NETWORK for array in layer)
    assert feed_forward.num_parameters(NETWORK, (7, 7, 7)) == count
    many = feed_forward.num_parameters(NETWORK, np.array([[7, 3], [7, 2], [7, 1]]))
    assert many[0] == count


def changed(**arrays):
    found = torch_names(NETWORK, ("0", "1", "2", "3")) | arrays
    return {name: array for name, array in found.items() if array is not None}


NAN = NETWORK[1].weight.copy()
NAN[0, 0] = np.nan


@pytest.mark.parametrize(
    ("arrays", "said"),
    [
        (changed(**{"1.weight": None, "1.bias": None, "2.weight": None, "2.bias": None,
                    "3.weight": NETWORK[3].weight[:, :5]}),
         r"no chain of two or more layers leads from 12 inputs to 4 classes through 0 \(7, 12\), "
         r"3 \(4, 5\)"),
        (changed(**{"1.bias": None}), r"layer '1' needs a weight or kernel and a bias, has "
                                      r"\['weight'\]"),
        (changed(**{"1.bias": NETWORK[1].bias[:3]}), r"weights of shape \(7, 7\) and biases of "
                                                     r"shape \(3,\)"),
        (changed(**{"1.weight": NAN}), "1.weight holds 1 NaN or infinite numbers"),
        (changed(**{"1.weight": NETWORK[1].weight.astype(int)}), "floating point numbers, got int"),
        (changed(**{"norm.scale": np.ones(7, np.float32)}), "found 'norm.scale'"),
        (changed(**{"0.weight": np.ones((7, 3, 2), np.float32)}), "must be fully connected"),
        ({}, "through no layers"),
        (torch_names(network((12, 4)), ("0",)), "two or more layers"),
    ],
    ids=["missing layer", "missing bias", "wrong bias", "NaN", "integers", "other layers",
         "three axes", "nothing", "no hidden layer"],
)  # fmt: skip
def test_a_bad_parent_gets_one_clear_line(arrays, said, tmp_path):
    path = tmp_path / "parent.safetensors"
    safetensors.numpy.save_file(arrays, path)
    with pytest.raises(ValueError, match=said) as error:
        feed_forward.load(path, SHAPE, 4)
    assert str(error.value).startswith(f"{path}: ")
    assert "\n" not in str(error.value)


def test_bad_files_get_one_clear_line(tmp_path):
    with pytest.raises(FileNotFoundError, match="no file"):
        feed_forward.load(tmp_path / "none.npz", SHAPE, 4)
    for name in ("torn.npz", "torn.safetensors", "parent.pth"):
        (tmp_path / name).write_bytes(b"PK\x03\x04torn")
        with pytest.raises(ValueError, match=name):
            feed_forward.load(tmp_path / name, SHAPE, 4)
    objects = np.array([object()], dtype=object)
    np.savez(tmp_path / "objects.npz", **{"0.weight": objects})
    with pytest.raises(ValueError, match=r"objects\.npz"):
        feed_forward.load(tmp_path / "objects.npz", SHAPE, 4)
