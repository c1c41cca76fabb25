"""The shared expert of a layer in an exported graph: an FFN of the same tokens, added to what the experts return.

    combine -> Add <- Gemm(down) <- activation <- Gemm(up) <- tokens

It is found by its form, which is that of the experts: node by node the same, with a Gemm for every `ExpertLinear`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import onnx_ir as ir

from sparsify.passes.lower_onnx.expert_region import ExpertRegion, is_linear
from sparsify.passes.lower_onnx.values import input_of, optional_input


@dataclass(frozen=True)
class SharedExpert:
    """`linears`: the Gemm that does for every token what an `ExpertLinear` does for some; `add` joins both outputs."""

    linears: Mapping[ir.Node, ir.Node]
    add: ir.Node


def find_shared(region: ExpertRegion) -> SharedExpert | None:
    """Find it; None where there is none, or one that does something else than an expert."""
    uses = [usage.node for usage in region.combine.outputs[0].uses()]
    if len(uses) != 1 or uses[0].op_type != "Add":
        return None
    add, y = uses[0], region.combine.outputs[0]
    output = input_of(add, 1 if input_of(add, 0) is y else 0)
    matched: dict[ir.Node, ir.Node] = {}
    if not _same(region, region.down.outputs[0], output, matched):
        return None
    return SharedExpert({ours: theirs for ours, theirs in matched.items() if is_linear(ours)}, add)


def _same(region: ExpertRegion, ours: ir.Value, theirs: ir.Value, matched: dict[ir.Node, ir.Node]) -> bool:
    """`theirs` is computed from the tokens as `ours` is from the rows of an expert; `matched` takes the nodes."""
    if ours is region.dispatch.outputs[0]:
        return theirs is input_of(region.dispatch, 0)
    node, other = ours.producer(), theirs.producer()
    if node is None or other is None:
        return ours is theirs
    if node in matched:
        return matched[node] is other
    matched[node] = other
    if is_linear(node):
        biases = (optional_input(value, 2) is None for value in (node, other))
        alike = node is region.down or len({*biases}) == 1  # biases of down are summed, be they there or not
        return alike and _is_plain_gemm(other) and _same(region, input_of(node, 0), input_of(other, 0), matched)
    if _kind(node) != _kind(other) or len(node.inputs) != len(other.inputs):
        return False
    pairs = zip(node.inputs, other.inputs, strict=True)
    return all(a is b or (a is not None and b is not None and _same(region, a, b, matched)) for a, b in pairs)


def _is_plain_gemm(node: ir.Node) -> bool:
    """What the exporter makes of an `nn.Linear`."""
    values = [optional_input(node, 1), optional_input(node, 2)]
    numbers = {name: attribute.value for name, attribute in node.attributes.items()}
    plain = numbers.get("transB") == 1 and not numbers.get("transA") and {*_factors(numbers)} == {1.0}
    known = all(value is None or value.const_value is not None for value in values)
    return node.op_type == "Gemm" and plain and known


def _factors(numbers: Mapping[str, object]) -> list[object]:
    return [numbers.get(name, 1.0) for name in ("alpha", "beta")]


def _kind(node: ir.Node) -> tuple[str, str, dict[str, object]]:
    return node.domain, node.op_type, {name: attribute.value for name, attribute in node.attributes.items()}
