"""A distilled dataset with its recipe: its file, and its evaluation on test images."""

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
from evojax_suite.data import DataError, npz, siamese, transforms
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
    300, batch_size=256, optimizer="sgd", learning_rate=0.01, schedule="step", l2_penalty=5e-4
)
"""The recipe, without augmentation, of tables that compare methods (Zhao et al. 2021)."""

AugmentationName = Literal["none", "shift_flip", "shift_flip_mixup", "siamese"]

AUGMENTATIONS: dict[AugmentationName, dict[str, Any]] = {
    "none": {},
    "shift_flip": {"shift_pixels": 5, "flip": True},
    "shift_flip_mixup": {"shift_pixels": 5, "flip": True, "mixup_alpha": 0.4},
    "siamese": {"siamese": siamese.NAMES},
}
"""Augmentations by name: what they set in a TrainingConfig, with all other augmentation off."""

_FORMAT = "evojax_suite distilled dataset 1"


def with_augmentation(training: TrainingConfig, name: AugmentationName) -> TrainingConfig:
    """`training` with the augmentation `name` of AUGMENTATIONS and no other."""
    off = {field: getattr(TrainingConfig, field) for field in AUGMENTATION}
    return replace(training, **off | AUGMENTATIONS[name])


def augmentation_of(training: TrainingConfig) -> str:
    """The augmentation of `training` as text for tables: "shift_pixels 5, flip", or "none"."""
    used = []
    for name in AUGMENTATION:
        value = getattr(training, name)
        if value:
            value = " ".join(value) if name == "siamese" else value
            used.append(name if value is True else f"{name} {value}")
    return ", ".join(used) or "none"


@dataclass(frozen=True)
class DistilledDataset:
    """Synthetic images, their labels and how networks are to be trained on them."""

    images: Float[np.ndarray, "images height width channels"]
    """Normalised already: networks are trained on them as they are."""
    labels: Float[np.ndarray, "images classes"]
    """Probabilities of each class."""
    dataset: str
    """The name of the dataset that was distilled."""
    class_names: tuple[str, ...]
    mean: tuple[float, ...]
    """The mean of each channel, for images in [0, 1], with which test images are normalised."""
    std: tuple[float, ...]
    network: NetworkConfig
    training: TrainingConfig
    seed: int
    """The seed of the run that made it."""
    factor: int = 1
    """Smaller images per side that one image holds (`operators.encodings.unpacked`)."""
    test_accuracies: tuple[Annotated[float, AllowInfNan()], ...] = ()
    """Accuracies of networks trained on it with this recipe from different initialisations."""

    def __repr__(self) -> str:
        count, *shape = self.images.shape
        about = f"{count:,} images of {'x'.join(map(str, shape))} for {self.dataset!r}"
        if self.test_accuracies:
            mean = float(np.mean(self.test_accuracies))
            about += f", test accuracy {mean:.4f} of {len(self.test_accuracies)} networks"
        return f"DistilledDataset({about})"

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
        """Images in place of `dataset`, normalised with its constants, and their recipe."""
        about = dataset.name, dataset.class_names, dataset.mean, dataset.std
        accuracies = tuple(map(float, test_accuracies))
        return DistilledDataset(images, labels, *about, network, training, seed, factor, accuracies)

    def unpacked(self) -> DistilledDataset:
        """The set on which networks are trained: each tile is an image of the full size."""
        if self.factor == 1:
            return self
        packed = jnp.asarray(self.images), jnp.asarray(self.labels)
        images, labels = map(np.asarray, encodings.unpacked(*packed, self.factor))
        return replace(self, images=images, labels=labels, factor=1)

    def save(self, path: Path) -> None:
        """Write `path` (.npz) atomically; equal contents give equal bytes."""
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        arrays = {name: values.pop(name).astype(np.float32) for name in ("images", "labels")}
        about = {name: values.pop(name) for name in ("dataset", "class_names", "mean", "std")}
        value_range = [float(self.images.min()), float(self.images.max())]
        recipe = {"format": _FORMAT, **about, "value_range": value_range, **values}
        buffer = io.BytesIO()
        np.savez(buffer, **arrays, recipe=np.array(json.dumps(to_jsonable(recipe), indent=1)))
        write_atomically(path, buffer.getvalue())

    @staticmethod
    def load(path: Path, dataset: Dataset | None = None) -> DistilledDataset:
        """The set in a file that `save` wrote, or with `dataset` also in a plain file of arrays.

        A plain file holds images (n, H, W, C) and labels, (n,) integers or (n, num_classes)
        probabilities; uint8 images and floats in [0, 1] are normalised as `dataset` is, other
        floats count as normalised. Its recipe is the literature's. Raises DataError, one line,
        where `path` is neither.
        """
        if path.is_dir():
            inside = ", ".join(sorted(each.name for each in path.glob("*.npz"))) or "no such file"
            raise DataError(f"{path}: not a distilled dataset: a folder, in which is {inside}")
        try:
            arrays = npz.arrays_in(path, ("images", "labels", "recipe"))
            images, labels = arrays["images"], arrays["labels"]
            if "recipe" in arrays:
                return _from_recipe(images, labels, json.loads(_text(arrays["recipe"])))
            if dataset is None:
                raise ValueError("it has no recipe; a plain file of arrays needs --dataset")
            return _from_arrays(images, labels, dataset)
        except FileNotFoundError:
            raise DataError(f"{path}: no such file") from None
        except (OSError, KeyError, ValueError, TypeError, RecursionError) as error:
            reason = f"it has no {error}" if isinstance(error, KeyError) else error
            raise DataError(f"{path}: not a distilled dataset: {reason}") from None


def _text(array: np.ndarray) -> str:
    """The string in an array that is one; numpy itself lets invalid characters pass."""
    if array.dtype.kind != "U" or array.ndim:
        raise ValueError(f"its recipe has type {array.dtype} and shape {array.shape}")
    little = array.astype(array.dtype.newbyteorder("<"))
    return little.tobytes().decode("utf-32-le").rstrip("\0")


def _from_recipe(images: np.ndarray, labels: np.ndarray, recipe: Any) -> DistilledDataset:
    if recipe["format"] != _FORMAT:
        raise ValueError(f"its format is {recipe['format']!r}, allowed: {_FORMAT!r}")
    if images.ndim != 4 or labels.shape != (len(images), len(recipe["class_names"])):
        raise ValueError(f"images {images.shape} and labels {labels.shape} disagree")
    images, labels = _floats("images", images), _floats("labels", labels)
    # JSON has no NaN, the accuracy of a network that failed.
    accuracies = [float("nan") if value is None else value for value in recipe["test_accuracies"]]
    recipe = {"factor": 1} | recipe | {"test_accuracies": accuracies}
    names = [field.name for field in fields(DistilledDataset)][2:]  # without images and labels
    values = from_json(DistilledDataset, recipe, names)
    transforms.check_constants(values["mean"], values["std"], images.shape[3])
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
    images = transforms.normalize(images, dataset.mean, dataset.std) if raw else images
    return DistilledDataset.made(dataset, images, labels, NetworkConfig(), LITERATURE, 0)


@lru_cache(maxsize=16)
def _trained_and_evaluated(
    network: nn.Module, training: TrainingConfig, engine: EngineConfig
) -> Callable[[PyTree, PyTree], Array]:
    """A function of members and data -> accuracies, one object for each architecture and recipe."""

    def evaluate(members: PyTree, data: PyTree):
        keys, sets = members
        shared, test_images, test_labels, mean, std = data
        batches = engine.batches(transforms.normalize(test_images, mean, std), test_labels)
        images, labels = sets or (jnp.broadcast_to(a, (len(keys), *a.shape)) for a in shared)
        (evaluation,) = fit_and_evaluate_population(
            keys, network, training, images, labels, (batches,), engine
        )
        return evaluation.accuracy

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
    """The accuracies in [0, 1] on `split`, a part of `dataset`, of `num_networks` networks trained
    on images; NaN for a network that failed.

    images: normalised. labels: probabilities. Both may have a leading axis, a set for each network.
    network, training: the architecture, and how it is trained on the images.
    num_devices: devices of each process over which the networks are divided.
    """
    module = networks.create(network, dataset.num_classes, dataset.image_shape)
    evaluate = _trained_and_evaluated(module, training, engine)
    sets = jnp.asarray(images), jnp.asarray(labels)
    shared, separate = (sets, None) if sets[0].ndim == 4 else (None, sets)
    constants = (jnp.asarray(values, jnp.float32) for values in (dataset.mean, dataset.std))
    data = shared, jnp.asarray(split.images), jnp.asarray(split.labels), *constants
    members = jax.random.split(key, num_networks), separate
    return devices.map_population(evaluate, members, data, num_devices)


def with_network(recipe: NetworkConfig, name: str) -> NetworkConfig:
    """`recipe` with the architecture `name`, in the literature's settings if it is another one."""
    if name == recipe.network:
        return recipe
    return replace(NetworkConfig(compute_dtype=recipe.compute_dtype), network=name)


def normalized_as(dataset: Dataset, data: DistilledDataset) -> Dataset:
    """`dataset` with the normalisation constants of `data`."""
    return replace(dataset, mean=data.mean, std=data.std)
