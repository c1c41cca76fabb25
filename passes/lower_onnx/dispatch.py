"""`sparsify::Dispatch` -> standard ops: one stable sort of the expert ids, and one Gather.

    order = TopK(ids, all of them, smallest first)        # ONNX gives the lower index first among equals: stable
    rows = Gather(x, order / K)
    tokens_per_expert = ScatterElements(zeros, ids, ones, add)

T tokens, K top_k, R = T*K, E num_experts, P parts (see `emit_placeholders`).
"""

from __future__ import annotations

from dataclasses import dataclass

import onnx_ir as ir
from onnx_ir.tape import Tape

from sparsify.passes.lower_onnx.values import constant, filled, input_of


def lower_dispatch(node: ir.Node, tape: Tape) -> tuple[ir.Value, ir.Value, ir.Value, ir.Value]:
    """Build the nodes that replace a placeholder.

    Args:
        node: `sparsify::Dispatch`.
        tape: takes the new nodes.

    Returns:
        rows `[R, D]`, order `[R]` int64, offsets `[E+1]` int32, tokens_per_expert `[P]` int64.
    """
    tokens = sort_tokens(node, tape)
    rows = tape.op("Gather", [input_of(node, 0), tokens.rows], {"axis": 0})
    offsets = _offsets(tape, tokens.per_expert, node.attributes["num_experts"].as_int())
    return rows, tokens.order, offsets, tokens.per_expert


@dataclass(frozen=True)
class SortedTokens:
    """Tokens by expert: `rows` `[R]` the token of every row, `order` `[R]` its slot, `per_expert` `[P]` how many."""

    rows: ir.Value
    order: ir.Value
    per_expert: ir.Value


def sort_tokens(node: ir.Node, tape: Tape) -> SortedTokens:
    """Sort the slots of a `sparsify::Dispatch` by expert; unused ones come last."""
    expert_ids = input_of(node, 1)
    num_experts, num_parts = node.attributes["num_experts"].as_int(), node.attributes["num_parts"].as_int()
    top_k = node.attributes["top_k"].as_int()
    ids = tape.op("Reshape", [expert_ids, constant(tape, [-1])])  # [R]
    count = tape.op("Shape", [ids])  # [1]
    key = _key(tape, ids, num_experts) if num_parts > num_experts else ids
    _, order = tape.op_multi_out("TopK", [key, count], {"axis": 0, "largest": 0, "sorted": 1}, num_outputs=2)
    rows = order if top_k == 1 else tape.op("Div", [order, constant(tape, top_k)])
    # ScatterElements touches each id once; comparing every id with every expert would touch it E times.
    zeros = filled(tape, constant(tape, [num_parts]), 0, ir.DataType.INT64)
    ones = filled(tape, count, 1, ir.DataType.INT64)
    per_expert = tape.op("ScatterElements", [zeros, key, ones], {"axis": 0, "reduction": "add"})
    return SortedTokens(rows, order, per_expert)


def _key(tape: Tape, ids: ir.Value, num_experts: int) -> ir.Value:
    """Unused slots (-1) sort behind the last expert."""
    unused = tape.op("Less", [ids, constant(tape, 0)])
    return tape.op("Where", [unused, constant(tape, num_experts), ids])


def _offsets(tape: Tape, tokens_per_expert: ir.Value, num_experts: int) -> ir.Value:
    """`[E+1]`; usually without a reader, and then dropped with the other unused nodes."""
    ends = tape.op("CumSum", [tokens_per_expert, constant(tape, 0)])
    ends = tape.op("Slice", [ends, constant(tape, [0]), constant(tape, [num_experts])])
    offsets = tape.op("Concat", [constant(tape, [0]), ends], {"axis": 0})
    return tape.op("Cast", [offsets], {"to": ir.DataType.INT32})
