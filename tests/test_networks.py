"""Networks: PyTorch's results, parameter counts, refused sizes, lowerings, layers."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import scipy.stats
from hypothesis import given, settings, strategies as st

from evojax_suite import networks
from evojax_suite.networks import NetworkConfig, compiled
from evojax_suite.networks.layers import (
    CONVOLUTIONS,
    Conv,
    Dense,
    GroupNorm,
    activate,
    convolve,
    default_convolution,
    normalize_features,
    pool,
)
from evojax_suite.training import TrainingConfig, fit

REFERENCE = Path(__file__).parent / "references/convnet.npz"
SMALL_GREY, COLOUR = (28, 28, 1), (32, 32, 3)
LOWERINGS = [name for name in CONVOLUTIONS if name != "compiled" or compiled.compiler()]


# --- the ConvNet against PyTorch


class Case:
    """One set of reference arrays; `tree(group)` nests `group/Conv_0/kernel` and the like."""

    def __init__(self, arrays: dict[str, np.ndarray]):
        self.arrays = arrays

    def __getitem__(self, name: str) -> np.ndarray:
        return self.arrays[name]

    def tree(self, group: str) -> dict:
        tree: dict = {}
        for name, array in self.arrays.items():
            if name.startswith(group + "/"):
                _, layer, parameter = name.split("/")
                tree.setdefault(layer, {})[parameter] = array
        return tree


@pytest.fixture(scope="module", params=["28x28x1", "32x32x3"])
def case(request) -> Case:
    with np.load(REFERENCE) as arrays:
        prefix = request.param + "/"
        return Case({k.removeprefix(prefix): v for k, v in arrays.items() if k.startswith(prefix)})


@pytest.fixture(params=LOWERINGS)
def convnet(request, case) -> nn.Module:
    config = NetworkConfig(width=8, convolution=request.param)
    return networks.create(config, 10, case["images"].shape[1:])


class Started:
    """A network whose initialisation is given."""

    def __init__(self, network: nn.Module, parameters: dict):
        self.apply = network.apply
        self.parameters = parameters

    def init(self, key, images):
        del key, images
        return {"params": jax.tree.map(jnp.asarray, self.parameters)}


def without_shifts_before_normalization(parameters: dict) -> dict:
    """Instance normalisation removes the biases of the convolutions before it: their gradients
    are round-off, and Adam makes steps of either sign from it."""
    return {
        layer: {k: v for k, v in values.items() if not (layer.startswith("Conv") and k == "bias")}
        for layer, values in parameters.items()
    }


def assert_close(actual, expected, atol=1e-4, rtol=0.0):
    assert jax.tree.structure(actual) == jax.tree.structure(expected)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=rtol, atol=atol), actual, expected
    )


def test_convnet_has_the_parameters_of_pytorch(case, convnet):
    variables = jax.eval_shape(convnet.init, jax.random.key(0), case["images"])
    assert set(variables) == {"params"}
    shapes = jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype), variables["params"])
    assert shapes == jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype), case.tree("before"))


@pytest.mark.parametrize("train", [False, True])
def test_convnet_computes_the_logits_of_pytorch(case, convnet, train):
    logits = convnet.apply({"params": case.tree("before")}, case["images"], train=train)
    np.testing.assert_allclose(logits, case["logits"], atol=1e-4)


def test_convnet_has_the_gradient_of_pytorch(case, convnet):
    def loss(parameters):
        logits = convnet.apply({"params": parameters}, case["images"], train=True)
        labels = case["labels"]
        if labels.ndim == 1:
            return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()
        return optax.softmax_cross_entropy(logits, labels).mean()

    gradient = jax.jit(jax.grad(loss))(case.tree("before"))
    assert_close(gradient, case.tree("gradient"), atol=1e-5, rtol=1e-3)


def test_one_epoch_is_the_adam_step_of_pytorch(case, convnet):
    network = Started(convnet, case.tree("before"))
    config = TrainingConfig(num_epochs=1, learning_rate=1e-3)
    trained = jax.jit(lambda: fit(jax.random.key(0), network, config, *inputs))
    inputs = jnp.asarray(case["images"]), jnp.asarray(case["labels"])
    variables = trained()
    assert_close(
        without_shifts_before_normalization(variables["params"]),
        without_shifts_before_normalization(case.tree("after")),
    )
    logits = convnet.apply(variables, case["images"])
    np.testing.assert_allclose(logits, case["logits_after"], atol=1e-4)
    assert np.abs(case["logits_after"] - case["logits"]).max() > 1e-2  # the step is to be seen


# --- the zoo


def dense(inputs, outputs):
    return inputs * outputs + outputs


def conv(inputs, outputs, size=3, bias=True):
    return inputs * outputs * size**2 + bias * outputs


def count_lenet(_, channels, classes):
    maps = conv(channels, 6, 5) + conv(6, 16, 5)
    return maps + dense(16 * 5 * 5, 120) + dense(120, 84) + dense(84, classes)


def count_alexnet(_, channels, classes):
    maps = conv(channels, 128, 5) + conv(128, 192, 5) + conv(192, 256)
    return maps + conv(256, 192) + conv(192, 192) + dense(192 * 4 * 4, classes)


def count_vgg11(_, channels, classes):
    filters = [channels, 64, 128, 256, 256, 512, 512, 512, 512]
    maps = sum(conv(a, b) + 2 * b for a, b in pairwise(filters))
    return maps + dense(512, classes)


def count_resnet18(_, channels, classes):
    total, inputs = conv(channels, 64, bias=False) + 2 * 64, 64
    for filters in (64, 128, 256, 512):
        total += conv(inputs, filters, bias=False) + 3 * conv(filters, filters, bias=False)
        total += 4 * 2 * filters
        if inputs != filters:
            total += conv(inputs, filters, 1, bias=False) + 2 * filters
        inputs = filters
    return total + dense(512, classes)


def count_mlp(size, channels, classes):
    return dense(size * size * channels, 128) + dense(128, 128) + dense(128, classes)


def count_convnet(_, channels, classes):
    maps = conv(channels, 128) + 2 * conv(128, 128) + 3 * 2 * 128
    return maps + dense(128 * 4 * 4, classes)


ZOO = {
    "LeNet": count_lenet,
    "AlexNet": count_alexnet,
    "VGG11": count_vgg11,
    "ResNet18": count_resnet18,
    "MLP": count_mlp,
    "ConvNet": count_convnet,
}


@pytest.mark.parametrize("shape", [SMALL_GREY, COLOUR])
@pytest.mark.parametrize("name", ZOO)
def test_number_of_parameters(name, shape):
    network = networks.create(NetworkConfig(network=name), 7, shape)
    variables = jax.eval_shape(network.init, jax.random.key(0), jnp.zeros((1, *shape)))
    leaves = jax.tree.leaves(variables["params"])
    assert sum(leaf.size for leaf in leaves) == ZOO[name](shape[0], shape[-1], 7)
    assert all(leaf.dtype == jnp.float32 for leaf in leaves)


@pytest.mark.parametrize(
    ("name", "count"),  # as published, for ten classes and 32x32x3 images
    [("ConvNet", 320_010), ("ResNet18", 11_173_962), ("VGG11", 9_231_114), ("LeNet", 62_006)],
)
def test_published_number_of_parameters(name, count):
    network = networks.create(NetworkConfig(network=name), 10, COLOUR)
    variables = jax.eval_shape(network.init, jax.random.key(0), jnp.zeros((1, *COLOUR)))
    assert sum(leaf.size for leaf in jax.tree.leaves(variables["params"])) == count


@pytest.mark.parametrize(
    ("name", "normalization", "shape"),
    [
        (name, "default", shape)
        for name in ZOO
        for shape in (SMALL_GREY, COLOUR)
        if (name, shape) not in (("VGG11", SMALL_GREY), ("ResNet18", COLOUR))
    ]  # long to compile
    + [("VGG11", "instance", SMALL_GREY), ("ResNet18", "instance", COLOUR)],
)
def test_logits_of_fresh_networks_are_finite(name, normalization, shape):
    config = NetworkConfig(network=name, width=16, normalization=normalization)
    network = networks.create(config, 10, shape)

    @jax.jit
    def run(key, images):
        variables = network.init(key, images)
        return variables, network.apply(variables, images)

    images = jnp.asarray(np.random.default_rng(0).normal(size=(2, *shape)), jnp.float32)
    # This generator compiles several times faster.
    variables, logits = run(jax.random.key(0, impl="rbg"), images)
    assert logits.shape == (2, 10)
    assert logits.dtype == jnp.float32
    assert np.isfinite(logits).all()
    assert np.ptp(logits, axis=0).max() > 1e-4  # they depend on the image
    has_statistics = name in ("VGG11", "ResNet18") and normalization == "default"
    assert ("batch_stats" in variables) == has_statistics


@pytest.mark.parametrize(
    ("name", "shape", "reason"),
    [
        ("ConvNet", (4, 4, 1), "2x2 pooling does not fit a feature map of 1x1"),
        ("ConvNet", (7, 9, 2), "2x2 pooling does not fit a feature map of 1x2"),
        ("LeNet", (15, 15, 1), "2x2 pooling does not fit a feature map of 1x1"),
        ("LeNet", (8, 8, 1), "5x5 convolution does not fit a feature map of 2x2"),
        ("LeNet", (4, 4, 3), "5x5 convolution does not fit a feature map of 4x4"),
        ("LeNet", (28, 4, 1), "5x5 convolution does not fit a feature map of 14x2"),
        ("AlexNet", (4, 4, 1), "2x2 pooling does not fit a feature map of 1x1"),
        ("VGG11", (16, 16, 1), "2x2 pooling does not fit a feature map of 1x1"),
        ("VGG11", (8, 8, 3), "2x2 pooling does not fit a feature map of 1x1"),
    ],
)
def test_images_that_do_not_fit_are_refused_with_one_line(name, shape, reason):
    with pytest.raises(ValueError, match=reason) as caught:
        networks.create(NetworkConfig(network=name, width=8), 10, shape)
    message = str(caught.value)
    assert message.startswith(f"{name} does not fit images of {shape}: ")
    assert "\n" not in message


@pytest.mark.parametrize(
    ("name", "shape"),
    [
        ("ConvNet", (8, 8, 1)),
        ("LeNet", (16, 16, 1)),
        ("AlexNet", (8, 8, 1)),
        ("VGG11", (32, 40, 1)),
        ("ResNet18", (8, 8, 1)),
        ("MLP", (7, 9, 2)),
        ("ConvNet", (64, 64, 3)),
    ],
)
def test_other_images_that_fit(name, shape):
    network = networks.create(NetworkConfig(network=name, width=8), 10, shape)
    images = jnp.zeros((3, *shape))
    logits = jax.eval_shape(lambda key: network.init_with_output(key, images)[0], jax.random.key(0))
    assert logits.shape == (3, 10)


def test_depth_beyond_the_image_is_refused():
    networks.create(NetworkConfig(width=4, depth=5), 10, COLOUR)
    with pytest.raises(ValueError, match="smaller depth"):
        networks.create(NetworkConfig(width=4, depth=6), 10, COLOUR)
    networks.create(NetworkConfig(width=4, depth=6, pooling="none"), 10, (8, 8, 1))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"width": 0}, "width must be >= 1, got 0"),
        ({"depth": -1}, "depth must be >= 1, got -1"),
    ],
)
def test_config_refuses(options, message):
    with pytest.raises(ValueError, match=f"^{message}$"):
        NetworkConfig(**options)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"network": "ConvNext"}, ("network must be", "ResNet18", "'ConvNext'")),
        ({"normalization": "weight"}, ("normalization must be", "instance", "'weight'")),
        ({"pooling": "sum"}, ("pooling must be", "average", "'sum'")),
        ({"activation": "gelu"}, ("activation must be", "relu", "'gelu'")),
        ({"convolution": "winograd"}, ("convolution must be", "patches", "'winograd'")),
        ({"width": 6, "normalization": "group"}, ("group", "6")),
        ({"width": 2, "normalization": "group"}, ("group", "2")),
    ],
)
def test_create_refuses_with_one_line(options, words):
    with pytest.raises(ValueError, match=words[0]) as caught:
        networks.create(NetworkConfig(**({"width": 8} | options)), 10, (16, 16, 1))
    assert "\n" not in str(caught.value)
    for word in words:
        assert word in str(caught.value)


@pytest.mark.parametrize(
    "options",
    [
        {"normalization": "batch"},
        {"normalization": "layer"},
        {"normalization": "group"},
        {"normalization": "none"},
        {"pooling": "max"},
        {"pooling": "none"},
        {"activation": "leaky_relu"},
        {"activation": "sigmoid"},
        {"activation": "tanh"},
        {"activation": "swish"},
    ],
    ids=lambda options: "-".join(options.values()),
)
def test_options_of_the_convnet_change_its_logits(options):
    images = jnp.asarray(np.random.default_rng(1).normal(size=(2, 8, 8, 1)), jnp.float32)

    def logits(**chosen):
        network = networks.create(NetworkConfig(width=8, depth=1, **chosen), 3, (8, 8, 1))
        return network.init_with_output(jax.random.key(0), images)[0]

    chosen = logits(**options)
    assert np.isfinite(chosen).all()
    assert np.abs(np.asarray(chosen) - np.asarray(logits())).max() > 1e-4


# --- convolutions


@st.composite
def convolutions(draw):
    size = draw(st.sampled_from([1, 3, 5]))
    padding = draw(st.integers(0, 4))
    smallest = max(1, size - 2 * padding)
    return {
        "images": (
            draw(st.integers(1, 3)),
            draw(st.integers(smallest, smallest + 7)),
            draw(st.integers(smallest, smallest + 7)),
            draw(st.integers(1, 6)),
        ),
        "size": size,
        "filters": draw(st.integers(1, 6)),
        "padding": padding,
        "stride": draw(st.sampled_from([1, 2])),
        "seed": draw(st.integers(0, 1000)),
    }


def draw_arrays(setting, members=()):
    """Images, a kernel with products of unit size, and a cotangent of the outputs."""
    random = np.random.default_rng(setting["seed"])
    size, channels = setting["size"], setting["images"][-1]
    number, height, width = (
        setting["images"][0],
        *((n + 2 * setting["padding"] - size) // setting["stride"] + 1
          for n in setting["images"][1:3]),
    )  # fmt: skip
    shapes = (
        setting["images"],
        (size, size, channels, setting["filters"]),
        (number, height, width, setting["filters"]),
    )
    images, kernel, cotangent = (
        random.normal(size=(*members, *shape)).astype(np.float32) for shape in shapes
    )
    return images, kernel / (size * size * channels) ** 0.5, cotangent


def value_and_gradients(lowering, setting):
    def run(images, kernel, cotangent):
        outputs, pullback = jax.vjp(
            lambda images, kernel: convolve(
                images, kernel, setting["padding"], setting["stride"], lowering
            ),
            images,
            kernel,
        )
        return outputs, *pullback(cotangent)

    return run


def direct_convolution(images, kernel, padding, stride):
    """A sum over kernel positions and output pixels, in float64."""
    images = np.pad(
        np.asarray(images, np.float64), ((0, 0), (padding,) * 2, (padding,) * 2, (0, 0))
    )
    size = kernel.shape[0]
    rows = range(0, images.shape[1] - size + 1, stride)
    columns = range(0, images.shape[2] - size + 1, stride)
    return np.stack(
        [
            np.stack(
                [
                    np.einsum("nijc,ijcf->nf", images[:, y : y + size, x : x + size], kernel)
                    for x in columns
                ],
                axis=1,
            )
            for y in rows
        ],
        axis=1,
    )


@settings(max_examples=18, deadline=None, derandomize=True)
@given(convolutions())
def test_convolutions_agree(setting):
    arrays = draw_arrays(setting)
    results = jax.jit(
        lambda *arrays: {name: value_and_gradients(name, setting)(*arrays) for name in LOWERINGS}
    )(*arrays)
    outputs = direct_convolution(*arrays[:2], setting["padding"], setting["stride"])
    np.testing.assert_allclose(results["native"][0], outputs, atol=1e-4)
    for name in LOWERINGS:
        assert_close(results[name], results["native"], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(
    ("images", "size", "filters"),
    [
        ((50, 16, 16, 5), 3, 3),
        ((9, 24, 24, 32), 3, 64),
        ((2, 6, 5, 4), 5, 3),
        ((2, 6, 6, 2), 5, 3),
        ((2, 2, 3, 4), 7, 3),
        ((3, 4, 5, 4), 5, 6),
    ],
    ids=[
        "many pixels",
        "in blocks",
        "large kernel",
        "few channels",
        "beyond the map",
        "few pixels",
    ],
)
def test_ways_to_the_kernel_gradient_agree(images, size, filters):
    setting = {"images": images, "size": size, "padding": size // 2, "stride": 1}
    setting["filters"] = filters
    arrays = draw_arrays(setting | {"seed": 0})
    results = [jax.jit(value_and_gradients(name, setting))(*arrays) for name in LOWERINGS]
    for result in results:
        assert_close(result, results[0], atol=2e-3, rtol=1e-3)


@settings(max_examples=6, deadline=None, derandomize=True)
@given(convolutions(), st.integers(2, 3))
def test_convolutions_agree_under_vmap(setting, members):
    arrays = draw_arrays(setting, (members,))
    results = jax.jit(
        lambda *arrays: {
            name: jax.vmap(value_and_gradients(name, setting))(*arrays) for name in LOWERINGS
        }
    )(*arrays)
    single = jax.jit(value_and_gradients("native", setting))
    expected = [single(*(array[member] for array in arrays)) for member in range(members)]
    for name in LOWERINGS:
        for member in range(members):
            actual = jax.tree.map(lambda leaf, member=member: leaf[member], results[name])
            assert_close(actual, expected[member], atol=1e-4, rtol=1e-4)


@settings(max_examples=50, deadline=None, derandomize=True)
@given(
    st.sampled_from([1, 3, 5]), st.integers(0, 4), st.integers(1, 2), st.integers(1, 9),
    st.integers(1, 9),
)  # fmt: skip
def test_a_convolution_refuses_exactly_the_maps_that_it_does_not_fit(
    size, padding, stride, height, width
):
    layer = Conv(2, size, padding, stride)
    images = jnp.zeros((1, height, width, 1))
    if min(height, width) + 2 * padding < size:
        with pytest.raises(ValueError, match=f"{size}x{size} convolution does not fit"):
            jax.eval_shape(layer.init, jax.random.key(0), images)
    else:
        outputs = jax.eval_shape(
            lambda key: layer.init_with_output(key, images)[0], jax.random.key(0)
        )
        assert min(outputs.shape) >= 1


@pytest.mark.parametrize(
    ("channels", "filters", "padding", "stride", "dtype"),
    [
        (16, 24, 1, 1, jnp.float32),
        (24, 16, 1, 1, jnp.float32),
        (16, 16, 3, 1, jnp.float32),
        (16, 16, 1, 2, jnp.float32),
        (16, 16, 1, 1, jnp.bfloat16),
    ],
    ids=["filters", "channels", "padding", "stride", "bfloat16"],
)
def test_what_does_not_fit_the_compiled_one_is_lowered_otherwise(
    channels, filters, padding, stride, dtype
):
    images = jnp.ones((2, 6, 6, channels), dtype)
    assert not compiled.fits(images, filters, padding, 3, stride)
    kernel = jnp.ones((3, 3, channels, filters), dtype)
    program = jax.jit(lambda *both: convolve(*both, padding, stride, "compiled"))
    assert "evojax_suite" not in program.lower(images, kernel).as_text()


def test_without_a_compiler_the_compiled_one_is_one_line(monkeypatch):
    monkeypatch.setenv("CXX", "no-such-compiler")
    compiled.load.cache_clear()
    with pytest.raises(ValueError, match=r"convolution compiled needs a C\+\+ compiler"):
        networks.create(NetworkConfig(width=16, convolution="compiled"), 10, (8, 8, 1))


def test_default_convolution_is_one_of_them():
    chosen = {
        default_convolution(train, channels, platform)
        for train in (False, True)
        for channels in (1, 3, 32)
        for platform in ("cpu", "gpu", "tpu")
    }
    assert chosen <= set(CONVOLUTIONS)
    here = jax.default_backend()
    assert default_convolution(True, 1) == default_convolution(True, 1, here)


# --- precision


@pytest.mark.parametrize("lowering", LOWERINGS)
@pytest.mark.parametrize("name", ["ConvNet", "MLP"])
def test_bfloat16_keeps_parameters_and_logits_in_float32(name, lowering):
    images = jnp.asarray(np.random.default_rng(2).normal(size=(3, 16, 16, 2)), jnp.float32)

    def create(dtype):
        config = NetworkConfig(
            network=name, width=8, depth=2, compute_dtype=dtype, convolution=lowering
        )
        return networks.create(config, 5, (16, 16, 2))

    full, half = create("float32"), create("bfloat16")
    variables = jax.jit(full.init)(jax.random.key(0, impl="rbg"), images)
    shapes = jax.eval_shape(half.init, jax.random.key(0), images)
    assert all(leaf.dtype == jnp.float32 for leaf in jax.tree.leaves(shapes))
    expected, actual = full.apply(variables, images), half.apply(variables, images)
    assert actual.dtype == jnp.float32
    error = np.abs(np.asarray(actual) - np.asarray(expected)).max()
    assert 0 < error < 0.03 * np.abs(expected).max()


# --- initialisation


@pytest.mark.parametrize(
    ("layer", "inputs", "fan_in"),
    [
        (Conv(500, 3), (1, 6, 6, 4), 36),
        (Conv(400, 5), (1, 6, 6, 2), 50),
        (Conv(600, 1, 0), (1, 2, 2, 9), 9),
        (Dense(700), (1, 25), 25),
    ],
    ids=["conv3", "conv5", "conv1", "dense"],
)
def test_initialisation_is_uniform_within_one_over_the_root_of_the_fan_in(layer, inputs, fan_in):
    parameters = layer.init(jax.random.key(3), jnp.zeros(inputs))["params"]
    bound = fan_in**-0.5
    assert set(parameters) == {"kernel", "bias"}
    for values in parameters.values():
        values = np.asarray(values).ravel()
        assert np.abs(values).max() <= bound
        uniform = scipy.stats.uniform(-bound, 2 * bound)
        assert scipy.stats.kstest(values, uniform.cdf).pvalue > 1e-3
    first = np.asarray(parameters["kernel"]).ravel()[: parameters["bias"].size]
    assert not np.array_equal(first, parameters["bias"])


def test_layers_of_a_network_are_initialised_apart():
    network = networks.create(NetworkConfig(width=8), 10, (8, 8, 8))
    key = jax.random.key(0, impl="rbg")
    parameters = jax.jit(network.init)(key, jnp.zeros((1, 8, 8, 8)))["params"]
    kernels = [np.asarray(parameters[f"Conv_{layer}"]["kernel"]).ravel() for layer in range(3)]
    for first, second in pairwise(kernels):
        assert scipy.stats.pearsonr(first, second).pvalue > 1e-3


# --- normalisation, pooling, activation


def normalized(images, num_groups, scale, bias):
    """Over pixels and the channels of a group, straight from the definition, in float64."""
    outputs = np.empty(images.shape)
    size = images.shape[-1] // num_groups
    for image, output in zip(images.astype(np.float64), outputs, strict=True):
        for group in range(num_groups):
            part = slice(group * size, (group + 1) * size)
            values = image[..., part]
            output[..., part] = (values - values.mean()) / np.sqrt(values.var() + 1e-5)
    return outputs * scale + bias


@pytest.mark.parametrize(("spread", "offset"), [(1.0, 0.0), (2.0, 5.0), (3e-3, 0.0)])
@pytest.mark.parametrize(("name", "num_groups"), [("instance", 12), ("layer", 1), ("group", 4)])
def test_group_normalisation(name, num_groups, spread, offset):
    class Layer(nn.Module):
        @nn.compact
        def __call__(self, images):
            return normalize_features(name, images, train=False)

    random = np.random.default_rng(4)
    images = (offset + spread * random.normal(size=(3, 5, 7, 12))).astype(np.float32)
    images *= np.linspace(0.5, 1.5, 12, dtype=np.float32)  # channels that differ
    scale, bias = random.normal(size=(2, 12)).astype(np.float32)
    variables = {"params": {"GroupNorm_0": {"scale": scale, "bias": bias}}}
    actual = Layer().apply(variables, images)
    np.testing.assert_allclose(actual, normalized(images, num_groups, scale, bias), atol=1e-4)


def test_normalisation_of_a_constant_map_and_its_gradient_are_finite():
    images = jnp.full((2, 4, 4, 3), 7.0)
    variables = GroupNorm().init(jax.random.key(0), images)
    np.testing.assert_allclose(GroupNorm().apply(variables, images), 0, atol=1e-2)
    gradient = jax.grad(lambda images: GroupNorm().apply(variables, images).sum())(images)
    assert np.isfinite(gradient).all()


@pytest.mark.parametrize("shape", [(4, 6), (5, 7), (2, 3), (9, 4)])
@pytest.mark.parametrize(("name", "reduce"), [("average", np.mean), ("max", np.max)])
def test_pooling_drops_odd_rows_and_columns(name, reduce, shape):
    images = np.random.default_rng(5).normal(size=(2, *shape, 3)).astype(np.float32)
    height, width = shape[0] // 2, shape[1] // 2
    expected = np.empty((2, height, width, 3))
    for y in range(height):
        for x in range(width):
            window = images[:, 2 * y : 2 * y + 2, 2 * x : 2 * x + 2]
            expected[:, y, x] = reduce(window, axis=(1, 2))
    np.testing.assert_allclose(pool(name, images), expected, atol=1e-6)


@pytest.mark.parametrize(("name", "reduce"), [("average", jnp.mean), ("max", jnp.max)])
@pytest.mark.parametrize("shape", [(4, 6), (5, 7)])
def test_pooling_has_the_gradient_of_its_definition(name, reduce, shape):
    images = jax.random.normal(jax.random.key(0), (2, *shape, 3))
    gradient = jax.random.normal(jax.random.key(1), (2, shape[0] // 2, shape[1] // 2, 3))

    def plain(images):
        height, width = shape[0] // 2, shape[1] // 2
        windows = images[:, : 2 * height, : 2 * width].reshape(2, height, 2, width, 2, 3)
        return reduce(windows, axis=(2, 4))

    expected = jax.vjp(plain, images)[1](gradient)[0]
    found = jax.vjp(lambda images: pool(name, images), images)[1](gradient)[0]
    np.testing.assert_allclose(found, expected, atol=1e-6)


def test_the_first_of_equal_pixels_takes_the_gradient():
    """As in PyTorch."""
    found = jax.grad(lambda images: pool("max", images).sum())(jnp.zeros((1, 2, 2, 1)))
    assert found[0, :, :, 0].tolist() == [[1, 0], [0, 0]]


@pytest.mark.parametrize("shape", [(1, 4), (4, 1)])
def test_pooling_refuses_maps_smaller_than_its_window(shape):
    with pytest.raises(ValueError, match=f"{shape[0]}x{shape[1]}"):
        pool("average", jnp.zeros((1, *shape, 1)))


@pytest.mark.parametrize(
    ("name", "function"),
    [
        ("relu", lambda x: np.maximum(x, 0)),
        ("leaky_relu", lambda x: np.where(x > 0, x, 0.01 * x)),
        ("sigmoid", lambda x: 1 / (1 + np.exp(-x))),
        ("tanh", np.tanh),
        ("swish", lambda x: x / (1 + np.exp(-x))),
    ],
)
def test_activations(name, function):
    inputs = np.linspace(-4, 4, 41, dtype=np.float32)
    np.testing.assert_allclose(activate(name, inputs), function(inputs), atol=1e-6)


def test_kaiming_initialisation():
    config = NetworkConfig(width=64, depth=2, initialization="kaiming")
    network = networks.create(config, 10, (16, 16, 3))
    parameters = network.init(jax.random.key(0), jnp.zeros((1, 16, 16, 3)))["params"]
    for layer, fan_in in (("Conv_0", 27), ("Conv_1", 576), ("Dense_0", 1024)):
        kernel = np.asarray(parameters[layer]["kernel"])
        assert abs(kernel.std() / np.sqrt(2 / fan_in) - 1) < 5 / np.sqrt(2 * kernel.size)
        assert abs(kernel.mean()) < 5 * np.sqrt(2 / fan_in / kernel.size)
        np.testing.assert_array_equal(parameters[layer]["bias"], 0)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"dropout": 1.0}, r"dropout must be in \[0, 1\), got 1.0"),
        ({"network": "MLP", "dropout": 0.1}, "dropout belongs to the ConvNet, got 0.1 with MLP"),
    ],
)
def test_options_of_the_convnet(options, message):
    with pytest.raises(ValueError, match=message):
        NetworkConfig(**options)
