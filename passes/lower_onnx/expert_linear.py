"""`sparsify::ExpertLinear` -> Split by tokens_per_expert, one Gemm an expert, Concat.

Every expert has an initializer of its own, a slice of the stacked weight: nothing is sliced or transposed at run time.
R rows, E experts, M input and N output features.
"""

from __future__ import annotations

import onnx_ir as ir
from onnx_ir.tape import Tape

from sparsify.passes.lower_onnx.values import constant, dtype_of, experts_of, filled, input_of, optional_input, stored


def lower_expert_linear(node: ir.Node, tape: Tape) -> tuple[ir.Value]:
    """Build the nodes that replace a placeholder.

    Args:
        node: `sparsify::ExpertLinear`.
        tape: takes the new nodes and initializers.

    Returns:
        `[R, N]`; rows of unused slots are zero.
    """
    rows, weight, bias, tokens_per_expert = (
        input_of(node, 0),
        input_of(node, 1),
        optional_input(node, 2),
        input_of(node, 3),
    )
    num_parts = node.attributes["num_parts"].as_int()
    graph = node.graph
    assert graph is not None
    parts = tape.op_multi_out("Split", [rows, tokens_per_expert], {"axis": 0}, num_outputs=num_parts)
    weights = experts_of(tape, weight, graph)
    biases = experts_of(tape, bias, graph) if bias is not None else [None] * len(weights)
    outputs = [
        lower_gemm(tape, *inputs) for inputs in zip(parts, weights, biases, strict=False)
    ]  # [tokens of e, N] each
    if num_parts > len(weights):
        outputs.append(zero_rows(tape, parts[-1], stored(weight).shape[1], dtype_of(weight)))
    return (tape.op("Concat", outputs, {"axis": 0}),)


def lower_gemm(tape: Tape, rows: ir.Value, weight: ir.Value, bias: ir.Value | None) -> ir.Value:
    """`rows` `[R, M]` times `weight` `[N, M]`, which is read as `nn.Linear` has it."""
    inputs = [rows, weight] if bias is None else [rows, weight, bias]
    return tape.op("Gemm", inputs, {"transB": 1})


def zero_rows(tape: Tape, rows: ir.Value, features: int, dtype: ir.DataType) -> ir.Value:
    """As many rows of zeros as `rows` has entries."""
    count = tape.op("Shape", [rows], {"start": 0, "end": 1})
    shape = tape.op("Concat", [count, constant(tape, [features])], {"axis": 0})
    return filled(tape, shape, 0, dtype)
