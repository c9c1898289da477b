"""A block of the ConvNet as one function with a hand-written gradient: for accelerators, and for
CPUs in C++ (`compiled_block`).

Convolution, instance normalisation, ReLU and 2x2 average pooling read and write maps of many
megabytes again and again where each is a layer by itself. As one function:

- The mean and the variance of a convolution's output over the pixels follow from the first and
  second moments of the input's patches, which have 9 values a pixel where images are grey: the map
  is not needed. So the first block (`first_block`) writes its pooled output and nothing else, and
  its gradient needs one product of the patches with what the activation lets through.
- The gradient of a pooled map is a broadcast (`normalized_pool`), and the sums that the gradient of
  the normalisation needs are of one pass.
- A bias before an instance normalisation cancels: it is not added, and its gradient is exactly 0.

The functions agree with the layers of `networks.layers` up to rounding; tests/test_blocks.py.
"""

from __future__ import annotations

from functools import partial, reduce
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental.layout import Layout, with_layout_constraint

from evojax_suite.networks import compiled
from evojax_suite.networks.layers import convolve, corners, padded
from evojax_suite.types import Array, PyTree

LAYERS = "instance", "relu", "average"
"""Normalisation, activation and pooling of a block."""
EPSILON = 1e-5
FEW = 4  # an input of fewer channels has a map that is better computed again than kept


def fits(images: Array, padding: int) -> bool:
    """Whether the maps of a block of images (N, H, W, C), its kernel 3x3, have even sides."""
    return all(side + 2 * padding >= 4 and side % 2 == 0 for side in images.shape[1:3])


def block(images: Array, kernel: Array, scale: Array, bias: Array, padding: int) -> Array:
    """Convolution of images (N, H, W, C) with a kernel (K, K, C, F), instance normalisation with
    scale and bias (F,), ReLU, average pooling: (N, H'/2, W'/2, F) in the type of the images."""
    function = first_block if images.shape[-1] < FEW else _later_block
    return function(images, kernel, scale, bias, padding)


def _later_block(images: Array, kernel: Array, scale: Array, bias: Array, padding: int) -> Array:
    maps = convolve(images, kernel.astype(images.dtype), padding, 1, "adaptive")
    return normalized_pool(maps, scale, bias)


def _channels_last(maps: Array) -> Array:
    """The maps, laid out in memory as their axes are: XLA would put pixels last, and transpose."""
    return with_layout_constraint(maps, Layout(tuple(range(maps.ndim))))


@jax.custom_jvp
def _sums(first: Array, second: Array) -> tuple[Array, Array]:
    """Sums over the pixels of two maps (N, H, W, C), in one pass."""

    def add(one: tuple[Array, Array], other: tuple[Array, Array]):
        return one[0] + other[0], one[1] + other[1]

    return lax.reduce((first, second), (jnp.float32(0), jnp.float32(0)), add, (1, 2))


@_sums.defjvp
def _sums_jvp(maps: tuple[Array, Array], tangents: tuple[Array, Array]) -> Any:
    return _sums(*maps), tuple(tangent.sum((1, 2)) for tangent in tangents)


def _upsampled(pooled: Array) -> Array:
    """Each pixel of (N, H, W, C) as 2x2 pixels."""
    number, height, width, channels = pooled.shape
    pixels = pooled[:, :, None, :, None]
    pixels = jnp.broadcast_to(pixels, (number, height, 2, width, 2, channels))
    return pixels.reshape(number, 2 * height, 2 * width, channels)


@jax.custom_vjp
def normalized_pool(maps: Array, scale: Array, bias: Array) -> Array:
    """Instance normalisation with scale and bias (C,), ReLU and 2x2 average pooling of maps (N, H,
    W, C), H and W even: (N, H/2, W/2, C) in the type of the maps; statistics are float32."""
    return _normalized_pool_forward(maps, scale, bias)[0]


def _normalized_pool_forward(maps: Array, scale: Array, bias: Array):
    inputs, pixels = maps.astype(jnp.float32), maps.shape[1] * maps.shape[2]
    mean, square = (total / pixels for total in _sums(inputs, inputs * inputs))
    inverse = lax.rsqrt(jnp.maximum(square - mean * mean, 0.0) + EPSILON)
    slope = inverse * scale
    slope, offset = slope[:, None, None], (bias - mean * slope)[:, None, None]
    parts = [part.astype(jnp.float32) for part in corners(maps, 2)]
    rectified = [jnp.maximum(part * slope + offset, 0) for part in parts]
    pooled = sum(rectified[1:], rectified[0]) * 0.25
    return pooled.astype(maps.dtype), (maps, mean, inverse, scale, bias)


def _normalized_pool_backward(residuals: PyTree, gradient: Array):
    maps, mean, inverse, scale, bias = residuals
    expand = (slice(None), None, None)

    def passed(maps: Array, gradient: Array):
        """What the activation lets through, and the normalised map before scale and bias."""
        standard = (maps.astype(jnp.float32) - mean[expand]) * inverse[expand]
        share = _upsampled(gradient).astype(jnp.float32) * 0.25
        # A sign, since XLA would make a separate kernel of a comparison.
        return share * jnp.sign(jnp.maximum(standard * scale + bias, 0.0)), standard

    through, standard = passed(maps, gradient)
    total, product = _sums(through, through * standard)
    # The barrier keeps XLA from writing what this pass and the next one have in common.
    maps, gradient, total, product = lax.optimization_barrier((maps, gradient, total, product))
    through, standard = passed(maps, gradient)
    pixels = maps.shape[1] * maps.shape[2]
    centred = through - (total[expand] + standard * product[expand]) / pixels
    to_maps = (inverse * scale)[expand] * centred
    return to_maps.astype(maps.dtype), product.sum(0), total.sum(0)


normalized_pool.defvjp(_normalized_pool_forward, _normalized_pool_backward)


def _views(images: Array, size: int, padding: int) -> Array:
    """The inputs of a map's pooling windows in the images (N, H, W, C): (N, H'/2, W'/2, V + 1), the
    pixels of the square of K + 1 pixels that a window's four patches share, and 1. Each is written
    once, though up to four patches have it."""
    images = padded(images, padding)
    number, height, width, channels = images.shape
    pairs = images.reshape(number, height // 2, 2, width // 2, 2, channels)
    pairs = pairs.swapaxes(2, 3).reshape(number, height // 2, width // 2, 4 * channels)
    shifts = (size + 1) // 2
    height, width = height // 2 - shifts + 1, width // 2 - shifts + 1
    views = [pairs[:, i : i + height, j : j + width] for i in range(shifts) for j in range(shifts)]
    return jnp.concatenate([*views, jnp.ones_like(views[0][..., :1])], -1)


def _taps(size: int, channels: int) -> np.ndarray:
    """Places in the views (`_views`) of the input of each weight of a filter, in the order of a
    kernel's rows, at each corner of the pooling windows: (4, T)."""
    row, column, corner_row, corner_column = np.ogrid[:size, :size, :2, :2]
    row, column = row + corner_row, column + corner_column
    pair = (row // 2) * ((size + 1) // 2) + column // 2
    place = (4 * pair + 2 * (row % 2) + column % 2)[..., None] * channels + np.arange(channels)
    return place.transpose(2, 3, 0, 1, 4).reshape(4, -1)


_exact = partial(jnp.einsum, precision="highest", preferred_element_type=jnp.float32)


def _moments(views: Array, taps: np.ndarray) -> tuple[Array, Array]:
    """Means (N, T) and covariances (N, T, T) of the taps over the pixels."""
    products = _exact("nhwu,nhwv->nuv", views, views) / (4 * views.shape[1] * views.shape[2])
    second = reduce(jnp.add, [products[:, corner[:, None], corner] for corner in taps])
    mean = reduce(jnp.add, [products[:, -1, corner] for corner in taps])
    return mean, second - mean[:, :, None] * mean[:, None, :]


def _statistics(moments: tuple[Array, Array], weights: Array) -> tuple[Array, Array]:
    """Mean and 1 / standard deviation (N, F) of the products of patches with weights (T, F)."""
    mean, covariance = moments
    variance = _exact("tf,ntu,uf->nf", weights, covariance, weights)
    inverse = lax.rsqrt(jnp.maximum(variance, 0.0) + EPSILON)
    return _exact("nt,tf->nf", mean, weights), inverse


def kernel_gradient(
    kernel: Array,
    scale: Array,
    moments: tuple[Array, Array],
    mean: Array,
    inverse: Array,
    with_taps: Array,
    total: Array,
) -> tuple[Array, Array, Array]:
    """The gradients of kernel, scale and bias of a first block.

    moments: means (N, T) and covariances (N, T, T), over the pixels, of the inputs of a filter's T
    weights. mean, inverse (N, F): of the map, 1 / its standard deviation. with_taps (N, T, F),
    total (N, F): the sums over the pixels of what the activation lets through, times each input
    and alone.
    """
    tap_mean, covariance = moments
    weights = kernel.astype(jnp.float32).reshape(-1, kernel.shape[-1])
    # The map is Y = patches W. The sums are those of it times the normalised map,
    product = inverse * (_exact("tf,ntf->nf", weights, with_taps) - mean * total)
    # and patches^T (through - (total + normalised product) / pixels).
    centred = with_taps - tap_mean[:, :, None] * total[:, None]
    slanted = _exact("ntu,uf->ntf", covariance, weights) * (inverse * product)[:, None]
    slope = inverse * scale
    to_kernel = (slope[:, None] * (centred - slanted)).sum(0).reshape(kernel.shape)
    return to_kernel.astype(kernel.dtype), product.sum(0), total.sum(0)


def image_gradient(
    images: Array, kernel: Array, scale: Array, bias: Array, padding: int, gradient: Array
) -> Array:
    """Images are data mostly, and this is not computed where nothing asks for it."""
    _, pull = jax.vjp(lambda images: _later_block(images, kernel, scale, bias, padding), images)
    return pull(gradient)[0]


@partial(jax.custom_vjp, nondiff_argnums=(4,))
def first_block(images: Array, kernel: Array, scale: Array, bias: Array, padding: int) -> Array:
    """`block` for images of few channels; products are float32."""
    return _first_block_forward(images, kernel, scale, bias, padding)[0]


def _normalized(
    views: Array, taps: np.ndarray, weights: Array, slope: Array, offset: Array
) -> list[Array]:
    """The map at each corner of the pooling windows (N, H'/2, W'/2, F), normalised. A sum that is
    written out fuses with what follows."""

    def of_corner(corner: np.ndarray):
        inputs = [views[..., tap, None].astype(jnp.float32) for tap in corner]
        products = [tap * weight for tap, weight in zip(inputs, weights, strict=True)]
        total = sum(products[1:], products[0])
        return _channels_last(total * slope[:, None, None] + offset[:, None, None])

    return [of_corner(corner) for corner in taps]


def _first_block_forward(images: Array, kernel: Array, scale: Array, bias: Array, padding: int):
    views = _views(images, kernel.shape[0], padding)
    taps = _taps(kernel.shape[0], images.shape[-1])
    weights = kernel.astype(jnp.float32).reshape(-1, kernel.shape[-1])
    moments = _moments(views, taps)
    mean, inverse = _statistics(moments, weights)
    slope = inverse * scale
    maps = _normalized(views, taps, weights, slope, bias - mean * slope)
    pooled = reduce(jnp.add, (jnp.maximum(corner, 0) for corner in maps)) * 0.25
    return pooled.astype(images.dtype), (images, kernel, scale, bias, moments, mean, inverse)


def _first_block_backward(padding: int, residuals: PyTree, gradient: Array) -> PyTree:
    # Without the barrier XLA would keep the large map of the forward pass after all.
    images, kernel, scale, bias, moments, mean, inverse = lax.optimization_barrier(residuals)
    views = _views(images, kernel.shape[0], padding)
    taps = _taps(kernel.shape[0], images.shape[-1])
    weights = kernel.astype(jnp.float32).reshape(-1, kernel.shape[-1])
    slope = inverse * scale
    maps = _normalized(views, taps, weights, slope, bias - mean * slope)
    share = gradient * 0.25
    # Sums over the pixels of each tap times what the activation lets through, and of that alone.
    sums = [_exact("nhwv,nhwf->nvf", views, jnp.where(corner > 0, share, 0)) for corner in maps]
    with_taps = reduce(jnp.add, [part[:, places] for part, places in zip(sums, taps, strict=True)])
    total = reduce(jnp.add, [part[:, -1] for part in sums])
    by_parameter = kernel_gradient(kernel, scale, moments, mean, inverse, with_taps, total)
    return image_gradient(images, kernel, scale, bias, padding, gradient), *by_parameter


first_block.defvjp(_first_block_forward, _first_block_backward)


@partial(jax.custom_vjp, nondiff_argnums=(4,))
def compiled_block(images: Array, kernel: Array, scale: Array, bias: Array, padding: int) -> Array:
    """`block` in C++, for images of which `compiled.fits` says that it takes them."""
    return compiled.block(images, kernel, scale, bias, padding, keep=False)[0]


def _compiled_forward(images: Array, kernel: Array, scale: Array, bias: Array, padding: int):
    pooled, *kept = compiled.block(images, kernel, scale, bias, padding, keep=True)
    return pooled, (images, kernel, scale, bias, *kept)


def _compiled_backward(padding: int, residuals: PyTree, gradient: Array) -> PyTree:
    images, kernel, scale, bias, *kept = residuals
    arrays = images, kernel, scale, bias, padding
    to_images, *by_parameter = compiled.block_gradient(*arrays, *kept, gradient)
    if to_images is None:
        to_images = image_gradient(*arrays, gradient)
    return to_images, *by_parameter


compiled_block.defvjp(_compiled_forward, _compiled_backward)
