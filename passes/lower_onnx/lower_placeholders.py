"""ONNX model with placeholder nodes -> ONNX model with nodes that a runtime knows."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import onnx_ir as ir
from onnx_ir.passes import common
from onnx_ir.tape import Tape

from sparsify.passes.lower_onnx import fused_op, moe_op
from sparsify.passes.lower_onnx.combine import lower_combine
from sparsify.passes.lower_onnx.dense_layer import lower_dense_layer
from sparsify.passes.lower_onnx.dense_masked import lower_dense_masked
from sparsify.passes.lower_onnx.dispatch import lower_dispatch
from sparsify.passes.lower_onnx.expert_chain import lower_expert_chain
from sparsify.passes.lower_onnx.expert_linear import lower_expert_linear
from sparsify.passes.lower_onnx.expert_region import DOMAIN, ExpertRegion, layer_of, put_nodes
from sparsify.passes.lower_onnx.lowerings import Lowering
from sparsify.passes.lower_onnx.moe_op import lower_moe_layer, lower_moe_op

_PLACEHOLDERS: dict[str, Callable[[ir.Node, Tape], Sequence[ir.Value]]] = {
    "Dispatch": lower_dispatch,
    "ExpertLinear": lower_expert_linear,
    "Combine": lower_combine,
    "MoE": lower_moe_op,
}
_SEQUENCE_OPS = ("SplitToSequence", "SequenceConstruct", "SequenceEmpty", "SequenceInsert", "SequenceErase")
_PARTS = {"Dispatch": "dispatch", "ExpertLinear": "experts", "Combine": "combine", "MoE": "experts"}
_LAYERS: dict[Lowering, Callable[[ExpertRegion], None]] = {
    "expert_chain": lower_expert_chain,
    "dense_masked": lower_dense_masked,
    "moe_op": lower_moe_layer,
    "fused_op": fused_op.lower_fused_op,
    "dense": lower_dense_layer,
    "original": lower_dense_layer,  # its experts hold the weights of the original by then
}


def lower_layer(region: ExpertRegion, lowering: Lowering) -> None:
    """Replace the placeholders of a layer that are lowered together; "sorted_split" lowers each by itself."""
    lower = _LAYERS.get(lowering)
    if lower is not None:
        lower(region)


def lower_placeholders(model: ir.Model) -> None:
    """Lower every placeholder that is left, in place, and drop what nothing reads any more.

    Args:
        model: from `torch.onnx.export` of a graph with placeholders (see `emit_placeholders`).
    """
    for node in [node for node in model.graph if node.domain == DOMAIN]:
        _lower(model.graph, node)
    model.opset_imports.pop(DOMAIN, None)
    for domain in {node.domain for node in model.graph} & {moe_op.DOMAIN, fused_op.DOMAIN}:
        model.opset_imports[domain] = 1
    common.RemoveUnusedNodesPass()(model)
    common.LiftConstantsToInitializersPass(lift_all_constants=True, size_limit=0)(model)
    common.DeduplicateInitializersPass()(model)  # all layers share the small numbers that they reshape by
    common.NameFixPass()(model)
    # onnxruntime loads a file a fifth faster whose shapes are all noted. What the exporter knows better stays.
    common.ShapeInferencePass(check_type=False, strict_mode=False, data_prop=True)(model)
    for value in (value for node in model.graph if node.op_type in _SEQUENCE_OPS for value in node.outputs):
        value.type, value.shape = None, None  # the exporter takes a sequence for a tensor, which onnxruntime refuses


def _lower(graph: ir.Graph, node: ir.Node) -> None:
    tape = Tape()
    outputs = _PLACEHOLDERS[node.op_type](node, tape)
    values = dict(zip(node.outputs, outputs, strict=True))
    put_nodes(graph, tape, node, f"{layer_of(node)}.{_PARTS[node.op_type]}", values)
    graph.remove(node, safe=True)
