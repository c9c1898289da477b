"""The settings of a search."""

from __future__ import annotations

import itertools
from dataclasses import field
from typing import Annotated, Literal

from annotated_types import Ge, Lt
from flax import struct
from pydantic import NonNegativeFloat, NonNegativeInt, PositiveInt

from evojax_suite.configuration import Scalars, Share, configuration
from evojax_suite.systems.de_nas.architectures import Head, Space
from evojax_suite.systems.de_nas.methods import MethodConfig
from evojax_suite.systems.de_nas.networks import Initialization
from evojax_suite.training import EngineConfig, TrainingConfig

TRAINING = TrainingConfig(
    num_epochs=10,
    batch_size=64,
    optimizer="sgd",
    learning_rate=0.01,
    momentum=0.0,
    crop_padding=4,
    flip=True,
)
"""The training of a candidate (Table 2)."""


@configuration
class Config:
    """Sizes and choices; defaults are the paper's (Tables 1 and 2)."""

    population_size: Annotated[int, Ge(3)] = 20
    """Architectures that survive a generation."""
    num_children: PositiveInt = 10
    """New architectures of a generation."""
    num_generations: NonNegativeInt = 9
    """Generations after the first population."""
    num_best: PositiveInt = 5
    """Number of best architectures that a child may be based on."""
    compare: Literal["kind", "unit"] = "kind"
    """What makes two units alike in a difference: their kind, or kernel and filters too."""
    method: Literal["evolution", "random", "evosax", "ageing", "surrogate"] = "evolution"
    """Source of children: differential evolution on units (the paper's); the distribution of the
    first population, for comparison; `strategy`; regularised evolution; or evolution that trains
    those children which a Gaussian process thinks best (`methods`)."""
    strategy: str = "DifferentialEvolution"
    """evosax algorithm of the method evosax. It moves normal deviates that `architectures.decode`
    reads through their distribution function, so that standard normal vectors are random networks;
    it starts from the best `num_children` of the first population and minimises the score, on the
    scale of the first population."""
    survival: Literal["score", "nsga2"] = "score"
    """What selects survivors: the weighted sum (the paper's), or the fronts of error and size, the
    more spread out first (NSGA-II)."""
    size: Literal["parameters", "multiplications"] = "parameters"
    """What counts as size; multiplications are those of one image, forward."""
    num_known: NonNegativeInt = 0
    """Networks like VGG of rising width in the first population, in place of random ones."""
    screen: PositiveInt = 1
    """Random networks of which each of the first population is the one with the most parameters: a
    choice without any training, for a space whose `max_weights` keeps networks small."""
    rungs: tuple[int, ...] = ()
    """Epochs after which a child is evaluated too, and trains on only if it keeps up with the
    survivors (`Params.stopping_quantile`): successive halving in the asynchronous form that stops
    (Li et al. 2020, ASHA). The first population is never stopped; () is the paper's."""
    inherit: bool = False
    """Children begin with the weights of the survivor that is most like them (`inheritance`), the
    final training with those that the search left; one program for all, as `programs` padded."""
    child_epochs: PositiveInt | None = None
    """Epochs of a child that inherits; None is as many as of the first population."""
    final_epochs: NonNegativeInt = 200
    """Epochs of the training of the most accurate and the smallest architecture; 0 is none."""

    dropout: Annotated[float, Ge(0), Lt(1)] = 0.5
    """Probability that an input of the first two dense layers is dropped in training."""
    normalization: Literal["none", "batch", "instance", "layer"] = "none"
    """Normalisation after each convolution."""
    initialization: Initialization = "pytorch"
    """Initialisation of weights; kaiming (He et al. 2015) lets deep networks learn in few steps."""
    skip: bool = False
    """A skip connection around each convolution that keeps the number of filters."""
    compute_dtype: Literal["float32", "bfloat16"] = "float32"
    """Precision of convolutions and matrix products; parameters stay float32."""
    head: Head = "dense"
    """What follows the units: the paper's three dense layers, or the mean over the pixels and one
    layer."""
    programs: Literal["auto", "separate", "padded", "layers"] = "auto"
    """A program for each candidate, one for all with filters masked, or one for each layer that
    differs in shape, which candidates share; auto is padded on a CPU where trainings are so short
    that compiling takes longer (experiments/de_nas/README.md)."""
    workers: PositiveInt | None = None
    """Candidates that compile or train at once; None is 2 a device, of a CPU one a
    device and at least 2."""

    space: Space = field(default_factory=Space)
    training: TrainingConfig = TRAINING
    engine: EngineConfig = field(default_factory=EngineConfig)

    def __post_init__(self):
        size, num_epochs = self.population_size, self.training.num_epochs
        for name in ("num_best", "num_known"):
            if (value := getattr(self, name)) > size:
                raise ValueError(f"{name} must be <= population_size = {size}, got {value}")
        if num_epochs < 1:
            raise ValueError(f"num_epochs must be >= 1, got {num_epochs}")
        if self.method == "evosax":
            if self.num_known:
                raise ValueError(f"method evosax takes no known networks, got {self.num_known}")
            if self.screen > 1:
                raise ValueError(f"method evosax takes no screen, got {self.screen}")
            if self.num_children > size:
                raise ValueError(
                    f"num_children must be <= population_size = {size} with the method evosax, got "
                    f"{self.num_children}"
                )
        ends = (0, *self.rungs, num_epochs)
        if any(before >= after for before, after in itertools.pairwise(ends)):
            raise ValueError(
                f"rungs must rise within 1..{num_epochs - 1}, below the {num_epochs} epochs, got "
                f"{self.rungs}"
            )
        padded = "programs padded" if self.programs == "padded" else "inherit"
        if (self.programs == "padded" or self.inherit) and not self.can_be_padded:
            raise ValueError(
                f"{padded} needs normalization none, no skip, the dense head and "
                "compute_dtype float32"
            )
        if self.inherit and self.programs not in ("auto", "padded"):
            raise ValueError(f"inherit needs programs padded, got {self.programs}")
        if self.inherit and self.rungs:
            raise ValueError(f"inherit takes no rungs, got {self.rungs}")
        if self.child_epochs and not self.inherit:
            raise ValueError(f"child_epochs needs inherit, got {self.child_epochs}")

    @property
    def methods(self) -> MethodConfig:
        """The sizes of the methods that `methods` has."""
        size = self.population_size
        return MethodConfig(
            "ageing" if self.method == "ageing" else "surrogate",
            population_size=size,
            num_children=self.num_children,
            num_best=self.num_best,
            sample_size=min(10, size),
            num_proposals=max(200, 10 * self.num_children),
        )

    @property
    def num_candidates(self) -> int:
        """Number of candidates of a whole run."""
        return self.candidates_of(self.num_generations)[1]

    @property
    def can_be_padded(self) -> bool:
        """Whether one padded program can compute networks of these settings."""
        plain = self.normalization == "none" and not self.skip and self.head == "dense"
        return plain and self.compute_dtype == "float32"

    def generation_of(self, candidate: int) -> int:
        """Generation of a candidate, 0 for the first population; candidates count from 0."""
        return max(0, 1 + (candidate - self.population_size) // self.num_children)

    def candidates_of(self, generation: int) -> tuple[int, int]:
        """The first candidate that is made in a generation, and the one after its last."""
        end = self.population_size + generation * self.num_children
        return (end - self.num_children if generation else 0), end


@struct.dataclass
class Params(Scalars):
    """Scalars that users sweep."""

    error_weight: NonNegativeFloat = 0.7
    """Weight of the error rate in the score, >= 0."""
    size_weight: NonNegativeFloat = 0.3
    """Weight of the size in the score, >= 0."""
    differential_weight: Share = 1.0
    """Probability that a unit of a difference takes part, in [0, 1]."""
    stopping_quantile: Share = 0.5
    """Quantile of the survivors' accuracies at a rung that a child must reach, in [0, 1]; 0.5 as
    in halving."""
