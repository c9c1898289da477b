"""The settings of a training by CEST."""

from __future__ import annotations

from dataclasses import field
from typing import Annotated, Literal

from annotated_types import Ge, Gt, Le, Lt, MultipleOf
from flax import struct
from pydantic import NonNegativeFloat, NonNegativeInt, PositiveInt

from evojax_suite.configuration import Scalars, Share, configuration
from evojax_suite.networks import NetworkConfig
from evojax_suite.training import EngineConfig, TrainingConfig

Selection = Literal[
    "cest",
    "top_k",
    "loss_proportional",
    "random",
    "full",
    "reducible_loss",
    "selective_backprop",
    "infobatch",
    "craig",
    "grad_match",
]
"""Rules by which the examples of an epoch are chosen; full is the whole set."""

ONLINE: tuple[Selection, ...] = "reducible_loss", "selective_backprop"
"""Rules that choose in each step among candidates, not in an epoch among all examples."""


@configuration
class Config:
    """Sizes and choices."""

    selection: Selection = "cest"
    """How examples are selected: evolved prey (the paper's), the hardest, a sample in proportion to
    the loss, a random subset, or all. In each step: by the loss that can be reduced (RHO-LOSS, its
    reference a regression in closed form), or by the rank of the loss. Those with a low loss left
    out at random and the rest of them weighted (InfoBatch). Subsets with weights whose gradients of
    the last layer stand for all (CRAIG, GradMatch)."""
    fraction: Annotated[float, Gt(0), Le(1)] = 0.25
    """Size of a subset as a part of the training set."""
    initial_epochs: NonNegativeInt = 1
    """Epochs on the whole set at the start."""
    epochs_per_selection: PositiveInt = 5
    """Epochs on a subset before the next one is selected."""

    prey_population: Annotated[int, Ge(2), MultipleOf(2)] = 50
    """Number of subsets that evolve, even."""
    prey_generations: NonNegativeInt = 20
    """Generations of the subsets in a selection."""
    tournament_size: PositiveInt = 3
    """Number of subsets in a tournament for a parent."""
    repair: bool = False
    """Replace examples that a subset of the prey holds twice."""
    difficulty: Literal["loss", "error", "reducible", "el2n", "grand"] = "loss"
    """What makes an example hard: its loss, a wrong prediction, its loss less the one of a
    regression on all other examples (at least 0), the norm of its error p - y, or that of its
    gradient in the last layer."""
    matching: bool = False
    """Prey is fitter as well the nearer its mean gradient of the last layer is to that of all
    (Params.matching_weight)."""
    prune_rate: Annotated[float, Ge(0), Lt(1)] = 0.5
    """InfoBatch: part of the examples with a loss below the mean that an epoch leaves out."""
    whole_at_end: Share = 0.125
    """InfoBatch: part of the epochs, the last ones, that leave none out."""

    balanced: bool = False
    """Give each class an equal share of every subset."""
    random_share: Annotated[float, Ge(0), Lt(1)] = 0.0
    """Part of a subset that is random instead of selected, in [0, 1)."""
    difficulty_decay: Annotated[float, Ge(0), Lt(1)] = 0.0
    """Weight of an example's previous difficulty when it is measured anew, in [0, 1)."""
    give_up_after: NonNegativeInt = 0
    """Misclassifications in a row after which an example counts as mislabelled and as not hard at
    all; 0 is never."""
    pass_fraction: Share = 1.0
    """Part of the training set that is measured anew at a selection, one part after the other; 0
    needs reuse_training_losses."""
    reuse_training_losses: bool = False
    """Keep the losses of the last training epoch before a selection; the first selection then needs
    no pass."""

    network: NetworkConfig = NetworkConfig(network="VGG10", width=256)
    training: TrainingConfig = TrainingConfig(num_epochs=60, batch_size=64)
    engine: EngineConfig = field(default_factory=EngineConfig)

    def __post_init__(self):
        if self.training.num_epochs < 1:
            raise ValueError(f"num_epochs must be >= 1, got {self.training.num_epochs}")
        if not (self.pass_fraction or (self.reuse_training_losses and self.initial_epochs)):
            raise ValueError("pass_fraction 0 needs reuse_training_losses and initial_epochs >= 1")
        if self.selection == "infobatch" and not self.initial_epochs:
            raise ValueError("infobatch needs initial_epochs >= 1")
        if self.needs_outputs and (self.pass_fraction < 1 or self.reuse_training_losses):
            raise ValueError(
                "gradients of the last layer need pass_fraction 1 and no reuse_training_losses"
            )

    @property
    def is_online(self) -> bool:
        """Whether examples are chosen in each step."""
        return self.selection in ONLINE

    @property
    def needs_losses(self) -> bool:
        """Whether a selection needs difficulties of the whole training set."""
        return self.selection in ("cest", "top_k", "loss_proportional") or self.matches_gradients

    @property
    def matches_gradients(self) -> bool:
        """Whether a selection needs the gradients of the last layer."""
        return self.selection in ("craig", "grad_match") or (
            self.selection == "cest" and self.matching
        )

    @property
    def needs_outputs(self) -> bool:
        """Whether a pass gives more than losses."""
        return self.matches_gradients or self.difficulty in ("el2n", "grand")

    @property
    def needs_reference(self) -> bool:
        """Whether losses are compared with those of a regression."""
        return self.selection == "reducible_loss" or self.difficulty == "reducible"


@struct.dataclass
class Params(Scalars):
    """Scalars that users sweep; traced."""

    crossover_rate: Share = 0.5
    """Probability that a pair of subsets exchanges a part, in [0, 1]."""
    mutation_rate: Share = 0.2
    """Probability that a subset mutates, in [0, 1]."""
    gene_mutation_rate: Share = 0.05
    """Probability that a place of a mutating subset is drawn anew, in [0, 1]."""
    matching_weight: Share = 0.5
    """Weight of the match of gradients in the fitness of prey, in [0, 1]; the rest is that of the
    difficulty, both in units of what random subsets differ by."""
    temperature: NonNegativeFloat = 0.0
    """Nats by which two reducible losses must differ for odds of e between the examples, >= 0; 0
    takes the highest (RHO-LOSS)."""
