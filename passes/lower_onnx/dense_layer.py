"""A whole layer -> the FFN that it is with all experts on. Its router goes, unless something else reads its choice.

    y = act(x up_proj + up_bias) down_proj

It is another function than the layer computes, so it is written only where the user allows it. Experts of a split that
count alike are neurons side by side, so all of them together are one FFN: what `set_top_k(num_experts)` computes. A
shared expert, which is an FFN of the same tokens, becomes a part of it.
D, F and N features; E num_experts.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import onnx_ir as ir
from onnx_ir.tape import Tape

from sparsify.passes.lower_onnx.dense_masked import flat_down
from sparsify.passes.lower_onnx.expert_region import ExpertRegion, mark_nodes
from sparsify.passes.lower_onnx.shared_expert import SharedExpert, find_shared
from sparsify.passes.lower_onnx.values import dtype_of, input_of, optional_input, packed, stored


def lower_dense_layer(region: ExpertRegion) -> None:
    """Replace all nodes of the layer, in place.

    Args:
        region: whose activation is a function of the projections alone, and whose routing weights are one.
    """
    tape, graph, shared = Tape(), region.graph, find_shared(region)
    project = _projection(tape, graph, shared)
    hidden = region.replay(tape, input_of(region.dispatch, 0), project)  # [T, F]
    y = tape.op("Gemm", [hidden, *_down(tape, region, shared)])
    mark_nodes(tape.nodes, region.scope("dense"))
    region.replace(tape, {region.combine.outputs[0]: y})
    if shared is not None:
        ir.convenience.replace_all_uses_with(shared.add.outputs[0], y, replace_graph_outputs=True)
        graph.remove(shared.add, safe=True)  # and then nothing reads the shared expert


def _projection(tape: Tape, graph: ir.Graph, shared: SharedExpert | None) -> Callable[[ir.Node, ir.Value], ir.Value]:
    """Writes an `ExpertLinear` for the neurons of all experts, `[T, D]` to `[T, F]`."""

    def project(node: ir.Node, rows: ir.Value) -> ir.Value:
        own = shared.linears[node] if shared else None
        inputs = [rows]
        for i in (1, 2):  # weight [E, M, D], bias [E, M]
            value = optional_input(node, i)
            if value is not None:
                parts = [stored(value).reshape(-1, *stored(value).shape[2:])]
                parts += [stored(input_of(own, i))] if own else []
                name = f"{value.name}.flat" if own is None else f"{value.name}.whole"
                inputs.append(packed(tape, graph, name, np.concatenate(parts), dtype_of(value)))
        return tape.op("Gemm", inputs, {"transB": 1})

    return project


def _down(tape: Tape, region: ExpertRegion, shared: SharedExpert | None) -> list[ir.Value]:
    """The weight `[F, N]`, and the sum of all biases `[N]` where there are any."""
    weight, bias = input_of(region.down, 1), optional_input(region.down, 2)
    found = flat_down(tape, region.down)
    biases = [] if bias is None else [*stored(bias)]
    if shared is not None:
        own = shared.linears[region.down]
        whole = np.concatenate([stored(found), stored(input_of(own, 1)).T])
        found = packed(tape, region.graph, f"{weight.name}.whole", whole, dtype_of(weight))
        last = optional_input(own, 2)
        biases += [] if last is None else [stored(last)]
    if not biases:
        return [found]
    total = np.sum(biases, axis=0, dtype=np.float64).astype(dtype_of(weight).numpy())  # [N]
    return [found, packed(tape, region.graph, f"{weight.name}.bias", total, dtype_of(weight))]
