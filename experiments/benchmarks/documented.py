"""The seconds of every command of the documentation, each in a process of its own, as a page.

    python experiments/benchmarks/documented.py    # let nothing else run

The blocks of a page share a folder, as a reader's do. Writes docs/times.md.
"""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import date
from pathlib import Path

import jax
import tyro

DOCS = Path(__file__).parents[2] / "docs"
BLOCK = re.compile(r"^```(\w+)([^\n]*)\n(.*?)^```$", re.DOTALL | re.MULTILINE)
HEAD = """# How long it takes

Every command of these pages, from the prompt to the next one, compilation counted
(`experiments/benchmarks/documented.py`). {machine}, {date}, JAX {jax}. On an accelerator: not run.
"""


@dataclass(frozen=True)
class Options:
    machine: str = "Two cores of an AMD EPYC VM"
    output: Path = DOCS / "times.md"


def run(folder: Path, *arguments: str) -> float:
    """The seconds of Python with these arguments in a folder."""
    clock = time.perf_counter()
    subprocess.run([sys.executable, *arguments], cwd=folder, check=True, capture_output=True)
    return time.perf_counter() - clock


def commands_in(block: str) -> list[str]:
    """The commands of a block, each in one line."""
    lines = block.replace("\\\n", "").splitlines()
    return [shlex.join(shlex.split(line)[1:]) for line in lines]


def commands_of(page: str) -> list[str]:
    """The commands of a page."""
    blocks = [block for language, _, block in BLOCK.findall(page) if language == "console"]
    return [command for block in blocks for command in commands_in(block)]


def times_of(page: str, folder: Path) -> Iterator[tuple[str, float]]:
    """The commands of a page, run in a folder, and their seconds."""
    code = done = ""
    for language, needs, block in BLOCK.findall(page):
        if language == "python" and not needs.strip():
            code += block
        if language != "console":
            continue
        if code != done:  # commands may take what Python made above them
            run(folder, "-c", code)
            done = code
        for command in commands_in(block):
            yield command, run(folder, "-m", "evojax_suite", *shlex.split(command)[1:])


def main(options: Options) -> None:
    text = HEAD.format(machine=options.machine, date=date.today(), jax=jax.__version__)
    for path in sorted(DOCS.rglob("*.md")):
        if not commands_of(page := path.read_text()):
            continue
        name = path.relative_to(DOCS)
        text += f"\n## [{page.splitlines()[0][2:]}]({name})\n\n| command | seconds |\n|---|---|\n"
        with tempfile.TemporaryDirectory() as folder:
            for command, seconds in times_of(page, Path(folder)):
                text += f"| `{command}` | {seconds:.0f} |\n"
                print(f"{seconds:6.1f} s  {command}", flush=True)
    options.output.write_text(text)


if __name__ == "__main__":
    main(tyro.cli(Options))
