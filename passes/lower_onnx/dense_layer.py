"""A whole layer -> the FFN that it is with all experts on. Its router goes, unless something else reads its choice.

    y = act(x up_proj + up_bias) down_proj

It is another function than the layer computes, so it is written only where the user allows it. Experts of a split that
count alike are neurons side by side, so all of them together are one FFN: what `set_top_k(num_experts)` computes.
D, F and N features; E num_experts.
"""

from __future__ import annotations

import numpy as np
from onnx_ir.tape import Tape

from sparsify.passes.lower_onnx.dense_masked import flat_down, project
from sparsify.passes.lower_onnx.expert_region import ExpertRegion, mark_nodes
from sparsify.passes.lower_onnx.values import dtype_of, input_of, optional_input, packed, stored


def lower_dense_layer(region: ExpertRegion) -> None:
    """Replace all nodes of the layer, in place.

    Args:
        region: whose activation is a function of the projections alone, and whose routing weights are one.
    """
    tape = Tape()
    hidden = region.replay(tape, input_of(region.dispatch, 0), lambda node, rows: project(tape, node, rows))  # [T, F]
    inputs = [hidden, flat_down(tape, region.down)]
    bias = optional_input(region.down, 2)
    if bias is not None:
        total = np.sum(stored(bias), axis=0, dtype=np.float64).astype(dtype_of(bias).numpy())  # [N]
        inputs.append(packed(tape, region.graph, f"{bias.name}.total", total, dtype_of(bias)))
    y = tape.op("Gemm", inputs)
    mark_nodes(tape.nodes, region.scope("dense"))
    region.replace(tape, {region.combine.outputs[0]: y})
