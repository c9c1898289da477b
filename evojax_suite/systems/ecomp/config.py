"""The settings of a compression."""

from __future__ import annotations

from typing import Annotated, Literal

from annotated_types import Ge, Gt, Le, MultipleOf
from flax import struct
from pydantic import NonNegativeInt, PositiveInt

from evojax_suite.configuration import Scalars, Share, configuration
from evojax_suite.types import Array


@configuration
class Config:
    """Sizes and choices; the defaults are the released program's."""

    population_size: Annotated[int, Ge(2), MultipleOf(2)] = 100
    """Individuals, an even number."""
    num_generations: NonNegativeInt = 100
    """Generations after the initial population; 100 are one epoch over the images."""
    batch_size: Annotated[int, Ge(4)] = 100
    """Images that all members of a generation share."""
    least_compression: float = 0.1
    """Part of the hidden units that the largest initial individual loses."""
    most_compression: float = 0.8
    """Part of the hidden units that the smallest initial individual loses, itself left out."""
    pruning: Literal["incoming_l1", "activity"] = "incoming_l1"
    """Which units go first: those of the smallest incoming weights (the program), or the least
    active on a batch (the text)."""
    mutated_layers: Literal["all", "hidden"] = "all"
    """Whose weights mutation scales: all layers' (the program), or the hidden ones' (the text)."""
    similarity: Literal["gaussian", "student_t", "cka"] = "gaussian"
    """How child and parent compare: t-SNE's divergence with Gaussian or Student's t children, or
    1 - centred kernel alignment."""
    final_choice: Literal["mean", "last"] = "mean"
    """The best network: by mean fitness over all batches (the program), or by the fitness of its
    generation (the text)."""

    balanced: bool = True
    """Keep the hidden layers equal in size, as the paper must; a parent may differ in them where
    this is off."""
    shrinking: bool = False
    """Let networks lose units; the paper's keep the sizes of the initial ones."""
    crossover: Literal["cut_off", "aligned"] = "cut_off"
    """aligned: units that fire alike take each other's place (the paper's mixes unrelated ones)."""
    selection: Literal["softmax", "nsga2"] = "softmax"
    """nsga2: parents and children compete by the fronts of error, similarity loss and parameters,
    whatever the weights; these choose among the last population alone."""
    batches_per_generation: PositiveInt = 1
    """Batches over which a generation's scores are averaged."""

    def __post_init__(self):
        if not 0 <= self.least_compression < self.most_compression <= 1:
            raise ValueError(
                f"compression must be 0 <= least < most <= 1, got least_compression "
                f"{self.least_compression} and most_compression {self.most_compression}"
            )

    @property
    def images_per_generation(self) -> int:
        """Number of images in all batches of a generation."""
        return self.batch_size * self.batches_per_generation


@struct.dataclass
class Params(Scalars):
    """Scalars that users sweep; traced, arrays of shape () work too."""

    accuracy_weight: float = 1.0
    """Weight of the accuracy in the fitness (w_a)."""
    similarity_weight: float = 2.0
    """Weight of the similarity loss, which is subtracted from the fitness (w_s)."""
    compression_weight: float = 1.0
    """Weight of 1 - relative size in the fitness (w_c)."""
    mutation_rate: Share = 0.01
    """Probability that a network mutates, in [0, 1]."""
    mutation_span: Share = 0.1
    """A mutated weight is multiplied by a number uniform in 1 - span..1 + span."""
    shrink_rate: Share = 0.5
    """Probability that a network shrinks where networks do (`shrinking`), in [0, 1]."""
    shrink_span: Share = 0.1
    """Largest part of its units that a layer loses where networks shrink, in [0, 1]."""
    perplexity: float = 30.0
    """Perplexity of the Gaussians around each image, in 1..batch_size - 1."""

    def fitness(
        self, accuracy: Array, similarity_loss: Array, relative_size: float | Array
    ) -> Array:
        """The fitness of members (section 3.1.2); higher is better."""
        return (
            self.accuracy_weight * accuracy
            - self.similarity_weight * similarity_loss
            + self.compression_weight * (1 - relative_size)
        )


WEIGHTINGS = ((0, 0, 1), (0, 2, 0), (1, 0, 0), (0, 2, 1), (1, 2, 0), (1, 0, 1), (1, 2, 1))
"""Table 1: weights of accuracy, similarity and compression."""


@configuration
class RefitConfig:
    """Sizes and choices of the search for the units to keep (`--refit`)."""

    population_size: Annotated[int, Ge(2)] = 64
    """Individuals."""
    num_generations: PositiveInt = 16
    """Generations, the evaluation of the initial individuals being the first."""
    num_fit_images: PositiveInt = 3000
    """Images on which the networks of the search are fitted, at most three fifths of those of
    evolution; the final networks are fitted on all of these."""
    num_judged_images: PositiveInt = 2000
    """Further images on which they are compared, if there are so many."""
    num_positions: PositiveInt = 10
    """Pixels of each image at which the outputs of a convolution are compared."""
    error: Literal["cross_entropy", "divergence", "error_rate"] = "cross_entropy"
    """cross_entropy: with the labels; divergence: Kullback and Leibler's of the parent's
    predictions from the network's, without labels; error_rate: of the labels."""
    size: Literal["parameters", "multiplications", "latency"] = "parameters"
    """The other objective, relative to the parent's. latency: the seconds of a batch of images on
    this device, from measurements of layers (`latency.py`)."""
    num_timed_images: PositiveInt = 100
    """Images of that batch."""
    low_rank: bool = False
    """Search for the rank of each layer, too: it becomes two, through the principal components of
    its output, where that is smaller."""
    prune_inputs: bool = True
    """Whether inputs, the pixels of a fully connected parent, are removed, too."""
    relu_rounds: NonNegativeInt = 2
    """Times that targets below 0 are relaxed in the fits of the final networks."""
    label_rounds: NonNegativeInt = 8
    """Rounds of the fit of the logits to labels; 0 fits them to the parent's alone."""
    front_size: PositiveInt = 24
    """Networks of the front that are written, evenly spaced by the logarithm of their size."""
    tolerance: Share = 0.005
    """The best network is the smallest whose accuracy on further training images is at most this
    below the parent's."""
    largest: Annotated[float, Gt(0), Le(1)] = 0.3
    """Largest relative size that is searched for."""
    smallest: Annotated[float, Gt(0), Le(1)] = 0.02
    """Relative size of the smallest initial individuals, about."""

    def __post_init__(self):
        if not self.smallest < self.largest:
            raise ValueError(
                f"smallest must be below largest, got {self.smallest} and {self.largest}"
            )


@struct.dataclass
class RefitParams(Scalars):
    """Scalars of the search with refits; traced, arrays of shape () work too."""

    ridge: Annotated[float, Gt(0)] = 1e-4
    """Penalty of the distance from the parent's weights, relative to the mean square of what they
    are multiplied with."""
    vote: Annotated[float, Ge(0)] = 4.0
    """Weight of the number of parents that have a unit, in its score for the child."""
    noise: Annotated[float, Ge(0)] = 0.1
    """Scale of the Gumbel noise in the scores; the prior of a unit is minus the logarithm of its
    place in the order of backward elimination."""
    size_span: Annotated[float, Ge(0)] = 0.1
    """Deviation of the logarithm of the factor by which the size of a group mutates."""
    initial_span: Annotated[float, Ge(0)] = 0.35
    """The same of the initial individuals, from equal shares of all groups."""
