"""What the five systems are measured against: plain PyTorch loops, one network after the other.

They do the work of ours on the same arrays, in the way of the papers' programs, and nothing that
would slow them: no logging, no synchronisation but one at the end. Images are (N, C, H, W). The
loop of Sato et al. also comes in the variants that an informed user would try. As a program this
file is one of the processes of `Processes`.
"""

from __future__ import annotations

import contextlib
import io
import os
import random
import subprocess
import sys

import numpy as np
import torch
import torch.nn.functional as F
from sklearn.cluster import MiniBatchKMeans
from sklearn.manifold._t_sne import _joint_probabilities
from torch import nn


def channels_first(images: np.ndarray, device: str = "cpu") -> torch.Tensor:
    """(..., H, W, C) -> (..., C, H, W)."""
    return torch.from_numpy(np.ascontiguousarray(np.moveaxis(images, -1, -3))).to(device)


class ConvNet(nn.Module):
    """ConvNet-3, its features and the layers after them."""

    def __init__(self, width: int, channels=1, side=28, bottleneck=0, dropout=0.0, num_classes=10):
        super().__init__()
        padding, layers = 3 if side == 28 else 1, []
        for _ in range(3):
            layers += [nn.Conv2d(channels, width, 3, padding=padding)]
            layers += [nn.GroupNorm(width, width), nn.ReLU(), nn.AvgPool2d(2)]
            channels, padding = width, 1
        self.features = nn.Sequential(*layers, nn.Flatten())
        num_features = width * (32 if side == 28 else side) ** 2 // 64
        head = []
        if bottleneck:
            head = [nn.Linear(num_features, bottleneck), nn.ReLU()]
        head += [nn.Dropout(dropout)] if dropout else []
        self.head = nn.Sequential(*head, nn.Linear(bottleneck or num_features, num_classes))

    def forward(self, images):
        return self.head(self.features(images))


class VGG10(nn.Module):
    """CEST's, for images of 28x28: maps of 28, 14, 7, 3 and 1 pixels."""

    def __init__(self, width: int, channels: int = 1, num_classes: int = 10):
        super().__init__()
        layers = []
        for pair in range(4):
            filters = width if pair == 0 else 2 * width
            for _ in range(2):
                layers += [nn.Conv2d(channels, filters, 3, padding=1), nn.BatchNorm2d(filters)]
                layers += [nn.ReLU()]
                channels = filters
            layers += [nn.MaxPool2d(2), nn.Dropout(0.2)]
        layers += [nn.Flatten(), nn.Linear(2 * width, 4 * width), nn.ReLU(), nn.Dropout(0.2)]
        layers += [nn.BatchNorm1d(4 * width), nn.Linear(4 * width, num_classes)]
        self.layers = nn.Sequential(*layers)

    def forward(self, images):
        return self.layers(images)


def learn(network, optimizer, images, labels, autocast=None) -> None:
    with autocast or contextlib.nullcontext():
        loss = F.cross_entropy(network(images), labels)
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()


class GaDistillation:
    """Sato et al.: each set (10, C, H, W) trains a network, which classifies all images.

    bfloat16: autocast. compiled: `torch.compile` of the network, which the first call does; each
    set then starts the one network anew.
    """

    def __init__(
        self,
        width,
        sets,
        steps,
        images,
        labels,
        batch_size,
        bfloat16=False,
        channels_last=False,
        compiled=False,
    ):
        self.format = torch.channels_last if channels_last else torch.contiguous_format
        self.sets = [own.contiguous(memory_format=self.format) for own in sets]
        self.width, self.steps, self.batch_size = width, steps, batch_size
        self.images, self.labels = images.contiguous(memory_format=self.format), labels
        self.autocast = torch.autocast(images.device.type, torch.bfloat16, enabled=bfloat16)
        self.compiled = torch.compile(self.made(), dynamic=False) if compiled else None

    def made(self):
        network = ConvNet(self.width, *self.images.shape[1:3])
        return network.to(self.images.device, memory_format=self.format)

    def fresh(self):
        if self.compiled is None:
            return self.made()
        for layer in self.compiled.modules():
            if isinstance(layer, nn.Conv2d | nn.GroupNorm | nn.Linear):
                layer.reset_parameters()
        return self.compiled

    def __call__(self) -> float:
        targets, correct = torch.arange(10, device=self.images.device), 0.0
        for images_of_set in self.sets:
            network = self.fresh()
            optimizer = torch.optim.Adam(network.parameters(), 1e-3)
            for _ in range(self.steps):
                learn(network, optimizer, images_of_set, targets, self.autocast)
            with self.autocast:
                correct += correctness(network, self.images, self.labels, self.batch_size)
        return correct


class Processes:
    """`GaDistillation` in so many processes of one thread each, the sets divided among them. They
    are started once; a call waits until all have done theirs."""

    def __init__(self, number, width, sets, *arguments, **settings):
        environment = os.environ | {"OMP_NUM_THREADS": "1"}
        self.processes = []
        for own in sets.tensor_split(min(number, len(sets))):
            command = [sys.executable, __file__]
            pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
            process = subprocess.Popen(command, env=environment, **pipes)
            message = io.BytesIO()  # of a view all of the tensor behind it would be sent
            torch.save(((width, own.clone(), *arguments), settings), message)
            process.stdin.write(b"%d\n" % message.tell() + message.getvalue())
            self.processes.append(process)

    def __call__(self) -> float:
        for process in self.processes:
            process.stdin.write(b"once\n")
            process.stdin.flush()
        return sum(float(process.stdout.readline()) for process in self.processes)

    def close(self) -> None:
        for process in self.processes:
            process.communicate()


def serve() -> None:
    """Be one of `Processes`: a line for each line."""
    torch.set_num_threads(1)
    message = sys.stdin.buffer.read(int(sys.stdin.buffer.readline()))
    arguments, settings = torch.load(io.BytesIO(message), weights_only=True)
    loop = GaDistillation(*arguments, **settings)
    for _ in sys.stdin.buffer:
        print(loop(), flush=True)


def correctness(network, images, labels, batch_size: int) -> float:
    """Images that it classifies as labelled."""
    network.eval()
    correct = torch.zeros((), device=images.device)
    with torch.no_grad():
        for own, own_labels in zip(images.split(batch_size), labels.split(batch_size), strict=True):
            correct += (network(own).argmax(1) == own_labels).sum()
    network.train()
    return float(correct)


class Cest:
    """CEST: a network that goes on learning from subsets, which DEAP evolves."""

    def __init__(self, width, images, labels, validation, validation_labels, fraction=0.25):
        from deap import base, creator, tools  # of this case alone

        self.images, self.labels = images, labels
        self.validation = validation, validation_labels
        self.network = VGG10(width, images.shape[1])
        self.optimizer = torch.optim.Adam(self.network.parameters(), 1e-3)
        number = len(images)
        creator.create("Fitness", base.Fitness, weights=(1.0,))
        creator.create("Prey", list, fitness=creator.Fitness)
        self.tools, self.best = base.Toolbox(), tools.selBest
        self.tools.register("index", random.randrange, number)
        size = round(fraction * number)
        self.tools.register("prey", tools.initRepeat, creator.Prey, self.tools.index, size)
        self.tools.register("mate", tools.cxTwoPoint)
        self.tools.register("mutate", tools.mutUniformInt, low=0, up=number - 1, indpb=0.05)
        self.tools.register("select", tools.selTournament, tournsize=3)
        self.prey = [self.tools.prey() for _ in range(50)]

    def losses(self) -> np.ndarray:
        self.network.eval()
        with torch.no_grad():
            found = [
                F.cross_entropy(self.network(own), labels, reduction="none")
                for own, labels in zip(self.images.split(500), self.labels.split(500), strict=True)
            ]
        self.network.train()
        return torch.cat(found).numpy()

    def evolve(self, losses: np.ndarray, generations: int) -> None:
        def judge(prey):
            for one in prey:
                one.fitness.values = (losses[one].mean(),)

        judge(self.prey)
        for _ in range(generations):
            children = [
                self.tools.clone(one) for one in self.tools.select(self.prey, len(self.prey))
            ]
            for first, second in zip(children[::2], children[1::2], strict=True):
                if random.random() < 0.5:
                    self.tools.mate(first, second)
            for one in children:
                if random.random() < 0.2:
                    self.tools.mutate(one)
            judge(children)
            self.prey = self.best(self.prey + children, len(self.prey))

    def __call__(self, epochs: int, generations: int = 20) -> None:
        """A selection and the epochs after it."""
        self.evolve(self.losses(), generations)
        chosen = torch.tensor(self.prey[0])
        for _ in range(epochs):
            for batch in chosen[torch.randperm(len(chosen))].split(64):
                learn(self.network, self.optimizer, self.images[batch], self.labels[batch])
            correctness(self.network, *self.validation, 500)


class Ecomp:
    """EComp: each child is compared with its parent by t-SNE's divergence, layer by layer, as
    the released program does with scikit-learn. Selection, crossover and mutation are left out."""

    def __init__(self, parent, networks, images, labels, perplexity=30.0):
        self.networks, self.images, self.labels = networks, images, labels
        self.perplexity = perplexity
        self.targets = [self.joint(values) for values in self.forward(parent)[0]]

    def forward(self, network):
        hidden, values = [], self.images
        for weight, bias in network[:-1]:
            values = torch.relu(F.linear(values, weight, bias))
            hidden.append(values)
        return hidden, F.linear(values, *network[-1])

    def joint(self, activations):
        distances = torch.cdist(activations, activations).square().numpy()
        return _joint_probabilities(distances, self.perplexity, 0)

    def __call__(self) -> list[float]:
        """The fitness of every network, weights 1, 2 and 1."""
        fitness = []
        with torch.no_grad():
            for network in self.networks:
                hidden, logits = self.forward(network)
                loss = 0.0
                for target, activations in zip(self.targets, hidden, strict=True):
                    other = self.joint(activations)  # of each pair of images, once
                    loss += 2 * float((target * np.log(target / other)).sum())
                accuracy = float((logits.argmax(1) == self.labels).float().mean())
                size = sum(len(bias) for _, bias in network[:-1]) / 512
                fitness.append(accuracy - 2 * loss + 1 - size)
        return fitness


class Devs:
    """DEvS: a reduction of a set to clusters of its features."""

    def __init__(self, width, images, labels):
        self.images, self.labels, self.width = images, labels, width

    def augmented(self, images, labels, shift=5, alpha=0.4):
        number, channels, height, width = images.shape
        places = torch.arange(number)[:, None, None, None]
        moved = torch.randint(0, 2 * shift + 1, (2, number, 1, 1, 1))
        rows = moved[0] + torch.arange(height)[:, None]
        columns = moved[1] + torch.arange(width)
        padded = F.pad(images, (shift,) * 4)
        images = padded[places, torch.arange(channels)[:, None, None], rows, columns]
        images = torch.where(torch.rand(number, 1, 1, 1) < 0.5, images.flip(3), images)
        part = float(np.random.beta(alpha, alpha))
        other = torch.randperm(number)
        mixed = part * images + (1 - part) * images[other]
        return mixed, part * labels + (1 - part) * labels[other]

    def __call__(self, epochs: int, size: int, batch_size: int = 256):
        network = ConvNet(self.width, *self.images.shape[1:3], bottleneck=128, dropout=0.2)
        for layer in network.modules():
            if isinstance(layer, nn.Conv2d | nn.Linear):
                nn.init.kaiming_normal_(layer.weight)
        optimizer = torch.optim.SGD(network.parameters(), 0.05, momentum=0.9, weight_decay=5e-4)
        for _ in range(epochs):
            for batch in torch.randperm(len(self.images)).split(batch_size):
                learn(network, optimizer, *self.augmented(self.images[batch], self.labels[batch]))
        network.eval()
        with torch.no_grad():
            features = torch.cat([network.features(own) for own in self.images.split(500)])
        model = MiniBatchKMeans(size, n_init=1, batch_size=1028, max_iter=200, tol=1e-4)
        assignments = torch.from_numpy(model.fit_predict(features.numpy())).long()
        counts = torch.bincount(assignments, minlength=size).clamp(min=1)
        return tuple(
            torch.zeros(size, *values.shape[1:]).index_add_(0, assignments, values)
            / counts.view(-1, *[1] * (values.ndim - 1))
            for values in (self.images, self.labels)
        )


if __name__ == "__main__":
    serve()
