"""The settings of a training."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from flax import struct

from evojax_suite.data.errors import check_types
from evojax_suite.networks import NetworkConfig
from evojax_suite.training import (
    EngineConfig,
    TrainingConfig,
)

Selection = Literal["cest", "top_k", "loss_proportional", "random", "full"]
"""Rules by which the examples of an epoch are chosen; full is the whole set."""


@dataclass(frozen=True)
class Config:
    """Sizes and choices."""

    selection: Selection = "cest"
    """What picks the examples: evolved prey (the paper's), the hardest, a sample in proportion to
    the loss, a random subset, or no rule: all."""
    fraction: float = 0.25
    """Part of the training set that a subset has."""
    initial_epochs: int = 1
    """Epochs on the whole set at the start."""
    epochs_per_selection: int = 5
    """Epochs on a subset before the next one is selected."""

    prey_population: int = 50
    """Subsets that evolve, an even number."""
    prey_generations: int = 20
    """Their generations in a selection."""
    tournament_size: int = 3
    """Subsets that compete to be a parent."""
    repair: bool = False
    """Replace examples that a subset of prey holds twice."""
    difficulty: Literal["loss", "error"] = "loss"
    """What makes an example hard: its loss, or a wrong prediction."""

    balanced: bool = False
    """Each class has its equal share of every subset."""
    random_share: float = 0.0
    """Part of a subset that is random instead of selected, in [0, 1)."""
    difficulty_decay: float = 0.0
    """Weight of what was known of an example when its difficulty is measured anew, in [0, 1)."""
    give_up_after: int = 0
    """Measurements in a row that find an example wrong before it counts as mislabelled and as not
    hard at all; 0 is never."""
    pass_fraction: float = 1.0
    """Part of the training set that is measured anew at a selection, one part after the other; 0
    needs reuse_training_losses."""
    reuse_training_losses: bool = False
    """Keep the losses that training saw in its last epoch before a selection; the first selection
    then needs no pass."""

    network: NetworkConfig = field(
        default_factory=lambda: NetworkConfig(network="VGG10", width=256)
    )
    training: TrainingConfig = field(
        default_factory=lambda: TrainingConfig(num_epochs=60, batch_size=64)
    )
    engine: EngineConfig = field(default_factory=EngineConfig)

    def __post_init__(self):
        check_types(vars(self), type(self))
        if self.training.num_epochs < 1:
            raise ValueError(f"num_epochs must be >= 1, got {self.training.num_epochs}")
        for name, least in (
            ("initial_epochs", 0),
            ("epochs_per_selection", 1),
            ("prey_population", 2),
            ("prey_generations", 0),
            ("tournament_size", 1),
            ("give_up_after", 0),
        ):
            if getattr(self, name) < least:
                raise ValueError(f"{name} must be >= {least}, got {getattr(self, name)}")
        if self.prey_population % 2:
            raise ValueError(f"prey_population must be even, got {self.prey_population}")
        if not 0 < self.fraction <= 1:
            raise ValueError(f"fraction must be in (0, 1], got {self.fraction}")
        if not 0 <= self.pass_fraction <= 1:
            raise ValueError(f"pass_fraction must be in [0, 1], got {self.pass_fraction}")
        if not (self.pass_fraction or (self.reuse_training_losses and self.initial_epochs)):
            raise ValueError("pass_fraction 0 needs reuse_training_losses and initial_epochs >= 1")
        for name in ("random_share", "difficulty_decay"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"{name} must be in [0, 1), got {getattr(self, name)}")
        if self.training.schedule != "constant":
            raise ValueError(f"schedule must be constant, got {self.training.schedule}")


@struct.dataclass
class Params:
    """Scalars that users sweep; traced."""

    crossover_rate: float = 0.5
    """Probability that a pair of subsets exchanges a part, in [0, 1]."""
    mutation_rate: float = 0.2
    """Probability that a subset mutates, in [0, 1]."""
    gene_mutation_rate: float = 0.05
    """Probability that a place of a mutating subset is drawn anew, in [0, 1]."""

    def check(self) -> None:
        """Raise ValueError where a rate is out of range."""
        for name in ("crossover_rate", "mutation_rate", "gene_mutation_rate"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name} must be in [0, 1], got {getattr(self, name)}")
