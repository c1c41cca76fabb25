"""The router of a layer -> one `ai.sparsify::Route`: the largest logits of a perceptron, as an op of onnxruntime.

    TopK(Gemm(Relu(Gemm(x)))) -> Route(x)     # see cpu/onnx_route.h

In standard operators these three products and sorts take as long as a tenth of the experts, where tokens are few.
"""

from __future__ import annotations

from dataclasses import dataclass

import onnx_ir as ir
import torch
from onnx_ir.tape import Tape

from sparsify.cpu.blocks import in_blocks
from sparsify.passes.lower_onnx.expert_region import ExpertRegion, put_nodes
from sparsify.passes.lower_onnx.values import dtype_of, optional_input, packed, stored


@dataclass(frozen=True)
class _Perceptron:
    """A router that is nothing else; its nodes, the last first."""

    top_k: int
    x: ir.Value
    nodes: tuple[ir.Node, ir.Node, ir.Node, ir.Node]


def lower_router(region: ExpertRegion, domain: str) -> None:
    """Replace the router, in place, where it is a perceptron in fp32 whose experts alone are read."""
    found = _perceptron(region.expert_ids)
    if found is None:
        return
    largest, output, _, hidden = found.nodes
    tape = Tape()
    weights = [value for node in (hidden, output) for value in _linear(tape, region.graph, node)]
    ids = tape.op("Route", [found.x, *weights], {"top_k": found.top_k}, domain=domain, version=1)
    put_nodes(region.graph, tape, largest, region.scope("router"), {largest.outputs[1]: ids})
    region.graph.remove(found.nodes, safe=True)


def _perceptron(ids: ir.Value) -> _Perceptron | None:
    largest = _producer(ids, "TopK")
    output = _producer(largest.inputs[0], "Gemm") if largest else None
    relu = _producer(output.inputs[0], "Relu") if output else None
    hidden = _producer(relu.inputs[0], "Gemm") if relu else None
    if largest is None or output is None or relu is None or hidden is None:
        return None
    x, k = hidden.inputs[0], largest.inputs[1]
    if x is None or x.dtype != ir.DataType.FLOAT or k is None or k.const_value is None:
        return None
    inner = [relu.outputs[0], hidden.outputs[0], output.outputs[0]]
    others = len(list(largest.outputs[0].uses())) + sum(len(list(value.uses())) - 1 for value in inner)
    plain = _is_row_wise(largest) and _is_linear(output) and _is_linear(hidden)
    if others or not plain or any(value.is_graph_output() for value in (*inner, largest.outputs[0])):
        return None
    return _Perceptron(int(k.const_value.numpy().item()), x, (largest, output, relu, hidden))


def _producer(value: ir.Value | None, op: str) -> ir.Node | None:
    node = None if value is None else value.producer()
    return node if node is not None and node.op_type == op and not node.domain else None


def _is_row_wise(largest: ir.Node) -> bool:
    numbers = {name: attribute.as_int() for name, attribute in largest.attributes.items()}
    return numbers.get("axis", -1) in (-1, 1) and numbers.get("largest", 1) == 1 and numbers.get("sorted", 1) == 1


def _is_linear(gemm: ir.Node) -> bool:
    """`x weight^T + bias`, with stored weights and as many biases as outputs."""
    numbers = {name: float(attribute.value) for name, attribute in gemm.attributes.items()}
    expected = {"transA": 0.0, "transB": 1.0, "alpha": 1.0, "beta": 1.0}
    weight, bias = optional_input(gemm, 1), optional_input(gemm, 2)
    if {**expected, "transB": 0.0, **numbers} != expected or weight is None or bias is None:
        return False
    both = weight.const_value, bias.const_value
    return both[0] is not None and both[1] is not None and tuple(both[1].shape) == (both[0].shape[0],)


def _linear(tape: Tape, graph: ir.Graph, gemm: ir.Node) -> tuple[ir.Value, ir.Value]:
    """The weight in blocks, `[1, B, M, b]`, and the bias, `[1, N]`."""
    weight, bias = gemm.inputs[1], gemm.inputs[2]
    assert weight is not None
    assert bias is not None
    blocks = in_blocks(torch.from_numpy(stored(weight)).unsqueeze(0)).numpy()
    row = stored(bias).reshape(1, -1)
    return (
        packed(tape, graph, f"{weight.name}.in_blocks", blocks, dtype_of(weight)),
        packed(tape, graph, f"{bias.name}.row", row, dtype_of(bias)),
    )
