"""LaplaceGA under evosax's own loop, its generation step by step, and strategies by name."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats
from evosax.problems import BBOBProblem

from evojax_suite import strategies
from evojax_suite.strategies import LaplaceGA
from evojax_suite.strategies.laplace_ga import Params

ALPHA = 1e-3


def start(strategy, population, fitness, params):
    population, fitness = jnp.asarray(population), jnp.asarray(fitness, jnp.float32)
    return strategy.init(jax.random.key(0), population, fitness, params)


# --- evosax's protocol


@pytest.fixture(scope="module")
def sphere() -> BBOBProblem:
    return BBOBProblem("sphere", num_dims=3, seed=1)


def begin(strategy, problem, params):
    """Evaluated first individuals, as evosax's own tests make them."""
    key_sample, key_problem, key_eval = jax.random.split(jax.random.key(1), 3)
    population = jax.vmap(problem.sample)(jax.random.split(key_sample, strategy.population_size))
    fitness, problem_state, _ = problem.eval(key_eval, population, problem.init(key_problem))
    return start(strategy, population, fitness, params), problem_state


@pytest.mark.parametrize("options", [{}, {"sign": "shared"}, {"crossover": "none"}])
def test_laplace_ga_improves_a_sphere(sphere, options):
    strategy = LaplaceGA(32, sphere.sample(jax.random.key(0)), **options)
    params = strategy.default_params
    first, problem_state = begin(strategy, sphere, params)

    def step(carry, key):
        state, problem_state = carry
        key_ask, key_eval, key_tell = jax.random.split(key, 3)
        population, state = strategy.ask(key_ask, state, params)
        fitness, problem_state, _ = sphere.eval(key_eval, population, problem_state)
        state, metrics = strategy.tell(key_tell, population, fitness, state, params)
        return (state, problem_state), metrics

    keys = jax.random.split(jax.random.key(2), 40)
    (state, _), metrics = jax.lax.scan(step, (first, problem_state), keys)
    best = np.asarray(metrics["best_fitness"])
    assert (np.diff(best) <= 0).all()
    assert int(state.generation_counter) == 40
    error = np.asarray(jnp.append(first.best_fitness, best) - sphere.f_opt)
    assert error[-1] < 0.05 * error[0]
    # all of the population comes closer, not the best alone
    spread = np.median(state.fitness) - float(sphere.f_opt)
    assert spread < 0.1 * (np.median(first.fitness) - float(sphere.f_opt))
    np.testing.assert_allclose(state.best_solution, sphere.x_opt, atol=0.5)
    np.testing.assert_allclose(
        sphere.eval(keys[0], state.best_solution[None], problem_state)[0][0],
        state.best_fitness,
        atol=1e-3,
    )

    state, problem_state = first, problem_state
    for key in keys[:3]:  # the same without scan
        (state, problem_state), last = step((state, problem_state), key)
    np.testing.assert_allclose(last["best_fitness"], best[2], rtol=1e-5)


def test_scan_keeps_the_type_of_the_state():
    strategy = LaplaceGA(6, jnp.zeros(2))
    params = strategy.default_params
    state = start(strategy, jnp.zeros((6, 2)), jnp.arange(6), params)
    population, asked = strategy.ask(jax.random.key(0), state, params)
    told, _ = strategy.tell(jax.random.key(0), population, jnp.arange(6.0), asked, params)
    assert jax.tree.structure(told) == jax.tree.structure(state)
    for before, after in zip(jax.tree.leaves(state), jax.tree.leaves(told), strict=True):
        assert (before.shape, before.dtype) == (after.shape, after.dtype)


def test_solutions_may_be_any_tree():
    solution = {"images": jnp.zeros((2, 3)), "labels": jnp.zeros(2)}
    strategy = LaplaceGA(5, solution)
    population = jax.tree.map(lambda leaf: jnp.ones((5, *leaf.shape)), solution)
    params = strategy.default_params
    state = strategy.init(jax.random.key(0), population, jnp.arange(5.0), params)
    assert state.population.shape == (5, 8)
    asked, _ = strategy.ask(jax.random.key(1), state, params)
    assert jax.tree.map(jnp.shape, asked) == {"images": (5, 2, 3), "labels": (5, 2)}


# --- NaN fitness


def test_members_without_a_fitness_never_win_and_the_run_goes_on():
    strategy = LaplaceGA(8, jnp.zeros(2))
    params = strategy.default_params.replace(mutation_scale=0.1)
    population = jnp.arange(16.0).reshape(8, 2)
    fitness = jnp.array([jnp.nan, 5.0, 2.0, jnp.nan, 1.0, 7.0, jnp.nan, 3.0])
    state = start(strategy, population, fitness, params)
    assert float(state.best_fitness) == 1
    np.testing.assert_array_equal(state.best_solution, population[4])
    asked, state = strategy.ask(jax.random.key(1), state, params)
    np.testing.assert_array_equal(asked[:4], population[jnp.array([4, 2, 7, 1])])

    fitness = jnp.array([4.0, jnp.nan, 0.5, 6.0, jnp.nan, 8.0, 9.0, 7.0])
    state, metrics = strategy.tell(jax.random.key(2), asked, fitness, state, params)
    assert float(metrics["best_fitness"]) == 0.5
    np.testing.assert_array_equal(state.best_solution, asked[2])
    following, _ = strategy.ask(jax.random.key(3), state, params)
    np.testing.assert_array_equal(following[:4], asked[jnp.array([2, 0, 3, 7])])
    assert np.isfinite(following).all()


def test_the_best_solution_of_a_state_has_a_fitness():
    strategy = LaplaceGA(4, jnp.zeros(1))
    params = strategy.default_params
    population = jnp.arange(4.0)[:, None]
    state = start(strategy, population, jnp.array([3.0, jnp.nan, 1.0, 2.0]), params)
    np.testing.assert_array_equal(strategy.get_best_solution(state), population[2])
    state, _ = strategy.tell(
        jax.random.key(1), population, jnp.array([jnp.nan, 3.0, 2.0, 1.0]), state, params
    )
    np.testing.assert_array_equal(strategy.get_best_solution(state), population[3])


def test_a_generation_without_any_fitness_changes_no_best():
    strategy = LaplaceGA(6, jnp.zeros(2))
    params = strategy.default_params
    population = jax.random.normal(jax.random.key(0), (6, 2))
    failed = jnp.full(6, jnp.nan)
    state = start(strategy, population, failed, params)
    for generation in range(2):
        asked, state = strategy.ask(jax.random.key(generation), state, params)
        assert np.isfinite(asked).all()
        state, metrics = strategy.tell(jax.random.key(9), asked, failed, state, params)
        assert np.isposinf(metrics["best_fitness"])
    asked, state = strategy.ask(jax.random.key(5), state, params)
    state, _ = strategy.tell(jax.random.key(6), asked, jnp.arange(6.0), state, params)
    assert float(state.best_fitness) == 0
    best = np.asarray(state.best_solution)
    asked, state = strategy.ask(jax.random.key(7), state, params)
    state, _ = strategy.tell(jax.random.key(8), asked, failed, state, params)
    assert float(state.best_fitness) == 0
    np.testing.assert_array_equal(state.best_solution, best)


# --- one generation


@pytest.mark.parametrize(
    ("population_size", "survival_ratio", "num_survivors"),
    [(10, 0.5, 5), (7, 0.5, 3), (2, 0.5, 1), (10, 0.3, 3), (10, 0.9, 9), (100, 0.29, 29)],
)
def test_survivors_are_exactly_the_best(population_size, survival_ratio, num_survivors):
    strategy = LaplaceGA(population_size, jnp.zeros(3), survival_ratio=survival_ratio)
    assert strategy.num_survivors == num_survivors
    params = strategy.default_params
    random = np.random.default_rng(population_size)
    population = random.normal(size=(population_size, 3)).astype(np.float32)
    fitness = random.permutation(population_size)
    state = start(strategy, population, fitness, params)
    asked, _ = strategy.ask(jax.random.key(1), state, params)
    assert asked.shape == (population_size, 3)
    best = population[np.argsort(fitness)[:num_survivors]]
    np.testing.assert_array_equal(asked[:num_survivors], best)
    children = np.asarray(asked[num_survivors:])
    assert not (children[:, None] == population[None]).all(-1).any()


@pytest.mark.parametrize("crossover", ["laplace", "none"])
def test_children_alone_are_clipped(crossover):
    strategy = LaplaceGA(60, jnp.zeros(2), crossover=crossover)
    lower, upper = jnp.array([-0.5, 0.0]), jnp.array([0.5, 0.25])
    params = strategy.default_params.replace(lower=lower, upper=upper)
    population = 3 + jax.random.normal(jax.random.key(0), (60, 2))  # all of it outside
    state = start(strategy, population, jnp.arange(60), params)
    asked, _ = strategy.ask(jax.random.key(1), state, params)
    np.testing.assert_array_equal(asked[:30], population[:30])
    children = np.asarray(asked[30:])
    assert (children >= lower).all()
    assert (children <= upper).all()
    assert (children == np.asarray(upper)).any()


@pytest.mark.parametrize("scale", [1.0, 0.2])
@pytest.mark.parametrize("crossover", ["laplace", "none"])
def test_noise_of_generation_g_has_the_first_deviation_over_g(crossover, scale):
    """All parents are one point, so that the children are that point and noise."""
    strategy = LaplaceGA(4000, jnp.zeros(2), crossover=crossover)
    params = strategy.default_params.replace(mutation_scale=scale)
    population = jnp.ones((4000, 2))
    state = start(strategy, population, jnp.zeros(4000), params)
    for generation in range(1, 4):
        asked, state = strategy.ask(jax.random.key(generation), state, params)
        noise = np.asarray(asked[2000:]) - 1
        law = scipy.stats.norm(0, scale / generation)
        assert scipy.stats.kstest(noise.ravel(), law.cdf).pvalue > ALPHA
        assert abs(noise.std() * generation / scale - 1) < 0.05
        assert scipy.stats.pearsonr(*noise.T).pvalue > ALPHA
        state, _ = strategy.tell(jax.random.key(0), population, jnp.zeros(4000), state, params)


def test_without_crossover_a_child_is_a_uniform_parent():
    strategy = LaplaceGA(4000, jnp.zeros(2), survival_ratio=0.00125, crossover="none")
    assert strategy.num_survivors == 5
    params = strategy.default_params.replace(mutation_scale=0.0)
    population = jnp.stack([jnp.arange(4000.0), -jnp.arange(4000.0)], 1)
    state = start(strategy, population, jnp.arange(4000), params)
    children = np.asarray(strategy.ask(jax.random.key(1), state, params)[0][5:])
    np.testing.assert_array_equal(children[:, 0], -children[:, 1])
    counts = np.array([(children[:, 0] == parent).sum() for parent in range(5)])
    assert counts.sum() == len(children)
    assert scipy.stats.chisquare(counts).pvalue > ALPHA


@pytest.mark.parametrize("rate", [1.0, 0.5])
def test_a_child_is_the_first_child_of_two_uniform_parents(rate):
    """Half of the pairs of survivors 0 and 1 are alike; the others give beta or 1 + beta."""
    strategy = LaplaceGA(40_000, jnp.zeros(1), survival_ratio=0.00005)
    assert strategy.num_survivors == 2
    params = strategy.default_params.replace(mutation_scale=0.0, crossover_rate=rate)
    population = jnp.arange(40_000.0)[:, None]
    state = start(strategy, population, jnp.arange(40_000), params)
    children = np.asarray(strategy.ask(jax.random.key(1), state, params)[0][2:, 0])
    kept = 1 - rate / 2
    for parent in (0, 1):
        same = int((children == parent).sum())
        assert scipy.stats.binomtest(same, len(children), kept / 2).pvalue > ALPHA
    crossed = children[(children != 0) & (children != 1)]

    def law(values):
        return sum(scipy.stats.laplace.cdf(values, parent, 0.5) for parent in (0, 1)) / 2

    assert scipy.stats.kstest(crossed, law).pvalue > ALPHA


def test_the_laplace_distribution_is_that_of_the_params():
    strategy = LaplaceGA(20_000, jnp.zeros(1), survival_ratio=0.0001)
    params = strategy.default_params.replace(
        mutation_scale=0.0, laplace_location=10.0, laplace_scale=0.1
    )
    state = start(strategy, jnp.arange(20_000.0)[:, None], jnp.arange(20_000), params)
    children = np.asarray(strategy.ask(jax.random.key(1), state, params)[0][2:, 0])
    crossed = children[(children != 0) & (children != 1)]

    def law(values):
        return sum(scipy.stats.laplace.cdf(values, 10 + parent, 0.1) for parent in (0, 1)) / 2

    assert scipy.stats.kstest(crossed, law).pvalue > ALPHA


def test_shared_sign_reaches_the_children():
    strategy = LaplaceGA(2000, jnp.zeros(1), survival_ratio=0.001, sign="shared")
    params = strategy.default_params.replace(mutation_scale=0.0)
    population = 10 * jnp.arange(2000.0)[:, None]
    state = start(strategy, population, jnp.arange(2000), params)
    children = np.asarray(strategy.ask(jax.random.key(1), state, params)[0][2:, 0])
    gap = 10 * 0.5 * np.log(2)  # beta is above -scale ln 2, and not within 0..scale ln 2
    assert children.min() >= -gap - 1e-4
    assert children.min() < -0.9 * gap
    assert not ((children > 1e-4) & (children < gap - 1e-4)).any()


def test_params_are_traced():
    strategy = LaplaceGA(6, jnp.zeros(2))
    state = start(strategy, jnp.zeros((6, 2)), jnp.arange(6), Params())

    def run(scale):
        params = Params(mutation_scale=scale)
        return strategy.ask(jax.random.key(1), state, params)[0]

    asked = jax.jit(jax.vmap(run))(jnp.array([0.0, 1.0, 2.0]))
    np.testing.assert_array_equal(asked[0], 0)
    np.testing.assert_allclose(asked[2], 2 * asked[1], atol=1e-6)


# --- errors


@pytest.mark.parametrize(
    ("population_size", "survival_ratio"),
    [(10, 0.0), (10, 1.0), (10, -0.5), (10, 1.5), (10, 0.05), (1, 0.5)],
)
def test_ratios_that_leave_no_survivor_or_no_child_are_refused(population_size, survival_ratio):
    with pytest.raises(ValueError, match="survival_ratio must leave") as caught:
        LaplaceGA(population_size, jnp.zeros(1), survival_ratio=survival_ratio)
    assert str(survival_ratio) in str(caught.value)
    assert f"a population of {population_size}" in str(caught.value)


def test_unknown_crossover_is_refused():
    with pytest.raises(ValueError, match="crossover must be laplace or none, got 'uniform'"):
        LaplaceGA(4, jnp.zeros(1), crossover="uniform")


@pytest.mark.parametrize(
    ("name", "near"), [("LaplaceGa", "LaplaceGA"), ("SepCMA_ES", "Sep_CMA_ES"), ("snes", None)]
)
def test_an_unknown_strategy_is_refused_with_a_suggestion(name, near):
    with pytest.raises(ValueError, match=f"got '{name}'") as caught:
        strategies.create(name, 8, 3)
    message = str(caught.value)
    assert "LaplaceGA" in message
    assert "CMA_ES" in message
    assert "\n" not in message
    if near is not None:
        assert message.endswith(f"(did you mean {near}?)")


@pytest.mark.parametrize(
    ("name", "population_size", "options"),
    [
        ("LaplaceGA", 0, {}),
        ("SimpleGA", 0, {}),
        ("SNES", -1, {}),
        ("Open_ES", 7, {}),
        ("LaplaceGA", 8, {"elitism": True}),
    ],
)
def test_what_a_strategy_refuses_is_an_error_of_one_line(name, population_size, options):
    with pytest.raises(ValueError, match=rf"population of {population_size}") as caught:
        strategies.create(name, population_size, 3, **options)
    assert "\n" not in str(caught.value)


# --- by name


@pytest.mark.parametrize(
    ("name", "population_based"),
    [
        ("LaplaceGA", True),
        ("SimpleGA", True),
        ("DifferentialEvolution", True),
        ("PSO", True),
        ("SNES", False),
        ("Sep_CMA_ES", False),
        ("CMA_ES", False),
        ("PGPE", False),
    ],
)
def test_strategies_by_name_run_a_generation(name, population_based):
    strategy = strategies.create(name, 8, 3)
    assert type(strategy).__name__ == name
    assert strategies.is_population_based(strategy) == population_based
    params = strategy.default_params
    population = jax.random.normal(jax.random.key(0), (8, 3))
    if population_based:
        state = start(strategy, population, (population**2).sum(-1), params)
    else:
        state = strategy.init(jax.random.key(0), population.mean(0), params)
    asked, state = strategy.ask(jax.random.key(1), state, params)
    assert asked.shape == (8, 3)
    fitness = (asked**2).sum(-1)
    state, metrics = strategy.tell(jax.random.key(2), asked, fitness, state, params)
    assert float(metrics["best_fitness"]) <= float(fitness.min())
    again, _ = strategy.ask(jax.random.key(3), state, params)
    assert np.isfinite(again).all()


def test_options_reach_the_strategy():
    strategy = strategies.create("LaplaceGA", 10, 4, survival_ratio=0.2, crossover="none")
    assert isinstance(strategy, LaplaceGA)
    assert (strategy.num_survivors, strategy.crossover, strategy.num_dims) == (2, "none", 4)


def test_options_names_the_arguments_of_a_strategy():
    assert {"survival_ratio", "crossover", "sign"} <= strategies.options("LaplaceGA")
    assert "survival_ratio" not in strategies.options("SNES")
    with pytest.raises(ValueError, match="did you mean LaplaceGA"):
        strategies.options("LaplaceG")
