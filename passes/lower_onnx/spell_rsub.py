"""`number - tensor` -> `tensor * -1 + number`, where their kinds differ: torch.onnx.export cannot take the first."""

from __future__ import annotations

import torch
from torch.fx import Graph

_RSUB = torch.ops.aten.rsub.Scalar


def spell_rsub(graph: Graph) -> None:
    """Rewrite, in place, a float minus what may be an integer tensor, such as `1.0 - attention_mask`.

    The product with a float is a float, so the result has the same kind and, as changing a sign is exact, value.
    """
    for node in graph.find_nodes(op="call_function", target=_RSUB):
        if len(node.args) != 2 or not isinstance(node.args[1], float):
            continue
        x, number = node.args
        with graph.inserting_before(node):
            negative = graph.call_function(torch.ops.aten.mul.Tensor, (x, -1.0))
        node.target, node.args = torch.ops.aten.add.Tensor, (negative, number)
        negative.meta = node.meta.copy()
