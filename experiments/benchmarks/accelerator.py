"""Everything that an accelerator has to tell, in one call of nine minutes.

    python experiments/benchmarks/accelerator.py --seconds 540 --data-dir DATA --output OUT
    python experiments/benchmarks/accelerator.py --rehearse --output OUT    # tiny, on a CPU

Blocks, in order of worth; each is a process, so that one that crashes takes no other with it, and
writes its results (OUT/<block>.json) after every measurement. What does not fit into the time left
is not begun, and what fails leaves its error:

    agreement   each system's first steps against the numbers of a CPU (agreement.json), in float32
                and in bfloat16
    engine      Sato et al.'s training steps and evaluations at full size, by lowering and members
                in flight, beside what the roofline says of the very programs; a whole generation
    kernels     those of `networks.fused`: agreement with the layers, each beside the model, and a
                whole generation
    pytorch     members a second at full size, each way of pytorch_on_gpu.py
    systems     EComp's 70 runs, candidates of DE-NAS, a reduction of DEvS, an epoch of CEST
    distillation
                synthetic images of MNIST, Fashion-MNIST and CIFAR-10 by kernel regression on
                features of width 128: `--searches` of one a class, four in one, with soft labels
                (OUT/<search>.npz)
    transfer    the sets of experiments/ga_distillation/sets judged by networks that they were not
                made for (OUT/table.json)
    labels      hard labels and a teacher's for 100 and 500 images of CIFAR-10: real ones, and what
                searches named cifar10-100 and cifar10-500 have left in OUT (OUT/by-labels.json)
    paper       with the time that is left: ga-distillation on MNIST at the paper's setting. What it
                leaves, OUT/paper-run.tar.000, ... in parts of 15 MB, goes in again by `--checkpoint
                FOLDER` with these parts, so that several calls add up to the paper's run

It runs with Python 3.12, jax 0.11, flax, optax, orbax-checkpoint, scikit-learn, torch 2.11 and
numpy 2.5. Where that is all, carry these wheels: evosax, tyro, typeguard, docstring-parser,
platformdirs, pillow, safetensors (`pip download --no-deps`), and on the other machine:

    pip install --no-index --no-deps --target site wheels/*.whl
    PYTHONPATH=site:. python experiments/benchmarks/accelerator.py --data-dir data --output out

DATA holds MNIST's four IDX files (11 MB), and for `distillation` Fashion-MNIST's and CIFAR-10's, or
a part of either as fashion_mnist.npz and cifar10.npz (x_train, y_train, x_test, y_test). To make
the numbers of a CPU anew, after a change of a system: `--expected`.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import tyro

BLOCKS = Path(__file__).with_name("accelerator_blocks.py")
SHARES = {
    "agreement": 0.25,
    "engine": 0.4,
    "kernels": 0.3,
    "pytorch": 0.2,
    "systems": 0.25,
    "distillation": 0.3,
    "transfer": 0.4,
    "labels": 0.4,
    "paper": 1,
}
"""The blocks, and the most of the seconds that each may take."""


@dataclass(frozen=True)
class Options:
    """Measure what an accelerator does."""

    output: Path
    """Folder of the results."""
    seconds: float = 540.0
    """For everything."""
    data_dir: Path | None = None
    """Where MNIST lies, for the paper's run."""
    checkpoint: Path | None = None
    """Folder with the parts of an earlier run of the paper's setting, to go on from."""
    blocks: tuple[str, ...] = ()
    """Some of them; all by default."""
    searches: tuple[str, ...] = ()
    """Some of those of `distillation` (SEARCHES in accelerator_blocks.py); all by default."""
    rehearse: bool = False
    """Tiny sizes."""
    expected: bool = False
    """Write the numbers that `agreement` compares with (agreement.json), and end."""


def main(options: Options) -> None:
    unknown = sorted(set(options.blocks) - set(SHARES))
    if unknown:
        raise SystemExit(f"blocks must be of {', '.join(SHARES)}, got {unknown[0]!r}")
    settings = [f"--output={options.output}"]
    settings += [f"--data-dir={options.data_dir}"] if options.data_dir else []
    settings += [f"--checkpoint={options.checkpoint}"] if options.checkpoint else []
    environment = {"XLA_PYTHON_CLIENT_PREALLOCATE": "false", **os.environ}  # PyTorch wants some
    settings += ["--searches", *options.searches] if options.searches else []
    if options.rehearse:
        settings += ["--rehearse"]
        environment["XLA_FLAGS"] = "--xla_backend_optimization_level=0"  # compiles faster
    end, failed = time.time() + options.seconds, []
    for name in ["expected"] if options.expected else options.blocks or SHARES:
        start = time.time()
        left = end - start
        share = SHARES.get(name, 1.0) if len(options.blocks) != 1 else 1.0
        deadline = start + min(left, share * options.seconds)
        command = [sys.executable, str(BLOCKS), name, f"--deadline={deadline}", *settings]
        # A measurement that was begun may end; one that hangs may not take the rest.
        limit = max(10.0, min(left - 5, deadline - start + 60))
        try:
            code = subprocess.run(command, timeout=limit, env=environment).returncode
        except subprocess.TimeoutExpired:
            code = "more seconds than it had"
        print(f"{name}: {time.time() - start:.0f} s, exit code {code}", flush=True)
        if code != 0:
            failed.append(f"{name} ended with {code}")
        failed += [] if options.expected else faults(options.output / f"{name}.json")
    if failed:
        raise SystemExit("\n".join(failed))


def faults(path: Path) -> list[str]:
    """Measurements of a block that failed, or do not agree with a CPU's."""
    if not path.exists():
        return [f"{path.name} was not written"]
    found = json.loads(path.read_text())
    errors = [f"{name}: {row['error']}" for name, row in found.items() if "error" in row]
    apart = [f"{name} does not agree" for name, row in found.items() if row.get("agrees") is False]
    return [f"{path.stem}: {fault}" for fault in errors + apart]


if __name__ == "__main__":
    main(tyro.cli(Options))
