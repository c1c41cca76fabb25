"""A whole layer -> for every expert: gather its tokens, both products with the activation between; then one Concat.

    tokens_0 .. = Split(order / K, tokens_per_expert)           # a few numbers instead of a copy of all rows
    out_e = down_e(act(up_e(Gather(x, tokens_e))))              # the rows of one expert stay in the cache
    out = Concat(out_0 ..)                                      # [R, D], then combined as by `sorted_split`

In onnxruntime on the CPU as fast as `sorted_split` up to 128 tokens, and 1.02 to 1.1 times as fast with 512 to 2048
(D=768, F=3072, E=16, K=4).
T tokens, K top_k, R = T*K, E num_experts, D features.
"""

from __future__ import annotations

import onnx_ir as ir
from onnx_ir.tape import Tape

from sparsify.passes.lower_onnx.dispatch import sort_tokens
from sparsify.passes.lower_onnx.expert_linear import lower_gemm, zero_rows
from sparsify.passes.lower_onnx.expert_region import ExpertRegion, mark_nodes
from sparsify.passes.lower_onnx.values import dtype_of, expert_of, input_of, optional_input, stored


def lower_expert_chain(region: ExpertRegion) -> None:
    """Replace the nodes from dispatch to down, in place.

    Args:
        region: whose activation is a function of the projections alone; it is evaluated once an expert.
    """
    tape = Tape()
    x = input_of(region.dispatch, 0)
    tokens = sort_tokens(region.dispatch, tape)
    num_parts = region.dispatch.attributes["num_parts"].as_int()
    parts = tape.op_multi_out("Split", [tokens.rows, tokens.per_expert], {"axis": 0}, num_outputs=num_parts)
    mark_nodes(tape.nodes, region.scope("dispatch"))
    outputs: list[ir.Value] = []
    for e in range(region.num_experts):
        rows = tape.op("Gather", [x, parts[e]], {"axis": 0})  # [tokens of e, D]
        hidden = region.replay(tape, rows, lambda node, rows, e=e: _linear(tape, node, rows, e))
        outputs.append(_linear(tape, region.down, hidden, e))
        mark_nodes(tape.nodes, region.scope(f"experts.{e}"))
    if num_parts > region.num_experts:
        down = input_of(region.down, 1)
        outputs.append(zero_rows(tape, parts[-1], stored(down).shape[1], dtype_of(down)))
    out = tape.op("Concat", outputs, {"axis": 0})
    mark_nodes(tape.nodes, region.scope("combine"))
    region.replace(tape, {region.dispatch.outputs[1]: tokens.order, region.down.outputs[0]: out})


def _linear(tape: Tape, node: ir.Node, rows: ir.Value, expert: int) -> ir.Value:
    weight, bias = input_of(node, 1), optional_input(node, 2)
    graph = node.graph
    assert isinstance(graph, ir.Graph)
    own_bias = None if bias is None else expert_of(tape, bias, graph, expert)
    return lower_gemm(tape, rows, expert_of(tape, weight, graph, expert), own_bias)
