"""A whole layer -> the dense FFN over the neurons of all experts, those of experts that were not chosen set to zero.

Nothing is skipped: it is for layers whose experts would take longer than all of them at once. What the file computes is
still what the model computes, so it can be compared.

    mask = ScatterElements(zeros [T, E], expert_ids, routing_weights, add)
    y = (act(x up_proj + up_bias) * mask) down_proj + mask down_bias

T tokens, K top_k, E num_experts, M neurons of one expert, F = E*M, D and N features.
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
from onnx_ir.tape import Tape

from sparsify.passes.lower_onnx.expert_region import ExpertRegion
from sparsify.passes.lower_onnx.values import constant, dtype_of, filled, input_of, optional_input, packed, stored


def lower_dense_masked(region: ExpertRegion) -> None:
    """Replace all nodes of the layer, in place.

    Args:
        region: whose activation is a function of the projections alone.
    """
    tape = Tape()
    x = input_of(region.dispatch, 0)
    hidden = region.replay(tape, x, lambda node, rows: project(tape, node, rows))  # [T, F]
    dtype = dtype_of(input_of(region.down, 1))
    mask = _mask(tape, region, dtype)  # [T, E]
    neurons = stored(input_of(region.down, 1)).shape[2]
    by_expert = tape.op("Reshape", [hidden, constant(tape, [-1, region.num_experts, neurons])])  # [T, E, M]
    mask_of_neurons = tape.op("Unsqueeze", [mask, constant(tape, [2])])  # [T, E, 1]
    if dtype == ir.DataType.FLOAT16:  # neurons may overflow: 0 * inf of an expert that was not chosen must not show
        chosen = tape.op("Cast", [mask_of_neurons], {"to": ir.DataType.BOOL})
        by_expert = tape.op("Where", [chosen, by_expert, _zero(tape, dtype)])
    masked = tape.op("Mul", [by_expert, mask_of_neurons])  # which onnxruntime does faster than Where
    masked = tape.op("Reshape", [masked, constant(tape, [-1, region.num_experts * neurons])])  # [T, F]
    y = _down(tape, region.down, masked, mask)
    region.replace(tape, {region.combine.outputs[0]: y})


def project(tape: Tape, node: ir.Node, rows: ir.Value) -> ir.Value:
    """An `ExpertLinear` for the neurons of all experts, `[T, D]` to `[T, F]`.

    The weight `[E, M, D]` has its rows in the order of a dense one already.
    """
    weight, bias = input_of(node, 1), optional_input(node, 2)
    inputs = [rows, _flat(tape, node, weight, (-1, stored(weight).shape[2]))]
    if bias is not None:
        inputs.append(_flat(tape, node, bias, (-1,)))
    return tape.op("Gemm", inputs, {"transB": 1})


def flat_down(tape: Tape, node: ir.Node) -> ir.Value:
    """The weight `[E, N, M]` of an `ExpertLinear` with its input features side by side, `[F, N]`."""
    weight = input_of(node, 1)
    array = stored(weight)
    flat = np.ascontiguousarray(array.swapaxes(1, 2)).reshape(-1, array.shape[1])
    graph = node.graph
    assert isinstance(graph, ir.Graph)
    return packed(tape, graph, f"{weight.name}.flat", flat, dtype_of(weight))


def _down(tape: Tape, node: ir.Node, hidden: ir.Value, mask: ir.Value) -> ir.Value:
    """`[T, F]` to `[T, N]`."""
    bias = optional_input(node, 2)
    inputs = [hidden, flat_down(tape, node)]
    if bias is None:
        return tape.op("Gemm", inputs)
    return tape.op("Gemm", [*inputs, tape.op("MatMul", [mask, bias])])


def _mask(tape: Tape, region: ExpertRegion, dtype: ir.DataType) -> ir.Value:
    """`[T, E]`: the routing weights, zero where an expert was not chosen."""
    ids = input_of(region.dispatch, 1)  # [T, K]
    tokens = tape.op("Shape", [ids], {"start": 0, "end": 1})
    shape = tape.op("Concat", [tokens, constant(tape, [region.num_experts])], {"axis": 0})
    zeros = filled(tape, shape, 0, dtype)
    if region.unit_weights:
        ones = filled(tape, tape.op("Shape", [ids]), 1, dtype)
        return tape.op("ScatterElements", [zeros, ids, ones], {"axis": 1})
    weights = tape.op("Cast", [input_of(region.combine, 1)], {"to": dtype})
    unused = tape.op("Less", [ids, constant(tape, 0)])
    weights = tape.op("Where", [unused, _zero(tape, dtype), weights])
    ids = tape.op("Where", [unused, constant(tape, 0), ids])
    return tape.op("ScatterElements", [zeros, ids, weights], {"axis": 1, "reduction": "add"})


def _zero(tape: Tape, dtype: ir.DataType) -> ir.Value:
    return tape.op("Constant", [], {"value": ir.tensor(np.array(0, dtype=dtype.numpy()), dtype=dtype)})


def _flat(tape: Tape, node: ir.Node, stacked: ir.Value, shape: tuple[int, ...]) -> ir.Value:
    graph = node.graph
    assert isinstance(graph, ir.Graph)
    return packed(tape, graph, f"{stacked.name}.flat", stored(stacked).reshape(shape), dtype_of(stacked))
