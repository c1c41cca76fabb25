"""Ops of ours become placeholders, in place."""

from __future__ import annotations

import pytest
import torch

from sparsify.passes.find_layers import find_layers
from sparsify.passes.lower_onnx.choose_lowering import Lowering
from sparsify.passes.lower_onnx.emit_placeholders import emit_placeholders


@pytest.mark.parametrize(("lowering", "kept"), [("sorted_split", 4), ("moe_op", 1)])
def test_leaves_no_op_of_ours(sparse_transformer, lowering: Lowering, kept: int) -> None:
    """A leftover op fails in torch.onnx.export; activations stay only where the experts are split."""
    sparse = sparse_transformer()
    emit_placeholders(sparse.graph, [(layer, lowering) for layer in find_layers(sparse, sparse.graph)])
    namespaces = {getattr(node.target, "namespace", None) for node in sparse.graph.nodes}
    assert "sparsify" not in namespaces
    ours = [node for node in sparse.graph.nodes if getattr(node.target, "__module__", "").endswith("emit_placeholders")]
    assert len(ours) == 2 * kept
    relus = sparse.graph.find_nodes(op="call_function", target=torch.ops.aten.relu.default)
    assert len(relus) == (2 if lowering == "sorted_split" else 0)
