"""Attention over tensors of a rank other than 4, which torch.onnx.export lacks -> matrix products and a softmax."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch.fx import Graph, Node

from sparsify.passes.graph_values import fake_tensor

aten = torch.ops.aten
_DEFAULTS: dict[str, Any] = {
    "query": None,
    "key": None,
    "value": None,
    "attn_mask": None,
    "dropout_p": 0.0,
    "is_causal": False,
    "scale": None,
    "enable_gqa": False,
}


def spell_attention(graph: Graph) -> None:
    """Rewrite in place.

    softmax(Q K^T scale + mask) V, scale = 1 / sqrt(head size) by default (Vaswani et al. 2017, section 3.2.1). Causal
    attention of such a rank is left to the exporter, and so are values whose rank is not known.
    """
    for node in graph.find_nodes(op="call_function", target=aten.scaled_dot_product_attention.default):
        arguments = _arguments(node)
        query = fake_tensor(arguments["query"])
        if query is None or query.dim() == 4 or arguments["is_causal"] or arguments["enable_gqa"]:
            continue
        with graph.inserting_before(node):
            result = _spell(graph, arguments, arguments["scale"] or 1 / math.sqrt(query.shape[-1]))
        result.meta = node.meta.copy()
        node.replace_all_uses_with(result)
        graph.erase_node(node)


def _arguments(node: Node) -> dict[str, Any]:
    given = dict(zip(_DEFAULTS, node.args, strict=False)) | dict(node.kwargs)
    return {**_DEFAULTS, **given}


def _spell(graph: Graph, arguments: dict[str, Any], scale: float) -> Node:
    scaled = graph.call_function(aten.mul.Tensor, (arguments["query"], scale))
    keys = graph.call_function(aten.transpose.int, (arguments["key"], -2, -1))
    scores = graph.call_function(aten.matmul.default, (scaled, keys))
    mask = arguments["attn_mask"]
    if mask is not None:
        scores = _masked(graph, scores, mask)
    weights = graph.call_function(aten.softmax.int, (scores, -1))
    return graph.call_function(aten.matmul.default, (weights, arguments["value"]))


def _masked(graph: Graph, scores: Node, mask: Node) -> Node:
    value = fake_tensor(mask)
    if value is None or value.dtype != torch.bool:
        return graph.call_function(aten.add.Tensor, (scores, mask))
    hidden = graph.call_function(aten.logical_not.default, (mask,))
    return graph.call_function(aten.masked_fill.Scalar, (scores, hidden, -math.inf))
