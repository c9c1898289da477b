"""Graphs of layers: their files, and PyTorch's networks as graphs and back."""

from __future__ import annotations

import json

import jax
import numpy as np
import pytest
import safetensors.numpy

from evojax_suite.cli.main import main
from evojax_suite.data import load
from evojax_suite.systems.ecomp import from_torch, graph as graphs

torch = pytest.importorskip("torch")
nn = torch.nn


class Block(nn.Module):
    """As in ResNet: two convolutions and what they are added to, by a projection if the size
    changes."""

    def __init__(self, before, after, stride):
        super().__init__()
        self.conv1 = nn.Conv2d(before, after, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(after)
        self.conv2 = nn.Conv2d(after, after, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(after)
        self.relu = nn.ReLU(inplace=True)
        self.shortcut = nn.Identity()
        if stride > 1 or before != after:
            project = nn.Conv2d(before, after, 1, stride, bias=False)
            self.shortcut = nn.Sequential(project, nn.BatchNorm2d(after))

    def forward(self, x):
        out = self.bn2(self.conv2(self.relu(self.bn1(self.conv1(x)))))
        out += self.shortcut(x)
        return self.relu(out)


def residual_network():
    stem = nn.Conv2d(1, 6, 3, 1, 1, bias=False), nn.BatchNorm2d(6), nn.ReLU()
    blocks = Block(6, 6, 1), Block(6, 8, 2)
    return nn.Sequential(*stem, *blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 10))


def vgg():
    return nn.Sequential(
        *(nn.Conv2d(1, 6, 3, padding=1), nn.BatchNorm2d(6), nn.ReLU(), nn.MaxPool2d(2)),
        *(nn.Conv2d(6, 8, 5, padding=2), nn.ReLU(), nn.AvgPool2d(2), nn.Dropout()),
        *(nn.Flatten(), nn.Linear(32, 12), nn.ReLU(), nn.Linear(12, 10)),
    )


def perceptron():
    return nn.Sequential(nn.Flatten(), nn.Linear(192, 12), nn.ReLU(), nn.Linear(12, 10))


def prepared(make, seed=0):
    """A network in evaluation mode whose batch norms have seen something."""
    torch.manual_seed(seed)
    module = make()
    for one in module.modules():
        if isinstance(one, nn.BatchNorm2d):
            one.running_mean.uniform_(-0.5, 0.5)
            one.running_var.uniform_(0.5, 2.0)
            one.weight.data.uniform_(0.5, 2.0)
            one.bias.data.uniform_(-0.5, 0.5)
    return module.eval()


@pytest.mark.parametrize("make", [residual_network, vgg, perceptron])
def test_a_module_its_graph_and_the_module_of_that_compute_the_same(make, tmp_path):
    channels = 3 if make is perceptron else 1
    module, shape = prepared(make), (8, 8, channels)
    graph = from_torch.to_graph(module, shape)
    graphs.save(tmp_path / "parent.safetensors", graph)
    read = graphs.load(tmp_path / "parent.safetensors", shape, len(graph[-1].bias))
    assert jax.tree.structure(read) == jax.tree.structure(graph)
    images = np.random.default_rng(0).normal(size=(5, *shape)).astype(np.float32)
    tensor = torch.tensor(images).movedim(-1, 1)
    with torch.no_grad():
        expected = module(tensor).numpy()
        again = from_torch.to_module(read)(tensor).numpy()
    inputs = images if graph[0].is_convolution else images.reshape(5, -1)
    logits = graphs.forward(read, inputs)[0][-1]
    np.testing.assert_allclose(logits, expected, rtol=1e-3, atol=1e-4)
    np.testing.assert_allclose(again, expected, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("make", [residual_network, vgg, perceptron])
def test_layers_of_low_rank_come_back_as_a_module(make, tmp_path):
    shape = (8, 8, 3 if make is perceptron else 1)
    graph = from_torch.to_graph(prepared(make), shape)
    images = np.random.default_rng(0).normal(size=(40, *shape)).astype(np.float32)
    inputs = images if graph[0].is_convolution else images.reshape(40, -1)
    halves = graphs.decomposed(graph, inputs)
    between, sizes = graphs.groups_between(halves), graphs.group_sizes(halves)
    kept = [np.arange(2 if group in between else size) for group, size in enumerate(sizes)]
    small = graphs.as_one(graphs.part(jax.device_get(halves), kept))
    assert len(graph) < len(small) <= len(halves)
    graphs.save(tmp_path / "small.safetensors", small)
    read = graphs.load(tmp_path / "small.safetensors", shape, 10)
    with torch.no_grad():
        module = from_torch.to_module(read)(torch.tensor(images).movedim(-1, 1)).numpy()
    logits = graphs.forward(read, inputs)[0][-1]
    np.testing.assert_allclose(module, logits, rtol=1e-3, atol=1e-4)
    difference = np.abs(graphs.forward(graph, inputs)[0][-1] - logits).max()
    assert difference > 1e-3  # something was lost


def test_the_channels_along_a_skip_are_one_group():
    graph = from_torch.to_graph(prepared(residual_network), (8, 8, 1))
    assert graphs.group_sizes(graph) == (1, 6, 6, 8, 8)


class Shared(nn.Module):
    """A convolution whose output is taken before and after its ReLU."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(1, 4, 3, padding=1)
        self.head = nn.Linear(256, 10)

    def forward(self, x):
        x = self.conv(x)
        return self.head((torch.relu(x) + x).flatten(1))


@pytest.mark.parametrize(
    ("module", "said"),
    [
        (nn.Sequential(nn.Conv2d(1, 4, 3)), "padded by its half"),
        (nn.Sequential(nn.Conv2d(1, 4, 2, padding=1)), "must be odd"),
        (nn.Sequential(nn.Conv2d(1, 4, 3, padding=1), nn.MaxPool2d(3)), "over 2x2 pixels"),
        (nn.Sequential(nn.Conv2d(1, 4, 3, padding=1), nn.Sigmoid()), "no node for Sigmoid"),
        (Shared(), "whose output nothing else takes"),
    ],
)
def test_what_is_no_such_network_is_refused(module, said):
    with pytest.raises(ValueError, match=said):
        from_torch.to_graph(module, (8, 8, 1))


def test_a_parent_from_pytorch_is_pruned_and_goes_back(tmp_path):
    """A residual network, whose multiplications are the size; the run's network, as a module, has
    the accuracy of the summary."""
    path = tmp_path / "parent.safetensors"
    graphs.save(path, from_torch.to_graph(prepared(residual_network), (8, 8, 1)))
    command = [
        "ecomp", "--refit", "--dataset", "digits", "--parent", str(path), "--num-images", "400",
        "--search.population-size", "6", "--search.num-generations", "2",
        "--search.front-size", "3", "--search.size", "multiplications", "--search.largest", "0.9",
        "--search.smallest", "0.3", "--fine-tuning-seconds", "0.1",
        "--name", "run", "--runs-dir", str(tmp_path),
    ]  # fmt: skip
    assert main(command) == 0
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert summary["relative_multiplications"] <= 0.9
    graph = graphs.load(tmp_path / "run" / "network.safetensors", (8, 8, 1), 10)
    test = load("digits").test
    images = torch.tensor(test.images.astype(np.float32) / 255).movedim(-1, 1)
    with torch.no_grad():
        classes = from_torch.to_module(graph)(images).argmax(1).numpy()
    assert summary["test_accuracy"] == pytest.approx((classes == test.labels).mean(), abs=0.006)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"source": 4}, "node 1 does not fit the nodes before it"),
        ({"pooling": "sum"}, "pooling must be one of none, average, max, global, got 'sum'"),
        ({"add": 0}, "are added"),
        ({"stride": "2"}, "stride must be int"),
    ],
)
def test_damaged_nodes_are_one_line_and_exit_code_2(change, said, tmp_path, capsys):
    graph = from_torch.to_graph(prepared(vgg), (8, 8, 1))
    nodes = graphs.description(graph)
    nodes[1] |= change
    content = safetensors.numpy.save(graphs.arrays_of(graph), {"nodes": json.dumps(nodes)})
    path = tmp_path / "parent.safetensors"
    path.write_bytes(content)
    assert main(["ecomp", "--refit", "--dataset", "digits", "--parent", str(path)]) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert str(path) in error
    assert said in error


def test_only_the_search_with_refits_takes_a_graph(tmp_path, capsys):
    path = tmp_path / "parent.safetensors"
    graphs.save(path, from_torch.to_graph(prepared(vgg), (8, 8, 1)))
    assert main(["ecomp", "--dataset", "digits", "--parent", str(path)]) == 2
    assert "only --refit compresses" in capsys.readouterr().err
