"""ONNX model with placeholder nodes -> ONNX model with nodes that a runtime knows."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import onnx_ir as ir
from onnx_ir.passes import common
from onnx_ir.tape import Tape

from sparsify.passes.lower_onnx import moe_op
from sparsify.passes.lower_onnx.combine import lower_combine
from sparsify.passes.lower_onnx.dispatch import lower_dispatch
from sparsify.passes.lower_onnx.emit_placeholders import DOMAIN
from sparsify.passes.lower_onnx.expert_linear import lower_expert_linear
from sparsify.passes.lower_onnx.moe_op import lower_moe_op

_LOWERINGS: dict[str, Callable[[ir.Node, Tape], Sequence[ir.Value]]] = {
    "Dispatch": lower_dispatch,
    "ExpertLinear": lower_expert_linear,
    "Combine": lower_combine,
    "MoE": lower_moe_op,
}


def lower_placeholders(model: ir.Model) -> list[ir.Value]:
    """Lower every placeholder, in place, and drop what nothing reads any more.

    Args:
        model: from `torch.onnx.export` of a graph with placeholders (see `emit_placeholders`).

    Returns:
        The expert ids `[T, K]` of every layer, in the order of the graph. Names are final.
    """
    placeholders = [node for node in model.graph if node.domain == DOMAIN]
    expert_ids = [ids for node in placeholders if node.op_type in ("Dispatch", "MoE") and (ids := node.inputs[1])]
    for node in placeholders:
        _lower(model.graph, node)
    model.opset_imports.pop(DOMAIN, None)
    if any(node.domain == moe_op.DOMAIN for node in model.graph):
        model.opset_imports[moe_op.DOMAIN] = 1
    common.RemoveUnusedNodesPass()(model)
    common.NameFixPass()(model)
    return expert_ids


def _lower(graph: ir.Graph, node: ir.Node) -> None:
    tape = Tape()
    outputs = _LOWERINGS[node.op_type](node, tape)
    for initializer in tape.initializers:
        graph.initializers[str(initializer.name)] = initializer
    graph.insert_before(node, tape.nodes)
    for old, new in zip(node.outputs, outputs, strict=True):
        new.shape, new.type, new.name = old.shape, old.type, old.name
    ir.convenience.replace_all_uses_with(node.outputs, outputs, replace_graph_outputs=True)
    graph.remove(node, safe=True)
