"""The settings of a compression."""

from __future__ import annotations

from typing import Annotated, Literal

from annotated_types import Ge, MultipleOf
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
