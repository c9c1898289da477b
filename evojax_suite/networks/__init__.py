"""Networks that members train: flax modules of images (N, H, W, C) -> logits (N, num_classes)."""

from __future__ import annotations

import dataclasses
import inspect
from typing import Annotated, Literal

import flax.linen as nn
import jax
import jax.numpy as jnp
from annotated_types import Ge, Lt
from flax.errors import FlaxError
from pydantic import NonNegativeInt, PositiveInt

from evojax_suite.configuration import configuration
from evojax_suite.data.errors import first_line
from evojax_suite.imports import import_object
from evojax_suite.names import did_you_mean
from evojax_suite.networks import compiled
from evojax_suite.networks.convnet import ConvNet as ConvNet
from evojax_suite.networks.zoo import (
    MLP as MLP,
    VGG10 as VGG10,
    VGG11 as VGG11,
    AlexNet as AlexNet,
    LeNet as LeNet,
    ResNet18 as ResNet18,
)
from evojax_suite.types import Array, PRNGKey

NetworkName = Literal["ConvNet", "MLP", "LeNet", "AlexNet", "VGG10", "VGG11", "ResNet18"]
_NETWORKS: dict[str, type] = {
    kind.__name__: kind for kind in (ConvNet, MLP, LeNet, AlexNet, VGG10, VGG11, ResNet18)
}
_PLATFORMS = {"fused": "gpu", "compiled": "cpu"}
"""Where lowerings run that are auto elsewhere."""
_CONVNET_ONLY = "initialization", "dropout", "first_padding"


@configuration
class NetworkConfig:
    """The network that a member trains."""

    network: NetworkName | str = "ConvNet"
    """Architecture: a name, or package.module:Class of a flax module of yours (`own_module`)."""
    width: PositiveInt = 128
    """Filters of each ConvNet block; units of each MLP layer; filters of VGG10's first pair."""
    depth: PositiveInt = 3
    """Blocks of the ConvNet."""
    normalization: Literal["default", "instance", "batch", "layer", "group", "none"] = "default"
    """ConvNet (default: instance), VGG10, VGG11 and ResNet18 (default: batch)."""
    pooling: Literal["average", "max", "none"] = "average"
    """Pooling of the ConvNet."""
    activation: Literal["relu", "leaky_relu", "sigmoid", "tanh", "swish"] = "relu"
    """Activation of the ConvNet."""
    initialization: Literal["pytorch", "kaiming"] = "pytorch"
    """Initial weights of the ConvNet."""
    dropout: Annotated[float, Ge(0), Lt(1)] = 0.0
    """Probability with which the ConvNet drops an input of its last layer while training."""
    first_padding: NonNegativeInt | None = None
    """Padding of the ConvNet's first convolution; by default 3 for images of 28x28, else 1."""
    compute_dtype: Literal["float32", "bfloat16"] = "float32"
    """Precision of convolutions and matrix products; parameters stay float32."""
    convolution: Literal[
        "auto", "native", "split_gradient", "patches", "adaptive", "fused", "compiled"
    ] = "auto"
    """How convolutions are lowered; auto takes the fastest that needs nothing more. compiled has
    them in C++ on a CPU, several times as fast for small networks, and needs a C++ compiler; fused
    has kernels of our own on a GPU, which are not measured yet. Either is auto elsewhere."""

    def __post_init__(self):
        if self.network not in _NETWORKS and ":" not in self.network:
            names, hint = ", ".join(_NETWORKS), did_you_mean(self.network, _NETWORKS)
            allowed = f"one of {names}, or package.module:Class"
            raise ValueError(f"network must be {allowed}, got {self.network!r}{hint}")
        for name in _CONVNET_ONLY:
            value = getattr(self, name)
            if self.network != "ConvNet" and value != getattr(type(self), name):
                raise ValueError(f"{name} belongs to the ConvNet, got {value} with {self.network}")


def create(config: NetworkConfig, num_classes: int, image_shape: tuple[int, int, int]) -> nn.Module:
    """The flax module that `config` describes.

    Raises ValueError where the network does not fit images of `image_shape` (height, width,
    channels).

    >>> network = create(NetworkConfig(network="MLP", width=8), 10, (8, 8, 1))
    >>> variables = network.init(jax.random.key(0), jnp.zeros((1, 8, 8, 1)))
    >>> network.apply(variables, jnp.zeros((5, 8, 8, 1))).shape
    (5, 10)
    """
    if num_classes < 1 or min(image_shape) < 1:
        raise ValueError(
            f"classes and the sides of images must be >= 1, got {num_classes} and {image_shape}"
        )
    is_named = config.network in _NETWORKS
    if is_named:
        kind = _NETWORKS[config.network]
        names = "width", "depth", "normalization", "pooling", "activation"
        names += _CONVNET_ONLY if kind is ConvNet else ()
        settings = {name: getattr(config, name) for name in names}
        if config.normalization == "default":
            settings["normalization"] = "instance" if kind is ConvNet else "batch"
        platform = _PLATFORMS.get(config.convolution)
        elsewhere = platform is not None and platform != jax.default_backend()
        is_auto = config.convolution == "auto" or elsewhere
        settings["lowering"] = None if is_auto else config.convolution
        if settings["lowering"] == "compiled":
            compiled.load()
        settings["dtype"] = jnp.dtype(config.compute_dtype)
        fields = {field.name for field in dataclasses.fields(kind)}
        network = kind(num_classes, **{k: v for k, v in settings.items() if k in fields})
    else:
        network = own_module(config.network)(num_classes=num_classes)

    def outputs(key: PRNGKey, images: Array):
        logits, variables = network.init_with_output(key, images)
        if not is_named:
            statistics = [name for name in variables if name != "params"]
            rngs = {"dropout": key} if getattr(network, "dropout", 0) else {}
            network.apply(variables, images, train=True, mutable=statistics, rngs=rngs)
        return logits

    expected = (ValueError, TypeError, FlaxError) if is_named else (Exception,)
    images = jax.ShapeDtypeStruct((1, *image_shape), jnp.float32)
    try:
        logits = jax.eval_shape(outputs, jax.random.key(0), images)
    except expected as error:
        raise ValueError(
            f"{config.network} does not fit images of {image_shape}: {first_line(error)}"
        ) from error
    if getattr(logits, "shape", None) != (1, num_classes):
        raise ValueError(
            f"{config.network} must give logits (N, {num_classes}) for images (N, "
            f"{', '.join(map(str, image_shape))}), got {getattr(logits, 'shape', type(logits))}"
        )
    return network


def own_module(path: str) -> type[nn.Module]:
    """The class of flax modules that `path` (package.module:Class) names.

    It is made with `num_classes` alone and called with images (N, H, W, C) float32, normalised, and
    `train=True` while it trains; it returns logits (N, num_classes). Collections beside `params`
    are kept as batch statistics are; a module that draws random numbers while it trains has a field
    `dropout` above 0, and draws from the stream of that name. Raises ValueError where there is no
    class of this path, or its `__call__` takes no `train`.
    """
    kind = import_object(path)
    if not (isinstance(kind, type) and issubclass(kind, nn.Module)):
        raise ValueError(f"{path!r} must be a class of flax.linen modules, got {kind!r:.60}")
    if "num_classes" not in {field.name for field in dataclasses.fields(kind)}:
        raise ValueError(f"{path!r} must have a field num_classes")
    if "train" not in inspect.signature(kind.__call__).parameters:
        raise ValueError(f"{path!r} must take train as its second argument: whether it trains")
    return kind
