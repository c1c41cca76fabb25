"""A whole layer -> one `ai.sparsify::MoE`, the fused kernel of `sparsify/cpu` as an op of onnxruntime.

    y = sum over k of routing_weights[:, k] * down(act(up x) [* act(gate x)]), expert by expert     # see cpu/onnx_moe.h

Only the chosen experts are computed, in one call without a node for each: exact for any routing weights, unused slots
(-1) and experts of several widths. A session must register the library of `onnx_ops_library`.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import torch
from onnx_ir.tape import Tape

from sparsify.cpu.blocks import in_blocks, stay_in_rows
from sparsify.passes.lower_onnx.expert_region import ExpertRegion, is_linear
from sparsify.passes.lower_onnx.fused_router import lower_router
from sparsify.passes.lower_onnx.values import dtype_of, input_of, optional_input, packed, stored

DOMAIN = "ai.sparsify"
_BIAS, _ADDED = 9, 10  # inputs of the op


def lower_fused_op(region: ExpertRegion) -> None:
    """Replace all nodes of the layer, in place.

    Args:
        region: a layer for which `why_not_fused_op` knows no reason.
    """
    lower_router(region, DOMAIN)
    tape = Tape()
    linears = sorted(filter(is_linear, region.inner), key=lambda node: node.attributes["gate"].as_int())
    projections = [value for node in linears for value in _projection(tape, region.graph, node)]
    gate = [None] * (4 - len(projections))
    down, down_bias = _in_blocks(tape, region.graph, region.down)
    if down_bias is None:
        down_bias = _zero_bias(tape, region.graph, input_of(region.down, 1))
    weights = None if region.unit_weights else _in_fp32(tape, input_of(region.combine, 1))
    inputs = [*region.dispatch.inputs[:2], weights, *projections, *gate, down, down_bias]
    activation = region.dispatch.attributes["function"].as_string()
    y = tape.op("MoE", [*inputs, None, None], {"activation": activation}, domain=DOMAIN, version=1)
    region.replace(tape, {region.combine.outputs[0]: y})
    for _ in (_BIAS, _ADDED):
        _take_sum(y)


def has_own_ops(model: onnx.ModelProto) -> bool:
    """A session for this file must register `onnx_ops_library`."""
    return any(entry.domain == DOMAIN for entry in model.opset_import)


def uses_own_ops(file: Path) -> bool:
    """`has_own_ops` of a file."""
    return has_own_ops(onnx.load(str(file), load_external_data=False))


def _take_sum(y: ir.Value) -> None:
    """Have the op add a bias `[N]` or rows `[T, N]`, where nothing else is done with its output `[T, N]`."""
    op, uses = y.producer(), list(y.uses())
    if op is None or len(uses) != 1 or y.is_graph_output() or uses[0].node.op_type != "Add":
        return
    add = uses[0].node
    other, graph, total = add.inputs[1 - uses[0].idx], add.graph, add.outputs[0]
    if other is None or graph is None or y.shape is None or other.shape is None or other.shape.has_unknown_dim():
        return
    shapes = [tuple(map(str, shape)) for shape in (y.shape[1:], y.shape)]  # symbolic sizes are equal by name
    own = tuple(map(str, other.shape))
    place = (_BIAS, _ADDED)[shapes.index(own)] if own in shapes else None
    if place is None or op.inputs[place] is not None:
        return
    op.replace_input_with(place, other)
    graph.remove(op)
    graph.insert_before(add, op)  # when the other is there
    y.name, total.name = total.name, None
    ir.convenience.replace_all_uses_with(total, y, replace_graph_outputs=True)
    graph.remove(add, safe=True)


def _projection(tape: Tape, graph: ir.Graph, node: ir.Node) -> tuple[ir.Value, ir.Value | None]:
    """The weight of an `ExpertLinear` before the activation, in blocks or as it is, and its bias."""
    weight = input_of(node, 1)
    if stay_in_rows(stored(weight).shape[1]):
        return weight, optional_input(node, 2)
    return _in_blocks(tape, graph, node)


def _in_blocks(tape: Tape, graph: ir.Graph, node: ir.Node) -> tuple[ir.Value, ir.Value | None]:
    weight = input_of(node, 1)
    blocks = in_blocks(torch.from_numpy(stored(weight))).numpy()
    return packed(tape, graph, f"{weight.name}.in_blocks", blocks, dtype_of(weight)), optional_input(node, 2)


def _zero_bias(tape: Tape, graph: ir.Graph, weight: ir.Value) -> ir.Value | None:
    """`[E, N]`, where the blocks of `weight` `[E, N, M]` have more outputs than N, which the op could not tell."""
    num_experts, outputs, _ = stored(weight).shape
    _, blocks, _, size = in_blocks(torch.empty((1, outputs, 0))).shape
    if blocks * size == outputs:
        return None
    zeros = np.zeros((num_experts, outputs), dtype=np.float32)
    return packed(tape, graph, f"{weight.name}.zero_bias", zeros, ir.DataType.FLOAT)


def _in_fp32(tape: Tape, weights: ir.Value) -> ir.Value:
    if weights.dtype == ir.DataType.FLOAT:
        return weights
    return tape.op("Cast", [weights], {"to": ir.DataType.FLOAT})
