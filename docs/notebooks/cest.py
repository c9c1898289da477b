# ---
# jupyter:
#   jupytext:
#     formats: py:percent
# ---

# %% [markdown]
# # Which examples to learn from
#
# CEST lets subsets of the training set evolve while a network learns: the network is the predator, the
# hardest subset the prey. Other rules take evolution's place by one word, `selection`. Here each rule
# learns from the same number of gradient examples.

# %%
from dataclasses import replace

import jax
import matplotlib.pyplot as plt
import numpy as np

from evojax_suite import EngineConfig, NetworkConfig, Split, TrainingConfig, cest, load, networks
from evojax_suite.training import batches_of, evaluate

digits = load("digits")

# %% [markdown]
# A tenth of the labels is replaced by wrong ones: what is hardest then is mostly what is wrong.

# %%
random = np.random.default_rng(0)
labels = digits.train.labels.copy()
wrong = random.choice(len(labels), len(labels) // 10, replace=False)
labels[wrong] = (labels[wrong] + random.integers(1, 10, len(wrong))) % 10
noisy = replace(digits, train=Split(digits.train.images, labels))

# %%
config = cest.Config(
    initial_epochs=2,
    epochs_per_selection=3,
    network=NetworkConfig(network="MLP", width=32),
    training=TrainingConfig(num_epochs=32, batch_size=64, learning_rate=5e-3, schedule="cosine"),
)
test = batches_of(digits, digits.test, EngineConfig())


def train(rule, key):
    """The metrics of all epochs, and the test accuracy after the last."""
    chosen = replace(config, selection=rule)
    algorithm = cest.build(chosen, digits.num_classes, digits.image_shape)
    params, data = cest.Params(), cest.make_data(chosen, noisy)

    def epoch(state, key):
        return algorithm.step(key, state, params, data)

    key_init, key_epochs = jax.random.split(key)
    state = algorithm.init(key_init, params, data)
    keys = jax.random.split(key_epochs, chosen.training.num_epochs)
    state, metrics = jax.lax.scan(epoch, state, keys)
    network = networks.create(chosen.network, digits.num_classes, digits.image_shape)
    variables = algorithm.result(state, params, data)
    return metrics, evaluate(network, variables, test).accuracy


# %% [markdown]
# Three seeds of each rule are one program: `vmap` over keys.

# %%
rules = {
    "cest": "the hardest subset, evolved",
    "random": "a random quarter",
    "reducible_loss": "what can be learned",
}
keys = jax.random.split(jax.random.key(0), 3)
found = {}
for rule, name in rules.items():
    found[name] = jax.jit(jax.vmap(lambda key, rule=rule: train(rule, key)))(keys)
    accuracies = found[name][1]
    print(f"{name}: {accuracies.mean():.1%} ± {accuracies.std():.1%} of the test images")

# %%
figure, axis = plt.subplots(figsize=(5, 3))
for name, (metrics, _) in found.items():
    examples = metrics.gradient_examples.mean(0) / 1000
    axis.plot(examples, metrics.validation_accuracy.mean(0), label=name)
axis.set(xlabel="gradient examples (thousands)", ylabel="validation accuracy", ylim=(0.5, 1))
axis.legend(loc="lower right")
