"""experiments/ga_distillation/equal_seconds.py: its rows, and that it goes on where it ended."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest

from evojax_suite import ga_distillation
from evojax_suite.networks import NetworkConfig
from evojax_suite.systems.ga_distillation.kernel_regression import KernelConfig
from evojax_suite.training import TrainingConfig


def test_every_way_is_judged_after_its_seconds_and_only_once(import_script, tmp_path, capsys):
    script = import_script("ga_distillation/equal_seconds.py")
    config = replace(
        ga_distillation.RECOMMENDED,
        population_size=8,
        kernel=KernelConfig(kernel_width=8, kernel_images=100, company=2),
        network=NetworkConfig(width=8, depth=1),
        training=TrainingConfig(num_epochs=30, learning_rate=0.01),
    )
    options = script.Options(
        dataset="digits",
        seconds=(0.02, 0.1),
        seeds=(0,),
        num_networks=1,
        output=tmp_path / "equal_seconds.json",
        config=config,
    )
    script.main(options)
    rows = json.loads(options.output.read_text())["rows"]
    assert [(row["way"], row["mark"]) for row in rows] == [
        (way, mark) for way in script.WAYS for mark in (0.02, 0.1)
    ]
    for first, second in zip(rows[::2], rows[1::2], strict=True):
        assert 0.02 <= first["seconds"] <= second["seconds"]
        assert second["seconds"] >= 0.1
        assert 1 <= first["steps"] <= second["steps"]
    best = {row["way"]: row["accuracies"][0] for row in rows}
    assert best["evolution"] > 0.5
    assert (tmp_path / "equal_seconds_digits.png").stat().st_size > 0
    table = capsys.readouterr().out
    script.main(options)
    assert json.loads(options.output.read_text())["rows"] == rows
    assert capsys.readouterr().out == table[table.index("| dataset") :]


def test_a_way_that_is_none(import_script):
    script = import_script("ga_distillation/equal_seconds.py")
    with pytest.raises(ValueError, match=r"ways must be of .*, got 'annealing'"):
        script.Options(ways=("annealing",))
