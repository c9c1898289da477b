"""Weights that a child takes over from the survivor that is most like it, so that it trains on.

Units are compared place by place, as differential evolution changes them. Where a child is the
survivor with units at its end, more filters or wider kernels, it computes what the survivor does:
new inputs have weights of 0, a new convolution is the identity (Chen, Goodfellow & Shlens 2016,
"Net2Net: Accelerating Learning via Knowledge Transfer", section 2; Wei et al. 2016, "Network
Morphism"), and what leads to new filters is fresh, so that they differ. Where it has less than the
survivor, what is left stays as it is. After other poolings the dense layers are fresh.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float

from evojax_suite.systems.de_nas import architectures
from evojax_suite.systems.de_nas.architectures import CONVOLUTION, END, Genome, dense_units
from evojax_suite.systems.de_nas.networks import PaddedNetwork
from evojax_suite.types import Array, IntScalar, PyTree


class Elder(NamedTuple):
    """A trained network that a child may take weights from; none where its genome is empty."""

    genome: Genome
    parameters: PyTree  # of `PaddedNetwork`

    @property
    def exists(self) -> Array:
        """Whether there is one."""
        return self.genome.kinds[0] != END


def most_alike(genome: Genome, survivors: Genome) -> Float[np.ndarray, "survivors"]:
    """How much of each survivor a child can take over: the units that are alike from the first on,
    then those that are alike anywhere."""
    alike = np.all([one == all for one, all in zip(genome, survivors, strict=True)], axis=0)
    from_first = np.cumprod(alike, axis=1).sum(1)
    return from_first + alike.mean(1)


def inherited(
    network: PaddedNetwork, genome: Genome, fresh: PyTree, elder: Elder
) -> dict[str, Array]:
    """The parameters with which a child of a genome begins. fresh: those that it has without an
    elder (`networks.for_genome`)."""
    channels, old, taken = network.image_shape[2], elder.parameters, dict(fresh)
    inputs = architectures.inputs_of(genome, channels)
    inputs_before = architectures.inputs_of(elder.genome, channels)
    goes_on = elder.genome.kinds == CONVOLUTION  # else a convolution is new
    before = inputs_before, elder.genome.filters, elder.genome.kernels
    units: tuple[Array, ...] = goes_on, inputs, *before

    def convolution(new: Array, old: Array, *unit: Array) -> Array:
        goes_on, inputs, into, out, size = unit
        from_middle = jnp.abs(jnp.arange(len(new)) - len(new) // 2)
        within = from_middle <= size // 2
        within, middle = (
            (line[:, None] & line)[..., None, None] for line in (within, from_middle == 0)
        )
        widened = _grown(new, jnp.where(within, old, 0.0), into, out)
        rows, columns = new.shape[2:]
        identity = _grown(new, middle * jnp.eye(rows, columns), inputs, inputs)
        return jnp.where(goes_on, widened, identity)

    first: list[Array] = [leaf[0] for leaf in units]
    taken["first"] = convolution(fresh["first"], old["first"], *first)
    rest = [leaf[1:] for leaf in units]
    taken["kernels"] = jax.vmap(convolution)(fresh["kernels"], old["kernels"], *rest)
    places, filters = jnp.arange(fresh["biases"].shape[1]), elder.genome.filters[:, None]
    stays = jnp.where(goes_on[:, None], places < filters, places < inputs[:, None])
    biases = jnp.where(goes_on[:, None], old["biases"], 0.0)
    taken["biases"] = jnp.where(stays, biases, fresh["biases"])
    taken |= _dense(network, genome, fresh, elder)
    return {name: jnp.where(elder.exists, taken[name], fresh[name]) for name in taken}


def _grown(
    new: Float[Array, "... inputs outputs"],
    old: Float[Array, "... inputs outputs"],
    num_inputs: IntScalar | int,
    num_outputs: IntScalar | int,
) -> Float[Array, "... inputs outputs"]:
    """Weights that compute from more inputs, and for more outputs, what the old ones do."""
    inputs, outputs = (jnp.arange(size) for size in new.shape[-2:])
    kept = jnp.where((inputs < num_inputs)[:, None], old, 0.0)
    return jnp.where(outputs < num_outputs, kept, new)


def _dense(network: PaddedNetwork, genome: Genome, fresh: PyTree, elder: Elder) -> dict[str, Array]:
    """The dense layers; a row of the first belongs to a pixel and a channel of the last maps."""
    poolings, channels, sizes = [], [], []
    for each in (genome, elder.genome):
        features = architectures.num_features(each, network.image_shape)
        poolings.append((each.kinds > CONVOLUTION).sum())
        channels.append(architectures.last_filters(each))
        sizes.append(dense_units(features, network.num_classes))
    rows = jnp.arange(network.most_features)
    pixel, channel = rows // channels[0], rows % channels[0]
    place = jnp.where(channel < channels[1], pixel * channels[1] + channel, 0)
    known = (channel < channels[1])[:, None]
    taken = {}
    for index, outputs in enumerate(sizes[1][1:]):
        weights, bias = f"dense_{index}", f"dense_bias_{index}"
        old = elder.parameters[weights]
        if index == 0:
            old = jnp.where(known, old[place], 0.0)
            inputs = network.most_features
        else:
            inputs = sizes[1][index]
        taken[weights] = _grown(fresh[weights], old, inputs, outputs)
        is_old = jnp.arange(len(fresh[bias])) < outputs
        taken[bias] = jnp.where(is_old, elder.parameters[bias], fresh[bias])
    same = poolings[0] == poolings[1]
    return {name: jnp.where(same, leaf, fresh[name]) for name, leaf in taken.items()}
