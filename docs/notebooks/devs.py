# ---
# jupyter:
#   jupytext:
#     formats: py:percent
# ---

# %% [markdown]
# # A training set, averaged
#
# DEvS shrinks a training set step by step: a network learns from it, the features that it sees are
# clustered, and each cluster becomes its average, image and label.

# %%
import jax
import matplotlib.pyplot as plt
import numpy as np

from evojax_suite import NetworkConfig, TrainingConfig, devs, load
from evojax_suite.data import normalize
from evojax_suite.distilled import accuracies_on
from evojax_suite.operators import random_examples
from evojax_suite.types import training_data

digits = load("digits")
config = devs.Config(
    target_sizes=(100, 50),
    network=NetworkConfig(width=16, depth=1),
    training=TrainingConfig(num_epochs=100, batch_size=64, learning_rate=0.01),
    feature_epochs=10,
    feature_learning_rate=0.01,
)
config

# %% [markdown]
# The set shrinks, so steps differ in shape, and the search is a loop instead of a scan. A step trains
# the network for some epochs and, after the last ones, reduces the set.

# %%
algorithm = devs.build(config, digits.num_classes, digits.image_shape)
data = training_data(digits)
key_init, key_steps = jax.random.split(jax.random.key(0))
state, sizes = algorithm.init(key_init, None, data), []
while not algorithm.finished(state):
    key = jax.random.fold_in(key_steps, state.step)
    state, metrics = algorithm.step(key, state, None, data)
    sizes.append(int(metrics.num_samples))
print("images after each step:", *sizes)
sets = algorithm.result(state, None, data)

# %% [markdown]
# Some of the fifty averages, each above the classes that its label gives it.

# %%
figure, axes = plt.subplots(2, 8, figsize=(8, 2.5))
for (above, below), image, label in zip(axes.T, sets[-1].images, sets[-1].labels, strict=False):
    above.imshow(image[:, :, 0], cmap="gray")
    above.axis("off")
    below.bar(range(10), label)
    below.set(ylim=(0, 1), yticks=[])

# %% [markdown]
# A sceptic takes as many images at random, in equal numbers of each class, and is ahead, here as in our
# measurements at other sizes (`experiments/devs/README.md`). Networks train on either, from the same
# initial weights.

# %%
key_test, key_drawn = jax.random.split(jax.random.key(1))


def accuracy(images, labels):
    return accuracies_on(
        digits.test, key_test, images, labels, digits, config.network, config.training, 3
    ).mean()


rows = []
for averaged in sets:
    size = len(averaged.images)
    chosen = np.asarray(random_examples(key_drawn, digits.train.labels, size, 10))
    drawn = normalize(digits.train.images[chosen], digits.mean, digits.std)
    drawn_labels = jax.nn.one_hot(digits.train.labels[chosen], 10)
    rows.append((size, accuracy(averaged.images, averaged.labels), accuracy(drawn, drawn_labels)))
    print("{} images: averaged {:.1%}, drawn {:.1%}".format(*rows[-1]))

# %%
figure, axis = plt.subplots(figsize=(4, 2.5))
sizes, *each = zip(*rows, strict=True)
for name, accuracies in zip(("averaged", "drawn at random"), each, strict=True):
    axis.plot(sizes, accuracies, "o-", label=name)
axis.set(xlabel="images", ylabel="test accuracy")
axis.legend()
