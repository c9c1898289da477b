"""What the README shows runs."""

from __future__ import annotations

import re
from pathlib import Path

README = Path(__file__).parents[1] / "README.md"


def test_the_script_of_the_readme_runs(capsys):
    (script,) = re.findall(r"```python\n(.*?)```", README.read_text(), re.DOTALL)
    names: dict = {}
    exec(compile(script, str(README), "exec"), names)
    assert names["images"].shape == (10, 8, 8, 1)
    assert names["labels"].shape == (10, 10)
    assert len(capsys.readouterr().out.splitlines()) == 5


def test_the_readme_names_only_files_that_exist():
    links = re.findall(r"\]\(([^)#]+)\)", README.read_text())
    links = [link for link in links if not link.startswith("https://doi.org/")]
    assert links
    for link in links:
        assert (README.parent / link).exists(), link
