"""The settings of a distillation, and the recommended ones."""

from __future__ import annotations

from dataclasses import field, replace
from typing import Annotated, Literal

from annotated_types import Ge, Gt, Le, Lt
from flax import struct
from pydantic import NonNegativeFloat, PositiveFloat, PositiveInt

from evojax_suite.configuration import Scalars, Share, configuration
from evojax_suite.networks import NetworkConfig
from evojax_suite.operators import LaplaceSign
from evojax_suite.operators.encodings import EncodingName
from evojax_suite.systems.ga_distillation.kernel_regression import KernelConfig, Regression
from evojax_suite.training import EngineConfig, TrainingConfig

FITNESS = "accuracy", "cross_entropy", "kernel_regression"
"""The fitness functions that have a name: the first two are of a network trained on the individual.
"""


@configuration
class Config:
    """Sizes and choices; the defaults are the paper's."""

    population_size: Annotated[int, Ge(2)] = 300
    """Individuals."""
    images_per_class: PositiveInt = 1
    """Synthetic images of each class in an individual."""
    survival_ratio: Annotated[float, Gt(0), Lt(1)] = 0.5
    """Part of the population that survives a generation."""
    strategy: str = "LaplaceGA"
    """LaplaceGA (the paper's), BlockES, or any evosax algorithm: SimpleGA, SNES, Sep_CMA_ES, ..."""
    strategy_std: PositiveFloat | None = None
    """Initial standard deviation of an evosax strategy that has one; None is its default."""
    crossover: Literal["laplace", "none"] = "laplace"
    """none is DL-EA without crossover, the paper's Fig. 3 comparison."""
    laplace_sign: LaplaceSign = "independent"
    """How the sign of beta is drawn: independent (inspyred) or shared (Eq. 4 to the letter)."""

    common_random_numbers: bool = False
    """Give all members of a generation the same initialisation, a new one each generation."""
    networks_per_member: PositiveInt = 1
    """Average the fitness of a member over this many networks; of kernel regression the kernel."""
    fitness: Literal["accuracy", "cross_entropy", "kernel_regression"] | str = "accuracy"
    """The quantity that selection maximises: the accuracy, minus the mean cross-entropy, or the
    mean of a user's `training.Score`, as package.module:function, of a network that is trained on
    the individual; or, without training one, minus the error of kernel regression on training
    images, or a user's `Judge`, a function of four arguments, of the images themselves."""
    encoding: EncodingName = "pixels"
    """The numbers that evolve: pixels, or the lowest cosine coefficients of each image."""
    num_cosines: PositiveInt = 14
    """Coefficients a side, at most as many as fit."""
    factor: PositiveInt = 1
    """Smaller images a side that one image holds; each is enlarged before it enters a network."""
    levels: Annotated[int, Ge(2), Le(256)] | None = None
    """Values that a pixel can take, evenly spaced from 0 to 1: 2 is one bit; None is any value."""
    start: Literal["real", "class_means", "k_means", "given"] = "real"
    """Images from which the search starts: real training images, or (for an algorithm that searches
    around a mean) the mean of each class, the centres of k-means in each class, or images that are
    given with the data."""
    fitness_subset_size: PositiveInt | None = None
    """Evaluate on a fresh random subset of this many fitness images in each generation."""
    holdout_ratio: Annotated[float, Ge(0), Lt(1)] = 0.0
    """Keep this part of the fitness images out of the fitness; the best of each generation is
    scored on them, and the run's result is the best by that score."""
    patience: PositiveInt | None = None
    """Stop early after this many generations without a better score on the held-out images."""
    best_of: Literal["run", "last_generation", "mean"] = "run"
    """Which individual is the result: the run's best by its single score (the paper's), the last
    generation's best, since scores of generations with common random numbers do not compare, or
    the mean around which an algorithm searches."""
    evolve_labels: bool = False
    """Let soft labels evolve along with the images, one for each; by kernel regression they evolve
    as logits."""
    clip: Literal["unit", "image"] = "unit"
    """Bounds of children: 0..1 in the space of normalised images (the paper's), or the values that
    an image of 0..1 has there after normalisation."""

    kernel: KernelConfig = field(default_factory=KernelConfig)
    network: NetworkConfig = field(default_factory=NetworkConfig)
    training: TrainingConfig = field(default_factory=TrainingConfig)
    engine: EngineConfig = field(default_factory=EngineConfig)

    @property
    def tiles_per_class(self) -> int:
        """The number of images of each class on which networks train."""
        return self.images_per_class * self.factor**2

    @property
    def regression(self) -> Regression:
        """The settings of kernel regression on that many images of each class."""
        return self.kernel.regression(self.tiles_per_class)

    def __post_init__(self):
        if self.fitness not in FITNESS and ":" not in self.fitness:
            allowed = f"one of {', '.join(FITNESS)}, or package.module:function"
            raise ValueError(f"fitness must be {allowed}, got {self.fitness!r}")
        if self.holdout_ratio > 0 and (best_of := self.best_of) != "run":
            raise ValueError(f"best_of {best_of} leaves nothing to choose by holdout_ratio > 0")
        if self.fitness == "kernel_regression":
            if (net := self.network.network) != "ConvNet":
                raise ValueError(
                    f"kernel_regression takes features of the ConvNet alone, got {net}"
                )
            parts = "holdout_ratio", "fitness_subset_size"
            self._refuse(parts, "a fitness of trained networks", self.fitness)
            if self.evolve_labels and (temperature := self.regression.temperature) == 0:
                needed = "evolve_labels by kernel_regression needs a temperature > 0"
                raise ValueError(f"{needed}, got {temperature}")
        if self.clip == "image" and self.encoding != "pixels":
            raise ValueError(f"clip image needs the encoding pixels, got {self.encoding}")
        if self.patience is not None and self.holdout_ratio == 0:
            raise ValueError("patience needs a holdout_ratio > 0, got 0")
        if self.strategy == "LaplaceGA" and self.strategy_std is not None:
            raise ValueError(f"LaplaceGA has no strategy_std, got {self.strategy_std}")
        if self.strategy != "LaplaceGA":
            settings = "crossover", "laplace_sign", "survival_ratio", "clip"
            self._refuse(settings, "LaplaceGA", self.strategy)

    def _refuse(self, names: tuple[str, ...], owner: str, used: str) -> None:
        """Raise ValueError where a setting that belongs to `owner` is not at its default."""
        for name in names:
            if (value := getattr(self, name)) != getattr(type(self), name):
                raise ValueError(f"{name} belongs to {owner}, got {value} with {used}")


RECOMMENDED = Config(
    population_size=256,
    networks_per_member=4,
    strategy="BlockES",
    strategy_std=0.4,
    fitness="kernel_regression",
    encoding="cosines",
    start="class_means",
    best_of="mean",
)
"""The recommended settings: no network is trained during the search."""

_KERNEL = KernelConfig(kernel_images=500)
FOUR_IN_ONE = replace(RECOMMENDED, population_size=32, factor=2, start="k_means", kernel=_KERNEL)
"""The same for images of the same size that hold four smaller ones each."""


@struct.dataclass
class Params(Scalars):
    """Scalars of LaplaceGA that users sweep; traced, arrays of shape () work too."""

    crossover_rate: Share = 1.0
    """Probability that a pair of parents is crossed over, in [0, 1]."""
    laplace_location: float = 0.0
    """Location of the Laplace distribution."""
    laplace_scale: PositiveFloat = 0.5
    """Scale of the Laplace distribution, > 0."""
    mutation_scale: NonNegativeFloat = 1.0
    """Noise of generation g has this standard deviation over g (Eq. 1)."""
