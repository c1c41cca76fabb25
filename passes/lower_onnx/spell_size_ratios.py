"""A tensor times a ratio of sizes -> times a tensor of that value: torch.onnx.export takes no computed floats."""

from __future__ import annotations

import operator

import torch
from torch.fx import Graph, Node

_OPS = (torch.ops.aten.mul.Tensor, torch.ops.aten.add.Tensor, torch.ops.aten.sub.Tensor, torch.ops.aten.div.Tensor)


def spell_size_ratios(graph: Graph) -> None:
    """Rewrite in place. A tensor without dimensions promotes as a Python number does, so no dtype changes."""
    for target in _OPS:
        for node in graph.find_nodes(op="call_function", target=target):
            number = node.args[1]
            if isinstance(number, Node) and _is_ratio(number):
                with graph.inserting_before(node):
                    tensor = graph.call_function(torch.ops.aten.scalar_tensor.default, (number,))
                node.args = (node.args[0], tensor)


def _is_ratio(node: Node) -> bool:
    return node.target is operator.truediv or isinstance(node.meta.get("val"), torch.SymFloat)
