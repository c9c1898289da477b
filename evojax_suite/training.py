"""The engine: train and evaluate one network as a pure function, and a population of them.

Everything is written for one member. `map_members` alone decides how many members run at once, so
that peak memory is bounded by one setting and not by the population size.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache, partial
from typing import Annotated, Any, Literal, NamedTuple, TypeVar

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax
from annotated_types import Ge, Lt
from flax import struct
from jaxtyping import Bool, Float, Int, Key
from pydantic import NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt

from evojax_suite.configuration import configuration
from evojax_suite.data import siamese
from evojax_suite.data.transforms import mixup, normalize, random_crop, random_flip, random_shift
from evojax_suite.types import (
    Array,
    Dataset,
    Images,
    IntScalar,
    Labels,
    PRNGKey,
    Probabilities,
    PyTree,
    Scalar,
    Split,
)

Count = TypeVar("Count", int, IntScalar)

AUGMENTATION = ("shift_pixels", "flip", "crop_padding", "siamese", "mixup_alpha")
"""The fields of a TrainingConfig that say how images are augmented."""


@configuration
class TrainingConfig:
    """How a member trains. The defaults are those of Sato et al. 2026, section 3.3."""

    num_epochs: NonNegativeInt = 300
    """Passes over the member's training images."""
    batch_size: PositiveInt | None = None
    """Images per step; None is the full batch."""
    optimizer: Literal["adam", "sgd"] = "adam"
    """Adam has beta 0.9 and 0.999, epsilon 1e-8."""
    learning_rate: PositiveFloat = 1e-3
    """Learning rate, the first one where a schedule is set."""
    momentum: Annotated[float, Ge(0), Lt(1)] = 0.9
    """Momentum of SGD, in [0, 1)."""
    schedule: Literal["constant", "cosine", "step"] = "constant"
    """Learning rate over the steps; step divides it by 10 after half of them."""
    weight_decay: NonNegativeFloat = 0.0
    """Decoupled weight decay."""
    l2_penalty: NonNegativeFloat = 0.0
    """Weight decay as PyTorch's optimizers have it: times the weights, added to the gradient."""
    shift_pixels: NonNegativeInt = 0
    """Augmentation: shift by up to this many pixels."""
    flip: bool = False
    """Augmentation: flip horizontally."""
    crop_padding: NonNegativeInt = 0
    """Augmentation: pad by this many pixels and crop at random."""
    siamese: tuple[str, ...] = ()
    """Augmentation of DSA: color, crop, cutout, flip, scale, rotate, one of them a batch."""
    mixup_alpha: NonNegativeFloat = 0.0
    """Augmentation: mixup with Beta(alpha, alpha); 0 is off."""

    def __post_init__(self):
        siamese.check_names(self.siamese)

    def num_batches(self, num_images: Count, capacity: int | None = None) -> Count:
        """Returns the number of steps of an epoch; a batch has at most all images, or `capacity`
        where the images are part of a buffer of that size and their number is traced."""
        most = num_images if capacity is None else capacity
        return -(-num_images // min(self.batch_size or most, most))


def _optimizer(config: TrainingConfig, num_steps: int | IntScalar) -> optax.GradientTransformation:
    def cosine(step: Any) -> Any:
        return rate * (1 + jnp.cos(jnp.pi * jnp.minimum(step / jnp.maximum(num_steps, 1), 1))) / 2

    def halfway(step: Any) -> Any:
        return rate * jnp.where(step < jnp.maximum(num_steps // 2, 1), 1.0, 0.1)

    def decay(strength: float):
        return [optax.add_decayed_weights(strength)] if strength else []

    rate = config.learning_rate
    schedule = {"constant": rate, "cosine": cosine, "step": halfway}[config.schedule]
    if config.optimizer == "adam":
        direction = optax.scale_by_adam(b1=0.9, b2=0.999, eps=1e-8)
    else:
        direction = optax.trace(config.momentum) if config.momentum else optax.identity()

    return optax.chain(
        *decay(config.l2_penalty),
        direction,
        *decay(config.weight_decay),
        optax.scale_by_learning_rate(schedule),
    )


def _augment(key: PRNGKey, config: TrainingConfig, images: Images, labels: Probabilities):
    key_shift, key_flip, key_crop, key_mixup = jax.random.split(key, 4)
    if config.siamese:
        key_mixup, key_siamese = jax.random.split(key_mixup)
        images = siamese.augment(key_siamese, images, config.siamese, shared=False)
    if config.shift_pixels:
        images = random_shift(key_shift, images, config.shift_pixels)
    if config.flip:
        images = random_flip(key_flip, images)
    if config.crop_padding:
        images = random_crop(key_crop, images, config.crop_padding)
    if config.mixup_alpha:
        images, labels = mixup(key_mixup, images, labels, config.mixup_alpha)
    return images, labels


def _is_random(network: nn.Module, config: TrainingConfig) -> bool:
    augmented = any(getattr(config, name) for name in AUGMENTATION)
    return augmented or bool(getattr(network, "dropout", 0))


@struct.dataclass
class FitState:
    """A network in training."""

    parameters: PyTree
    statistics: PyTree  # the other collections of variables, such as running means
    optimizer: PyTree

    @property
    def variables(self) -> PyTree:
        """What `network.apply` takes."""
        return {"params": self.parameters, **self.statistics}


class ExampleStatistics(NamedTuple):
    """The outputs of a network for each image; in training, before the step that learns from it."""

    losses: Float[Array, "images"]  # cross-entropy in nats
    correct: Bool[Array, "images"]  # for a mixed image, whether its heaviest class is predicted


def start_fit(
    key: PRNGKey, network: nn.Module, config: TrainingConfig, image_shape: tuple[int, ...]
) -> FitState:
    """A freshly initialised network for images (height, width, channels), with the state of its
    optimizer."""
    return start_fit_from(network.init(key, jnp.zeros((1, *image_shape))), config)


def start_fit_from(variables: PyTree, config: TrainingConfig) -> FitState:
    """A network with these flax variables, with the state of its optimizer."""
    statistics = dict(variables)
    parameters = statistics.pop("params")
    return FitState(parameters, statistics, _optimizer(config, 1).init(parameters))


def fit_step(
    key: PRNGKey,
    network: nn.Module,
    config: TrainingConfig,
    num_steps: int | IntScalar,
    state: FitState,
    images: Images,
    labels: Probabilities,
    weights: Float[Array, "images"],
    importance: Float[Array, "images"] | None = None,
) -> tuple[FitState, ExampleStatistics]:
    """Returns a network in training after a step on a batch, and what the step saw of it.

    num_steps: the steps of the whole training, for the schedule. images: normalised. labels:
    probabilities. weights: 0 of images that only fill the batch; the loss is the mean by them of
    the images' losses, each times its `importance`.
    """
    shown = prepared(key, network, config, images, labels)

    def loss(parameters: PyTree):
        logits, statistics = network.apply(
            {"params": parameters, **state.statistics},
            shown.images,
            train=True,
            mutable=[*state.statistics],
            rngs=shown.rngs,
        )
        losses = optax.softmax_cross_entropy(logits, shown.labels)
        seen = ExampleStatistics(losses, logits.argmax(-1) == shown.labels.argmax(-1))
        scaled = losses if importance is None else losses * importance
        return (scaled * weights).sum() / weights.sum(), (statistics, seen)

    gradient, (statistics, seen) = jax.grad(loss, has_aux=True)(state.parameters)
    return updated(config, num_steps, state, gradient, statistics), seen


class Prepared(NamedTuple):
    """A batch as a step shows it."""

    images: Images
    labels: Probabilities
    rngs: dict[str, PRNGKey]  # of the network's random layers


def prepared(
    key: PRNGKey,
    network: nn.Module,
    config: TrainingConfig,
    images: Images,
    labels: Probabilities,
) -> Prepared:
    """A batch, augmented where `config` says so, and the keys of the network's dropout."""
    rngs = {}
    if getattr(network, "dropout", 0):
        key, rngs["dropout"] = jax.random.split(key)
    if _is_random(network, config):
        images, labels = _augment(key, config, images, labels)
    return Prepared(images, labels, rngs)


def updated(
    config: TrainingConfig,
    num_steps: int | IntScalar,
    state: FitState,
    gradient: PyTree,
    statistics: PyTree,
) -> FitState:
    """A network after an update of its optimizer. num_steps: of the whole training, for the
    schedule. statistics: the new ones."""
    optimizer = _optimizer(config, num_steps)
    updates, moments = optimizer.update(gradient, state.optimizer, state.parameters)
    return FitState(optax.apply_updates(state.parameters, updates), statistics, moments)


def fit(
    key: PRNGKey,
    network: nn.Module,
    config: TrainingConfig,
    images: Images,
    labels: Labels | Probabilities,
) -> PyTree:
    """Train a freshly initialised network and return its flax variables.

    images: normalised. labels: classes or their probabilities; the loss is the cross-entropy. Each
    epoch shows every image once, in a new order; where the batch size does not divide their number
    the last batch is filled up with images of weight 0.
    """
    images, labels = jnp.asarray(images), jnp.asarray(labels)
    key_init, key_fit = jax.random.split(key)
    state = start_fit(key_init, network, config, images.shape[1:])
    num_images = images.shape[0]
    batch_size = min(config.batch_size or num_images, num_images)
    num_batches = config.num_batches(num_images)
    num_steps = config.num_epochs * num_batches
    step = partial(fit_step, network=network, config=config, num_steps=num_steps)
    if labels.ndim == 1:
        num_classes = jax.eval_shape(network.apply, state.variables, images[:1]).shape[-1]
        labels = jax.nn.one_hot(labels, num_classes)

    def full_batch_epoch(state: FitState, epoch: Array):
        key, weights = jax.random.fold_in(key_fit, epoch), jnp.ones(num_images)
        return step(key, state=state, images=images, labels=labels, weights=weights)[0], None

    def minibatch_epoch(state: FitState, epoch: Array):
        key_order, key_steps = jax.random.split(jax.random.fold_in(key_fit, epoch))
        order = jax.random.permutation(key_order, num_images)
        positions = jnp.arange(num_batches * batch_size)
        weights = (positions < num_images).astype(jnp.float32).reshape(num_batches, batch_size)
        indices = order[positions % num_images].reshape(num_batches, batch_size)
        keys = jax.random.split(key_steps, num_batches)

        def minibatch_step(state: FitState, inputs: PyTree):
            key, index, weight = inputs
            shown, targets = images[index], labels[index]
            return step(key, state=state, images=shown, labels=targets, weights=weight)[0], None

        return jax.lax.scan(minibatch_step, state, (keys, indices, weights))[0], None

    epoch = full_batch_epoch if num_batches == 1 else minibatch_epoch
    state, _ = jax.lax.scan(epoch, state, jnp.arange(config.num_epochs))
    return state.variables


def epoch_order(
    key: PRNGKey, epoch: int | IntScalar, capacity: int, num_images: int | IntScalar
) -> tuple[PRNGKey, Int[Array, "capacity"]]:
    """The key of an epoch's steps, and the order of its images: the first `num_images` of a buffer
    of `capacity` come first."""
    key_order, key_steps = jax.random.split(jax.random.fold_in(key, epoch))
    priorities = jax.random.uniform(key_order, (capacity,))
    return key_steps, jnp.where(jnp.arange(capacity) < num_images, priorities, 2.0).argsort()


def batch_of(
    order: Int[Array, "capacity"],
    batch: int | IntScalar,
    batch_size: int,
    num_images: int | IntScalar,
) -> tuple[Int[Array, "batch"], Int[Array, "batch"], Float[Array, "batch"]]:
    """The positions of a batch in an epoch, the places of its images, and their weights: an order
    of fewer images is repeated, and those beyond the last one of a larger set weigh 0."""
    positions = batch * batch_size + jnp.arange(batch_size)
    weights = (positions < jnp.maximum(num_images, batch_size)).astype(jnp.float32)
    return positions, order[positions % num_images], weights


@partial(jax.jit, static_argnames=("network", "config"))
def fit_epochs(
    key: PRNGKey,
    network: nn.Module,
    config: TrainingConfig,
    num_steps: int | IntScalar,
    state: FitState,
    images: Float[Array, "buffer height width channels"],
    labels: Float[Array, "buffer classes"],
    num_images: int | IntScalar,
    num_epochs: int | IntScalar,
    places: Int[Array, "buffer"] | None = None,
    importance: Float[Array, "buffer"] | None = None,
) -> tuple[FitState, ExampleStatistics]:
    """Go on with a training for `num_epochs` epochs, on the first `num_images` of a buffer, or on
    the first `num_images` of `places` in it, where an image may come more than once.

    For trainings that are cut into pieces, or on sets that shrink: the numbers are traced, so one
    compilation serves them all. A set smaller than the batch (the buffer where `config` sets none)
    is repeated to fill it, each copy augmented by itself.

    num_steps: the steps of the whole training, for the schedule. images: normalised. labels:
    probabilities. importance: factors of the losses of the images in the buffer, 1 by default.
    Returns the statistics of the last epoch; NaN and False of images that it did not show.
    """
    capacity = images.shape[0]
    batch_size = min(config.batch_size or capacity, capacity)

    def epoch(index: Array, carry: PyTree) -> PyTree:
        key_steps, order = epoch_order(key, index, capacity, num_images)

        def step(batch: Array, carry: PyTree):
            state, seen = carry
            positions, chosen, weights = batch_of(order, batch, batch_size, num_images)
            chosen = chosen if places is None else places[chosen]
            key_step, how = jax.random.fold_in(key_steps, batch), (network, config, num_steps)
            factors = None if importance is None else importance[chosen]
            shown = images[chosen], labels[chosen]
            state, new = fit_step(key_step, *how, state, *shown, weights, factors)
            places_shown = jnp.where(positions < num_images, chosen, capacity)
            return state, jax.tree.map(
                lambda old, value: old.at[places_shown].set(value, mode="drop"), seen, new
            )

        return jax.lax.fori_loop(0, -(-num_images // batch_size), step, carry)

    nothing = ExampleStatistics(jnp.full(capacity, jnp.nan), jnp.zeros(capacity, bool))
    return jax.lax.fori_loop(0, num_epochs, epoch, (state, nothing))


@partial(jax.jit, static_argnames=("network", "batch_size"))
def extract_features(
    network: nn.Module,
    variables: PyTree,
    images: Float[Array, "buffer height width channels"],
    num_images: int | IntScalar | None,
    batch_size: int,
) -> Float[Array, "buffer features"]:
    """Returns the inputs of the network's last layer for the first `num_images` images of a buffer,
    and zeros beyond.

    images: normalised. num_images: traced; None is all, and the features are then differentiable.
    Raises ValueError where the network does not give features.
    """
    if not hasattr(network, "bottleneck"):
        raise ValueError(f"features come from the ConvNet alone, got {type(network).__name__}")
    capacity = images.shape[0]
    batch_size = min(batch_size, capacity)

    def features_of(batch: Array):
        return jnp.asarray(network.apply(variables, batch, features_only=True))

    def body(batch: Array, features: Array):
        start = jnp.minimum(batch * batch_size, capacity - batch_size)
        images_of_batch = jax.lax.dynamic_slice_in_dim(images, start, batch_size)
        return jax.lax.dynamic_update_slice_in_dim(features, features_of(images_of_batch), start, 0)

    size = jax.eval_shape(features_of, images[:1]).shape[-1]
    number = capacity if num_images is None else num_images
    features = jax.lax.fori_loop(0, -(-number // batch_size), body, jnp.zeros((capacity, size)))
    return jnp.where(jnp.arange(capacity)[:, None] < number, features, 0)


def judge_each(
    network: nn.Module, variables: PyTree, images: Images, labels: Labels, batch_size: int
) -> ExampleStatistics:
    """Returns loss and correctness of each normalised image, without training."""
    num_images = images.shape[0]
    batch_size = min(batch_size, num_images)

    def body(batch: Array, seen: ExampleStatistics):
        start = jnp.minimum(batch * batch_size, num_images - batch_size)
        shown, classes = (
            jax.lax.dynamic_slice_in_dim(array, start, batch_size) for array in (images, labels)
        )
        logits = jnp.asarray(network.apply(variables, shown))
        losses = optax.softmax_cross_entropy_with_integer_labels(logits, classes)
        new = ExampleStatistics(losses, logits.argmax(-1) == classes)
        return jax.tree.map(
            lambda old, part: jax.lax.dynamic_update_slice_in_dim(old, part, start, 0), seen, new
        )

    empty = ExampleStatistics(jnp.zeros(num_images), jnp.zeros(num_images, bool))
    return jax.lax.fori_loop(0, -(-num_images // batch_size), body, empty)


class Evaluation(NamedTuple):
    """The evaluation of a network on a set of images; NaN where the cross-entropy is not finite."""

    accuracy: Scalar
    """Fraction of images classified as their label, in [0, 1]."""
    cross_entropy: Scalar
    """Mean over the images, in nats."""
    score: Scalar | None = None
    """Mean over the images of the caller's `Score`, where there is one."""


class Batches(NamedTuple):
    """Images for evaluation, cut into equal batches once for all members."""

    images: Float[Array, "batches batch_size height width channels"]
    labels: Int[Array, "batches batch_size"]
    weights: Float[Array, "batches batch_size"]  # 0 for filling


def make_batches(images: Images, labels: Labels, batch_size: int) -> Batches:
    """Cut images and labels into batches, the last filled up."""
    num_images = images.shape[0]
    batch_size = min(batch_size, num_images)
    num_batches = -(-num_images // batch_size)
    padding = num_batches * batch_size - num_images

    def cut(array: Array):
        padded = jnp.pad(array, [(0, padding)] + [(0, 0)] * (array.ndim - 1))
        return padded.reshape(num_batches, batch_size, *array.shape[1:])

    return Batches(cut(images), cut(labels), cut(jnp.ones(num_images)))


@lru_cache(maxsize=64)
def forward_work(network: nn.Module, image_shape: tuple[int, ...]) -> float:
    """Returns the floating-point operations of `network` on an image (height, width, channels)."""
    image = jax.ShapeDtypeStruct((1, *image_shape), jnp.float32)
    variables = jax.eval_shape(network.init, jax.random.key(0), image)
    cost = jax.jit(network.apply).lower(variables, image).cost_analysis() or {}
    return cost.get("flops", 0.0)


Score = Callable[[Probabilities, Labels], Float[Array, "images"]]
"""A function (logits, labels) -> score of each prediction, higher is better."""


def summed(
    logits: Float[Array, "images classes"],
    labels: Int[Array, "images"],
    weights: Float[Array, "images"],
    score: Score | None = None,
) -> tuple[Scalar, Scalar, Scalar | None]:
    """Cross-entropy, correct predictions and `score` of a batch, summed over its images."""
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
    correct = logits.argmax(-1) == labels
    worth = None if score is None else jnp.where(weights > 0, score(logits, labels), 0).sum()
    # A filling image must not turn the sum into NaN: zero times infinity.
    return jnp.where(weights > 0, losses, 0).sum(), (correct * weights).sum(), worth


def evaluation_of(
    sums: tuple[Float[Array, "batches"], Float[Array, "batches"], Float[Array, "batches"] | None],
    num_images: Scalar,
) -> Evaluation:
    """The evaluation that the sums of all batches (`summed`) are."""
    losses, correct, worth = sums
    cross_entropy = losses.sum() / num_images
    failed = ~jnp.isfinite(cross_entropy)
    return Evaluation(
        accuracy=jnp.where(failed, jnp.nan, correct.sum() / num_images),
        cross_entropy=jnp.where(failed, jnp.nan, cross_entropy),
        score=None if worth is None else jnp.where(failed, jnp.nan, worth.sum() / num_images),
    )


def evaluate(
    network: nn.Module, variables: PyTree, batches: Batches, score: Score | None = None
) -> Evaluation:
    """Returns accuracy, cross-entropy and mean `score` of a network, a batch at a time."""

    def evaluate_batch(batch: PyTree):
        images, labels, weights = batch
        logits = jnp.asarray(network.apply(variables, images))
        return summed(logits, labels, weights, score)

    return evaluation_of(jax.lax.map(evaluate_batch, batches), batches.weights.sum())


@configuration
class EngineConfig:
    """How much of a population runs at once."""

    members_in_flight: PositiveInt | None = None
    """Members trained at once, bounding peak memory; None is 1 on the CPU, 128 elsewhere."""
    members_evaluated_at_once: PositiveInt | None = None
    """Members in flight that are evaluated at once; None is all of them on the CPU, elsewhere 1 if
    the images are work enough."""
    evaluation_batch_size: PositiveInt | None = None
    """Images evaluated at once; None is as many as fit the cache on the CPU, 4,000 of 32x32
    elsewhere."""

    @property
    def resolved_members_in_flight(self) -> int:
        return self.members_in_flight or (1 if jax.default_backend() == "cpu" else 128)

    def resolved_members_evaluated_at_once(self, num_pixels: int) -> int:
        """Returns how many members in flight are evaluated at once, each on `num_pixels` in all.

        Elsewhere than on the CPU a thousand images of 32x32 are worth the launches of one member.
        """
        together = self.resolved_members_in_flight
        if self.members_evaluated_at_once is not None:
            return min(self.members_evaluated_at_once, together)
        return together if jax.default_backend() == "cpu" or num_pixels < 2**20 else 1

    def resolved_evaluation_batch_size(self, image_shape: tuple[int, ...]) -> int:
        """Returns the batch size for images (H, W, C): the pixels of 20 images of 32x32 on the CPU,
        of 4,000 elsewhere."""
        if self.evaluation_batch_size is not None:
            return self.evaluation_batch_size
        of_32x32 = 20 if jax.default_backend() == "cpu" else 4000
        return max(1, of_32x32 * 32 * 32 // (image_shape[0] * image_shape[1]))

    def batches(self, images: Images, labels: Labels) -> Batches:
        """Returns images and labels in batches of this size; elsewhere than on the CPU, where a
        batch is large, they are made as small as their number allows."""
        batch_size = self.resolved_evaluation_batch_size(images.shape[1:])
        if self.evaluation_batch_size is None and jax.default_backend() != "cpu":
            batch_size = -(-len(images) // -(-len(images) // batch_size))
        return make_batches(images, labels, batch_size)


def batches_of(dataset: Dataset, split: Split, engine: EngineConfig) -> Batches:
    """Returns a split of `dataset`, normalised, in batches of the engine's size."""
    images = jnp.asarray(normalize(split.images, dataset.mean, dataset.std))
    return engine.batches(images, jnp.asarray(split.labels))


def map_members(
    function: Callable[..., Any],
    members: PyTree,
    members_in_flight: int,
    then: Callable[[Any], Any] | None = None,
    members_at_once: int = 1,
) -> Any:
    """Apply `function` to each of P members, at most `members_in_flight` of them at once.

    members: a tuple of pytrees with leading axis P, each an argument of `function`.
    then: applied to each result, to `members_at_once` at a time, before the next group, so that a
    large result need not live longer.

    Returns the results with leading axis P, for any P: groups are as small as their number allows,
    the last group is filled up and cut off again.

    >>> map_members(lambda x, y: x * y, (jnp.arange(5), jnp.arange(5)), 2).tolist()
    [0, 1, 4, 9, 16]
    """
    population_size = jax.tree.leaves(members)[0].shape[0]
    num_groups = -(-population_size // members_in_flight)
    size = -(-population_size // num_groups)
    later = then if members_at_once < size else None

    def whole(*member: PyTree):
        result = function(*member)
        return result if then is None or later else then(result)

    if size == 1:
        return jax.lax.map(lambda member: whole(*member), members)
    index = (jnp.arange(num_groups * size) % population_size).reshape(num_groups, size)

    def grouped(leaf: Array):
        even = num_groups * size == population_size  # then nothing is copied
        return leaf.reshape(num_groups, size, *leaf.shape[1:]) if even else leaf[index]

    def of_group(group: PyTree):
        results = jax.vmap(whole)(*group)
        return map_members(later, (results,), members_at_once) if later else results

    results = jax.lax.map(of_group, jax.tree.map(grouped, members))
    return jax.tree.map(
        lambda leaf: leaf.reshape(num_groups * size, *leaf.shape[2:])[:population_size], results
    )


def fit_population(
    keys: Key[Array, "population"],
    network: nn.Module,
    config: TrainingConfig,
    images: Float[Array, "population images height width channels"],
    labels: Int[Array, "population images"] | Float[Array, "population images classes"],
    engine: EngineConfig = EngineConfig(),
) -> PyTree:
    """`fit` for each member."""
    return map_members(
        lambda key, images, labels: fit(key, network, config, images, labels),
        (keys, images, labels),
        engine.resolved_members_in_flight,
    )


def fit_and_evaluate_population(
    keys: Key[Array, "population"],
    network: nn.Module,
    config: TrainingConfig,
    images: Float[Array, "population images height width channels"],
    labels: Int[Array, "population images"] | Float[Array, "population images classes"],
    evaluations: tuple[Batches, ...],
    engine: EngineConfig = EngineConfig(),
    score: Score | None = None,
) -> tuple[Evaluation, ...]:
    """Train each member on its images and evaluate it on shared ones.

    Returns an `Evaluation` of arrays (population,) for each of `evaluations`. The networks live
    only as long as their members are in flight.
    """
    num_pixels = sum(batches.images[..., 0].size for batches in evaluations)
    return map_members(
        lambda key, images, labels: fit(key, network, config, images, labels),
        (keys, images, labels),
        engine.resolved_members_in_flight,
        lambda variables: tuple(
            evaluate(network, variables, batches, score) for batches in evaluations
        ),
        engine.resolved_members_evaluated_at_once(num_pixels),
    )
