"""A distilled dataset with its recipe: how it is kept, and how it is judged on test images."""

from __future__ import annotations

import io
import json
from collections.abc import Callable, Iterable
from dataclasses import dataclass, fields, replace
from functools import lru_cache
from pathlib import Path
from typing import Annotated, Any, Literal

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float
from pydantic import AllowInfNan

from evojax_suite import networks
from evojax_suite.configuration import from_json
from evojax_suite.data import DataError, siamese
from evojax_suite.data.npz import arrays_in
from evojax_suite.data.transforms import check_constants, normalize
from evojax_suite.networks import NetworkConfig
from evojax_suite.operators import encodings
from evojax_suite.runtime import devices
from evojax_suite.runtime.results import to_jsonable, write_atomically
from evojax_suite.training import (
    AUGMENTATION,
    EngineConfig,
    TrainingConfig,
    fit_and_evaluate_population,
)
from evojax_suite.types import Array, Dataset, PRNGKey, PyTree, Split

LITERATURE = TrainingConfig(
    num_epochs=300,
    batch_size=256,
    optimizer="sgd",
    learning_rate=0.01,
    schedule="step",
    l2_penalty=5e-4,
)
"""How tables across methods judge a distilled set (Zhao et al. 2021), without augmentation."""

AugmentationName = Literal["none", "shift_flip", "shift_flip_mixup", "siamese"]

AUGMENTATIONS: dict[AugmentationName, dict[str, Any]] = {
    "none": {},
    "shift_flip": {"shift_pixels": 5, "flip": True},
    "shift_flip_mixup": {"shift_pixels": 5, "flip": True, "mixup_alpha": 0.4},
    "siamese": {"siamese": siamese.NAMES},
}
"""Augmentations by name: what they set in a TrainingConfig, with all other augmentation off."""


def with_augmentation(training: TrainingConfig, name: AugmentationName) -> TrainingConfig:
    """`training` with the augmentation `name` of AUGMENTATIONS and no other."""
    default = TrainingConfig()
    off = {field: getattr(default, field) for field in AUGMENTATION}
    return replace(training, **off | AUGMENTATIONS[name])


def augmentation_of(training: TrainingConfig) -> str:
    """The augmentation of `training` in words, for tables: "shift_pixels 5, flip", or "none"."""
    used = {name: getattr(training, name) for name in AUGMENTATION if getattr(training, name)}
    return (
        ", ".join(
            name if value is True else f"{name} {' '.join(value) if name == 'siamese' else value}"
            for name, value in used.items()
        )
        or "none"
    )


_FORMAT = "evojax_suite distilled dataset 1"


@dataclass(frozen=True)
class DistilledDataset:
    """Synthetic images, their labels and how a network is to be trained on them."""

    images: Float[np.ndarray, "images height width channels"]
    """Normalised already: networks see them as they are."""
    labels: Float[np.ndarray, "images classes"]
    """Probabilities of each class."""
    dataset: str
    """Name of the dataset that was distilled."""
    class_names: tuple[str, ...]
    mean: tuple[float, ...]
    """Mean of each channel, for images in [0, 1]: what test images are normalised with."""
    std: tuple[float, ...]
    network: NetworkConfig
    training: TrainingConfig
    seed: int
    """Seed of the run that made it."""
    factor: int = 1
    """Smaller images a side that one image holds (`operators.encodings.unpacked`)."""
    test_accuracies: tuple[Annotated[float, AllowInfNan()], ...] = ()
    """Accuracies of networks trained on it with this recipe, each from its own initialisation."""

    @staticmethod
    def made(
        dataset: Dataset,
        images: Float[np.ndarray, "images height width channels"],
        labels: Float[np.ndarray, "images classes"],
        network: NetworkConfig,
        training: TrainingConfig,
        seed: int,
        test_accuracies: Iterable[float] = (),
        factor: int = 1,
    ) -> DistilledDataset:
        """Return images that stand for `dataset`, normalised as it is, with their recipe."""
        about = dataset.name, dataset.class_names, dataset.mean, dataset.std
        accuracies = tuple(map(float, test_accuracies))
        recipe = network, training, seed, factor, accuracies
        return DistilledDataset(images, labels, *about, *recipe)

    def unpacked(self) -> DistilledDataset:
        """What networks are trained on: each tile an image of its own, of the full size."""
        if self.factor == 1:
            return self
        found = jnp.asarray(self.images), jnp.asarray(self.labels)
        images, labels = map(np.asarray, encodings.unpacked(*found, self.factor))
        return replace(self, images=images, labels=labels, factor=1)

    def save(self, path: Path) -> None:
        """Write `path` (.npz) atomically; equal contents give equal bytes."""
        recipe = {
            "format": _FORMAT,
            "dataset": self.dataset,
            "class_names": self.class_names,
            "mean": self.mean,
            "std": self.std,
            "value_range": [float(self.images.min()), float(self.images.max())],
            "network": self.network,
            "training": self.training,
            "seed": self.seed,
            "factor": self.factor,
            "test_accuracies": self.test_accuracies,
        }
        buffer = io.BytesIO()
        np.savez(
            buffer,
            images=self.images.astype(np.float32),
            labels=self.labels.astype(np.float32),
            recipe=np.array(json.dumps(to_jsonable(recipe), indent=1)),
        )
        write_atomically(path, buffer.getvalue())

    @staticmethod
    def load(path: Path, dataset: Dataset | None = None) -> DistilledDataset:
        """Read what `save` wrote, or with `dataset` also a plain file of arrays.

        Such a file holds images (n, H, W, C) and labels, (n,) integers or (n, num_classes)
        probabilities; uint8 images and floats in [0, 1] are normalised as `dataset` is, other
        floats count as normalised. It gets the literature's recipe. Raises DataError, one line,
        where `path` is neither.
        """
        try:
            arrays = arrays_in(path, ("images", "labels", "recipe"))
            images, labels = arrays["images"], arrays["labels"]
            if "recipe" not in arrays and dataset is not None:
                return _from_arrays(images, labels, dataset)
            if "recipe" not in arrays:
                raise ValueError("it has no recipe; a plain file of arrays needs --dataset")
            return _from_recipe(images, labels, json.loads(_text(arrays["recipe"])))
        except FileNotFoundError:
            raise DataError(f"{path}: no such file") from None
        except KeyError as error:
            raise DataError(f"{path}: not a distilled dataset: it has no {error}") from None
        except (OSError, ValueError, TypeError, RecursionError) as error:
            raise DataError(f"{path}: not a distilled dataset: {error}") from None


def _text(array: np.ndarray) -> str:
    """The string in an array that is one; numpy itself passes on characters that do not exist."""
    if array.dtype.kind != "U" or array.ndim:
        raise ValueError(f"its recipe has type {array.dtype} and shape {array.shape}")
    little = array.astype(array.dtype.newbyteorder("<"))
    return little.tobytes().decode("utf-32-le").rstrip("\0")


def _from_recipe(
    images: np.ndarray, labels: np.ndarray, recipe: dict[str, Any]
) -> DistilledDataset:
    if recipe["format"] != _FORMAT:
        raise ValueError(f"its format is {recipe['format']!r}, allowed: {_FORMAT!r}")
    if images.ndim != 4 or labels.shape != (len(images), len(recipe["class_names"])):
        raise ValueError(f"images {images.shape} and labels {labels.shape} disagree")
    images, labels = _floats("images", images), _floats("labels", labels)
    # JSON has no NaN, that of a network that failed.
    judged = [float("nan") if value is None else value for value in recipe["test_accuracies"]]
    recipe = {"factor": 1} | recipe | {"test_accuracies": judged}
    names = (own.name for own in fields(DistilledDataset) if own.name not in ("images", "labels"))
    values = from_json(DistilledDataset, recipe, names)
    check_constants(values["mean"], values["std"], images.shape[3])
    encodings.check_factor(values["factor"], images.shape[1:3])
    return DistilledDataset(images, labels, **values)


def _floats(name: str, array: np.ndarray) -> np.ndarray:
    if array.dtype.kind != "f" or not array.size:
        raise ValueError(f"{name} are {array.shape} of type {array.dtype}, allowed: floats")
    with np.errstate(over="ignore", invalid="ignore"):
        array = array.astype(np.float32)
    if not np.isfinite(array).all():
        raise ValueError(f"{name} hold NaN or infinite numbers")
    return array


def _from_arrays(images: np.ndarray, labels: np.ndarray, dataset: Dataset) -> DistilledDataset:
    if images.ndim != 4 or images.shape[1:] != dataset.image_shape:
        raise ValueError(f"images are {images.shape}, allowed: (n, {dataset.image_shape})")
    if labels.shape == (len(images),) and labels.dtype.kind in "iu":
        if len(labels) and not 0 <= labels.min() <= labels.max() < dataset.num_classes:
            raise ValueError(f"labels must be in 0..{dataset.num_classes - 1}")
        labels = np.eye(dataset.num_classes, dtype=np.float32)[labels]
    if labels.shape != (len(images), dataset.num_classes):
        raise ValueError(f"labels {labels.shape} do not fit {dataset.num_classes} classes")
    labels = _floats("labels", labels.astype(np.float32) if labels.dtype.kind in "iu" else labels)
    if images.dtype != np.uint8 or not images.size:
        images = _floats("images", images)
    raw = images.dtype == np.uint8 or (images.min() >= 0 and images.max() <= 1)
    images = normalize(images, dataset.mean, dataset.std) if raw else images
    return DistilledDataset.made(dataset, images, labels, NetworkConfig(), LITERATURE, 0)


@lru_cache(maxsize=16)
def _trained_and_evaluated(
    network: nn.Module, training: TrainingConfig, engine: EngineConfig
) -> Callable[[PyTree, PyTree], Array]:
    """A function of members and data -> accuracies, one for each architecture and recipe."""

    def evaluate(members, data):
        keys, own = members
        shared, test_images, test_labels, mean, std = data
        batches = engine.batches(normalize(test_images, mean, std), test_labels)
        images, labels = own or (
            jnp.broadcast_to(array, (len(keys), *array.shape)) for array in shared
        )
        (found,) = fit_and_evaluate_population(
            keys, network, training, images, labels, (batches,), engine
        )
        return found.accuracy

    return evaluate


def accuracies_on(
    split: Split,
    key: PRNGKey,
    images: Float[Array | np.ndarray, "*sets images height width channels"],
    labels: Float[Array | np.ndarray, "*sets images classes"],
    dataset: Dataset,
    network: NetworkConfig,
    training: TrainingConfig,
    num_networks: int,
    engine: EngineConfig = EngineConfig(),
    num_devices: devices.Devices = 1,
) -> Float[np.ndarray, "{num_networks}"]:
    """Accuracy on `split`, a part of `dataset`, of `num_networks` networks that were trained on
    images.

    images: normalised. labels: probabilities. Both may have a leading axis, a set for each network.
    The networks are divided over `num_devices` devices of each process. Returns accuracies in
    [0, 1], NaN for a network that failed.
    """
    module = networks.create(network, dataset.num_classes, dataset.image_shape)
    sets = jnp.asarray(images), jnp.asarray(labels)
    one_for_all = sets[0].ndim == 4
    keys = jax.random.split(key, num_networks)
    data = (
        sets if one_for_all else None,
        jnp.asarray(split.images),
        jnp.asarray(split.labels),
        jnp.asarray(dataset.mean, jnp.float32),
        jnp.asarray(dataset.std, jnp.float32),
    )
    return devices.map_population(
        _trained_and_evaluated(module, training, engine),
        (keys, None if one_for_all else sets),
        data,
        num_devices,
    )


def with_network(recipe: NetworkConfig, name: str) -> NetworkConfig:
    """`recipe` with another architecture, which has the literature's settings."""
    if name == recipe.network:
        return recipe
    return replace(NetworkConfig(compute_dtype=recipe.compute_dtype), network=name)


def normalized_as(dataset: Dataset, data: DistilledDataset) -> Dataset:
    """`dataset` with the normalisation constants that `data` was made with."""
    return replace(dataset, mean=data.mean, std=data.std)
