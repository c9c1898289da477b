"""Dataset distillation by a genetic algorithm (Sato et al. 2026), and by kernel regression."""

from evojax_suite.systems.ga_distillation import (
    kernel_regression as kernel_regression,
    strong_random as strong_random,
)
from evojax_suite.systems.ga_distillation.algorithm import (
    Metrics as Metrics,
    State as State,
    build as build,
    check as check,
    frame_of as frame_of,
    history as history,
    reference_fitness as reference_fitness,
)
from evojax_suite.systems.ga_distillation.config import (
    FITNESS as FITNESS,
    FOUR_IN_ONE as FOUR_IN_ONE,
    RECOMMENDED as RECOMMENDED,
    Config as Config,
    Params as Params,
)
from evojax_suite.systems.ga_distillation.fitness import (
    Judge as Judge,
    Scores as Scores,
    own_judge as own_judge,
    own_score as own_score,
    score_population as score_population,
    solved_labels as solved_labels,
)
from evojax_suite.systems.ga_distillation.individuals import (
    Data as Data,
    Individual as Individual,
    class_centres as class_centres,
    class_means as class_means,
    decode as decode,
    encode as encode,
    images_and_targets as images_and_targets,
    make_data as make_data,
    num_dims as num_dims,
    random_individuals as random_individuals,
)
from evojax_suite.systems.ga_distillation.kernel_regression import KernelConfig as KernelConfig
