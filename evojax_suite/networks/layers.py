"""Layers of the distillation literature's networks, and the lowering of their convolutions.

Initialisation is PyTorch's default, U(-1/sqrt(fan_in), 1/sqrt(fan_in)) for kernels and biases,
because the papers' networks are PyTorch modules, or Kaiming's (He et al. 2015), N(0, 2/fan_in) for
kernels and 0 for biases. Images are (N, H, W, C).

The same convolution is lowered in one of six ways (`CONVOLUTIONS`); which one is fastest depends
on the platform and on whether members run one after the other or batched. The measurements behind
`default_convolution` are in experiments/benchmarks/README.md.

native          XLA's convolution and its automatic gradient.
split_gradient  XLA's convolution; the kernel gradient is a matrix product a kernel position. On
                the CPU XLA runs the automatic kernel gradient, a convolution with permuted
                dimensions, on a slow path inside loops (jax issue 12868); this avoids it. Where a
                kernel has more positions than the map has pixels, all is one product with the
                matrix that the kernel stands for.
patches         Patches and one matrix product: `vmap` over members turns it into a batched
                matrix product, where it would turn a convolution into a grouped one.
adaptive        For accelerators: native for a network by itself, patches where `vmap` gives each
                member its kernel. The ConvNet's blocks become those of `networks.blocks`.
fused           adaptive, but the ConvNet's blocks are kernels of our own where `networks.fused`
                takes them: for GPUs, off by default until measured on one.
compiled        C++ for CPUs (`networks.compiled`), also of the ConvNet's blocks, where it fits,
                split_gradient elsewhere. On request, as it needs a C++ compiler.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache, partial, reduce
from typing import Literal, TypeAlias, get_args

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.typing import DTypeLike

from evojax_suite.networks import compiled

Convolution = Literal["native", "split_gradient", "patches", "adaptive", "fused", "compiled"]
CONVOLUTIONS: tuple[str, ...] = get_args(Convolution)

_DIMENSIONS = ("NHWC", "HWIO", "NHWC")
_TwoArrays: TypeAlias = Callable[[jax.Array, jax.Array], jax.Array]


def default_convolution(train: bool, channels: int, platform: str | None = None) -> Convolution:
    """The fastest lowering on `platform` (the default backend's if None) in training or evaluation:
    measured on the CPU, by the model of `make gpu-check` elsewhere. On the CPU evaluation takes
    patches where the input has few channels, as grey images have."""
    if (platform or jax.default_backend()) != "cpu":
        return "adaptive"
    if train:
        return "split_gradient"
    return "patches" if channels < 4 else "native"


def convolve(
    images: jax.Array, kernel: jax.Array, padding: int, stride: int, lowering: Convolution
) -> jax.Array:
    """2D cross-correlation. images (N, H, W, C), kernel (K, K, C, F) -> (N, H', W', F)."""
    if lowering not in CONVOLUTIONS:
        raise ValueError(f"convolution must be one of {', '.join(CONVOLUTIONS)}, got {lowering!r}")
    size = kernel.shape[0]
    unseen = min(padding, size - 1 - padding) - max(images.shape[1:3]) + 1
    if unseen > 0 and stride == 1:  # the kernel's border only ever meets the padding
        kernel = kernel[unseen : size - unseen, unseen : size - unseen]
        padding -= unseen
    if lowering == "compiled":
        filters, size = kernel.shape[-1], len(kernel)
        if compiled.fits(images, filters, padding, size, stride):
            return _compiled(images, kernel, padding)
        lowering = "split_gradient"
    if lowering == "patches":
        return _patches(images, kernel, padding, stride)
    if lowering == "split_gradient" and stride == 1:
        height, width = images.shape[1:3]
        as_matrix = 2 * padding == len(kernel) - 1 and height * width < len(kernel) ** 2
        return (_as_matrix if as_matrix else _split_gradient)(images, kernel, padding)
    if lowering in ("adaptive", "fused"):
        return _adaptive(len(kernel), padding, stride, images.shape[1:3])[0](images, kernel)
    return _native(images, kernel, padding, stride)


def _native(images: jax.Array, kernel: jax.Array, padding: int, stride: int = 1):
    return lax.conv_general_dilated(
        images, kernel, (stride, stride), [(padding, padding)] * 2, dimension_numbers=_DIMENSIONS
    )


def _as_matrix(images: jax.Array, kernel: jax.Array, padding: int):
    """Convolution that keeps the size of the maps, as a product with a matrix (H W C, H W F)."""
    (height, width, channels), filters = images.shape[1:], kernel.shape[-1]

    def reads(side: int) -> np.ndarray:
        """Whether an output (second axis) reads an input (first) at a position of the kernel."""
        places, positions = np.arange(side), np.arange(len(kernel)) - padding
        return places[:, None, None] == places[None, :, None] + positions

    rows, columns = (reads(side).astype(kernel.dtype) for side in (height, width))
    matrix = jnp.einsum("xia,abcf->xibcf", rows, kernel)
    matrix = jnp.einsum("yjb,xibcf->xycijf", columns, matrix)
    matrix = matrix.reshape(height * width * channels, -1)
    return (images.reshape(len(images), -1) @ matrix).reshape(-1, height, width, filters)


def padded(images: jax.Array, padding: int) -> jax.Array:
    """Images (N, H, W, C) with `padding` rows and columns of zeros on each side."""
    return jnp.pad(images, ((0, 0), (padding, padding), (padding, padding), (0, 0)))


def _shifted(images: jax.Array, size: int, padding: int, stride: int = 1):
    """The size*size shifted views that a kernel of that size is multiplied with, row by row."""
    images = padded(images, padding)
    height, width = (stride * ((side - size) // stride) + 1 for side in images.shape[1:3])
    places = [(i, j) for i in range(size) for j in range(size)]
    return [images[:, i : i + height : stride, j : j + width : stride] for i, j in places]


def _concatenate(parts: Callable[[jax.Array], list[jax.Array]], array: jax.Array) -> jax.Array:
    """The `parts` of an array (..., C), a function that moves channels as a whole, side by side.

    On a GPU XLA writes a concatenation element by element: pairs of 16 bits, taken as one element
    of 32, take a quarter of the time.
    """

    def plain(array: jax.Array):
        return jnp.concatenate(parts(array), axis=-1)

    if array.dtype.itemsize != 2 or array.shape[-1] % 2:
        return plain(array)

    @jax.custom_jvp
    def in_pairs(array: jax.Array):
        pairs = lax.bitcast_convert_type(array.reshape(*array.shape[:-1], -1, 2), jnp.uint32)
        outputs = lax.bitcast_convert_type(plain(pairs), array.dtype)
        return outputs.reshape(*outputs.shape[:-2], -1)

    in_pairs.defjvp(lambda primals, tangents: (in_pairs(*primals), plain(*tangents)))
    return in_pairs(array)


def _patches(images: jax.Array, kernel: jax.Array, padding: int, stride: int):
    columns = _concatenate(lambda pixels: _shifted(pixels, len(kernel), padding, stride), images)
    return columns @ kernel.reshape(-1, kernel.shape[-1])


def _patches_of_two(images: jax.Array, kernel: jax.Array, padding: int):
    """`_patches` of stride 1 that computes two neighbouring pixels at once: a kernel of one more
    column, of stride 2, with two sets of filters. With a 3x3 kernel it moves 6 values a pixel, not
    9, for a third more products. Where kernels weigh more than the pixels, or the columns are odd
    or those of the kernel even, it is `_patches` itself."""
    size, filters = kernel.shape[0], kernel.shape[-1]
    height, width = (side + 2 * padding - size + 1 for side in images.shape[1:3])
    if width % 2 or not size % 2 or len(images) * height * width < 8 * filters:
        return _patches(images, kernel, padding, 1)

    def rows_of_pairs(images: jax.Array):
        images = padded(images, padding)
        # The inputs of two pixels in a row lie together in memory.
        shape = *images.shape[:2], width // 2, -1
        pairs = [images[:, :, j : j + width].reshape(shape) for j in range(0, size + 1, 2)]
        return [pair[:, i : i + height] for i in range(size) for pair in pairs]

    def both(kernel: jax.Array):
        return [jnp.pad(kernel, ((0, 0), (k, 1 - k), (0, 0), (0, 0))) for k in (0, 1)]

    columns = _concatenate(rows_of_pairs, images)
    kernels = _concatenate(both, kernel).reshape(-1, 2 * filters)
    return (columns @ kernels).reshape(len(images), height, width, filters)


def _by_members(alone: _TwoArrays, together: _TwoArrays, over_images: bool = True) -> _TwoArrays:
    """A function of two arrays, the first of images: `alone`, or `together` where `vmap` gives each
    member its second one. over_images: whether outputs have the images' axis, so that the images of
    all members may be taken at once where the second array is the same."""

    @jax.custom_batching.custom_vmap
    def function(images: jax.Array, second: jax.Array) -> jax.Array:
        return alone(images, second)

    @function.def_vmap
    def rule(
        axis_size: int, batched: list[bool], images: jax.Array, second: jax.Array
    ) -> tuple[jax.Array, bool]:
        if batched[1] or not over_images:
            axes = tuple(0 if is_batched else None for is_batched in batched)
            return jax.vmap(together, axes)(images, second), True
        outputs = function(images.reshape(-1, *images.shape[2:]), second)
        return outputs.reshape(axis_size, -1, *outputs.shape[1:]), True

    return function


@cache
def _adaptive(
    size: int, padding: int, stride: int, sides: tuple[int, int]
) -> tuple[_TwoArrays, _TwoArrays, _TwoArrays]:
    """The convolution (images, kernel) of images of these sides, its gradient for the images
    (output's gradient, kernel), and for the kernel (images, output's gradient).

    Each is linear in both of its arguments, and the derivatives of each are the other two, so that
    they can be differentiated any number of times.
    """

    def native(images: jax.Array, kernel: jax.Array):
        return _native(images, kernel, padding, stride)

    def patches(images: jax.Array, kernel: jax.Array):
        if stride > 1:
            return _patches(images, kernel, padding, stride)
        return _patches_of_two(images, kernel, padding)

    def to_images(convolution: _TwoArrays) -> _TwoArrays:
        def gradient(outputs: jax.Array, kernel: jax.Array) -> jax.Array:
            images = jnp.zeros((len(outputs), *sides, kernel.shape[2]), outputs.dtype)
            return jax.vjp(lambda images: convolution(images, kernel), images)[1](outputs)[0]

        return gradient

    def to_kernel(convolution: _TwoArrays) -> _TwoArrays:
        def gradient(images: jax.Array, outputs: jax.Array) -> jax.Array:
            kernel = jnp.zeros((size, size, images.shape[-1], outputs.shape[-1]), images.dtype)
            return jax.vjp(lambda kernel: convolution(images, kernel), kernel)[1](outputs)[0]

        return gradient

    def differentiable(
        function: _TwoArrays, first: Callable[..., jax.Array], second: Callable[..., jax.Array]
    ) -> _TwoArrays:
        """The function with its gradients for the two arguments, `first` and `second`: functions
        of both arguments and the output's gradient."""
        wrapped = jax.custom_vjp(function)
        wrapped.defvjp(
            lambda *both: (wrapped(*both), both),
            lambda both, gradient: (first(*both, gradient), second(*both, gradient)),
        )
        return wrapped

    # x: images or their gradient; k: a kernel or its gradient; y: outputs or their gradient.
    convolution = differentiable(
        _by_members(native, patches),
        lambda x, k, y: for_images(y, k),
        lambda x, k, y: for_kernel(x, y),
    )
    for_images = differentiable(
        _by_members(to_images(native), to_images(patches)),
        lambda y, k, x: convolution(x, k),
        lambda y, k, x: for_kernel(x, y),
    )
    for_kernel = differentiable(
        _by_members(to_kernel(native), to_kernel(patches), over_images=False),
        lambda x, y, k: for_images(y, k),
        lambda x, y, k: convolution(x, k),
    )
    return convolution, for_images, for_kernel


@partial(jax.custom_vjp, nondiff_argnums=(2,))
def _split_gradient(images: jax.Array, kernel: jax.Array, padding: int):
    return _native(images, kernel, padding)


def _split_gradient_forward(images: jax.Array, kernel: jax.Array, padding: int):
    return _native(images, kernel, padding), (images, kernel)


def _products_with(gradient: jax.Array, channels: int) -> Callable[[jax.Array], jax.Array]:
    """A function of a view (N, H, W, C) of images: its product (C, F) with the gradient (N, H, W,
    F) over all pixels. channels: those of the images."""
    num_images, height, width, filters = gradient.shape
    flat = gradient.reshape(-1, filters)

    def plain(view: jax.Array):
        return view.reshape(-1, view.shape[-1]).T @ flat

    if not (64 <= filters < 96 and channels >= 32 and len(flat) > 5000):
        return plain
    # With these numbers of columns XLA's CPU backend computes one long product on one core, at half
    # of its speed; a sum of short ones of the transposed gradient takes half the time. The barrier
    # keeps the transposition out of the products.
    most = max(1, 784 // (height * width))
    images_of_block = max(n for n in range(1, most + 1) if num_images % n == 0)
    blocks = gradient.reshape(-1, images_of_block * height * width, filters)
    transposed = lax.optimization_barrier(jnp.swapaxes(blocks, 1, 2))

    def in_blocks(view: jax.Array):
        columns = view.reshape(*blocks.shape[:2], -1)
        return jnp.einsum("bfp,bpc->bfc", transposed, columns).sum(0).T

    return in_blocks


def _split_gradient_backward(
    padding: int, residuals: tuple[jax.Array, jax.Array], gradient: jax.Array
) -> tuple[jax.Array, jax.Array]:
    images, kernel = residuals
    size, channels = len(kernel), images.shape[-1]
    _, height, width, _ = gradient.shape
    wide = padded(images, padding)
    product = _products_with(gradient, channels)

    def row(first: jax.Array) -> jax.Array:
        """Gradient of a row of the kernel, as one product: thin ones waste the matrix unit."""
        rows = lax.dynamic_slice_in_dim(wide, first, height, 1)
        columns = [rows[:, :, j : j + width] for j in range(size)]
        return product(jnp.concatenate(columns, axis=-1))

    def position(place: tuple[jax.Array, jax.Array]):
        return product(lax.dynamic_slice(wide, (0, *place, 0), (*gradient.shape[:3], channels)))

    # A loop over a kernel's positions compiles in a fraction of the time of all written out, and is
    # faster where each is much work; experiments/benchmarks/README.md.
    if channels < 4 and size > 3:
        kernel_gradient = lax.map(row, jnp.arange(size))
    elif channels < 4:
        kernel_gradient = product(jnp.concatenate(_shifted(images, size, padding), axis=-1))
    elif size > 3 or gradient[..., 0].size > 12_000:
        first = jnp.arange(size)
        kernel_gradient = lax.map(position, (jnp.repeat(first, size), jnp.tile(first, size)))
    else:
        kernel_gradient = jnp.stack([product(view) for view in _shifted(images, size, padding)])
    # The input gradient is the full correlation with the flipped kernel, less the padding.
    rotated = kernel[::-1, ::-1].transpose(0, 1, 3, 2)
    image_gradient = _native(gradient, rotated, max(0, size - 1 - padding))
    if (excess := padding - (size - 1)) > 0:
        image_gradient = image_gradient[:, excess:-excess, excess:-excess]
    return image_gradient, kernel_gradient.reshape(kernel.shape)


_split_gradient.defvjp(_split_gradient_forward, _split_gradient_backward)


@partial(jax.custom_vjp, nondiff_argnums=(2,))
def _compiled(images: jax.Array, kernel: jax.Array, padding: int):
    return compiled.convolution(images, kernel, padding)


def _compiled_backward(
    padding: int, residuals: tuple[jax.Array, jax.Array], gradient: jax.Array
) -> tuple[jax.Array, jax.Array]:
    images, kernel = residuals
    to_images, to_kernel = compiled.convolution_gradient(images, kernel, padding, gradient)
    if to_images is None:
        (to_images,) = jax.vjp(lambda images: _native(images, kernel, padding), images)[1](gradient)
    return to_images, to_kernel


_compiled.defvjp(
    lambda images, kernel, padding: (_compiled(images, kernel, padding), (images, kernel)),
    _compiled_backward,
)


def _initializers(name: str, fan_in: int) -> tuple[Callable[..., jax.Array], ...]:
    """Initialisers of kernels and of biases."""
    if name == "kaiming":
        return nn.initializers.normal((2 / fan_in) ** 0.5), nn.initializers.zeros
    if name != "pytorch":
        raise ValueError(f"initialization must be pytorch or kaiming, got {name!r}")
    bound = fan_in**-0.5

    def uniform(key: jax.Array, shape: tuple[int, ...], dtype: DTypeLike = jnp.float32):
        return jax.random.uniform(key, shape, dtype, -bound, bound)

    return uniform, uniform


class Conv(nn.Module):
    """Square 2D convolution."""

    filters: int
    size: int = 3
    padding: int = 1
    stride: int = 1
    use_bias: bool = True
    lowering: Convolution | None = None
    dtype: jnp.dtype = jnp.float32
    initialization: str = "pytorch"

    @nn.compact
    def parameters(self, images: jax.Array) -> tuple[jax.Array, jax.Array | None]:
        """Kernel (K, K, C, F) and bias (F,), if there is one, for images (N, H, W, C)."""
        _, height, width, channels = images.shape
        if min(height, width) + 2 * self.padding < self.size:
            raise ValueError(
                f"a {self.size}x{self.size} convolution does not fit a feature map of "
                f"{height}x{width} padded by {self.padding}"
            )
        for_kernel, for_bias = _initializers(self.initialization, self.size**2 * channels)
        kernel = self.param("kernel", for_kernel, (self.size, self.size, channels, self.filters))
        bias = self.param("bias", for_bias, (self.filters,)) if self.use_bias else None
        return kernel, bias

    def __call__(self, images: jax.Array, train: bool = False) -> jax.Array:
        kernel, bias = self.parameters(images)
        lowering = self.lowering or default_convolution(train, images.shape[-1])
        arrays = images.astype(self.dtype), kernel.astype(self.dtype)
        outputs = convolve(*arrays, self.padding, self.stride, lowering)
        return outputs if bias is None else outputs + bias.astype(self.dtype)


class Dense(nn.Module):
    """Fully connected layer."""

    features: int
    dtype: jnp.dtype = jnp.float32
    initialization: str = "pytorch"

    @nn.compact
    def __call__(self, inputs: jax.Array) -> jax.Array:
        for_kernel, for_bias = _initializers(self.initialization, inputs.shape[-1])
        kernel = self.param("kernel", for_kernel, (inputs.shape[-1], self.features))
        bias = self.param("bias", for_bias, (self.features,))
        return inputs.astype(self.dtype) @ kernel.astype(self.dtype) + bias.astype(self.dtype)


class GroupNorm(nn.Module):
    """Normalisation over the pixels and the channels of a group; epsilon 1e-5, affine.

    `num_groups=None` is instance normalisation (a group a channel), 1 is layer normalisation.
    Statistics are float32 and take one pass over the map.
    """

    num_groups: int | None = None

    @nn.compact
    def parameters(self, channels: int) -> tuple[jax.Array, jax.Array]:
        """Scale and bias (C,)."""
        scale = self.param("scale", nn.initializers.ones, (channels,))
        return scale, self.param("bias", nn.initializers.zeros, (channels,))

    def __call__(self, images: jax.Array) -> jax.Array:
        channels = images.shape[-1]
        scale, bias = self.parameters(channels)
        inputs = images.astype(jnp.float32)
        mean = inputs.mean((1, 2), keepdims=True)
        square = (inputs * inputs).mean((1, 2), keepdims=True)
        if (num_groups := self.num_groups) is not None:
            if channels % num_groups:
                raise ValueError(
                    f"group normalization needs a multiple of {num_groups} channels, got {channels}"
                )

            def share(statistic: jax.Array):
                size = channels // num_groups
                groups = statistic.reshape(-1, 1, 1, num_groups, size).mean(-1)
                return jnp.repeat(groups, size, axis=-1)

            mean, square = share(mean), share(square)
        variance = jnp.maximum(square - mean * mean, 0.0)
        outputs = (inputs - mean) * (lax.rsqrt(variance + 1e-5) * scale) + bias
        return outputs.astype(images.dtype)


def normalize_features(name: str, images: jax.Array, train: bool) -> jax.Array:
    """Apply the normalisation layer `name` (call inside a compact module)."""
    num_groups = {"instance": None, "layer": 1, "group": 4}
    if name in num_groups:
        return GroupNorm(num_groups[name])(images)
    if name == "batch":  # PyTorch's momentum 0.1 and epsilon; the running variance is biased here
        return nn.BatchNorm(use_running_average=not train, momentum=0.9, epsilon=1e-5)(images)
    if name == "none":
        return images
    raise ValueError(f"normalization must be instance, layer, group, batch or none, got {name!r}")


def pool(name: str, images: jax.Array, size: int = 2) -> jax.Array:
    """Pool size x size windows without overlap; odd rows and columns at the end are dropped."""
    height, width = images.shape[1:3]
    if min(height, width) < size:
        raise ValueError(
            f"a {size}x{size} pooling does not fit a feature map of {height}x{width}: use a "
            "smaller depth or larger images"
        )
    pools = {"average": _average_pool, "max": _max_pool}
    if name in pools:
        return pools[name](images, size)
    raise ValueError(f"pooling must be average or max, got {name!r}")


# Strided slices, and gradients written out: XLA's window gradients and those of stacked slices take
# ten times as long on the CPU.


def corners(images: jax.Array, size: int) -> list[jax.Array]:
    """The size*size strided views of which the windows consist, row by row."""
    height, width = images.shape[1] // size * size, images.shape[2] // size * size
    return [images[:, i:height:size, j:width:size] for i in range(size) for j in range(size)]


def _interleaved(views: list[jax.Array], size: int, shape: tuple[int, ...]):
    """The images of that shape whose `corners` are `views`, 0 in rows and columns beyond."""
    number, height, width, channels = views[0].shape
    pairs = [jnp.stack(views[i * size : (i + 1) * size], 3) for i in range(size)]
    rows = [pair.reshape(number, height, size * width, channels) for pair in pairs]
    images = jnp.stack(rows, 2).reshape(number, size * height, size * width, channels)
    return jnp.pad(images, [(0, all - part) for all, part in zip(shape, images.shape, strict=True)])


@partial(jax.custom_vjp, nondiff_argnums=(1,))
def _average_pool(images: jax.Array, size: int):
    views = corners(images, size)
    return sum(views[1:], views[0]) * (1 / size**2)


def _average_pool_forward(images: jax.Array, size: int):
    return _average_pool(images, size), images.shape


def _average_pool_backward(size: int, shape: tuple[int, ...], gradient: jax.Array):
    return (_interleaved([gradient * (1 / size**2)] * size**2, size, shape),)


@partial(jax.custom_vjp, nondiff_argnums=(1,))
def _max_pool(images: jax.Array, size: int):
    return reduce(jnp.maximum, corners(images, size))


def _max_pool_forward(images: jax.Array, size: int):
    pooled = _max_pool(images, size)
    return pooled, (images, pooled)


def _max_pool_backward(size: int, residuals: tuple[jax.Array, jax.Array], gradient: jax.Array):
    """Gradient of the images: that of a window goes to the first of equal pixels, as in PyTorch."""
    images, pooled = residuals
    taken, gradients = jnp.zeros(pooled.shape, bool), []
    for view in corners(images, size):
        largest = (view == pooled) & ~taken
        gradients.append(jnp.where(largest, gradient, 0))
        taken |= largest
    return (_interleaved(gradients, size, images.shape),)


_average_pool.defvjp(_average_pool_forward, _average_pool_backward)
_max_pool.defvjp(_max_pool_forward, _max_pool_backward)


_ACTIVATIONS = {
    "relu": nn.relu,
    "leaky_relu": nn.leaky_relu,  # slope 0.01
    "sigmoid": nn.sigmoid,
    "tanh": jnp.tanh,
    "swish": nn.swish,
}


def activate(name: str, inputs: jax.Array) -> jax.Array:
    """Apply the activation `name`."""
    if name in _ACTIVATIONS:
        return _ACTIVATIONS[name](inputs)
    raise ValueError(f"activation must be relu, leaky_relu, sigmoid, tanh or swish, got {name!r}")
