"""A block of the ConvNet in kernels of our own, for GPUs: Pallas with its Triton back end.

Each of XLA's kernels reads and writes whole maps. Here one program of a kernel holds 256 pixels of
a member's map, with up to 128 filters, in registers from the product to the pooling:

- `_forward` gathers the shifted pixels of a 3x3 convolution by itself, so that no patches are
  written; statistics, normalisation, ReLU and pooling follow on the chip. A step of training writes
  the map once, for the gradient; evaluation writes the pooled map alone.
- The gradient is three kernels: what the normalisation, ReLU and pooling let through (one pass
  over the map), the gradient of the images and that of the kernel (products again).
- The first block has too large a map for that. Its statistics follow from the moments of its
  patches (`networks.blocks`): a program sums them and then goes over the image's windows with
  weights that are normalised already. Its gradient is a product of patches and what the
  activation lets through.

`vmap` over members is an axis of the grid; a member's weights are shared by its images. Products
are those of the maps' type, in bfloat16 or TF32, their sums float32. On a CPU the kernels are
interpreted, which is for tests: `networks.create` takes none there. Differentiable once.

The functions agree with the layers of `networks.layers` up to rounding; tests/test_fused.py.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas
from jax.experimental.pallas import triton

from evojax_suite.networks import blocks
from evojax_suite.networks.layers import padded
from evojax_suite.types import Array, PyTree

_ROWS = 256  # pixels of a program
_COLUMNS = 128  # filters of a program
_POSITIONS = 9
_Ref: TypeAlias = PyTree  # an array in the card's memory


def fits(images: Array, filters: int, padding: int) -> bool:
    """Whether the kernels take a block of images (N, H, W, C) with a kernel 3x3."""
    height, width, channels = images.shape[1:]
    sides, pixels = (height + 2 * padding - 2, width + 2 * padding - 2), height * width
    if filters < 16 or not _is_power_of_2(filters) or not all(map(_is_power_of_2, sides)):
        return False
    if channels < blocks.FEW:
        return math.prod(sides) >= 64
    same = padding == 1 and min(sides) >= 2
    return same and 32 <= pixels <= _ROWS and channels >= 16 and _is_power_of_2(channels)


def _is_power_of_2(number: int) -> bool:
    return number > 0 and number & (number - 1) == 0


def block(images: Array, kernel: Array, scale: Array, bias: Array, padding: int) -> Array:
    """`blocks.block` of images (N, H, W, C) that `fits`, with a kernel (3, 3, C, F), scale and bias
    (F,): (N, H'/2, W'/2, F) in the type of the images."""
    if images.shape[-1] < blocks.FEW:
        return _first_block(images, kernel, scale, bias, padding)
    return _later_block(images, kernel, scale, bias)


class _Part(NamedTuple):
    """An array and what of it a program sees: a shape, None where an axis is one place of it, and
    the place by the indices of the program."""

    array: Array | jax.ShapeDtypeStruct
    shape: tuple[int | None, ...]
    place: Callable[..., tuple[int | Array, ...]]

    @property
    def spec(self) -> pallas.BlockSpec:
        return pallas.BlockSpec(self.shape, self.place)


class _Cost(NamedTuple):
    """What one program of a grid takes, for `experiments/benchmarks/roofline.py`."""

    flop: float  # of products
    operations: float  # on single elements
    loaded: float  # bytes


def _call(
    kernel: Callable[..., None],
    grid: tuple[int, ...],
    inputs: list[_Part],
    outputs: list[_Part],
    cost: _Cost,
) -> list[Array]:
    """The outputs of a kernel, called with a reference to each input and output."""
    return pallas.pallas_call(
        kernel,
        grid=grid,
        in_specs=[part.spec for part in inputs],
        out_specs=[part.spec for part in outputs],
        out_shape=[part.array for part in outputs],
        interpret=jax.default_backend() == "cpu",
        compiler_params=triton.CompilerParams(num_warps=8, num_stages=3),
        metadata={name: str(value) for name, value in cost._asdict().items()},
    )(*(part.array for part in inputs))


def _line(array: Array, tile: int) -> _Part:
    """A value for each filter."""
    return _Part(array, (tile,), lambda n, f: (f,))


def _of_image(array: Array | jax.ShapeDtypeStruct, tile: int) -> _Part:
    """What an image (first axis) has for each filter (last axis)."""
    middle = array.shape[1:-1]
    return _Part(array, (None, *middle, tile), lambda n, f: (n, *[0] * len(middle), f))


class _Sides(NamedTuple):
    """The images whose maps one program holds, and the sides of these maps.

    A program's rows are in an order in which the four pixels of a pooling window lie in registers
    of one thread: bits of the window's corner, of the window but for 3, of the corner, of these 3.
    """

    images: int
    height: int
    width: int

    @property
    def pixels(self) -> int:
        return self.height * self.width

    @property
    def rows(self) -> int:
        return self.images * self.pixels

    @property
    def windows(self) -> int:
        """The pooling windows of an image."""
        return self.pixels // 4

    def window_places(self) -> tuple[Array, Array, Array]:
        """Image, line and column of each row."""
        row = lax.iota(jnp.int32, self.rows)
        half, corner = lax.div(row, self.rows // 2), lax.rem(lax.div(row, 8), 2)
        window = lax.div(lax.rem(row, self.rows // 2), 16) * 8 + lax.rem(row, 8)
        image, window = lax.div(window, self.windows), lax.rem(window, self.windows)
        across = self.width // 2
        line, column = lax.div(window, across), lax.rem(window, across)
        return image, 2 * line + half, 2 * column + corner

    def pixel_places(self, rows: int, first: Array | int = 0) -> tuple[Array, Array, Array]:
        """Image, line and column of `rows` pixels from `first` on."""
        row = first + lax.iota(jnp.int32, rows)
        line = lax.div(row, self.width)
        return lax.div(row, self.pixels), lax.rem(line, self.height), lax.rem(row, self.width)

    def by_corner(self, maps: Array) -> Array:
        """Rows of windows (rows, F) as (2, images, windows / 8, 2, 8, F)."""
        return maps.reshape(2, self.images, self.windows // 8, 2, 8, -1)

    def over_pixels(self, by_corner: Array) -> Array:
        """Sums (images, F) over the pixels of each image."""
        return by_corner.sum(3).sum(0).sum(2).sum(1)

    def over_corners(self, by_corner: Array) -> Array:
        """Sums (images, windows, F) over the pixels of each window."""
        return by_corner.sum(3).sum(0).reshape(self.images, self.windows, -1)


def _sides(shape: tuple[int, ...]) -> _Sides:
    """The sides of maps (N, H, W, C); a program holds as many of them as divide N and have at most
    `_ROWS` pixels."""
    number, height, width, _ = shape
    images = 1
    while number % (2 * images) == 0 and 2 * images * height * width <= _ROWS:
        images *= 2
    return _Sides(images, height, width)


def _shifted(
    maps: _Ref, places: tuple[Array, ...], sides: _Sides, position: Array, first: Array, size: int
) -> Array:
    """`size` channels from `first` on of the pixels that a position of the kernel meets when it is
    at `places`; 0 beyond the edges, and beyond the kernel."""
    image, line, column = places
    line, column = line + lax.div(position, 3) - 1, column + lax.rem(position, 3) - 1
    inside = (line >= 0) & (line < sides.height) & (column >= 0) & (column < sides.width)
    inside &= position < _POSITIONS
    place = jnp.where(inside, (image * sides.height + line) * sides.width + column, 0)
    channel = first + lax.iota(jnp.int32, size)
    mask = jnp.broadcast_to(inside[:, None], (len(line), size))
    return triton.load(maps.at[place[:, None], channel[None]], mask=mask, other=0)


def _convolved(
    maps: _Ref, kernel: _Ref, places: tuple[Array, ...], sides: _Sides, to_images: bool = False
) -> Array:
    """The convolution of maps (pixels, C) with a kernel (9, C, F) at `places`, (rows, F); or of
    maps (pixels, F) with the turned kernel, (rows, C)."""
    channels, outputs = maps.shape[-1], kernel.shape[1 if to_images else 2]
    size = _channels_at_once(maps.dtype, channels)
    parts = channels // size

    def add(step: Array, total: Array) -> Array:
        position, first = lax.div(step, parts), lax.rem(step, parts) * size
        inputs = _shifted(maps, places, sides, position, first, size)
        of_part = pallas.ds(first, size)
        if to_images:
            turned = kernel[_POSITIONS - 1 - position, :, of_part]
            return total + triton.dot(inputs, turned, trans_b=True)
        return total + triton.dot(inputs, kernel[position, of_part, :])

    total = jnp.zeros((len(places[0]), outputs), jnp.float32)
    return lax.fori_loop(jnp.int32(0), _POSITIONS * parts, add, total)


def _channels_at_once(dtype: jnp.dtype, channels: int) -> int:
    """So that three stages of a product's operands fit the shared memory."""
    return min(channels, 128 // jnp.dtype(dtype).itemsize)


def _forward_kernel(
    maps: _Ref, kernel: _Ref, scale: _Ref, bias: _Ref, pooled: _Ref, *kept: _Ref, sides: _Sides
) -> None:
    total = _convolved(maps, kernel, sides.window_places(), sides)
    by_corner = sides.by_corner(total)
    mean = sides.over_pixels(by_corner) / sides.pixels
    expand = (None, slice(None), None, None, None)
    centred = by_corner - mean[expand]
    variance = sides.over_pixels(centred * centred) / sides.pixels
    inverse = lax.rsqrt(variance + blocks.EPSILON)
    rectified = jnp.maximum(centred * (inverse * scale[...])[expand] + bias[...], 0)
    pooled[...] = (sides.over_corners(rectified) * 0.25).astype(pooled.dtype)
    if kept:
        of_map, of_mean, of_inverse = kept
        of_map[...] = total.astype(of_map.dtype)
        of_mean[...], of_inverse[...] = mean, inverse


def _cost_of_product(
    rows: int, depth: int, columns: int, dtype: jnp.dtype, by_value: float = 0.0
) -> _Cost:
    """by_value: operations on each element of the result."""
    loaded = depth * (rows + columns) * dtype.itemsize
    return _Cost(2 * rows * depth * columns, by_value * rows * columns, loaded)


def _forward(
    maps: Array, kernel: Array, scale: Array, bias: Array, keep: bool
) -> tuple[Array, list[Array]]:
    """The pooled map (N, H/2, W/2, F) and, to `keep`, the map (N H W, F) in the order of `_Sides`
    and its mean and 1 / standard deviation (N, F)."""
    number, height, width, channels = maps.shape
    filters, sides = kernel.shape[-1], _sides(maps.shape)
    tile = min(filters, _COLUMNS)

    def of_images(dtype: jnp.dtype, *sizes: int) -> _Part:
        shape = jax.ShapeDtypeStruct((number, *sizes, filters), dtype)
        return _Part(shape, (sides.images, *sizes, tile), lambda n, f: (n, *[0] * len(sizes), f))

    def of_rows(dtype: jnp.dtype) -> _Part:
        shape = jax.ShapeDtypeStruct((number * sides.pixels, filters), dtype)
        return _Part(shape, (sides.rows, tile), lambda n, f: (n, f))

    kernel = kernel.reshape(_POSITIONS, channels, filters)
    inputs = [
        _Part(maps.reshape(-1, channels), (sides.rows, channels), lambda n, f: (n, 0)),
        _Part(kernel, (_POSITIONS, channels, tile), lambda n, f: (0, 0, f)),
        _line(scale, tile),
        _line(bias, tile),
    ]
    outputs = [of_images(maps.dtype, sides.windows)]
    if keep:
        statistics = of_images(jnp.dtype(jnp.float32))
        outputs += [of_rows(maps.dtype), statistics, statistics]
    products = _POSITIONS * channels
    pooled, *kept = _call(
        partial(_forward_kernel, sides=sides),
        (number // sides.images, filters // tile),
        inputs,
        outputs,
        _cost_of_product(sides.rows, products, tile, maps.dtype, by_value=7),
    )
    return pooled.reshape(number, height // 2, width // 2, filters), kept


def _through_kernel(
    kept: _Ref, mean: _Ref, inverse: _Ref, gradient: _Ref, scale: _Ref, bias: _Ref,
    to_map: _Ref, to_scale: _Ref, to_bias: _Ref, *, sides: _Sides,
) -> None:  # fmt: skip
    expand = (None, slice(None), None, None, None)
    by_corner = sides.by_corner(kept[...].astype(jnp.float32))
    standard = (by_corner - mean[...][expand]) * inverse[...][expand]
    share = gradient[...].astype(jnp.float32) * 0.25
    share = share.reshape(1, sides.images, sides.windows // 8, 1, 8, -1)
    share = jnp.broadcast_to(share, standard.shape)
    through = jnp.where(standard * scale[...] + bias[...] > 0, share, 0)
    total, product = sides.over_pixels(through), sides.over_pixels(through * standard)
    slanted = (total[expand] + standard * product[expand]) / sides.pixels
    found = (inverse[...] * scale[...])[expand] * (through - slanted)
    image, line, column = sides.window_places()
    place = (image * sides.height + line) * sides.width + column
    channel = lax.iota(jnp.int32, to_map.shape[-1])
    to_map[place[:, None], channel[None]] = found.reshape(sides.rows, -1).astype(to_map.dtype)
    to_scale[...], to_bias[...] = product, total


def _through(
    kept: Array, mean: Array, inverse: Array, gradient: Array, scale: Array, bias: Array
) -> list[Array]:
    """The gradient of the map (N H W, F), pixel by pixel, and those of scale and bias for each
    image (N, F), from that of the pooled map (N, H/2, W/2, F)."""
    number, height, width, filters = gradient.shape
    sides, tile = _sides((number, 2 * height, 2 * width, filters)), min(filters, 32)

    def of_rows(array: Array | jax.ShapeDtypeStruct) -> _Part:
        return _Part(array, (sides.rows, tile), lambda n, f: (n, f))

    def of_images(array: Array | jax.ShapeDtypeStruct) -> _Part:
        return _Part(array, (sides.images, tile), lambda n, f: (n, f))

    pooled = gradient.reshape(number, sides.windows, filters)
    shape = sides.images, sides.windows, tile
    inputs = [
        of_rows(kept),
        of_images(mean),
        of_images(inverse),
        _Part(pooled, shape, lambda n, f: (n, 0, f)),
        _line(scale, tile),
        _line(bias, tile),
    ]
    sums = of_images(jax.ShapeDtypeStruct((number, filters), jnp.float32))
    outputs = [of_rows(jax.ShapeDtypeStruct(kept.shape, kept.dtype)), sums, sums]
    grid = number // sides.images, filters // tile
    kernel = partial(_through_kernel, sides=sides)
    values = sides.rows * tile
    cost = _Cost(0, 10 * values, 1.25 * values * kept.dtype.itemsize)
    return _call(kernel, grid, inputs, outputs, cost)


def _to_images_kernel(gradient: _Ref, kernel: _Ref, to_images: _Ref, *, sides: _Sides) -> None:
    places = sides.pixel_places(sides.rows)
    found = _convolved(gradient, kernel, places, sides, to_images=True)
    to_images[...] = found.astype(to_images.dtype)


def _to_images(gradient: Array, kernel: Array, shape: tuple[int, ...]) -> Array:
    """The gradient of the images, of this shape, from that of the map (N H W, F)."""
    number, _, _, channels = shape
    filters, sides = kernel.shape[-1], _sides(shape)
    tile = min(channels, _COLUMNS)
    kernel = kernel.reshape(_POSITIONS, channels, filters)
    inputs = [
        _Part(gradient, (sides.rows, filters), lambda n, c: (n, 0)),
        _Part(kernel, (_POSITIONS, tile, filters), lambda n, c: (0, c, 0)),
    ]
    outputs = jax.ShapeDtypeStruct((len(gradient), channels), gradient.dtype)
    products = _POSITIONS * filters
    (found,) = _call(
        partial(_to_images_kernel, sides=sides),
        (number // sides.images, channels // tile),
        inputs,
        [_Part(outputs, (sides.rows, tile), lambda n, c: (n, c))],
        _cost_of_product(sides.rows, products, tile, gradient.dtype),
    )
    return found.reshape(shape)


def _to_kernel_kernel(
    maps: _Ref, gradient: _Ref, to_kernel: _Ref, *, sides: _Sides, rows: int
) -> None:
    """Two positions of the kernel, so that the map's gradient is loaded once for both; the last
    program has one."""
    channels, first = maps.shape[-1], 2 * pallas.program_id(0)
    positions = first, first + 1

    def add(step: Array, totals: list[Array]) -> list[Array]:
        places = sides.pixel_places(rows, step * rows)
        of_rows = gradient[pallas.ds(step * rows, rows), :]
        inputs = [_shifted(maps, places, sides, p, jnp.int32(0), channels) for p in positions]
        found = [triton.dot(pixels, of_rows, trans_a=True) for pixels in inputs]
        return [total + new for total, new in zip(totals, found, strict=True)]

    zeros = jnp.zeros((channels, gradient.shape[-1]), jnp.float32)
    totals = lax.fori_loop(jnp.int32(0), len(maps) // rows, add, [zeros, zeros])
    to_kernel[first] = totals[0].astype(to_kernel.dtype)

    @pallas.when(first + 1 < _POSITIONS)
    def _():
        to_kernel[first + 1] = totals[1].astype(to_kernel.dtype)


def _to_kernel(maps: Array, gradient: Array) -> Array:
    """The gradient of the kernel, in the type of the maps, from that of the map (N H W, F)."""
    number, height, width, channels = maps.shape
    filters, pixels = gradient.shape[-1], number * height * width
    high, wide = min(channels, _COLUMNS), min(filters, _COLUMNS)
    rows = min(height * width, 128 // maps.dtype.itemsize)
    inputs = [
        _Part(maps.reshape(-1, channels), (pixels, high), lambda p, c, f: (0, c)),
        _Part(gradient, (pixels, wide), lambda p, c, f: (0, f)),
    ]
    found = jax.ShapeDtypeStruct((_POSITIONS, channels, filters), maps.dtype)
    loaded = wide + _POSITIONS / 5 * high
    (found,) = _call(
        partial(_to_kernel_kernel, sides=_Sides(number, height, width), rows=rows),
        (5, channels // high, filters // wide),
        inputs,
        [_Part(found, (_POSITIONS, high, wide), lambda p, c, f: (0, c, f))],
        _Cost(4 * pixels * high * wide, 0, pixels * loaded * maps.dtype.itemsize),
    )
    return found.reshape(3, 3, channels, filters)


@jax.custom_vjp
def _later_block(images: Array, kernel: Array, scale: Array, bias: Array) -> Array:
    return _forward(images, kernel.astype(images.dtype), scale, bias, keep=False)[0]


def _later_block_forward(images: Array, kernel: Array, scale: Array, bias: Array) -> PyTree:
    pooled, kept = _forward(images, kernel.astype(images.dtype), scale, bias, keep=True)
    return pooled, (images, kernel, scale, bias, *kept)


def _later_block_backward(residuals: PyTree, gradient: Array) -> PyTree:
    images, kernel, scale, bias, kept, mean, inverse = residuals
    to_map, to_scale, to_bias = _through(kept, mean, inverse, gradient, scale, bias)
    to_images = _to_images(to_map, kernel.astype(images.dtype), images.shape)
    to_kernel = _to_kernel(images, to_map).astype(kernel.dtype)
    return to_images, to_kernel, to_scale.sum(0), to_bias.sum(0)


_later_block.defvjp(_later_block_forward, _later_block_backward)


class _Windows(NamedTuple):
    """The first block's images, padded and flat, and how a program goes over their windows."""

    columns: int  # of a padded image
    channels: int
    width: int  # of the map
    pixels: int  # of the map
    taps: int  # weights of a filter, with two for its offset and as many as make a power of 2

    @property
    def weights(self) -> int:
        """The number of weights of a filter."""
        return _POSITIONS * self.channels

    @property
    def rows(self) -> int:
        """Pixels at once."""
        return min(_ROWS, self.pixels)

    def patches(self, images: _Ref, step: Array) -> Array:
        """Patches (rows, taps), corner by corner of the windows, and 1 for the offset's taps; the
        last two values of the images are 0 and 1."""
        row, tap = lax.iota(jnp.int32, self.rows), lax.iota(jnp.int32, self.taps)
        windows, of_row = self.rows // 4, 3 * self.channels
        corner, window = lax.div(row, windows), step * windows + lax.rem(row, windows)
        line = 2 * lax.div(window, self.width // 2) + lax.div(corner, 2)
        column = 2 * lax.rem(window, self.width // 2) + lax.rem(corner, 2)
        place = (line * self.columns + column) * self.channels
        reach = lax.div(tap, of_row) * self.columns * self.channels + lax.rem(tap, of_row)
        is_one = (tap == self.weights) | (tap == self.weights + 1)
        constant = len(images) - jnp.where(is_one, 1, 2)
        inside = jnp.broadcast_to((tap < self.weights)[None], (self.rows, self.taps))
        index = jnp.where(inside, place[:, None] + reach[None], constant[None])
        return triton.load(images.at[index])

    def is_tap(self, number: int) -> Array:
        """1 at the first or second tap of the offset, 0 elsewhere."""
        return jnp.where(lax.iota(jnp.int32, self.taps) == self.weights + number, 1.0, 0.0)

    def normalized(self, weights: Array, slope: Array, offset: Array, dtype: jnp.dtype) -> Array:
        """Weights (taps, F) that give the map normalised; the offset in two parts, so that bfloat16
        rounds it as little as float32 would."""
        high = offset.astype(dtype).astype(jnp.float32)
        offsets = self.is_tap(0)[:, None] * high + self.is_tap(1)[:, None] * (offset - high)
        return (weights * slope + offsets).astype(dtype)

    def each(self, function: Callable[[Array, Array], Array], start: Array) -> Array:
        """A fold over the steps of a program."""
        return lax.fori_loop(jnp.int32(0), self.pixels // self.rows, function, start)


_exact = partial(triton.dot, allow_tf32=False)


def _first_forward_kernel(
    images: _Ref, kernel: _Ref, scale: _Ref, bias: _Ref, pooled: _Ref, *kept: _Ref,
    windows: _Windows,
) -> None:  # fmt: skip
    def add(step: Array, total: Array) -> Array:
        patches = windows.patches(images, step)
        return total + _exact(patches, patches, trans_a=True)

    weights, is_one = kernel[...], windows.is_tap(0)
    second = windows.each(add, jnp.zeros((windows.taps, windows.taps), jnp.float32))
    second = second / windows.pixels
    of_taps = (second * is_one[:, None]).sum(0)
    covariance = second - of_taps[:, None] * of_taps[None]
    mean = (weights * of_taps[:, None]).sum(0)
    variance = (weights * _exact(covariance, weights)).sum(0)
    inverse = lax.rsqrt(jnp.maximum(variance, 0.0) + blocks.EPSILON)
    slope = inverse * scale[...]
    normalized = windows.normalized(weights, slope, bias[...] - mean * slope, images.dtype)

    def pool(step: Array, nothing: Array) -> Array:
        maps = jnp.maximum(triton.dot(windows.patches(images, step), normalized), 0)
        found = maps.reshape(4, windows.rows // 4, -1).sum(0) * 0.25
        of_step = pallas.ds(step * (windows.rows // 4), windows.rows // 4)
        pooled[of_step, :] = found.astype(pooled.dtype)
        return nothing

    windows.each(pool, jnp.int32(0))
    if kept:
        of_second, of_mean, of_inverse = kept
        of_second[...], of_mean[...], of_inverse[...] = second, mean, inverse


def _first_backward_kernel(
    images: _Ref, kernel: _Ref, scale: _Ref, bias: _Ref, mean: _Ref, inverse: _Ref, gradient: _Ref,
    sums: _Ref, *, windows: _Windows,
) -> None:  # fmt: skip
    slope = inverse[...] * scale[...]
    offset = bias[...] - mean[...] * slope
    normalized = windows.normalized(kernel[...], slope, offset, images.dtype)

    def add(step: Array, total: Array) -> Array:
        patches = windows.patches(images, step)
        maps = triton.dot(patches, normalized)
        of_step = pallas.ds(step * (windows.rows // 4), windows.rows // 4)
        share = gradient[of_step, :] * 0.25
        share = jnp.broadcast_to(share[None], (4, *share.shape)).reshape(maps.shape)
        through = jnp.where(maps > 0, share, 0).astype(gradient.dtype)
        return total + triton.dot(patches, through, trans_a=True)

    sums[...] = windows.each(add, jnp.zeros(sums.shape, jnp.float32))


def _windows(images: Array, kernel: Array, padding: int) -> _Windows:
    height, width = (side + 2 * padding - 2 for side in images.shape[1:3])
    taps = max(16, 1 << (kernel[..., 0].size + 1).bit_length())
    return _Windows(width + 2, images.shape[-1], width, height * width, taps)


def _first_inputs(
    images: Array, kernel: Array, scale: Array, bias: Array, padding: int, tile: int
) -> list[_Part]:
    windows = _windows(images, kernel, padding)
    weights = kernel.astype(jnp.float32).reshape(windows.weights, -1)
    weights = jnp.pad(weights, ((0, windows.taps - windows.weights), (0, 0)))
    flat = padded(images, padding).reshape(len(images), -1)
    flat = jnp.pad(jnp.pad(flat, ((0, 0), (0, 1))), ((0, 0), (0, 1)), constant_values=1)
    return [
        _Part(flat, (None, flat.shape[1]), lambda n, f: (n, 0)),
        _Part(weights, (windows.taps, tile), lambda n, f: (0, f)),
        _line(scale, tile),
        _line(bias, tile),
    ]


def _loaded_first(images: Array, padding: int, windows: _Windows, tile: int) -> int:
    """Bytes of an image and the weights."""
    pixels = windows.columns * (images.shape[1] + 2 * padding)
    return pixels * windows.channels * images.dtype.itemsize + 4 * windows.taps * tile


def _first_forward(
    images: Array, kernel: Array, scale: Array, bias: Array, padding: int, keep: bool
) -> tuple[Array, list[Array]]:
    """The pooled map (N, H'/2, W'/2, F) and, to `keep`, the mean products of taps (N, taps, taps)
    and the map's mean and 1 / standard deviation (N, F)."""
    windows, number, filters = _windows(images, kernel, padding), len(images), len(scale)
    tile, taps = min(filters, _COLUMNS), windows.taps
    inputs = _first_inputs(images, kernel, scale, bias, padding, tile)

    def of(dtype: jnp.dtype, *sizes: int) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct((number, *sizes), dtype)

    exact = jnp.dtype(jnp.float32)
    outputs = [_of_image(of(images.dtype, windows.pixels // 4, filters), tile)]
    if keep:
        statistics = _of_image(of(exact, filters), tile)
        second = _Part(of(exact, taps, taps), (None, taps, taps), lambda n, f: (n, 0, 0))
        outputs += [second, statistics, statistics]
    flop = 2 * taps * windows.pixels * (taps + tile)
    operations = windows.pixels * (2 * tile + 6 * taps)
    cost = _Cost(flop, operations, _loaded_first(images, padding, windows, tile))
    function = partial(_first_forward_kernel, windows=windows)
    pooled, *kept = _call(function, (number, filters // tile), inputs, outputs, cost)
    return pooled.reshape(number, -1, windows.width // 2, filters), kept


def _first_sums(
    images: Array,
    kernel: Array,
    scale: Array,
    bias: Array,
    padding: int,
    mean: Array,
    inverse: Array,
    gradient: Array,
) -> Array:
    """The sums over the pixels of each tap times what the activation lets through (N, taps, F)."""
    windows, number, filters = _windows(images, kernel, padding), len(images), len(scale)
    tile, taps = min(filters, _COLUMNS), windows.taps
    inputs = _first_inputs(images, kernel, scale, bias, padding, tile)
    pooled = gradient.reshape(number, -1, filters)
    inputs += [_of_image(array, tile) for array in (mean, inverse, pooled)]
    found = _of_image(jax.ShapeDtypeStruct((number, taps, filters), jnp.float32), tile)
    loaded = _loaded_first(images, padding, windows, tile)
    loaded += windows.pixels // 4 * tile * gradient.dtype.itemsize
    operations = windows.pixels * (3 * tile + 3 * taps)
    cost = _Cost(4 * taps * windows.pixels * tile, operations, loaded)
    function = partial(_first_backward_kernel, windows=windows)
    return _call(function, (number, filters // tile), inputs, [found], cost)[0]


@partial(jax.custom_vjp, nondiff_argnums=(4,))
def _first_block(images: Array, kernel: Array, scale: Array, bias: Array, padding: int) -> Array:
    return _first_forward(images, kernel, scale, bias, padding, keep=False)[0]


def _first_block_forward(images: Array, kernel: Array, scale: Array, bias: Array, padding: int):
    pooled, kept = _first_forward(images, kernel, scale, bias, padding, keep=True)
    return pooled, (images, kernel, scale, bias, kept)


def _first_block_backward(padding: int, residuals: PyTree, gradient: Array) -> PyTree:
    images, kernel, scale, bias, (second, mean, inverse) = residuals
    sums = _first_sums(images, kernel, scale, bias, padding, mean, inverse, gradient)
    taps = kernel[..., 0].size
    of_taps = second[:, taps, :taps]
    covariance = second[:, :taps, :taps] - of_taps[:, :, None] * of_taps[:, None]
    by_parameter = blocks.kernel_gradient(
        kernel, scale, (of_taps, covariance), mean, inverse, sums[:, :taps], sums[:, taps]
    )
    to_images = blocks.image_gradient(images, kernel, scale, bias, padding, gradient)
    return to_images, *by_parameter


_first_block.defvjp(_first_block_forward, _first_block_backward)
