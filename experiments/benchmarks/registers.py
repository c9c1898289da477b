"""Registers, spills and shared memory of the kernels of `networks.fused`, as the compiler has them.

    XLA_FLAGS=--xla_dump_to=DUMP make gpu-check \\
        GPU_CHECK="--systems ga_distillation --convolution fused --cards h100 --output DUMP/model"
    .venv-gpu/bin/python experiments/benchmarks/registers.py DUMP

With jax 0.10, whose dumps hold the kernels' PTX; those of 0.11 and 0.12 do not.
"""

from __future__ import annotations

import importlib.metadata
import re
import subprocess
import sys
from pathlib import Path


def assembler() -> str:
    """The ptxas that jax[cuda13] installs."""
    files = importlib.metadata.files("nvidia-cuda-nvcc") or []
    return str(next(one.locate() for one in files if one.name == "ptxas"))


def main(folder: Path) -> None:
    launches = "\n".join(
        one.read_text() for one in folder.glob("*thunk_sequence_after_thunk_passes.txt")
    )
    print("| kernel | programs | registers | spilled bytes | shared memory, KiB | wgmma |")
    print("|---|---|---|---|---|---|")
    for path in sorted(folder.glob("*.ptx"), key=lambda one: [len(one.name), one.name]):
        text = path.read_text()
        entry = re.search(r"\.entry (\w+_kernel(?:_\d+)?)\b", text)
        if not entry:
            continue
        command = [assembler(), "-v", "-arch=sm_90a", path, "-o", "/dev/null"]
        said = subprocess.run(command, capture_output=True, text=True, check=True).stderr
        registers = re.search(r"Used (\d+) registers", said)
        spills = re.search(r"(\d+) bytes spill stores", said)
        launch = re.search(rf"\b{entry[1]} grid: \[([\d, ]+)\] .*shared_memory: (\d+)", launches)
        grid, shared = (launch[1], int(launch[2]) // 1024) if launch else ("", "")
        assert registers
        assert spills
        products = text.count("wgmma.mma_async")
        print(f"| {entry[1]} | {grid} | {registers[1]} | {spills[1]} | {shared} | {products} |")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
