# ---
# jupyter:
#   jupytext:
#     formats: py:percent
# ---

# %% [markdown]
# # A trained network, smaller
#
# Evolution looks for the units of a network to keep and, for each layer, the rank of its weights. The
# weights of each candidate follow in closed form, by least squares from what the parent computes, so
# that no gradient is needed. The parent may come from anywhere; this one is scikit-learn's.

# %%
import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
from sklearn.neural_network import MLPClassifier

from evojax_suite import ecomp, load
from evojax_suite.systems.ecomp import baselines

digits = load("digits")


def flat(split):
    return split.images.reshape(len(split), -1) / 255


classifier = MLPClassifier((64, 64), max_iter=200, tol=1e-3, n_iter_no_change=5, random_state=0)
classifier.fit(flat(digits.train), digits.train.labels)
print(f"parent: {classifier.score(flat(digits.test), digits.test.labels):.1%} of the test images")

# %% [markdown]
# A graph is a tuple of layers, whose weights are (outputs, inputs), as in PyTorch.

# %%
pairs = [*zip(classifier.coefs_, classifier.intercepts_, strict=True)]
parent = tuple(
    ecomp.graph.Node(
        jnp.asarray(weight.T, jnp.float32),
        jnp.asarray(bias, jnp.float32),
        source=index,
        relu=index < len(pairs) - 1,
    )
    for index, (weight, bias) in enumerate(pairs)
)
inputs = jnp.asarray(flat(digits.train), jnp.float32)
targets = jax.nn.one_hot(digits.train.labels, 10)

# %% [markdown]
# `decomposed` writes each layer as two, through the principal components of its output, so that ranks
# are units like others. The search is one program.

# %%
config = ecomp.RefitConfig(population_size=32, num_generations=12, largest=0.5, smallest=0.05)
params = ecomp.RefitParams()
searched = ecomp.graph.decomposed(parent, inputs)
key_fit, key_init, key_steps = jax.random.split(jax.random.key(0), 3)
shape = digits.image_shape
data = ecomp.mask_search.make_data(key_fit, config, params, searched, inputs, targets, shape)
algorithm = ecomp.mask_search.build(config)


@jax.jit
def search(key_init, key_steps, data):
    def step(state, key):
        return algorithm.step(key, state, params, data)

    state = algorithm.init(key_init, params, data)
    return jax.lax.scan(step, state, jax.random.split(key_steps, config.num_generations))


state, metrics = search(key_init, key_steps, data)
front = ecomp.mask_search.front_of(config, state)
masks = tuple(np.asarray(group[front]) for group in state.masks)

# %% [markdown]
# The front of sizes, fitted to all training images and judged on the test images, beside the units of
# the largest weights (L1) in the same fits.

# %%
test = ecomp.refit.arranged(searched, jnp.asarray(flat(digits.test), jnp.float32))
fit = ecomp.refit.make_fit(key_fit, searched, inputs, targets, config.num_positions)


@jax.jit
def classes_of(kept):
    return ecomp.mask_search.fitted_network(config, params, searched, fit, kept, test)[1]


def accuracies(masks):
    members = zip(*masks, strict=True)
    found = [classes_of(ecomp.mask_search.narrowest(searched, each)) for each in members]
    return (np.stack(found) == digits.test.labels).mean(1)


def sizes_of(masks):
    """The parameters of networks, relative to the parent's."""
    counts = [[int(mask.sum()) for mask in one] for one in zip(*masks, strict=True)]
    parameters = [ecomp.graph.num_parameters(searched, each) for each in counts]
    return np.array(parameters) / sum(leaf.size for leaf in jax.tree.leaves(parent))


def by_norm(share):
    """Masks that keep the share `share` of the units of each hidden layer, and all inputs and
    components."""
    scores = baselines.incoming_l1(searched)
    between = ecomp.graph.groups_between(searched)
    kept = [
        len(each) if group == 0 or group in between else round(share * len(each))
        for group, each in enumerate(scores)
    ]
    return baselines.masks_of(scores, tuple(kept))


simple = [by_norm(share) for share in (0.15, 0.2, 0.3, 0.4, 0.6)]
simple = tuple(map(np.stack, zip(*simple, strict=True)))
figure, axis = plt.subplots(figsize=(5, 3))
for name, each in (("evolved", masks), ("largest weights", simple)):
    sizes, right = sizes_of(each), accuracies(each)
    axis.plot(100 * sizes, 100 * right, "o-", markersize=3, label=name)
    smallest = sizes[right > 0.93].min(initial=1)
    print(f"{name}: 93 % of the test images with {smallest:.0%} of the parameters")
axis.set(xlabel="parameters (% of the parent's)", ylabel="test accuracy (%)", xlim=(0, 60))
axis.legend(loc="lower right")
