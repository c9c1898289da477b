"""Normalisation and augmentation."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from evojax_suite.data import (
    DataError,
    denormalize,
    mixup,
    normalize,
    random_crop,
    random_flip,
    random_shift,
)

MEAN, STD = (0.5, 0.25, 0.1), (0.5, 0.2, 0.3)
KEY = jax.random.key(7)


@pytest.fixture
def batch() -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (16, 6, 5, 3), np.uint8)


@pytest.mark.parametrize("library", [np, jnp])
@pytest.mark.parametrize("scale", [1, 255])
def test_normalize_and_back(batch, library, scale):
    images = library.asarray(batch if scale == 255 else np.float32(batch / 255))
    normal = normalize(images, MEAN, STD)
    assert isinstance(normal, np.ndarray if library is np else jax.Array)
    assert normal.dtype == np.float32
    np.testing.assert_allclose(normal, (batch / 255 - MEAN) / STD, rtol=1e-5, atol=1e-5)
    back = denormalize(normal, MEAN, STD)
    assert isinstance(back, np.ndarray if library is np else jax.Array)
    np.testing.assert_allclose(back, batch / 255, atol=1e-6)


def test_normalize_in_jit_with_traced_constants(batch):
    mean, std = jnp.array(MEAN), jnp.array(STD)
    inside = jax.jit(lambda images, mean, std: normalize(images, mean, std))(batch, mean, std)
    np.testing.assert_allclose(inside, normalize(batch, MEAN, STD), rtol=1e-5, atol=1e-6)


def test_denormalize_does_not_clip():
    assert denormalize(np.full((1, 2, 2, 1), 4.0), (0.5,), (0.5,)).max() == 2.5


def test_wrong_input_to_normalize(batch):
    with pytest.raises(DataError, match="3 channels, mean 1 and std 1"):
        normalize(batch, (0.5,), (0.5,))
    with pytest.raises(DataError, match="type int64; allowed"):
        normalize(batch.astype(np.int64), MEAN, STD)


def shifted(image: np.ndarray, down: int, right: int, fill) -> np.ndarray:
    """The image moved by whole pixels, written out."""
    height, width, _ = image.shape
    moved = np.empty_like(image)
    moved[:] = fill
    for y in range(height):
        for x in range(width):
            if 0 <= y - down < height and 0 <= x - right < width:
                moved[y, x] = image[y - down, x - right]
    return moved


@pytest.mark.parametrize("fill", [0, 9, (1, 2, 3)])
def test_random_shift_moves_each_image_by_whole_pixels(batch, fill):
    moves = set()
    for number in range(6):
        key = jax.random.fold_in(KEY, number)
        if isinstance(fill, int) and fill == 0:
            out = random_shift(key, jnp.asarray(batch), 2)
        else:
            out = random_shift(key, jnp.asarray(batch), 2, fill=jnp.asarray(fill, jnp.uint8))
        assert out.dtype == jnp.uint8
        for image, got in zip(batch, np.asarray(out), strict=True):
            found = [
                (down, right)
                for down in range(-2, 3)
                for right in range(-2, 3)
                if np.array_equal(shifted(image, down, right, fill), got)
            ]
            assert len(found) == 1
            moves.update(found)
    assert len(moves) == 25  # 96 images: all of the 5 x 5 moves, both signs, both axes


def test_random_crop_pads_with_zeros(batch):
    images = jnp.asarray(batch).astype(jnp.float32) + 1
    out = random_crop(KEY, images, 4)
    assert out.shape == images.shape
    assert float(out.min()) == 0
    np.testing.assert_array_equal(random_crop(KEY, images, 0), images)


def test_random_flip_mirrors_about_half_of_the_images(batch):
    images = jnp.asarray(np.concatenate([batch] * 20))
    out = np.asarray(random_flip(KEY, images))
    kept = (out == np.asarray(images)).all((1, 2, 3))
    mirrored = (out == np.asarray(images)[:, :, ::-1]).all((1, 2, 3))
    np.testing.assert_array_equal(kept, ~mirrored)
    assert 0.4 < mirrored.mean() < 0.6


def test_mixup_uses_one_lam_and_one_permutation():
    images = jnp.asarray(np.random.default_rng(0).uniform(size=(12, 3, 3, 1)), jnp.float32)
    labels = jnp.eye(12)
    mixed, soft = mixup(KEY, images, labels, 1.0)
    lam = np.diag(soft)
    partner = np.asarray(soft - jnp.diag(jnp.diag(soft))).argmax(1)
    own = np.isclose(lam, 1)  # an image may be its own partner
    partner[own] = np.flatnonzero(own)
    assert sorted(partner) == list(range(12))
    lam = lam[~own]
    np.testing.assert_allclose(lam, lam[0], atol=1e-6)
    assert 0 < lam[0] < 1
    expected = lam[0] * images + (1 - lam[0]) * images[partner]
    np.testing.assert_allclose(mixed, expected, atol=1e-6)
    np.testing.assert_allclose(soft.sum(1), 1, atol=1e-6)


@pytest.mark.parametrize("alpha", [1.0, 4.0])
def test_mixup_draws_lam_from_beta(alpha):
    """The variance of Beta(a, a) is 1 / (4 (2a + 1)); lam is read off two images of 0 and 1."""
    images, labels = jnp.arange(2.0)[:, None, None, None], jnp.eye(2)
    keys = jax.random.split(KEY, 4000)
    _, soft = jax.vmap(lambda key: mixup(key, images, labels, alpha))(keys)
    lam = np.asarray(soft[:, 0, 0])
    lam = lam[lam < 1]  # 1 is an image mixed with itself
    np.testing.assert_allclose(lam.mean(), 0.5, atol=0.03)
    np.testing.assert_allclose(lam.var(), 1 / (4 * (2 * alpha + 1)), rtol=0.1)


def test_mixup_refuses_plain_labels_and_alpha_0(batch):
    with pytest.raises(DataError, match=r"shape \(16,\); allowed: \(N, K\)"):
        mixup(KEY, jnp.asarray(batch), jnp.zeros(16, int), 1.0)
    with pytest.raises(DataError, match="alpha is 0; allowed: above 0"):
        mixup(KEY, jnp.asarray(batch), jnp.eye(16), 0)


AUGMENTATIONS = {
    "shift": lambda key, images: random_shift(key, images, 2, 0.5),
    "crop": lambda key, images: random_crop(key, images, 4),
    "flip": random_flip,
    "mixup": lambda key, images: mixup(key, images, jnp.eye(16), 0.5)[0],
}


@pytest.mark.parametrize("name", AUGMENTATIONS)
def test_augmentations_are_pure_and_jit_and_vmap(name):
    augment = AUGMENTATIONS[name]
    images = jax.random.uniform(KEY, (3, 16, 6, 6, 1))
    keys = jax.random.split(KEY, 3)
    mapped = jax.jit(jax.vmap(augment))(keys, images)
    for key, batch, got in zip(keys, images, mapped, strict=True):
        np.testing.assert_allclose(augment(key, batch), got, atol=1e-6)
    assert not np.array_equal(augment(keys[0], images[0]), augment(keys[1], images[0]))
