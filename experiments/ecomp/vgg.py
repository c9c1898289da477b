"""A network like VGG or ResNet for CIFAR-10, trained by PyTorch, pruned by evolution and refitted
without a gradient, beside Torch-Pruning at the same multiplications.

    python experiments/ecomp/vgg.py    # needs the extra `bench`
    python experiments/ecomp/vgg.py --network resnet --widths 24 48 96 --runs-dir runs/ecomp-resnet

Torch-Pruning prunes by the magnitude of weights and by that of groups, once, without training; its
networks are also shown after the batch norms' statistics were computed anew on the images of
evolution, which is what costs no gradient there.
"""

from __future__ import annotations

import json
import shlex
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import jax
import numpy as np
import torch
import tyro
from torch import nn

from evojax_suite import load
from evojax_suite.cli.main import main as run_command
from evojax_suite.data import normalize, with_whole_training_set
from evojax_suite.runtime.results import write_json
from evojax_suite.systems.ecomp import from_torch, graph as graphs
from evojax_suite.types import Split


@dataclass(frozen=True)
class Options:
    network: Literal["vgg", "resnet"] = "vgg"
    widths: tuple[int, ...] = (24, 24, 48, 48, 96, 96)
    """Filters of the convolutions, after every second of which pixels are pooled (vgg); of the
    residual blocks, each but the first of which halves the maps (resnet)."""
    epochs: int = 10
    seed: int = 0
    dataset: str = "cifar10"
    data_dir: Path | None = None
    images: int = 4000
    """Images of evolution."""
    search: str = (
        "--search.largest 0.8 --search.smallest 0.2 --search.front-size 8 "
        "--search.population-size 24 --search.num-generations 8 "
        "--search.num-fit-images 1000 --search.num-judged-images 1000"
    )
    """Further options of `evojax-suite ecomp`, as one word (--search="--search.largest 0.7")."""
    runs_dir: Path = Path("runs/ecomp-vgg")
    output: Path = Path("experiments/ecomp/vgg.json")


def vgg(widths: tuple[int, ...], num_classes: int) -> nn.Sequential:
    layers, before = [], 3
    for index, width in enumerate(widths):
        layers += [nn.Conv2d(before, width, 3, padding=1), nn.BatchNorm2d(width), nn.ReLU()]
        last = index == len(widths) - 1
        if index % 2:
            layers.append(nn.AdaptiveAvgPool2d(1) if last else nn.MaxPool2d(2))
        before = width
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(before, num_classes))


class Block(nn.Module):
    """Two convolutions and what they are added to, by a projection where the maps change."""

    def __init__(self, before: int, after: int, stride: int):
        super().__init__()
        self.inner = nn.Sequential(
            *(nn.Conv2d(before, after, 3, stride, 1), nn.BatchNorm2d(after), nn.ReLU()),
            *(nn.Conv2d(after, after, 3, 1, 1), nn.BatchNorm2d(after)),
        )
        projection = nn.Conv2d(before, after, 1, stride), nn.BatchNorm2d(after)
        self.shortcut = nn.Identity() if before == after else nn.Sequential(*projection)
        self.relu = nn.ReLU()

    def forward(self, maps: torch.Tensor) -> torch.Tensor:
        return self.relu(self.inner(maps) + self.shortcut(maps))


def resnet(widths: tuple[int, ...], num_classes: int) -> nn.Sequential:
    stem = nn.Conv2d(3, widths[0], 3, 1, 1), nn.BatchNorm2d(widths[0]), nn.ReLU()
    strides = [1] + [2] * (len(widths) - 1)
    blocks = map(Block, (widths[0], *widths), widths, strides)
    ending = nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(widths[-1], num_classes)
    return nn.Sequential(*stem, *blocks, *ending)


def as_tensor(images: np.ndarray, dataset) -> torch.Tensor:
    values = normalize(images, np.array(dataset.mean), np.array(dataset.std))
    return torch.tensor(np.asarray(values, np.float32)).movedim(-1, 1).contiguous()


def train(module: nn.Module, dataset, options: Options) -> None:
    """AdamW with one cycle, flips and shifts of up to 4 pixels."""
    torch.manual_seed(options.seed)
    images, labels = (
        as_tensor(dataset.train.images, dataset),
        torch.tensor(dataset.train.labels).long(),
    )
    steps = len(labels) // 128
    optimizer = torch.optim.AdamW(module.parameters(), weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 4e-3, steps * options.epochs)
    for epoch in range(options.epochs):
        module.train()
        start = time.perf_counter()
        for batch in torch.randperm(len(labels))[: steps * 128].reshape(-1, 128):
            shown = nn.functional.pad(images[batch], (4, 4, 4, 4))
            row, column = torch.randint(0, 9, (2,)).tolist()
            shown = shown[:, :, row : row + 32, column : column + 32]
            flipped = torch.rand(len(shown)) < 0.5
            shown[flipped] = shown[flipped].flip(-1)
            loss = nn.functional.cross_entropy(module(shown), labels[batch], label_smoothing=0.1)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
        print(f"epoch {epoch}: {loss.item():.3f}, {time.perf_counter() - start:.0f} s", flush=True)
    module.eval()


@torch.no_grad()
def accuracy(module: nn.Module, split: Split, dataset) -> float:
    module.eval()
    images = as_tensor(split.images, dataset)
    classes = torch.cat([module(batch).argmax(1) for batch in images.split(500)])
    return float((classes.numpy() == split.labels).mean())


def torch_pruned(module: nn.Module, kind: str, relative: float, dataset) -> nn.Module:
    """The largest of Torch-Pruning's networks with at most `relative` of the multiplications."""
    import copy

    import torch_pruning as pruning

    example = torch.zeros(1, 3, 32, 32)
    importances = {
        "magnitude": pruning.importance.MagnitudeImportance(p=1),
        "groups": pruning.importance.GroupMagnitudeImportance(p=2),
    }
    whole, _ = pruning.utils.count_ops_and_params(module, example)
    best = None
    for ratio in np.arange(0.9, 0.0, -0.02):
        small = copy.deepcopy(module)
        ignored = [layer for layer in small.modules() if isinstance(layer, nn.Linear)]
        pruner = pruning.MetaPruner(
            small,
            example,
            importance=importances[kind],
            pruning_ratio=float(ratio),
            ignored_layers=ignored,
            global_pruning=kind == "groups",
        )
        pruner.step()
        count, _ = pruning.utils.count_ops_and_params(small, example)
        if count > relative * whole:
            break
        best = small
    return best


@torch.no_grad()
def recalibrated(module: nn.Module, images: np.ndarray, dataset) -> nn.Module:
    """`module` with the statistics of its batch norms computed anew."""
    for layer in module.modules():
        if isinstance(layer, nn.BatchNorm2d):
            layer.reset_running_stats()
            layer.momentum = None
    module.train()
    for batch in as_tensor(images, dataset).split(500):
        module(batch)
    return module.eval()


def main(options: Options) -> None:
    dataset = with_whole_training_set(load(options.dataset, options.data_dir))
    make = {"vgg": vgg, "resnet": resnet}[options.network]
    module = make(options.widths, dataset.num_classes)
    state = options.runs_dir / "parent.pt"
    if state.exists():
        module.load_state_dict(torch.load(state, weights_only=True))
    else:
        state.parent.mkdir(parents=True, exist_ok=True)
        train(module, dataset, options)
        torch.save(module.state_dict(), state)
    module.eval()
    parent = accuracy(module, dataset.test, dataset)
    path = options.runs_dir / "parent.safetensors"
    graphs.save(path, from_torch.to_graph(module, dataset.image_shape))
    print(f"parent {100 * parent:.2f} %", flush=True)

    command = [
        "ecomp",
        "--recipe",
        "recommended",
        "--dataset",
        options.dataset,
        "--parent",
        str(path),
    ]
    about = ["--inputs", "normalized", "--search.size", "multiplications", "--name", "run"]
    more = ["--num-images", str(options.images), "--runs-dir", str(options.runs_dir)]
    more += ["--resume"] if (options.runs_dir / "run" / "config.json").exists() else []
    more += ["--data-dir", str(options.data_dir)] if options.data_dir else []
    more += [*shlex.split(options.search), "--fine-tuning-seconds", "0"]
    if run_command([*command, *about, *more]):
        raise SystemExit("the run failed")
    front = json.loads((options.runs_dir / "run" / "front.json").read_text())
    seen = dataset.train.images[: options.images]
    rows = []
    for row in front:
        relative = row["relative_multiplications"]
        row = {name: row[name] for name in row if name not in ("inputs_kept", "file")}
        for kind in ("magnitude", "groups"):
            small = torch_pruned(module, kind, relative, dataset)
            row[kind] = small and accuracy(small, dataset.test, dataset)
            row[f"{kind}, norms anew"] = small and accuracy(
                recalibrated(small, seen, dataset), dataset.test, dataset
            )
        rows.append(row)
        print({name: row[name] for name in row if not isinstance(row[name], dict)}, flush=True)
    summary = json.loads((options.runs_dir / "run" / "summary.json").read_text())
    about = {"parent_test_accuracy": parent, "device": jax.devices()[0].device_kind}
    write_json(options.output, about | {"summary": summary, "rows": rows})


if __name__ == "__main__":
    main(tyro.cli(Options))
