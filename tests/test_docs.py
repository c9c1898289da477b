"""Every block of commands and of Python in the documentation runs, a page in one folder."""

from __future__ import annotations

import re
import shlex
import sys
from pathlib import Path

import pytest

from evojax_suite.cli import main

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
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "my_parts", raising=False)
    names: dict = {}
    for number, (language, needs, text) in enumerate(BLOCK.findall(page.read_text())):
        assert language in ("python", "console", "text"), f"block {number} is {language}"
        if needs.strip():
            pytest.importorskip(needs.strip())
        if language == "python":
            exec(compile(text, f"{page}, block {number}", "exec"), names)
        if language == "console":
            for line in text.splitlines():
                prompt, program, *arguments = shlex.split(line)
                assert (prompt, program) == ("$", "evojax-suite")
                assert main(arguments) == 0, line


def test_the_fifteen_lines_for_pytorch_are_at_most_as_many():
    (text,) = re.findall(r"```python torch\n(.*?)```", (DOCS / "elsewhere.md").read_text(), re.S)
    lines = [line for line in text.splitlines() if line.strip()]
    assert len(lines) <= 17  # two of them imports


def test_links_between_pages_lead_somewhere():
    for page in DOCS.rglob("*.md"):
        for link in re.findall(r"\]\(([^)#]+)(?:#[^)]*)?\)", page.read_text()):
            assert (page.parent / link).resolve().exists(), f"{page}: {link}"
