"""Candidates per hour: our programs against a plain PyTorch loop, on the same candidates.

    pip install evojax-suite[bench]
    python experiments/de_nas/speed.py                      # the proxy of table.py
    python experiments/de_nas/speed.py --dataset digits
    python experiments/de_nas/speed.py --dataset cifar10 --num-images 45000 --max-filters 256 \\
        --num-epochs 1 --candidates 4 --programs separate   # full size, one epoch of ten

Each candidate is trained and judged on the validation split. Compilation counts: the first
candidate of ours starts with nothing compiled. Let nothing else run.
"""

from __future__ import annotations

import datetime
import json
import os
import platform
import resource
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import jax
import numpy as np
import psutil
import torch
import torch.nn.functional as F
import tyro

from evojax_suite import de_nas
from evojax_suite.data import load, normalize, some_images
from evojax_suite.systems.de_nas import architectures
from evojax_suite.systems.de_nas.architectures import Space
from evojax_suite.types import Dataset


@dataclass(frozen=True)
class Options:
    dataset: str = "fashion_mnist"
    data_dir: Path | None = None
    num_images: int | None = 1000
    """Training images, balanced; all of digits."""
    num_validation_images: int = 1000
    max_filters: int = 32
    max_features: int = 512
    filter_step: int = 1
    min_length: int = 7
    max_length: int = 15
    num_epochs: int = 10
    candidates: int = 10
    """Random architectures."""
    programs: tuple[Literal["separate", "padded", "layers"], ...] = ("separate", "padded", "layers")
    torch: bool = True
    workers: int | None = None
    seed: int = 0
    output: Path | None = None


def parts(options: Options) -> Dataset:
    number = None if options.dataset == "digits" else options.num_images
    dataset = load(options.dataset, options.data_dir)
    return some_images(dataset, number, options.num_validation_images)


def torch_network(units, channels: int, side: tuple[int, int], num_classes: int, dropout: float):
    modules, height, width = [], *side
    for unit in units:
        if unit.kind == "convolution":
            kernel, filters = unit.kernel, unit.filters
            modules += [torch.nn.Conv2d(channels, filters, kernel, padding=kernel // 2)]
            modules += [torch.nn.ReLU()]
            channels = filters
        else:
            kind = torch.nn.MaxPool2d if unit.kind == "max" else torch.nn.AvgPool2d
            modules, height, width = [*modules, kind(2)], height // 2, width // 2
    sizes = architectures.dense_units(height * width * channels, num_classes)
    modules += [torch.nn.Flatten(), torch.nn.Dropout(dropout), torch.nn.Linear(*sizes[:2])]
    modules += [torch.nn.ReLU(), torch.nn.Dropout(dropout), torch.nn.Linear(*sizes[1:3])]
    return torch.nn.Sequential(*modules, torch.nn.ReLU(), torch.nn.Linear(*sizes[2:]))


def torch_candidate(units, config, images, labels, validation, validation_labels, classes, device):
    """One candidate of the plain loop: training with crops and flips of whole batches at once."""
    training = config.training
    network = torch_network(units, images.shape[1], images.shape[2:], classes, config.dropout)
    network = network.to(device)
    optimizer = torch.optim.SGD(network.parameters(), training.learning_rate)
    pad, (height, width) = training.crop_padding, images.shape[2:]
    for _ in range(training.num_epochs):
        network.train()
        for chosen in torch.randperm(len(images), device=device).split(training.batch_size):
            batch = F.pad(images[chosen], (pad,) * 4)
            rows = torch.randint(0, 2 * pad + 1, (len(chosen), 1), device=device)
            columns = torch.randint(0, 2 * pad + 1, (len(chosen), 1), device=device)
            rows = (rows + torch.arange(height, device=device))[:, None, :, None]
            columns = (columns + torch.arange(width, device=device))[:, None, None, :]
            places = torch.arange(len(chosen), device=device)[:, None, None, None]
            kinds = torch.arange(batch.shape[1], device=device)[None, :, None, None]
            batch = batch[places, kinds, rows, columns]
            flipped = torch.rand(len(chosen), 1, 1, 1, device=device) < 0.5
            batch = torch.where(flipped & training.flip, batch.flip(3), batch)
            optimizer.zero_grad()
            F.cross_entropy(network(batch), labels[chosen]).backward()
            optimizer.step()
    network.eval()
    with torch.no_grad():
        correct = sum(
            (network(part).argmax(1) == own).sum().item()
            for part, own in zip(validation.split(500), validation_labels.split(500), strict=True)
        )
    return correct / len(validation)


def main(options: Options) -> None:
    before = psutil.Process().memory_info().rss / 1e6
    dataset = parts(options)
    shape, classes = dataset.image_shape, dataset.num_classes
    config = de_nas.Config(
        space=Space(
            options.min_length,
            options.max_length,
            max_filters=options.max_filters,
            max_features=options.max_features,
            filter_step=options.filter_step,
        ),
        training=replace(de_nas.TRAINING, num_epochs=options.num_epochs),
        population_size=max(5, options.candidates),
        num_generations=0,
        workers=options.workers,
    )
    found: dict = {
        "about": {
            **{name: value for name, value in vars(options).items() if name != "output"},
            "data_dir": None,
            "date": datetime.date.today().isoformat(),
            "machine": platform.processor() or platform.machine(),
            "cores": os.cpu_count(),
            "device": jax.devices()[0].device_kind,
        },
        "seconds": {},
        "accuracy": {},
    }
    for programs in options.programs:
        # As a search runs them, the look-ahead with them.
        own = replace(config, programs=programs)
        algorithm = de_nas.build(own, classes, shape)
        data = de_nas.make_data(own, dataset)
        params = de_nas.Params()
        state = algorithm.init(jax.random.key(0), params, data)
        clock, stages = time.perf_counter(), {}
        for step in range(options.candidates):
            key = jax.random.key(options.seed) if step == 0 else jax.random.key(step)
            state, metrics = algorithm.step(key, state, params, data)
            for name, value in metrics.stage_seconds.items():
                stages[name] = stages.get(name, 0.0) + value
        seconds = time.perf_counter() - clock
        found["seconds"][programs] = {"all": seconds, **stages}
        found["accuracy"][programs] = np.asarray(state.accuracy)[: options.candidates].tolist()
        # The same for all programs: they come from the key of the first step.
        population = architectures.member(state.genomes, slice(options.candidates))
        print(programs, found["seconds"][programs], flush=True)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e6
    found["peak_megabytes"] = peak - before  # ours, on a CPU
    costs = architectures.costs(population, shape, classes)
    found["about"] |= {name: sizes.tolist() for name, sizes in costs._asdict().items()}
    if options.torch:
        device = "cuda" if torch.cuda.is_available() else "cpu"

        def tensors(part):
            images = normalize(part.images, dataset.mean, dataset.std)
            images = torch.from_numpy(np.asarray(images).transpose(0, 3, 1, 2).copy())
            return images.to(device), torch.from_numpy(part.labels.astype(np.int64)).to(device)

        arguments = (*tensors(dataset.train), *tensors(dataset.validation), classes, device)
        accuracies, each = [], []
        for index in range(options.candidates):
            units = architectures.to_units(architectures.member(population, index))
            clock = time.perf_counter()
            accuracies.append(torch_candidate(units, config, *arguments))
            each.append(time.perf_counter() - clock)
        found["seconds"]["torch"] = {"all": sum(each), "each": each}
        found["accuracy"]["torch"] = accuracies
        print("torch", sum(each), flush=True)
    for name, seconds in found["seconds"].items():
        hourly = 3600 * options.candidates / seconds["all"]
        line = f"{name}: {hourly:.0f} candidates per hour"
        if options.torch and name != "torch":
            line += f", {found['seconds']['torch']['all'] / seconds['all']:.2f} x PyTorch"
        print(line, f"mean accuracy {np.nanmean(found['accuracy'][name]):.3f}")
    if options.output:
        options.output.write_text(json.dumps(found) + "\n")


if __name__ == "__main__":
    main(tyro.cli(Options))
