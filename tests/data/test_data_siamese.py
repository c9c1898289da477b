"""Differentiable siamese augmentation: what each operation does, by images that show it."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from evojax_suite.data import siamese

NUMBER = 400
SIZE = 16
CENTRES = (2 * np.arange(SIZE) + 1) / SIZE - 1


def images_of(count, seed=0, shape=(SIZE, SIZE, 3)):
    return jax.random.normal(jax.random.key(seed), (count, *shape))


def coordinates(count):
    """Images whose two channels are the height and the width, from -1 to 1."""
    grid = np.stack(np.meshgrid(CENTRES, CENTRES, indexing="ij"), -1).astype(np.float32)
    return jnp.broadcast_to(grid, (count, SIZE, SIZE, 2))


def augmented(name, images, seed=1, shared=False):
    return np.asarray(siamese.augment(jax.random.key(seed), images, (name,), shared))


@pytest.mark.parametrize("name", siamese.NAMES)
def test_the_same_is_done_to_batches_of_any_size_when_shared(name):
    images = images_of(7)
    many, few = augmented(name, images, shared=True), augmented(name, images[2:4], shared=True)
    assert many.shape == images.shape
    np.testing.assert_allclose(many[2:4], few, atol=1e-5)
    results = [augmented(name, images, seed, shared=True) for seed in range(8)]
    assert any(not np.allclose(result, results[0]) for result in results)
    same = jnp.broadcast_to(images[0], images.shape)
    alike = augmented(name, same, shared=True)
    np.testing.assert_allclose(alike, np.broadcast_to(alike[0], alike.shape), atol=1e-5)
    apart = augmented(name, jnp.broadcast_to(images[0], (30, *images.shape[1:])))
    assert any(not np.allclose(image, apart[0]) for image in apart)


@pytest.mark.parametrize("name", siamese.NAMES)
def test_gradients_are_those_of_finite_differences(name):
    images, direction = images_of(4), images_of(4, seed=5)
    _, tangent = jax.jvp(
        lambda images: siamese.augment(jax.random.key(2), images, (name,), False),
        (images,),
        (direction,),
    )
    change = augmented(name, images + direction, 2) - augmented(name, images, 2)
    np.testing.assert_allclose(tangent, change, atol=1e-4)  # each operation is affine in images


def test_flip_mirrors_half_of_the_images():
    images = images_of(NUMBER)
    result = augmented("flip", images)
    mirrored = np.array(
        [np.array_equal(a, b[:, ::-1]) for a, b in zip(result, images, strict=True)]
    )
    kept = np.array([np.array_equal(a, b) for a, b in zip(result, images, strict=True)])
    assert (mirrored | kept).all()
    assert 0.42 < mirrored.mean() < 0.58


def test_crop_moves_whole_pixels_and_zeros_come_in():
    image = np.asarray(images_of(1))[0]
    result = augmented("crop", jnp.broadcast_to(image, (NUMBER, *image.shape)))
    padded = np.pad(image, ((2, 2), (2, 2), (0, 0)))
    windows = {
        (y, x): padded[y : y + SIZE, x : x + SIZE].tobytes() for y in range(5) for x in range(5)
    }
    found = [
        [place for place, window in windows.items() if window == one.tobytes()] for one in result
    ]
    assert all(len(places) == 1 for places in found)
    counts = np.array([sum(places[0] == place for places in found) for place in windows])
    assert (counts > 0).all()  # 16 of each expected


def test_cutout_zeros_at_most_a_quarter():
    result = augmented("cutout", jnp.ones((NUMBER, SIZE, SIZE, 1)))[..., 0]
    assert set(np.unique(result)) == {0, 1}
    rows, columns = (result == 0).any(2), (result == 0).any(1)
    np.testing.assert_array_equal(result == 0, rows[:, :, None] & columns[:, None])  # rectangles
    heights, widths = rows.sum(1), columns.sum(1)
    assert heights.max() == widths.max() == SIZE // 2
    assert heights.min() == widths.min() == SIZE // 4  # the centre is on the border
    assert 0.5 < (heights == SIZE // 2).mean() < 0.7  # 9 of 17 corners, and 13 wide apart of them


def matrices(name):
    """The matrix of each image; checks that coordinates follow it where they are inside."""
    result = augmented(name, coordinates(NUMBER))
    middle = slice(SIZE // 2 - 3, SIZE // 2 + 3)
    places = np.stack(np.meshgrid(CENTRES, CENTRES, indexing="ij"), -1)[middle, middle].reshape(
        -1, 2
    )
    values = result[:, middle, middle].reshape(NUMBER, -1, 2)
    solved = np.array([np.linalg.lstsq(places, value, rcond=None)[0].T for value in values])
    np.testing.assert_allclose(np.einsum("nij,pj->npi", solved, places), values, atol=1e-5)
    return solved


def test_scale_magnifies_height_and_width_by_own_factors():
    found = matrices("scale")
    np.testing.assert_allclose(found[:, [0, 1], [1, 0]], 0, atol=1e-5)
    factors = found[:, [0, 1], [0, 1]]
    assert factors.min() >= 1 / 1.2 - 1e-5
    assert factors.max() <= 1.2 + 1e-5
    np.testing.assert_allclose(factors.mean(), (1 / 1.2 + 1.2) / 2, atol=0.02)
    assert abs(np.corrcoef(factors.T)[0, 1]) < 0.2


def test_rotate_turns_by_up_to_15_degrees():
    found = matrices("rotate")
    np.testing.assert_allclose(
        found @ found.transpose(0, 2, 1), np.broadcast_to(np.eye(2), found.shape), atol=1e-5
    )
    angles = np.degrees(np.arctan2(found[:, 0, 1], found[:, 0, 0]))
    assert 13 < angles.max() <= 15 + 1e-3
    assert -15 - 1e-3 <= angles.min() < -13
    assert abs(angles.mean()) < 2


@pytest.mark.parametrize("name", ["scale", "rotate"])
def test_zeros_come_in_from_outside(name):
    result = augmented(name, jnp.ones((NUMBER, SIZE, SIZE, 1)))
    assert result.min() < 0.5
    assert result.max() <= 1 + 1e-5


def test_color_changes_brightness_saturation_and_contrast():
    images = images_of(NUMBER) + 2
    result = augmented("color", images)
    shift = result.mean((1, 2, 3)) - np.asarray(images).mean((1, 2, 3))
    assert -0.5 - 1e-5 <= shift.min() < -0.4
    assert 0.4 < shift.max() <= 0.5 + 1e-5
    grey, grey_before = result.mean(-1), np.asarray(images).mean(-1)

    def deviation(values):
        return values.reshape(NUMBER, -1).std(1)

    contrast = deviation(grey) / deviation(grey_before)
    assert 0.5 - 1e-4 <= contrast.min() < 0.55
    assert 1.45 < contrast.max() <= 1.5 + 1e-4
    chroma, chroma_before = result - grey[..., None], np.asarray(images) - grey_before[..., None]
    saturation = deviation(chroma) / deviation(chroma_before) / contrast
    assert 0 <= saturation.min() < 0.1
    assert 1.9 < saturation.max() <= 2 + 1e-3


def test_one_of_the_operations_is_picked_uniformly():
    image = jnp.broadcast_to(images_of(1)[0], (4, SIZE, SIZE, 3))
    keys = jax.random.split(jax.random.key(0), 600)
    names = ("cutout", "color")
    results = np.asarray(jax.vmap(lambda key: siamese.augment(key, image, names, True))(keys))
    cut = (results == 0).any((1, 2, 3, 4)).mean()
    assert 0.44 < cut < 0.56


def test_no_names_do_nothing_and_unknown_ones_are_refused():
    images = images_of(2)
    assert siamese.augment(jax.random.key(0), images, (), True) is images
    with pytest.raises(ValueError, match="flip, scale, rotate, got 'mirror'"):
        siamese.augment(jax.random.key(0), images, ("flip", "mirror"), True)
