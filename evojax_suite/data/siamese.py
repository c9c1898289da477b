"""Differentiable siamese augmentation (DSA; Zhao & Bilen, ICML 2021).

A call applies one operation, picked uniformly from those named (the published "S" mode), with
random parameters that all images share or that each image has to itself. Two calls with the same
key and shared parameters do the same to batches of any size, as gradient matching needs for its
real and synthetic images.

color   brightness, saturation and contrast, in this order. Adds -0.5..0.5 (1.0); multiplies the
        distance from the pixel's mean over the channels by 0..2 (2.0), and then the distance from
        the image's mean by 0.5..1.5 (0.5).
crop    moves by up to 0.125 of height and width, whole pixels; zeros move in.
cutout  zeros a rectangle of 0.5 of height and width, its centre anywhere in the image.
flip    mirrors left to right with probability 0.5.
scale   magnifies height and width by a factor each, 1/1.2..1.2 (1.2); zeros move in.
rotate  turns by -15..15 degrees about the centre; zeros move in.

All numbers are uniform, all parameters (in brackets) the published ones. Images are normalised, so
that zero is the mean colour. scale and rotate sample bilinearly in coordinates that run from -1 to
1 between the borders of the image, so that rotating an image that is not square shears it, as
published.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import jax
import jax.numpy as jnp
from jax.scipy.ndimage import map_coordinates
from jaxtyping import Float, Num

from evojax_suite.types import Array, Images, PRNGKey

BRIGHTNESS, SATURATION, CONTRAST = 1.0, 2.0, 0.5
CROP, CUTOUT, FLIP, SCALE, ROTATE = 0.125, 0.5, 0.5, 1.2, 15.0


def check_names(names: Sequence[str]) -> None:
    """Raise ValueError where one of `names` is no operation."""
    for name in names:
        if name not in NAMES:
            raise ValueError(f"siamese must name some of {', '.join(NAMES)}, got {name!r}")


def augment(key: PRNGKey, images: Images, names: Sequence[str], shared: bool) -> Images:
    """The normalised images after one of the operations `names`, of the same type; without names
    the images themselves. Raises ValueError for an unknown name.

    shared: whether all images get the same parameters. Differentiable in the images; `names` and
    `shared` are static.
    """
    check_names(names)
    if not names:
        return images
    key_operation, key_parameters = jax.random.split(key)
    count = 1 if shared else images.shape[0]
    operations = [partial(_OPERATIONS[name], count=count) for name in names]
    chosen = jax.random.randint(key_operation, (), 0, len(names))
    return jax.lax.switch(chosen, operations, key_parameters, images)


def _color(key: PRNGKey, images: Images, count: int) -> Images:
    draws = jax.random.uniform(key, (3, count, 1, 1, 1), images.dtype)
    images = images + BRIGHTNESS * (draws[0] - 0.5)
    grey = images.mean(-1, keepdims=True)
    images = grey + SATURATION * draws[1] * (images - grey)
    mean = images.mean((1, 2, 3), keepdims=True)
    return mean + (CONTRAST + draws[2]) * (images - mean)


def _crop(key: PRNGKey, images: Images, count: int) -> Images:
    reach_y, reach_x = (_part(CROP, length) for length in images.shape[1:3])
    padded = jnp.pad(images, ((0, 0), (reach_y, reach_y), (reach_x, reach_x), (0, 0)))
    last = 2 * jnp.array([reach_y, reach_x])
    corners = jax.random.randint(key, (count, 2), 0, last + 1)

    def window(image: Array, corner: Array):
        return jax.lax.dynamic_slice(image, (corner[0], corner[1], 0), images.shape[1:])

    return _apply(window, padded, corners)


def _cutout(key: PRNGKey, images: Images, count: int) -> Images:
    lengths = images.shape[1:3]
    sizes = [_part(CUTOUT, length) for length in lengths]
    # An even rectangle has its centre on a corner of pixels, of which there is one more.
    last = [length - size % 2 for length, size in zip(lengths, sizes, strict=True)]
    centres = jax.random.randint(key, (count, 2), 0, jnp.array(last) + 1)

    def inside(axis: int):
        start = centres[:, axis, None] - sizes[axis] // 2
        positions = jnp.arange(lengths[axis])
        return (positions >= start) & (positions < start + sizes[axis])

    return jnp.where(inside(0)[:, :, None, None] & inside(1)[:, None, :, None], 0, images)


def _flip(key: PRNGKey, images: Images, count: int) -> Images:
    flip = jax.random.bernoulli(key, FLIP, (count, 1, 1, 1))
    return jnp.where(flip, images[:, :, ::-1], images)


def _scale(key: PRNGKey, images: Images, count: int) -> Images:
    factors = jax.random.uniform(key, (count, 2), images.dtype, 1 / SCALE, SCALE)
    return _apply(_sample, images, factors[:, :, None] * jnp.eye(2, dtype=images.dtype))


def _rotate(key: PRNGKey, images: Images, count: int) -> Images:
    limit = jnp.deg2rad(ROTATE)
    angle = jax.random.uniform(key, (count,), images.dtype, -limit, limit)
    cosine, sine = jnp.cos(angle), jnp.sin(angle)
    matrices = jnp.stack([jnp.stack([cosine, sine], -1), jnp.stack([-sine, cosine], -1)], 1)
    return _apply(_sample, images, matrices)


def _part(ratio: float, length: int) -> int:
    """`ratio` of a length in whole pixels, halves rounded up."""
    return int(ratio * length + 0.5)


def _apply(
    function: Callable[[Array, Array], Array],
    images: Float[Array, "images rows columns channels"],
    parameters: Num[Array, "sets *parameters"],
) -> Images:
    """Apply `function` to each image with its parameters, or with the only set of them."""
    if len(parameters) == 1:
        return jax.vmap(lambda image: function(image, parameters[0]))(images)
    return jax.vmap(function)(images, parameters)


def _sample(
    image: Float[Array, "height width channels"], matrix: Float[Array, "2 2"]
) -> Float[Array, "height width channels"]:
    """The image whose pixel at (y, x) is that of `image` at matrix @ (y, x), zero outside."""
    lengths = image.shape[:2]
    centres = [(2 * jnp.arange(n, dtype=image.dtype) + 1) / n - 1 for n in lengths]
    places = jnp.einsum("ij,jhw->ihw", matrix, jnp.stack(jnp.meshgrid(*centres, indexing="ij")))
    pixels = [((place + 1) * n - 1) / 2 for place, n in zip(places, lengths, strict=True)]
    bilinear = partial(map_coordinates, coordinates=pixels, order=1)
    return jax.vmap(bilinear, in_axes=-1, out_axes=-1)(image)


_OPERATIONS: dict[str, Callable[..., Array]] = dict(
    color=_color, crop=_crop, cutout=_cutout, flip=_flip, scale=_scale, rotate=_rotate
)
NAMES = tuple(_OPERATIONS)
