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
    places = _inverse(tape, order)  # [R]
    if top_k > 1:  # a few numbers take the shape, so that the rows need not: [T, K]
        places = tape.op("Reshape", [places, constant(tape, [-1, top_k])])
    by_slot = tape.op("Gather", [rows, places], {"axis": 0})  # [T, K, D], without K where it is one
    dtype = dtype_of(rows)
    if dtype not in _HALF:
        return (_weighted(tape, by_slot, routing_weights, top_k, unit_weights),)
    total = _weighted(tape, tape.op("Cast", [by_slot], {"to": ir.DataType.FLOAT}), routing_weights, top_k, unit_weights)
    return (tape.op("Cast", [total], {"to": dtype}),)


def _weighted(tape: Tape, by_slot: ir.Value, routing_weights: ir.Value, top_k: int, unit_weights: int) -> ir.Value:
    """The sum over K, `[T, D]`."""
    if not unit_weights:
        weights = routing_weights if top_k == 1 else tape.op("Unsqueeze", [routing_weights, constant(tape, [2])])
        by_slot = tape.op("Mul", [by_slot, tape.op("CastLike", [weights, by_slot])])
    return by_slot if top_k == 1 else tape.op("ReduceSum", [by_slot, constant(tape, [1])], {"keepdims": 0})


def _inverse(tape: Tape, order: ir.Value) -> ir.Value:
    """`inverse[order[i]] = i`, in one pass instead of a second sort."""
    places = tape.op("Range", [constant(tape, 0), tape.op("Size", [order]), constant(tape, 1)])
    return tape.op("ScatterElements", [order, order, places], {"axis": 0})
