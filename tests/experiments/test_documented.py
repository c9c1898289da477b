"""The page that tells how long the commands of the documentation take."""

from __future__ import annotations

import subprocess

import pytest

PAGE = """
```python
open("made", "w").close()
```

```console
$ evojax-suite {command} \\
    --nothing
```
"""


@pytest.fixture(scope="module")
def script(import_script):
    return import_script("benchmarks/documented.py")


def test_a_command_runs_where_python_made_something(script, tmp_path, monkeypatch):
    asked = []
    monkeypatch.setattr(script, "run", lambda folder, *arguments: asked.append(arguments) or 2.0)
    found = [*script.times_of(PAGE.format(command="doctor"), tmp_path)]
    assert found == [("evojax-suite doctor --nothing", 2.0)]
    assert [arguments[0] for arguments in asked] == ["-c", "-m"]


def test_a_command_that_fails_ends_it(script, tmp_path):
    with pytest.raises(subprocess.CalledProcessError):
        [*script.times_of(PAGE.format(command="unheard-of"), tmp_path)]
    assert (tmp_path / "made").exists()


def test_every_command_is_told(script):
    """The page is made anew where a command changes."""
    shown = (script.DOCS / "times.md").read_text()
    for path in script.DOCS.rglob("*.md"):
        for command in script.commands_of(path.read_text()):
            assert f"| `{command}` |" in shown, path.name
