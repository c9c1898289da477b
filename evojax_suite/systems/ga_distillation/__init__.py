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
    num_frames as num_frames,
    over_members as over_members,
)
from evojax_suite.systems.ga_distillation.config import (
    FITNESS as FITNESS,
    FOUR_IN_ONE as FOUR_IN_ONE,
    RECOMMENDED as RECOMMENDED,
    TRAINED as TRAINED,
    Config as Config,
    Params as Params,
)
from evojax_suite.systems.ga_distillation.fitness import (
    Judge as Judge,
    Scores as Scores,
    check_judge as check_judge,
    num_held_out as num_held_out,
    own_judge as own_judge,
    own_score as own_score,
    rank_last as rank_last,
    score_on as score_on,
    score_population as score_population,
    solved_labels as solved_labels,
)
from evojax_suite.systems.ga_distillation.individuals import (
    LABEL_STEP as LABEL_STEP,
    Data as Data,
    Individual as Individual,
    class_centres as class_centres,
    class_means as class_means,
    decode as decode,
    encode as encode,
    encoding_of as encoding_of,
    images_and_targets as images_and_targets,
    label_step as label_step,
    make_data as make_data,
    num_dims as num_dims,
    one_hot_classes as one_hot_classes,
    random_individuals as random_individuals,
)
from evojax_suite.systems.ga_distillation.kernel_regression import (
    KernelConfig as KernelConfig,
    Regression as Regression,
)
