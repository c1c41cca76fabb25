"""Ops of ours become placeholders, in place."""

from __future__ import annotations

import torch

from sparsify.passes.find_layers import find_layers
from sparsify.passes.lower_onnx.emit_placeholders import emit_placeholders


def test_leaves_no_op_of_ours(sparse_transformer) -> None:
    """A leftover op fails in torch.onnx.export; the activation nodes of the model stay between the placeholders."""
    sparse = sparse_transformer()
    emit_placeholders(sparse.graph, find_layers(sparse, sparse.graph))
    namespaces = {getattr(node.target, "namespace", None) for node in sparse.graph.nodes}
    assert "sparsify" not in namespaces
    ours = [node for node in sparse.graph.nodes if getattr(node.target, "__module__", "").endswith("emit_placeholders")]
    assert len(ours) == 2 * 4
    assert len(sparse.graph.find_nodes(op="call_function", target=torch.ops.aten.relu.default)) == 2
