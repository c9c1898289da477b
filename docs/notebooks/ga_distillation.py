# ---
# jupyter:
#   jupytext:
#     formats: py:percent
# ---

# %% [markdown]
# # Ten images by evolution
#
# An individual is a whole training set: one image of each digit. Its fitness is how well real images
# are predicted from it by kernel regression on the features of fresh networks, so no network is
# trained, and no gradient is taken of an image.

# %%
from dataclasses import replace

import jax
import matplotlib.pyplot as plt
import numpy as np
from evosax.algorithms import SNES

from evojax_suite import NetworkConfig, TrainingConfig, ga_distillation, load
from evojax_suite.data import normalize
from evojax_suite.distilled import accuracies_on
from evojax_suite.operators import random_examples
from evojax_suite.problems import DistillationProblem
from evojax_suite.strategies import LaplaceGA

digits = load("digits")
digits

# %% [markdown]
# An algorithm is a handful of pure functions. `Config` has what is compiled in, `Params` numbers that
# may be traced, `Data` the images; `step` is one generation, so a search is one `scan`.

# %%
config = replace(
    ga_distillation.RECOMMENDED,
    population_size=32,
    network=NetworkConfig(width=16, depth=1),
    training=TrainingConfig(num_epochs=60),
    kernel=ga_distillation.KernelConfig(kernel_width=16, kernel_images=300, company=4),
)
algorithm = ga_distillation.build(config, digits.num_classes, digits.image_shape)
params, data = ga_distillation.Params(), ga_distillation.make_data(digits)


@jax.jit
def search(key, params, data):
    key_init, key_steps = jax.random.split(key)

    def step(state, key):
        return algorithm.step(key, state, params, data)

    state = algorithm.init(key_init, params, data)
    return jax.lax.scan(step, state, jax.random.split(key_steps, 100))


state, metrics = search(jax.random.key(0), params, data)
images, labels = algorithm.result(state, params, data)

# %%
figure, axis = plt.subplots(figsize=(5, 2.5))
axis.plot(metrics.generation, metrics.fitness_mean, label="mean")
axis.plot(metrics.generation, metrics.fitness_best, label="best")
axis.set(xlabel="generation", ylabel="fitness")
axis.legend()

# %% [markdown]
# The images, and what networks that were trained on them alone make of the test images, beside those
# that had ten real images, drawn at random.

# %%
figure, axes = plt.subplots(1, 10, figsize=(8, 1))
for axis, image in zip(axes, images, strict=True):
    axis.imshow(image[:, :, 0], cmap="gray")
    axis.axis("off")

# %%
key_real, key_test = jax.random.split(jax.random.key(1))
chosen = np.asarray(random_examples(key_real, digits.train.labels, 10, 10))
real = normalize(digits.train.images[chosen], digits.mean, digits.std)
real_labels = jax.nn.one_hot(digits.train.labels[chosen], 10)


def accuracy(images, labels):
    recipe = config.network, config.training, 5
    return accuracies_on(digits.test, key_test, images, labels, digits, *recipe).mean()


evolved, drawn = accuracy(images, labels), accuracy(real, real_labels)
print(f"evolved {100 * evolved:.1f} %, ten real images {100 * drawn:.1f} %")

# %% [markdown]
# ## The paper's algorithm in evosax's own loop
#
# Sato et al. train a network on each individual and recombine individuals by Laplace crossover.
# `LaplaceGA` is an evosax algorithm and `DistillationProblem` an evosax problem, so that both fit into
# any loop that is written for evosax. Here it is beside SNES, on the same problem and budget, with the
# same initial networks in every generation, so that the curves can be read as progress.

# %%
problem = DistillationProblem(
    digits,
    ga_distillation.Config(
        fitness="cross_entropy",
        common_random_numbers=True,
        network=NetworkConfig(network="MLP", width=16),
        training=TrainingConfig(num_epochs=30, learning_rate=0.01),
    ),
)
size = 16
starts = jax.vmap(problem.sample)(jax.random.split(jax.random.key(2), size))


def losses(strategy, state, params):
    """The least loss of each of 60 generations."""
    key, key_problem, key_networks = jax.random.split(jax.random.key(4), 3)
    problem_state, best = problem.init(key_problem), []
    for _ in range(60):
        key, key_ask, key_tell = jax.random.split(key, 3)
        solutions, state = strategy.ask(key_ask, state, params)
        fitness, problem_state, _ = problem.eval(key_networks, solutions, problem_state)
        state, _ = strategy.tell(key_tell, solutions, fitness, state, params)
        best.append(fitness.min())
    return np.array(best)


key_laplace, key_snes, key_first = jax.random.split(jax.random.key(3), 3)
laplace = LaplaceGA(population_size=size, solution=starts[0])
first, _, _ = problem.eval(key_first, starts, problem.init(key_first))
start = laplace.init(key_laplace, starts, first, laplace.default_params)
snes = SNES(population_size=size, solution=starts[0])
snes_params = snes.default_params.replace(std_init=0.1)
found = {
    "LaplaceGA": losses(laplace, start, laplace.default_params),
    "SNES": losses(snes, snes.init(key_snes, starts.mean(0), snes_params), snes_params),
}
figure, axis = plt.subplots(figsize=(5, 2.5))
for name, each in found.items():
    axis.plot(1 + np.arange(len(each)), each, label=name)
axis.set(xlabel="generation", ylabel="least cross-entropy (nats)")
axis.legend()
