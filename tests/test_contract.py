"""One battery for every algorithm: what `evojax_suite.types.Algorithm` promises."""

from __future__ import annotations

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from shape_checks import misfits

from evojax_suite import cest, de_nas, devs, ecomp, ga_distillation, proxy_network
from evojax_suite.data import load, with_whole_training_set
from evojax_suite.networks import NetworkConfig
from evojax_suite.runtime.checkpoint import Checkpoints
from evojax_suite.systems.cest import predator_prey
from evojax_suite.systems.coresets import gradient_matching, kernel_inducing_points
from evojax_suite.systems.de_nas.architectures import Space
from evojax_suite.systems.ecomp.feed_forward import Layer
from evojax_suite.systems.ga_distillation import strong_random
from evojax_suite.training import EngineConfig, TrainingConfig
from evojax_suite.types import Algorithm, training_data

SMALL = ga_distillation.Config(
    population_size=4,
    network=NetworkConfig(width=4, depth=1),
    training=TrainingConfig(num_epochs=2),
    engine=EngineConfig(members_in_flight=3),
)
VARIANTS = {
    "ga_distillation": SMALL,
    "ga_distillation_dl_ea": dataclasses.replace(SMALL, crossover="none"),
    "ga_distillation_options": dataclasses.replace(
        SMALL,
        networks_per_member=2,
        fitness="cross_entropy",
        fitness_subset_size=40,
        holdout_ratio=0.25,
        patience=5,
        evolve_labels=True,
        clip="image",
        images_per_class=2,
    ),
    "ga_distillation_common_random_numbers": dataclasses.replace(
        SMALL, common_random_numbers=True, best_of="last_generation"
    ),
    "ga_distillation_snes": dataclasses.replace(SMALL, strategy="SNES", strategy_std=0.1),
    "ga_distillation_de": dataclasses.replace(SMALL, strategy="DifferentialEvolution"),
    "ga_distillation_kernel_regression": dataclasses.replace(
        SMALL,
        strategy="BlockES",
        fitness="kernel_regression",
        encoding="cosines",
        start="k_means",
        factor=2,
        best_of="mean",
        kernel=ga_distillation.kernel_regression.KernelConfig(
            kernel_width=4, kernel_images=20, company=2
        ),
    ),
    "strong_random": SMALL,
    "devs": devs.Config(
        target_sizes=(20, 5),
        reduction_factor=3.0,
        feature_epochs=1,
        min_training_steps=2,
        network=dataclasses.replace(SMALL.network, dropout=0.2),
        training=TrainingConfig(batch_size=32, optimizer="sgd", mixup_alpha=0.4),
    ),
    "proxy_network": proxy_network.Config(
        SMALL.network, TrainingConfig(num_epochs=5, batch_size=64)
    ),
    "ecomp": ecomp.Config(population_size=6, num_generations=50, batch_size=20),
    "ecomp_refit": ecomp.RefitConfig(population_size=6, num_generations=50),
    "ecomp_extended": ecomp.Config(
        population_size=6,
        num_generations=50,
        batch_size=20,
        balanced=False,
        shrinking=True,
        crossover="aligned",
        selection="nsga2",
        batches_per_generation=2,
        similarity="cka",
        pruning="activity",
    ),
    "cest": cest.Config(
        network=dataclasses.replace(SMALL.network, normalization="batch"),
        training=TrainingConfig(num_epochs=9, batch_size=64),
        initial_epochs=0,
        epochs_per_selection=1,
        prey_population=4,
        prey_generations=2,
    ),
    "predator_prey": predator_prey.Config(
        num_predators=4,
        network=dataclasses.replace(SMALL.network, normalization="batch"),
        training=TrainingConfig(num_epochs=1, batch_size=64, flip=True),
        engine=EngineConfig(members_in_flight=2),
    ),
    "de_nas": de_nas.Config(
        population_size=3,
        num_children=1,
        num_generations=2,
        num_best=2,
        space=Space(3, 4, (1, 3), 2, 3, max_filters=4, max_features=256),
        training=TrainingConfig(num_epochs=1, batch_size=64, optimizer="sgd"),
    ),
    "de_nas_extended": de_nas.Config(
        population_size=4,
        num_children=4,
        num_generations=1,
        num_best=2,
        method="evosax",
        rungs=(1,),
        survival="nsga2",
        space=Space(3, 4, (1, 3), 2, 3, max_filters=4, max_features=256),
        training=TrainingConfig(num_epochs=2, batch_size=64, optimizer="sgd"),
    ),
    "gradient_matching": gradient_matching.Config(
        images_per_class=1, real_batch_size=8, network=SMALL.network
    ),
    "kernel_inducing_points": kernel_inducing_points.Config(
        images_per_class=2,
        kernel=ga_distillation.kernel_regression.KernelConfig(kernel_width=4, kernel_images=20),
        network=SMALL.network,
    ),
}


@dataclasses.dataclass(frozen=True)
class Case:
    algorithm: Algorithm
    params: object
    data: object
    other_data: object  # of the same shapes
    shares_keys: bool  # on purpose, between members


@pytest.fixture(scope="module", params=VARIANTS)
def case(request) -> Case:
    digits = load("digits")
    config = VARIANTS[request.param]
    shape, shares_keys, params = digits.image_shape, False, None
    match request.param:
        case "devs" | "proxy_network":
            module = {"devs": devs, "proxy_network": proxy_network}[request.param]
            data = training_data(with_whole_training_set(digits, 130))
            algorithm = module.build(config, 10, shape)
        case "ecomp" | "ecomp_extended":
            data = ecomp_data(digits)
            params = ecomp.Params(mutation_rate=0.3, perplexity=6.0)
            algorithm = ecomp.build(config)
        case "ecomp_refit":
            params, whole = ecomp.RefitParams(), ecomp_data(digits)
            parent = ecomp.graph.from_network(whole.parent)
            about = parent, whole.images, jax.nn.one_hot(whole.labels, 10), shape
            data = ecomp.mask_search.make_data(jax.random.key(0), config, params, *about)
            algorithm = ecomp.mask_search.build(config)
        case "cest":
            data, params = cest.make_data(config, digits), cest.Params()
            algorithm = cest.build(config, 10, shape)
        case "de_nas" | "de_nas_extended":
            data, params = de_nas.make_data(config, digits), de_nas.Params()
            algorithm = de_nas.build(config, 10, shape)
        case "predator_prey":
            data, params = cest.make_data(VARIANTS["cest"], digits), predator_prey.Params()
            algorithm = predator_prey.build(config, 10, shape)
        case "gradient_matching" | "kernel_inducing_points":
            matching = request.param == "gradient_matching"
            module = gradient_matching if matching else kernel_inducing_points
            data, algorithm = module.make_data(digits), module.build(config, 10, shape)
        case _:
            data, params = ga_distillation.make_data(digits), ga_distillation.Params()
            shares_keys = config.common_random_numbers
            if request.param == "strong_random":
                algorithm = strong_random.build(config, 3, 10, shape)
            else:
                algorithm = ga_distillation.build(config, 10, shape)
    name = "fitness_images" if hasattr(data, "fitness_images") else "images"
    by_regression = getattr(config, "fitness", None) == "kernel_regression"
    if by_regression or request.param == "kernel_inducing_points":
        name = "train_images"
    if isinstance(config, ecomp.RefitConfig):
        name = "inputs"
    other = data.replace(**{name: 255 - getattr(data, name)})
    return Case(algorithm, params, data, other, shares_keys)


def ecomp_data(dataset) -> ecomp.Data:
    shapes = ((12, 64), (12, 12), (10, 12))
    parent = tuple(
        Layer(jax.random.normal(jax.random.key(i), shape) / 4, jnp.full(shape[0], 0.1))
        for i, shape in enumerate(shapes)
    )
    return ecomp.make_data(parent, dataset.train.images[:100], dataset.train.labels[:100])


def compiled(case, function):
    """What is not scannable compiles its own parts."""
    return jax.jit(function) if case.algorithm.scannable else function


def only_scannable(case):
    if not case.algorithm.scannable:
        pytest.skip("its shapes or programs change from step to step")


def without_times(outcome):
    state, metrics = outcome
    values = metrics._asdict()
    values.pop("stage_seconds", None)
    return state, values


@pytest.fixture(scope="module")
def started(case):
    """A compiled step, counted, and the first state."""
    traces = []

    def step(key, state, params, data):
        traces.append(1)
        return case.algorithm.step(key, state, params, data)

    state = compiled(case, case.algorithm.init)(jax.random.key(0), case.params, case.data)
    return compiled(case, step), state, traces


def assert_equal(first, second):
    jax.tree.map(np.testing.assert_array_equal, first, second)


def differs(first, second) -> bool:
    pairs = zip(jax.tree.leaves(first), jax.tree.leaves(second), strict=True)
    return any(not np.array_equal(a, b) for a, b in pairs)


def test_step_keeps_the_type_of_the_state(case, started):
    _, state, _ = started
    step = compiled(case, case.algorithm.step)
    if case.algorithm.scannable:
        step = partial(jax.eval_shape, step)
    after, _ = step(jax.random.key(1), state, case.params, case.data)
    before, after = jax.eval_shape(lambda: state), jax.eval_shape(lambda: after)
    assert jax.tree.structure(before) == jax.tree.structure(after)
    for a, b in zip(jax.tree.leaves(before), jax.tree.leaves(after), strict=True):
        assert (a.shape, a.dtype, a.weak_type) == (b.shape, b.dtype, b.weak_type)


def test_step_is_a_function_of_its_arguments(case, started):
    step, state, _ = started
    once = step(jax.random.key(1), state, case.params, case.data)
    again = step(jax.random.key(1), state, case.params, case.data)
    other = step(jax.random.key(2), state, case.params, case.data)
    assert_equal(without_times(once), without_times(again))
    assert differs(once[0], other[0])


def test_step_compiles_once_for_all_generations_data_and_params(case, started):
    only_scannable(case)
    step, state, traces = started
    for generation in range(3):
        key = jax.random.fold_in(jax.random.key(3), generation)
        state, _ = step(key, state, case.params, case.data)
    params = jax.tree.map(lambda value: value * 0.5, case.params)
    _, here = step(jax.random.key(3), state, case.params, case.data)
    _, there = step(jax.random.key(3), state, params, case.other_data)
    assert differs(here, there)  # the data is an argument, not captured
    assert len(traces) == 1
    assert step._cache_size() == 1


def test_metrics_are_scalars_with_the_common_names(case, started):
    step, state, _ = started
    _, metrics = step(jax.random.key(1), state, case.params, case.data)
    assert {"generation", "num_failed"} <= set(metrics._fields)
    _, values = without_times((state, metrics))
    assert all(np.ndim(value) == 0 for value in values.values())
    assert int(metrics.generation) == 1
    assert int(metrics.num_failed) == 0
    if "fitness_best" in values:
        assert float(metrics.fitness_best) >= float(metrics.fitness_mean)


def test_fields_are_as_annotated(case, started):
    step, state, _ = started
    state, metrics = step(jax.random.key(1), state, case.params, case.data)
    result = case.algorithm.result(state, case.params, case.data)
    if getattr(result, "images", np.zeros(0)).ndim == 5:  # a set each repeat
        result = jax.tree.map(lambda leaf: leaf[0], result)
    for name in ("state", "metrics", "result"):
        assert misfits(locals()[name], name) == []
    assert misfits(case.data, "data") == []


def test_step_scans_and_maps_over_seeds(case, started):
    """Two seeds at once, three generations in one call."""
    only_scannable(case)
    step, state, _ = started
    keys = jax.vmap(lambda key: jax.random.split(key, 3))(jax.random.split(jax.random.key(4), 2))
    states = jax.tree.map(lambda leaf: np.stack([leaf, leaf]), jax.device_get(state))

    @jax.jit
    @jax.vmap
    def run(state, keys):
        def body(state, key):
            after, metrics = case.algorithm.step(key, state, case.params, case.data)
            return after, (state, metrics)

        return jax.lax.scan(body, state, keys)

    scanned, (before, metrics) = run(states, keys)
    assert jax.tree.structure(scanned) == jax.tree.structure(state)
    np.testing.assert_array_equal(metrics.generation, [[1, 2, 3], [1, 2, 3]])
    before = jax.device_get(before)
    for place in np.ndindex(2, 3):  # each from the scanned state: rounding does not accumulate
        own = jax.tree.map(lambda leaf, place=place: jnp.asarray(leaf[place]), before)
        _, alone = step(keys[place], own, case.params, case.data)
        for name in {"fitness_best", "fitness_mean", "loss", "matching_loss"} & set(alone._fields):
            mapped = getattr(metrics, name)[place]
            np.testing.assert_allclose(mapped, getattr(alone, name), rtol=1e-3, atol=2e-2)


def test_no_key_is_used_twice(case, started):
    _, state, _ = started
    with jax.debug_key_reuse(True):
        init, step = (compiled(case, f) for f in (case.algorithm.init, case.algorithm.step))
        initial = init(jax.random.key(0), case.params, case.data)
        if case.shares_keys:
            with pytest.raises(jax.errors.KeyReuseError):
                step(jax.random.key(1), initial, case.params, case.data)
        else:
            step(jax.random.key(1), initial, case.params, case.data)
    assert_equal(initial, state)


def test_state_survives_a_checkpoint(case, started, tmp_path):
    step, state, _ = started
    state, _ = step(jax.random.key(1), state, case.params, case.data)
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(1, state)
    checkpoints.close()
    reopened = Checkpoints(tmp_path)
    assert reopened.latest == 1
    restored = reopened.restore(1, state)
    reopened.close()
    assert_equal(restored, state)
    # Committed to a device it would compile anew.
    restored = jax.tree.map(jnp.asarray, jax.device_get(restored))
    after = step(jax.random.key(2), state, case.params, case.data)
    again = step(jax.random.key(2), restored, case.params, case.data)
    assert_equal(without_times(again), without_times(after))


def test_result_is_finite(case, started):
    step, state, _ = started
    state, _ = step(jax.random.key(1), state, case.params, case.data)
    result = case.algorithm.result(state, case.params, case.data)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(result))
    assert not bool(case.algorithm.finished(state))
