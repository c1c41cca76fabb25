"""`sparsify::Combine` -> Gather by the inverse of order, and a weighted sum over the K slots of a token.

T tokens, K top_k, R = T*K, D features.
"""

from __future__ import annotations

import onnx_ir as ir
from onnx_ir.tape import Tape

from sparsify.passes.lower_onnx.values import constant, dtype_of, input_of

_HALF = (ir.DataType.FLOAT16, ir.DataType.BFLOAT16)


def lower_combine(node: ir.Node, tape: Tape) -> tuple[ir.Value]:
    """Build the nodes that replace a placeholder.

    Args:
        node: `sparsify::Combine`.
        tape: takes the new nodes.

    Returns:
        `[T, D]`; summed in fp32 where the rows are fp16 or bf16.
    """
    rows, routing_weights, order = (input_of(node, i) for i in range(3))
    top_k, unit_weights = node.attributes["top_k"].as_int(), node.attributes["unit_weights"].as_int()
    features = tape.op("Shape", [rows], {"start": 1, "end": 2})
    by_slot = tape.op("Gather", [rows, _inverse(tape, order)], {"axis": 0})  # [R, D]
    if top_k == 1 and unit_weights:
        return (by_slot,)
    shape = tape.op("Concat", [constant(tape, [-1, top_k]), features], {"axis": 0})
    by_slot = tape.op("Reshape", [by_slot, shape])  # [T, K, D]
    dtype = dtype_of(rows)
    if dtype in _HALF:
        by_slot = tape.op("Cast", [by_slot], {"to": ir.DataType.FLOAT})
    if not unit_weights:
        weights = tape.op("CastLike", [routing_weights, by_slot])
        by_slot = tape.op("Mul", [by_slot, tape.op("Unsqueeze", [weights, constant(tape, [2])])])
    total = tape.op("ReduceSum", [by_slot, constant(tape, [1])], {"keepdims": 0})
    return (tape.op("Cast", [total], {"to": dtype}) if dtype in _HALF else total,)


def _inverse(tape: Tape, order: ir.Value) -> ir.Value:
    """`inverse[order[i]] = i`, in one pass instead of a second sort."""
    count = tape.op("Squeeze", [tape.op("Shape", [order])])
    places = tape.op("Range", [constant(tape, 0), count, constant(tape, 1)])
    return tape.op("ScatterElements", [places, order, places], {"axis": 0})
