"""Writes convnet.npz: what PyTorch computes for the ConvNet of the distillation literature.

Run it by hand with PyTorch installed; the tests read the file alone. For images of 28x28x1 with
hard labels and of 32x32x3 with soft ones it holds the images, the labels, the weights, the logits,
the gradient of the cross-entropy and the weights and logits after one step of Adam. Weights are in
the layout and under the names of the flax module.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from torch import nn

WIDTH, DEPTH, NUM_CLASSES, NUM_IMAGES = 8, 3, 10, 4


def build(size: int, channels: int) -> nn.Sequential:
    layers, inputs, padding = [], channels, 3 if size == 28 else 1
    for _ in range(DEPTH):
        layers += [
            nn.Conv2d(inputs, WIDTH, 3, padding=padding),
            nn.GroupNorm(WIDTH, WIDTH, affine=True),
            nn.ReLU(),
            nn.AvgPool2d(2, 2),
        ]
        inputs, padding = WIDTH, 1
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(WIDTH * 4 * 4, NUM_CLASSES))


def to_flax(network: nn.Sequential, tensors: dict[str, torch.Tensor]) -> dict[str, np.ndarray]:
    """Tensors under PyTorch's names in the layout and under the names of flax."""
    arrays, counts = {}, {}
    for index, layer in enumerate(network):
        kind = {nn.Conv2d: "Conv", nn.GroupNorm: "GroupNorm", nn.Linear: "Dense"}.get(type(layer))
        if kind is None:
            continue
        name = f"{kind}_{counts.setdefault(kind, 0)}"
        counts[kind] += 1
        weight, bias = tensors[f"{index}.weight"].detach(), tensors[f"{index}.bias"].detach()
        if kind == "Conv":
            weight = weight.permute(2, 3, 1, 0)  # (F, C, K, K) -> (K, K, C, F)
        elif kind == "Dense":  # columns in the order C, H, W -> rows in the order H, W, C
            weight = weight.reshape(NUM_CLASSES, WIDTH, 4, 4).permute(2, 3, 1, 0)
            weight = weight.reshape(-1, NUM_CLASSES)
        arrays[f"{name}/{'scale' if kind == 'GroupNorm' else 'kernel'}"] = weight.numpy().copy()
        arrays[f"{name}/bias"] = bias.numpy().copy()
    return arrays


def reference(seed: int, size: int, channels: int, soft: bool) -> dict[str, np.ndarray]:
    torch.manual_seed(seed)
    network = build(size, channels)
    with torch.no_grad():  # an affine part that does something
        for layer in network:
            if isinstance(layer, nn.GroupNorm):
                layer.weight.uniform_(0.5, 1.5)
                layer.bias.uniform_(-0.5, 0.5)
    images = torch.randn(NUM_IMAGES, channels, size, size)
    labels = torch.softmax(torch.randn(NUM_IMAGES, NUM_CLASSES), 1) if soft else torch.arange(4)
    before = to_flax(network, network.state_dict())
    optimizer = torch.optim.Adam(network.parameters(), lr=1e-3, betas=(0.9, 0.999), eps=1e-8)
    logits = network(images)
    nn.functional.cross_entropy(logits, labels).backward()
    gradient = to_flax(network, {name: p.grad for name, p in network.named_parameters()})
    optimizer.step()
    results = {
        "images": images.permute(0, 2, 3, 1).numpy(),
        "labels": labels.numpy().astype(np.float32 if soft else np.int32),
        "logits": logits.detach().numpy(),
        "logits_after": network(images).detach().numpy(),
    }
    after = to_flax(network, network.state_dict())
    for group, arrays in (("before", before), ("gradient", gradient), ("after", after)):
        results |= {f"{group}/{name}": array for name, array in arrays.items()}
    return results


def main() -> None:
    arrays = {}
    for seed, (size, channels, soft) in enumerate(((28, 1, False), (32, 3, True))):
        for name, array in reference(seed, size, channels, soft).items():
            arrays[f"{size}x{size}x{channels}/{name}"] = array
    np.savez_compressed(Path(__file__).with_name("convnet.npz"), **arrays)


if __name__ == "__main__":
    main()
