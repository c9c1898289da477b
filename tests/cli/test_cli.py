"""The command line: options from a file, several seeds, what it says, what it has."""

from __future__ import annotations

import html
import json
import re
import shlex
from dataclasses import replace
from pathlib import Path

import jax
import numpy as np
import pytest
import tyro

from evojax_suite import distilled, load
from evojax_suite.cli import evaluate
from evojax_suite.cli.config_file import arguments_of, known, named_in
from evojax_suite.cli.main import _commands, main
from evojax_suite.networks import NetworkConfig
from evojax_suite.reporting.progress import console
from evojax_suite.running import runner
from evojax_suite.running.system import Phase, part_for_dry_run
from evojax_suite.runtime.results import typed_option
from evojax_suite.systems.cest import experiment as cest
from evojax_suite.systems.coresets import experiment as coreset
from evojax_suite.systems.de_nas import experiment as de_nas
from evojax_suite.systems.devs import experiment as devs
from evojax_suite.systems.ecomp import experiment as ecomp
from evojax_suite.systems.ga_distillation import experiment as ga_distillation

COMMANDS = (ga_distillation, devs, coreset, cest, ecomp, de_nas)
TINY = [
    "ga-distillation", "--population-size", "4", "--width", "4", "--depth", "1", "--num-epochs",
    "2", "--num-networks", "2", "--strong-random-repeats", "0", "--generations", "3",
]  # fmt: skip


@pytest.mark.parametrize("command", COMMANDS, ids=lambda module: module.SYSTEM.name)
def test_what_a_run_was_made_with_comes_back_from_its_file(command, tmp_path):
    given = {
        ga_distillation: ["--no-common-random-numbers", "--patience", "3", "--holdout-ratio", ".1"],
        devs: ["--reduction-factor", "inf", "--target-sizes", "20", "10", "--siamese", "flip"],
        coreset: ["--method", "random", "--dc.network.width", "7", "--balanced"],
        cest: ["--width", "4", "--crossover-rate", "0.25", "--no-baseline"],
        ecomp: ["--inputs", "normalized", "--parent", "a b.npz", "--shrinking"],
        de_nas: ["--kernels", "1", "3", "--rungs", "3", "--error-weight", "0.5"],
    }[command]
    options = tyro.cli(command.Options, args=[*given, "--seed", "3"])
    file = tmp_path / "config.json"
    file.write_text(json.dumps(options.settings()))
    again = tyro.cli(command.Options, args=arguments_of(file, command.Options, "refuse"))
    assert again == options
    assert again.settings() == options.settings()


def test_a_recipe_stands_for_options_and_what_is_typed_wins(tmp_path):
    small = ["--kernel-width", "4", "--kernel-images", "20", "--depth", "1", "--width", "4"]
    small += ["--num-epochs", "2", "--num-networks", "1", "--strong-random-repeats", "0"]
    begin = ["ga-distillation", "--recipe", "recommended", "--runs-dir", str(tmp_path)]
    typed = ["--generations", "2", "--population-size", "6", *small]
    assert main([*begin, "--name", "typed", *typed]) == 0
    # Four smaller images in one: the file says so, and both judges train on each of them.
    assert main([*begin, "--recipe", "four_in_one", "--name", "smaller", *typed]) == 0
    found = distilled.DistilledDataset.load(tmp_path / "smaller" / "distilled.npz")
    assert (found.factor, found.images.shape) == (2, (10, 8, 8, 1))
    output = tmp_path / "judged.json"
    again = ["evaluate", str(tmp_path / "smaller" / "distilled.npz"), "--num-networks", "1"]
    assert main([*again, "--output", str(output)]) == 0
    (accuracy,) = json.loads(output.read_text())["test_accuracies"]["ConvNet"]
    expected = distilled.accuracies_on(
        load("digits").test,
        jax.random.key(1),
        found.unpacked().images,
        found.unpacked().labels,
        load("digits"),
        found.network,
        found.training,
        1,
    )
    assert accuracy == pytest.approx(float(expected[0]))
    # A search begins where another ended, and what it finds is labelled anew.
    more = ["--recipe", "four_in_one", *typed, "--strategy-std", "1e-6"]
    more += ["--start-from", str(tmp_path / "smaller" / "distilled.npz")]
    assert main([*begin, *more, "--name", "solved", "--labels", "solved"]) == 0
    solved = distilled.DistilledDataset.load(tmp_path / "solved" / "distilled.npz")
    np.testing.assert_allclose(solved.images, found.images, atol=1e-3)
    assert 0 < np.abs(solved.labels - found.labels).max() < 1
    more = ["--labels", "teacher", "--teacher-epochs", "1", "--choose-from", "2"]
    assert main([*begin, *typed, *more, "--name", "taught"]) == 0
    taught = distilled.DistilledDataset.load(tmp_path / "taught" / "distilled.npz")
    np.testing.assert_allclose(taught.labels.sum(1), 1, rtol=1e-5)
    assert taught.labels.max() < 0.99
    frames = np.load(tmp_path / "taught" / "frames.npz")
    summary = json.loads((tmp_path / "taught" / "summary.json").read_text())
    place = frames["generations"].tolist().index(summary["generation"])
    np.testing.assert_array_equal(taught.images, frames["images"][place])
    settings = json.loads((tmp_path / "typed" / "config.json").read_text())
    config = settings["config"]
    assert settings["recipe"] == "recommended"
    assert settings["num_generations"] == 2
    assert config["fitness"] == "kernel_regression"
    assert config["strategy"] == "BlockES"
    assert config["population_size"] == 6
    # A file names a recipe, too, and the run's own file gives the same run.
    file = tmp_path / "file.yaml"
    file.write_text("recipe: recommended\npopulation_size: 6\nnum_generations: 2\n")
    begin = ["ga-distillation", "--runs-dir", str(tmp_path)]
    assert main([*begin, "--config", str(file), "--name", "file", *small]) == 0
    own = tmp_path / "typed" / "config.json"
    assert main([*begin, "--config", str(own), "--name", "own"]) == 0
    for name in ("file", "own"):
        assert json.loads((tmp_path / name / "config.json").read_text()) == settings
        for output in ("metrics.jsonl", "distilled.npz"):
            expected = (tmp_path / "typed" / output).read_bytes()
            assert (tmp_path / name / output).read_bytes() == expected


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--start", "given"], "start given needs --start-from, got none"),
        (["--labels", "solved"], "labels solved needs --fitness kernel_regression"),
        (["--teacher-epochs", "3"], "--teacher-epochs needs --labels teacher, got 3"),
        (["--label-temperature", "2"], "--label-temperature needs --labels teacher, got 2"),
        (["--start-from", "none.npz"], "none.npz: no such file"),
        (["--start-from", "few.npz"], "few.npz: 2 images of class '0', allowed: 1 of each"),
        (["--start-from", "wide.npz"], "images (28, 28, 1) of 10 classes, allowed: (8, 8, 1)"),
    ],
)
def test_starts_and_labels_that_do_not_go_are_one_line(
    arguments, said, tmp_path, capsys, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    labels = np.array([0, 0, 1, 2, 3, 4, 5, 6, 7, 8, 9])
    np.savez("few.npz", images=np.zeros((11, 8, 8, 1), np.uint8), labels=labels)
    wide = distilled.DistilledDataset(
        images=np.zeros((10, 28, 28, 1)),
        labels=np.eye(10),
        dataset="mnist",
        class_names=tuple("0123456789"),
        mean=(0.5,),
        std=(0.5,),
        network=NetworkConfig(),
        training=distilled.LITERATURE,
        seed=0,
    )
    wide.save(Path("wide.npz"))
    begin = ["ga-distillation", "--strategy", "SNES", "--strategy-std", "0.1"]
    assert main([*begin, *arguments]) == 2
    last = capsys.readouterr().err.strip().splitlines()[-1]
    assert said in last


@pytest.mark.parametrize("name", [*_commands()])
def test_help_is_short_and_all_of_it_has_every_option(name, capsys):
    command = _commands()[name]
    said = {}
    for ask in ("-h", "--help", "--help-all"):
        assert main([name, ask]) == 0
        said[ask] = capsys.readouterr().out
    assert said["-h"] == said["--help"]
    flags = re.compile(r"^  (--\S+|[A-Z]+\b)", re.MULTILINE)
    every = {flag.replace("[no-]", "") for flag in flags.findall(said["--help-all"])}
    wanted = {option.flag for option in known(command.options).values()}
    positional = {flag.lower() for flag in every if flag.isupper()}
    assert every - {flag.upper() for flag in positional} == {
        flag for flag in wanted if flag.removeprefix("--") not in positional
    }
    assert (name == "doctor") or f"$ evojax-suite {name} " in said["--help"]
    if command.essentials:
        assert len(said["--help"].splitlines()) < 50
        assert flags.findall(said["--help"]) == [*command.essentials]
        assert all(example.split()[0] == name for example in command.examples)
    assert all(len(line) <= 100 for text in said.values() for line in text.splitlines())


def test_without_a_command_the_help_says_which_there_are(capsys):
    assert main(["--help"]) == 0
    said = capsys.readouterr().out
    assert all(f"  {name} " in said for name in _commands())
    assert main([]) == 2
    assert capsys.readouterr().err == said


def test_an_unknown_recipe_is_one_line(capsys):
    assert main(["ga-distillation", "--recipe", "best"]) == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    assert "best" in said
    assert "recommended" in said


@pytest.mark.parametrize("command", COMMANDS, ids=lambda module: module.SYSTEM.name)
def test_where_data_lie_and_whether_they_are_kept_is_no_setting(command):
    given = ["--data-dir", "there", "--no-cache-data"]
    options = tyro.cli(command.Options, args=given)
    assert not options.cache_data
    assert tyro.cli(command.Options, args=[]).cache_data
    assert options.settings() == tyro.cli(command.Options, args=[]).settings()


@pytest.mark.parametrize("command", [*COMMANDS, evaluate], ids=lambda module: module.__name__)
def test_the_options_that_a_file_may_have_are_those_of_tyro(command, capsys):
    with pytest.raises(SystemExit):
        tyro.cli(command.Options, args=["--help"])
    lines = [line.strip("│ ") for line in capsys.readouterr().out.splitlines()]
    starts = [re.split("  +", line)[0] for line in lines if line.startswith("-")]  # without help
    shown = {flag for start in starts for flag in re.findall(r"--\w[\w.-]*", start)}
    options = {option for path, option in known(command.Options).items() if path != "path"}
    flags = {flag for option in options for flag in (option.flag, *option.aliases)}
    negated = {typed_option(flag, False)[0] for flag in flags}
    assert shown - negated - {"--help"} == flags


@pytest.mark.parametrize(
    ("content", "arguments"),
    [
        ("seeds: 1:3", ["--seeds", "1:3"]),  # YAML 1.1 has numbers of base 60
        ("seeds: [0, 3]", ["--seeds", "0,3"]),
        ("name: 007", ["--name", "007"]),
        ("name: 1_000", ["--name", "1_000"]),
        ("name: on", ["--name", "on"]),
        ("learning_rate: .inf", ["--learning-rate", "inf"]),
        ("name: 2026-01-01", ["--name", "2026-01-01"]),
        ('{"name": null, "width": 3}', ["--name", "None", "--width", "3"]),
        ("patience: ~\nresume: true", ["--patience", "None", "--resume"]),
        ("evolve_labels: False", ["--no-evolve-labels"]),
        ("generations: 3", ["--num-generations", "3"]),  # its other name
        ("learning-rate: 1e-2", ["--learning-rate", "1e-2"]),
    ],
)
def test_values_are_as_they_are_written(content, arguments, tmp_path):
    file = tmp_path / "options.yaml"
    file.write_text(content)
    assert arguments_of(file, ga_distillation.Options, "refuse") == arguments


def test_a_typed_seed_wins_over_seeds_in_the_file(tmp_path, capsys):
    file = tmp_path / "options.yaml"
    for content, typed, names in (
        ("seed: 3", ["--seeds", "1:3"], ["all-seeds", "seed1", "seed2"]),
        ("seeds: 1:3", ["--seed", "5"], ["seed5"]),
    ):
        file.write_text(content)
        folder = tmp_path / names[-1]
        runs = [*TINY, "--config", str(file), *typed, "--runs-dir", str(folder), "--quiet"]
        assert main(runs) == 0, capsys.readouterr().err
        found = sorted(
            path.name.removeprefix("ga_distillation-digits-")
            for path in folder.iterdir()
            if path.is_dir()
        )
        assert found == names


def test_a_home_folder_and_what_repeats_the_run(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    assert main([*TINY, "--runs-dir=~/runs", "--name", "one", "--data-dir", "~/data"]) == 0
    page = (tmp_path / "runs/one/report.html").read_text()
    repeat = page[page.index("evojax-suite ga-distillation") :]
    first, second = html.unescape(repeat[: repeat.index("<")]).splitlines()[:2]
    assert first == shlex.join(
        ["evojax-suite", *TINY, "--runs-dir=~/runs", "--name", "one", "--data-dir", "~/data"]
    )
    assert second.endswith(f"--name again --data-dir {tmp_path}/data")


def test_completion_knows_every_command(tmp_path):
    with pytest.raises(SystemExit):
        main(["--tyro-write-completion", "bash", str(tmp_path / "completion")])
    script = (tmp_path / "completion").read_text()
    assert all(
        name in script for name in ("de-nas", "ga-distillation", "compare", "--population-size")
    )


def test_options_in_yaml_by_their_own_names_and_what_is_typed_wins(tmp_path, capsys):
    file = tmp_path / "Ünïcode name.yaml"
    file.write_text(
        "population-size: 4\nwidth: 4\ndepth: 1\nnum_epochs: 2\nnum_networks: 2\n"
        f"strong_random_repeats: 0\nnum_generations: 9\nruns_dir: {tmp_path}\nlearning_rate: 1e-2\n"
    )
    arguments = ["ga-distillation", f"--config={file}", "--generations", "2", "--name", "run"]
    assert main(arguments) == 0
    capsys.readouterr()
    settings = json.loads((tmp_path / "run/config.json").read_text())
    assert settings["num_generations"] == 2
    assert settings["config"]["training"]["learning_rate"] == 0.01
    assert len((tmp_path / "run/metrics.jsonl").read_text().splitlines()) == 2


def test_the_file_that_is_named_last_is_the_one():
    assert named_in(["x", "--config", "a", "--config=b"]).name == "b"
    assert named_in(["x", "--configuration", "a"]) is None
    assert named_in(["x", "--config"]) is None  # tyro says what is missing


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ("widht: 3", "no option 'widht' (did you mean width?)"),
        ("config: {network: {widht: 3}}", "did you mean config.network.width?"),
        ("- 1\n- 2", "must hold options and their values, got ['1', '2']"),
        ("a: [", "is neither YAML nor JSON"),
        ("", "must hold options and their values, got None"),
        ("width: wide", "wide"),
        ("seed: -1", "seed must be in 0..4294967295, got -1"),
        ("!!python/object/apply:os.system [true]", "is neither YAML nor JSON"),
    ],
)
def test_a_file_that_does_not_fit_is_one_line(content, says, tmp_path, capsys):
    file = tmp_path / "options.yaml"
    file.write_text(content)
    assert main(["ga-distillation", "--config", str(file), "--runs-dir", str(tmp_path / "r")]) == 2
    said = capsys.readouterr().err.strip().splitlines()
    assert len(said) == 1
    assert says in said[0]
    assert not (tmp_path / "r").exists()


def test_the_traceback_is_there_for_those_who_ask(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("EVOJAX_SUITE_TRACEBACK", "1")
    assert main(["compare", str(tmp_path / "none")]) == 2
    said = capsys.readouterr().err.strip().splitlines()
    assert said[0] == "Traceback (most recent call last):"
    assert said[-1].startswith("evojax-suite: error: ")


def test_a_file_that_is_not_there(tmp_path, capsys):
    assert main(["ecomp", "--config", str(tmp_path / "none.yaml")]) == 2
    said = capsys.readouterr().err.strip().splitlines()
    assert len(said) == 1
    assert "none.yaml" in said[0]


def test_several_seeds_are_runs_of_their_own_and_a_page(tmp_path, capsys):
    runs = [*TINY, "--runs-dir", str(tmp_path)]
    assert main([*runs, "--seeds", "1:3", "--quiet"]) == 0
    captured = capsys.readouterr()
    assert captured.err == captured.out == ""
    compared = json.loads(
        (tmp_path / "ga_distillation-digits-all-seeds/comparison.json").read_text()
    )
    assert compared[0]["seeds"] == [1, 2]
    assert main([*runs, "--seed", "2", "--name", "alone", "--quiet"]) == 0
    for file in ("distilled.npz", "metrics.jsonl", "config.json"):
        one, other = tmp_path / "ga_distillation-digits-seed2" / file, tmp_path / "alone" / file
        assert one.read_bytes() == other.read_bytes()
    assert main([*runs, "--seeds", "1,3", "--name", "named", "--quiet"]) == 0
    assert (tmp_path / "named-seed3/summary.json").exists()
    assert (tmp_path / "named-all-seeds/report.html").exists()
    console.say("Whoever prints next is heard.")
    assert capsys.readouterr().err == "Whoever prints next is heard.\n"


@pytest.mark.parametrize("seeds", ["3:3", "a:b", "1,1", "-1:2", "", "1.5", "2:1"])
def test_seeds_that_are_none(seeds, tmp_path, capsys):
    assert main([*TINY, f"--seeds={seeds}", "--runs-dir", str(tmp_path / "r")]) == 2
    said = capsys.readouterr().err.strip().splitlines()
    assert len(said) == 1
    assert "seeds must be a range such as 0:10" in said[0]
    assert not (tmp_path / "r").exists()


def test_the_log_in_json(tmp_path, capsys):
    assert main([*TINY, "--runs-dir", str(tmp_path), "--log-format", "json"]) == 0
    said = capsys.readouterr()
    lines = [json.loads(line) for line in said.err.splitlines()]
    assert all(set(line) >= {"time", "message"} for line in lines)
    results = [json.loads(line)["message"] for line in said.out.splitlines()]
    assert results[-1].startswith("report: ")
    assert main([*TINY, "--runs-dir", str(tmp_path), "--log-format", "json"]) == 2
    (error,) = capsys.readouterr().err.splitlines()
    assert json.loads(error)["message"].startswith("evojax-suite: error: ")
    console.say("as text again")
    assert capsys.readouterr().err == "as text again\n"
    last = next(line for line in lines if line.get("step") == 3)
    assert last["metrics"]["generation"] == 3
    assert last["num_steps"] == 3


def test_a_doctor_names_what_is_there(tmp_path, capsys, monkeypatch):
    rng = np.random.default_rng(0)
    arrays = {
        f"{part}_{kind}": value
        for part in ("train", "val", "test")
        for kind, value in (
            ("images", rng.integers(0, 256, (4, 28, 28), np.uint8)),
            ("labels", np.array([[0], [1], [0], [1]])),
        )
    }
    np.savez(tmp_path / "pneumoniamnist.npz", **arrays)
    (tmp_path / "mnist").mkdir()
    assert main(["doctor", "--data-dir", str(tmp_path), "--runs-dir", str(tmp_path / "new")]) == 0
    said = capsys.readouterr().out
    assert "pneumoniamnist.npz: train 4" in said.replace("test 4, ", "")
    assert "  mnist: not there" in said
    assert f"folder for runs, {tmp_path / 'new'}: ok" in said
    assert "device 0" in said
    (tmp_path / "file").write_text("")
    monkeypatch.delenv("EVOJAX_SUITE_DATA", raising=False)
    assert main(["doctor", "--runs-dir", str(tmp_path / "file/runs")]) == 2


DRY = [
    TINY,
    ["cest", "--num-images", "100", "--width", "4", "--num-epochs", "5"],
    [
        "coreset",
        "--num-images",
        "100",
        "--method",
        "herding",
        "--num-samples",
        "10",
        "--width",
        "4",
    ],
    ["ecomp", "--dataset", "digits", "--parent-units", "10", "--population-size", "10"],
    [
        *("ga-distillation", "--recipe", "recommended", "--population-size", "8"),
        *("--kernel-width", "8", "--kernel-images", "100", "--strong-random-repeats", "0"),
    ],
    ["devs", "--num-images", "200", "--target-sizes", "20", "--width", "4"],
    ["de-nas", "--num-images", "100", "--max-features", "64", "--baselines", "random", "hand"],
]
LOOPS = {
    "ga-distillation": ["evolving"],
    "cest": ["cest", "full"],
    "coreset": ["training on all"],
    "ecomp": ["parent", "compressing"],
    "devs": ["reducing"],
    "de-nas": [
        *("candidates", "most accurate", "smallest", "random search", "random search"),
        *("like VGG", "like ResNet"),
    ],
}


@pytest.mark.parametrize("arguments", DRY, ids=lambda arguments: arguments[0])
def test_a_dry_run_says_what_it_would_take_and_leaves_nothing(arguments, tmp_path, capsys):
    runs = tmp_path / "runs"
    file = tmp_path / "settings.yaml"
    assert main([*arguments, "--runs-dir", str(runs), "--dry-run", "--seeds", "0:4"]) == 0
    said = capsys.readouterr().out
    assert not runs.exists()
    assert "4 seeds, if the other steps are like the first" in said
    assert "GiB" in said
    assert [line.partition(":")[0] for line in said.splitlines() if " steps of " in line] == LOOPS[
        arguments[0]
    ]
    file.write_text(said.split("\n\n")[0])  # the settings, which --config takes
    options = {
        "ga-distillation": ga_distillation, "cest": cest, "coreset": coreset, "ecomp": ecomp,
        "devs": devs, "de-nas": de_nas,
    }[arguments[0]].Options  # fmt: skip
    assert tyro.cli(options, args=arguments_of(file, options, "refuse")).seed == 0


def test_metrics_go_to_tensorboard_and_weights_and_biases(tmp_path, capsys, monkeypatch):
    pytest.importorskip("tensorboardX")
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    run = [*TINY, "--runs-dir", str(tmp_path), "--name", "run"]
    assert main([*run, "--loggers", "tensorboard", "wandb"]) == 0
    (events,) = (tmp_path / "run/tensorboard").iterdir()
    content = events.read_bytes()
    assert content.count(b"fitness_best") == 3  # one a generation
    (kept,) = (tmp_path / "run/wandb").glob("offline-run-*/*.wandb")
    assert b"fitness_best" in kept.read_bytes()


def test_weights_and_biases_without_a_login(tmp_path, capsys, monkeypatch):
    pytest.importorskip("wandb")
    for name in ("WANDB_API_KEY", "WANDB_MODE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))  # without .netrc
    monkeypatch.setenv("WANDB_CONFIG_DIR", str(tmp_path))
    assert main([*TINY, "--loggers", "wandb", "--runs-dir", str(tmp_path / "r")]) == 2
    said = capsys.readouterr().err.strip().splitlines()
    assert len(said) == 1
    assert "WANDB_MODE=offline needs no login" in said[0]
    assert not (tmp_path / "r").exists()


def test_a_logger_that_is_not_installed(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert main([*TINY, "--loggers", "wandb", "--runs-dir", str(tmp_path / "r")]) == 2
    said = capsys.readouterr().err.strip().splitlines()
    assert len(said) == 1
    assert "logger wandb needs: pip install 'evojax-suite[wandb]'" in said[0]


def write_timing(folder: Path, lines: list[dict]) -> Phase:
    rows = [
        {"generation": i, "steps": 1, "compile_seconds": 0.0, **line}
        for i, line in enumerate(lines)
    ]
    (folder / "timing.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    nothing = None, None, None, None
    return Phase("title", *nothing, num_steps=100, dry_run_factor=10.0)


def test_compilation_takes_as_long_for_all_images_as_for_a_part(tmp_path):
    # A program for each candidate: two seconds of compilation, one of training.
    stages = {"compilation": 2.0, "training": 1.0}
    phase = write_timing(tmp_path, [{"seconds": 3.0, "stages": stages}] * 3)
    assert runner._pace(phase, tmp_path) == pytest.approx((10.0, 2.0, 0.0))
    # A loop like it whose program is one: half the training, compiled once.
    assert runner._pace(phase, tmp_path).times(0.5) == pytest.approx((5.0, 0.0, 2.0))
    # Programs that are compiled in the first steps, for all.
    steps = [{"compilation": 8.0, "training": 2.0}, {"compilation": 3.0, "training": 1.0}]
    steps += [{"training": 1.0}]
    lines = [{"seconds": sum(each.values()), "stages": each} for each in steps]
    phase = write_timing(tmp_path, lines)
    assert runner._pace(phase, tmp_path) == pytest.approx((10.0, 0.0, 8 + 3 + 2 - 1))


def test_a_dry_run_of_kernel_regression_is_never_on_a_part_of_the_images():
    digits = load("digits")
    many = replace(digits, validation=digits.train)
    regression = ga_distillation.Config(fitness="kernel_regression")
    assert ga_distillation._like(regression, many, 1) == (regression, 1.0)
    trained = ga_distillation.Config()
    assert ga_distillation._like(trained, many, 1)[0].fitness_subset_size == len(digits.train) // 5


@pytest.mark.parametrize(
    ("work", "images", "times"), [(1e9, 156, 8), (1e4, 1078, 1), (3e8, 179, 6)]
)
def test_a_dry_run_takes_a_part_of_the_images(work, images, times):
    digits = load("digits")
    part, factor = part_for_dry_run(digits, work, batch_size=64)
    assert factor == times
    assert len(part.train) == len(digits.train) // times
    assert abs(len(part.train) - images) < 30
    assert len(part.validation) == len(digits.validation) // times
