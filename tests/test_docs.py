"""Every block of commands and of Python in the documentation runs, a page in one folder."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import UnionType
from typing import Annotated, Any, Literal, get_args, get_origin, get_type_hints

import jax
import matplotlib.pyplot as plt
import numpy as np
import pytest

from evojax_suite import NetworkConfig, TrainingConfig, exports, load
from evojax_suite.cli import config_file
from evojax_suite.cli.main import _commands, main
from evojax_suite.data import normalize
from evojax_suite.distilled import DistilledDataset, accuracies_on
from evojax_suite.operators import random_examples

DOCS = Path(__file__).parents[1] / "docs"
PAGES = sorted(
    path
    for path in DOCS.rglob("*.md")
    if re.search(r"^```(python|console)", path.read_text(), re.MULTILINE)
)
BLOCK = re.compile(r"^```(\w+)([^\n]*)\n(.*?)^```$", re.DOTALL | re.MULTILINE)


@pytest.mark.parametrize("page", PAGES, ids=lambda path: str(path.relative_to(DOCS)))
def test_the_blocks_of_a_page_run(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("EVOJAX_SUITE_DATA", raising=False)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "my_parts", raising=False)
    names: dict = {}
    for number, (language, needs, text) in enumerate(BLOCK.findall(page.read_text())):
        assert language in ("python", "console", "text"), f"block {number} is {language}"
        if needs.strip() and importlib.util.find_spec(needs.strip()) is None:
            continue
        if language == "python":
            exec(compile(text, f"{page}, block {number}", "exec"), names)
        if language == "console":
            for line in text.replace("\\\n", "").splitlines():
                prompt, program, *arguments = shlex.split(line)
                assert (prompt, program) == ("$", "evojax-suite")
                assert main(arguments) == 0, line
    if check := SHOWN.get(str(page.relative_to(DOCS))):
        check(Path("runs"))


def distillation_notebook(names: dict) -> None:
    assert names["evolved"] > names["drawn"] + 0.2
    for name, losses in names["found"].items():
        assert losses[-10:].mean() < losses[:10].mean() - 0.05, name


def selection_notebook(names: dict) -> None:
    means = {rule: accuracies.mean() for rule, (_, accuracies) in names["found"].items()}
    evolved, random, reducible = means.values()
    assert reducible > random > evolved + 0.02


def compression_notebook(names: dict) -> None:
    evolved, simple = (
        names["sizes_of"](masks)[names["accuracies"](masks) > 0.93].min()
        for masks in (names["masks"], names["simple"])
    )
    assert evolved < 0.7 * simple


def search_notebook(names: dict) -> None:
    assert len(names["seen"]) == 14
    assert max(names["accuracies"]) > 0.7


def averaging_notebook(names: dict) -> None:
    assert [row[0] for row in names["rows"]] == [100, 50]
    assert min(min(row[1:]) for row in names["rows"]) > 0.75


NOTEBOOKS = {
    "cest": selection_notebook,
    "de_nas": search_notebook,
    "devs": averaging_notebook,
    "ecomp": compression_notebook,
    "ga_distillation": distillation_notebook,
}
"""What the notebooks show."""


@pytest.mark.parametrize("name", NOTEBOOKS)
def test_a_notebook_runs_and_shows_what_it_says(name):
    plt.switch_backend("agg")
    path, names = DOCS / f"notebooks/{name}.py", {}
    exec(compile(path.read_text(), path, "exec"), names)
    assert plt.get_fignums()
    plt.close("all")
    NOTEBOOKS[name](names)


def test_every_notebook_is_run():
    assert {path.stem for path in (DOCS / "notebooks").iterdir()} == NOTEBOOKS.keys()


def first_page(runs: Path) -> None:
    """Ten evolved images are far ahead of selected ones, and the chart rises."""
    summary = json.loads((runs / "first/summary.json").read_text())
    assert summary["test_accuracy_mean"] > summary["strong_random_test_accuracy_mean"] + 0.1
    lines = (runs / "first/metrics.jsonl").read_text().splitlines()
    means = [json.loads(line)["fitness_mean"] for line in lines]
    assert np.mean(means[-50:]) > np.mean(means[:20]) + 0.03
    reference = summary["reference"]
    assert reference["generation"][-1] == summary["num_generations"]
    assert reference["fitness"][-1] > max(reference["fitness"][:3]) + 0.03
    assert "no better than strong random" not in (runs / "first/report.html").read_text()


def devs_page(runs: Path) -> None:
    """No row is at chance, and the page says that random images are as good."""
    (run,) = runs.glob("devs-*")
    rows = json.loads((run / "summary.json").read_text())["results"]
    assert min(row["test_accuracy_mean"] for row in rows) > 0.4
    assert "No better than as many random ones: DEvS (50)" in (run / "report.html").read_text()


SHOWN = {"index.md": first_page, "systems/devs.md": devs_page}
"""What the runs of a page show."""


def mentioned() -> Iterator[tuple[str, str, str]]:
    """The options in code within the text of README and docs: page, option, what follows it."""
    for page in (DOCS.parent / "README.md", *sorted(DOCS.rglob("*.md"))):
        for code in re.findall(r"`([^`\n]*)`", BLOCK.sub("", page.read_text())):
            for option, value in re.findall(r"(--[a-z][\w.-]*)(?:[ =]([\w.]+))?", code):
                yield page.name, option, value


def choices(hint: Any) -> set[Any]:
    """The values that a type names; {...} where it has others too."""
    if get_origin(hint) is Literal:
        return set(get_args(hint))
    if get_origin(hint) is Annotated or get_origin(hint) is tuple:
        return choices(get_args(hint)[0])
    return set().union(*map(choices, get_args(hint))) if isinstance(hint, UnionType) else {...}


def test_options_in_the_text_are_those_of_the_commands():
    allowed: dict[str, set[Any]] = {each: {...} for each in ("--help", "--help-all", "--version")}
    for command in _commands().values():
        for path, option in config_file.known(command.options).items():
            kind = command.options
            for name in path.split("."):
                hint = get_type_hints(kind, include_extras=True)[name]
                kind = get_args(hint)[0] if get_origin(hint) is Annotated else hint
            values = {"None", *choices(hint)} if option.may_be_none else choices(hint)
            for flag in (option.flag, *option.aliases):
                allowed.setdefault(flag, set()).update(values)
    found = [*mentioned()]
    assert len(found) > 100
    for page, option, value in found:
        plain = option.replace("--no-", "--") if option not in allowed else option
        assert plain in allowed, f"{page}: {option}"
        values = allowed[plain]
        assert ... in values or not value or value in values, f"{page}: {option} {value}"


def test_the_template_outlives_a_generation_that_diverged(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    names: dict = {}
    for language, _, text in BLOCK.findall((DOCS / "adding.md").read_text()):
        if language == "python":
            exec(compile(text, "adding.md", "exec"), names)
    algorithm, params, data = names["algorithm"], names["Params"], names["data"]
    state = algorithm.init(jax.random.key(0), params(), data)
    state, diverged = algorithm.step(jax.random.key(1), state, params(scale=1e38), data)
    assert diverged.num_failed > 0
    before = float(state.accuracy)
    for number in range(5):
        state, metrics = algorithm.step(jax.random.key(2 + number), state, params(), data)
        assert metrics.num_failed == 0
    assert float(state.accuracy) >= before


@pytest.fixture
def installed(tmp_path) -> dict[str, str]:
    """The environment of a process in which the system of docs/adding.md is another package."""
    (code, *_) = (text for kind, _, text in BLOCK.findall((DOCS / "adding.md").read_text()))
    assert len(code.splitlines()) <= 100
    (tmp_path / "climbing.py").write_text(code)
    about = tmp_path / "climbing-1.0.dist-info"
    about.mkdir()
    (about / "METADATA").write_text("Metadata-Version: 2.1\nName: climbing\nVersion: 1.0\n")
    (about / "entry_points.txt").write_text(
        "[evojax_suite.systems]\nhill_climbing = climbing:SYSTEM\n"
    )
    return os.environ | {"PYTHONPATH": os.pathsep.join([str(tmp_path), *sys.path])}


def test_a_system_of_another_package_is_a_command(installed, tmp_path):
    def run(*arguments: str) -> str:
        command = [sys.executable, "-m", "evojax_suite", *arguments]
        done = subprocess.run(command, env=installed, capture_output=True, text=True, cwd=tmp_path)
        assert done.returncode == 0, done.stderr
        return done.stdout + done.stderr

    short = ["hill-climbing", "--num-children", "4", "--num-generations", "3"]
    assert "--differential-weight" not in run("hill-climbing", "--help")
    assert "in all" in run(*short, "--dry-run")
    run(*short, "--seeds", "0:2", "--seeds-in-flight", "2", "--devices", "1")
    folders = [tmp_path / f"runs/hill_climbing-digits-seed{seed}" for seed in range(2)]
    summary = json.loads((folders[0] / "summary.json").read_text())
    assert summary["system"] == "hill_climbing"
    assert 0 <= summary["test_accuracy"] <= 1
    assert "climbed" in (folders[0] / "report.html").read_text()
    run(*short, "--seed", "0", "--resume")
    assert "test accuracy" in run("compare", *map(str, folders))


def test_fifteen_lines_of_pytorch_find_what_we_find(tmp_path, monkeypatch):
    pytest.importorskip("torch")
    (text,) = re.findall(r"```python torch\n(.*?)```", (DOCS / "elsewhere.md").read_text(), re.S)
    assert sum(bool(line.strip()) for line in text.splitlines()) <= 16
    digits = load("digits")
    chosen = np.asarray(random_examples(jax.random.key(0), digits.train.labels, 100, 10))
    network = NetworkConfig(network="MLP", width=32)
    training = TrainingConfig(num_epochs=100, learning_rate=0.001)
    images = normalize(digits.train.images[chosen], digits.mean, digits.std)
    labels = np.eye(10, dtype=np.float32)[digits.train.labels[chosen]]
    data = DistilledDataset(
        images, labels, "digits", digits.class_names, digits.mean, digits.std, network, training, 0
    )
    monkeypatch.chdir(tmp_path)
    exports.save_safetensors(Path("source.safetensors"), data)
    block = compile(text, "elsewhere.md", "exec")
    theirs = []
    for _ in range(5):
        names = {"test_images": digits.test.images, "test_labels": digits.test.labels}
        exec(block, names)
        theirs.append(float(names["accuracy"]))
    key = jax.random.key(1)
    ours = accuracies_on(digits.test, key, images, labels, digits, network, training, 5)
    assert np.mean(theirs) > 0.6
    error = np.hypot(np.std(ours), np.std(theirs)) / np.sqrt(5)
    assert abs(np.mean(ours) - np.mean(theirs)) < 4 * error + 0.01


def test_links_between_pages_lead_somewhere():
    for page in DOCS.rglob("*.md"):
        for link in re.findall(r"\]\(([^)#]+)(?:#[^)]*)?\)", page.read_text()):
            assert (page.parent / link).resolve().exists(), f"{page}: {link}"
