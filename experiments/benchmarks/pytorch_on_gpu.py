"""Sato et al.'s members by PyTorch on a GPU, each way that an informed user would try.

All do the work of `pytorch_loops.ga_distillation`: a fresh ConvNet-3 for each set, full-batch Adam,
then all images classified. `VARIANTS` maps a name to a function of (width, sets, steps, images,
labels, batch_size) that returns the number of images classified right; sets (members, 10, C, H, W),
images (N, C, H, W) and labels (N,) are on the device.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F
from pytorch_loops import ConvNet
from torch import Tensor, nn
from torch.func import functional_call, stack_module_state


@contextlib.contextmanager
def precision(tf32: bool, bfloat16: bool, device: torch.device) -> Iterator[None]:
    """float32 products in TF32 or not, and autocast to bfloat16 or not."""
    before = torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = tf32
    try:
        with torch.autocast(device.type, torch.bfloat16, enabled=bfloat16):
            yield
    finally:
        torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = before


def network_for(width: int, sets: Tensor, channels_last: bool) -> nn.Module:
    network = ConvNet(width, sets.shape[-3], sets.shape[-1]).to(sets.device)
    return network.to(memory_format=torch.channels_last) if channels_last else network


def number_correct(network: nn.Module, images: Tensor, labels: Tensor, batch_size: int) -> Tensor:
    correct = torch.zeros((), device=images.device)
    with torch.no_grad():
        for own, own_labels in zip(images.split(batch_size), labels.split(batch_size), strict=True):
            correct += (network(own).argmax(1) == own_labels).sum()
    return correct


def loop(
    tf32: bool = True,
    bfloat16: bool = False,
    channels_last: bool = False,
    compiled: str | None = None,
) -> Callable[..., float]:
    """One member after the other, eager or through `torch.compile` of that mode."""

    def run(width, sets, steps, images, labels, batch_size) -> float:
        targets, total = torch.arange(sets.shape[1], device=sets.device), 0.0
        if channels_last:
            images = images.contiguous(memory_format=torch.channels_last)
        network = network_for(width, sets, channels_last)
        forward = torch.compile(network, mode=compiled) if compiled else network
        with precision(tf32, bfloat16, sets.device):
            for own in sets:
                for layer in network.modules():
                    if hasattr(layer, "reset_parameters"):
                        layer.reset_parameters()
                optimizer = torch.optim.Adam(
                    network.parameters(), 1e-3, fused=sets.device.type == "cuda"
                )
                for _ in range(steps):
                    loss = F.cross_entropy(forward(own), targets)
                    optimizer.zero_grad()
                    loss.backward()
                    optimizer.step()
                total += float(number_correct(forward, images, labels, batch_size))
        return total

    return run


def cuda_graph(width, sets, steps, images, labels, batch_size) -> float:
    """bfloat16, channels last, a training step captured once and replayed for every member."""
    device, total = sets.device, 0.0
    targets = torch.arange(sets.shape[1], device=device)
    images = images.contiguous(memory_format=torch.channels_last)
    network = network_for(width, sets, channels_last=True)
    optimizer = torch.optim.Adam(network.parameters(), 1e-3, capturable=True, fused=True)
    own = sets[0].clone(memory_format=torch.channels_last)

    def step():
        loss = F.cross_entropy(network(own), targets)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()

    with precision(True, True, device):
        beside = torch.cuda.Stream()
        beside.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(beside):
            for _ in range(3):
                step()
        torch.cuda.current_stream().wait_stream(beside)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            step()
        for images_of_set in sets:
            own.copy_(images_of_set)
            fresh = network_for(width, sets, channels_last=True)
            with torch.no_grad():
                for old, new in zip(network.parameters(), fresh.parameters(), strict=True):
                    old.copy_(new)
                for state in optimizer.state.values():
                    for value in state.values():
                        value.zero_()
            for _ in range(steps):
                graph.replay()
            total += float(number_correct(network, images, labels, batch_size))
    return total


def vmapped(width, sets, steps, images, labels, batch_size) -> float:
    """`torch.func`: all members as one stacked network under `vmap`, bfloat16."""
    members, number = sets.shape[:2]
    networks = [network_for(width, sets, channels_last=False) for _ in range(members)]
    stacked, _ = stack_module_state(networks)
    stacked = {name: value.detach().requires_grad_() for name, value in stacked.items()}
    skeleton = network_for(width, sets, channels_last=False)
    targets = torch.arange(number, device=sets.device).repeat(members)
    own_cuda = sets.device.type == "cuda"
    optimizer = torch.optim.Adam(list(stacked.values()), 1e-3, fused=own_cuda)

    def forward(parameters, own):
        return functional_call(skeleton, parameters, (own,))

    with precision(True, True, sets.device):
        together = torch.vmap(forward)
        for _ in range(steps):
            logits = together(stacked, sets)
            loss = F.cross_entropy(logits.flatten(0, 1), targets, reduction="sum") / number
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        correct = torch.zeros((), device=sets.device)
        with torch.no_grad():
            for member in range(members):
                own = {name: value[member] for name, value in stacked.items()}
                for some, some_labels in zip(
                    images.split(batch_size), labels.split(batch_size), strict=True
                ):
                    correct += (forward(own, some).argmax(1) == some_labels).sum()
    return float(correct)


VARIANTS: dict[str, Callable[..., float]] = {
    "float32": loop(tf32=False),
    "TF32": loop(),
    "bfloat16": loop(bfloat16=True),
    "bfloat16, channels last": loop(bfloat16=True, channels_last=True),
    "bfloat16, CUDA graph": cuda_graph,
    "bfloat16, vmap": vmapped,
    "bfloat16, torch.compile": loop(bfloat16=True, channels_last=True, compiled="default"),
    "bfloat16, torch.compile with CUDA graphs": loop(
        bfloat16=True, channels_last=True, compiled="reduce-overhead"
    ),
}
