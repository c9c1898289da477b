"""PyTorch's modules as graphs, and back. PyTorch is imported where a function here is called; the
package does not depend on it."""

from __future__ import annotations

import operator
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from evojax_suite.systems.ecomp.graph import Graph, Node


def to_graph(module: Any, image_shape: tuple[int, int, int]) -> Graph:
    """The graph of a PyTorch module in its evaluation mode, for `graph.save` and `--parent`.

    module: computes logits of images (N, C, H, W) by convolutions of odd size that keep the size
    but for their stride, batch norms after them, ReLU, 2x2 pooling or the mean over all pixels,
    additions, flattening and linear layers, as networks like VGG and ResNet do; it is traced by
    `torch.fx`. image_shape: height, width, channels. Raises ValueError for anything else.
    """
    import torch

    traced = torch.fx.symbolic_trace(module.eval())
    return _Translation(image_shape, dict(traced.named_modules())).graph(traced.graph.nodes)


class _Translation:
    """The nodes of a traced module, one after the other."""

    def __init__(self, image_shape: tuple[int, int, int], modules: dict[str, Any]):
        self.image_shape, self.modules = image_shape, modules
        self.nodes: list[Node] = []
        self.value_of: dict[Any, int] = {}

    def graph(self, traced: Any) -> Graph:
        for one in traced:
            if one.op == "placeholder":
                self.value_of[one] = 0
            elif one.op != "output":
                self.value_of[one] = self.value(one)
            elif self.value_of[one.args[0]] != len(self.nodes):
                raise ValueError("the module must end with its last layer")
        return tuple(self.nodes)

    def value(self, one: Any) -> int:
        """Translate an operation; returns the value that it computes."""
        import torch
        from torch import nn

        module = self.modules.get(one.target) if one.op == "call_module" else None
        name = one.target if one.op == "call_method" else getattr(one.target, "__name__", "")
        source = self.value_of[one.args[0]] if one.args else 0
        match module:
            case nn.Conv2d() | nn.Linear():
                return self.layer(module, source)
            case nn.BatchNorm2d():
                return self.changed(one, lambda node: _folded(node, module))
            case nn.ReLU():
                return self.changed(one, lambda node: replace(node, relu=True))
            case nn.MaxPool2d() | nn.AvgPool2d():
                if module.kernel_size not in (2, (2, 2)) or module.stride not in (2, (2, 2)):
                    raise ValueError(f"pooling must be over 2x2 pixels, got {module}")
                kind = "max" if isinstance(module, nn.MaxPool2d) else "average"
                return self.changed(one, lambda node: replace(node, pooling=kind))
            case nn.AdaptiveAvgPool2d() if module.output_size in (1, (1, 1)):
                return self.changed(one, lambda node: replace(node, pooling="global"))
            case nn.Flatten() | nn.Dropout() | nn.Identity():
                return source
            case None if one.target in (operator.add, operator.iadd, torch.add):
                return self.sum(one)
            case None if name in ("relu", "relu_"):
                return self.changed(one, lambda node: replace(node, relu=True))
            case None if name in ("flatten", "view", "reshape"):
                return source
            case None if name == "mean" and {*one.args[1]} in ({2, 3}, {-2, -1}):
                return self.changed(one, lambda node: replace(node, pooling="global"))
            case _:
                raise ValueError(f"there is no node for {module or name} of the module")

    def layer(self, module: Any, source: int) -> int:
        weight = module.weight.detach().cpu().numpy().astype(np.float32)
        size = len(weight)
        bias = np.zeros(size, np.float32) if module.bias is None else module.bias.detach().cpu()
        node = Node(weight, np.asarray(bias, np.float32), source=source, relu=False)
        if weight.ndim == 4:
            height, width = weight.shape[2:]
            fits = module.padding in ("same", (height // 2, width // 2)) and module.groups == 1
            if height != width or not height % 2 or not fits or module.dilation != (1, 1):
                raise ValueError(f"a convolution must be odd, padded by its half, got {module}")
            if module.stride[0] != module.stride[1]:
                raise ValueError(f"a convolution's strides must be equal, got {module}")
            node = replace(node, stride=module.stride[0])
        elif source == 0:  # PyTorch flattens channels first
            height, width, channels = self.image_shape
            weight = weight.reshape(size, channels, height, width)
            node = replace(node, weight=np.moveaxis(weight, 1, -1).reshape(size, -1))
        elif self.nodes[source - 1].weight.ndim == 4 and self.nodes[source - 1].pooling != "global":
            filters = len(self.nodes[source - 1].bias)
            node = replace(node, weight=weight.reshape(size, filters, -1))
        self.nodes.append(node)
        return len(self.nodes)

    def changed(self, one: Any, change: Any) -> int:
        """The value of a node after what directly follows it."""
        value = self.value_of[one.args[0]]
        if not value or len(one.args[0].users) > 1:
            raise ValueError(f"{one} must follow a layer whose output nothing else takes")
        self.nodes[value - 1] = change(self.nodes[value - 1])
        return value

    def sum(self, one: Any) -> int:
        """An addition belongs to the later of its two layers."""
        first, second = sorted(self.value_of[each] for each in one.args)
        node = self.nodes[second - 1]
        if not second or node.relu or node.pooling != "none" or node.add is not None:
            raise ValueError(f"{one} must add something to the output of a layer")
        self.nodes[second - 1] = replace(node, add=first)
        return second


def _folded(node: Node, norm: Any) -> Node:
    """A node with the batch norm that follows it."""
    if node.relu or node.pooling != "none" or node.add is not None:
        raise ValueError(f"a batch norm must directly follow its convolution, got {norm}")
    arrays = (norm.weight, norm.bias, norm.running_mean, norm.running_var)
    scale, shift, mean, variance = (each.detach().cpu().numpy() for each in arrays)
    factor = scale / np.sqrt(variance + norm.eps)
    weight = node.weight * factor[:, None, None, None]
    return replace(node, weight=weight, bias=(node.bias - mean) * factor + shift)


def to_module(graph: Graph, inputs_kept: Sequence[int] | None = None) -> Any:
    """The PyTorch module of a graph: images (N, C, H, W) -> logits (N, classes)."""
    import torch
    from torch import nn
    from torch.nn import functional

    class Pruned(nn.Module):
        """The nodes of a graph, by number."""

        def __init__(self):
            super().__init__()
            for index, node in enumerate(graph):
                weight = np.asarray(node.weight)
                weight = weight.reshape(len(weight), -1) if weight.ndim == 3 else weight
                outputs, inputs, *size = weight.shape
                about = {"padding": size[0] // 2, "stride": node.stride} if size else {}
                kind = nn.Conv2d if size else nn.Linear
                layer = kind(inputs, outputs, *size[:1], **about)
                layer.weight = nn.Parameter(torch.tensor(weight))
                layer.bias = nn.Parameter(torch.tensor(np.asarray(node.bias)))
                self.add_module(str(index), layer)

        def forward(self, images: torch.Tensor) -> torch.Tensor:
            values = [images]
            if graph[0].weight.ndim == 2:  # flattened row by row, channels last
                values = [images.movedim(1, -1).flatten(1)]
                if inputs_kept is not None:
                    values = [values[0][:, list(inputs_kept)]]
            for index, node in enumerate(graph):
                source = values[node.source]
                source = source if node.weight.ndim == 4 else source.flatten(1)
                output = self.get_submodule(str(index))(source)
                output = output if node.add is None else output + values[node.add]
                output = functional.relu(output) if node.relu else output
                pools = {"max": functional.max_pool2d, "average": functional.avg_pool2d}
                if node.pooling in pools:
                    output = pools[node.pooling](output, 2)
                elif node.pooling == "global":
                    output = output.mean((2, 3))
                values.append(output)
            return values[-1]

    return Pruned()
