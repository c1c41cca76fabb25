"""A whole layer -> one `com.microsoft::MoE`, with router_probs from which the op reproduces given ids and weights.

The op takes the softmax of router_probs and keeps the K largest. With `log g` at the chosen experts, -inf elsewhere and
normalisation it weighs them by `g / sum(g)`; the product with `sum(g)` then gives the wanted weights g. For g = 1 that
is 0 or -inf, and the product with K. The down bias goes in too, as the routing weights are meant to multiply it.

T tokens, K top_k, E num_experts, D hidden_size, M neurons of one expert.
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
from onnx_ir.tape import Tape

from sparsify.passes.lower_onnx.expert_region import ExpertRegion, is_linear
from sparsify.passes.lower_onnx.values import constant, dtype_of, filled, input_of, optional_input, packed, stored

DOMAIN = "com.microsoft"


def lower_moe_layer(region: ExpertRegion) -> None:
    """Replace all nodes of the layer, in place, by a `sparsify::MoE`, which `lower_moe_op` takes.

    Args:
        region: a layer for which `why_not_moe_op` knows no reason.
    """
    dispatch, combine = region.dispatch, region.combine
    linears = sorted(filter(is_linear, region.inner), key=lambda node: node.attributes["gate"].as_int())
    weights = [optional_input(node, i) for node in (region.down, *linears) for i in (1, 2)]
    settings = {name: dispatch.attributes[name] for name in ("num_experts", "top_k", "activation", "layer")}
    settings["unit_weights"] = combine.attributes["unit_weights"]
    tape = Tape()
    inputs = [*dispatch.inputs[:2], combine.inputs[1], *weights]
    y = tape.op("MoE", inputs, settings, domain=region.dispatch.domain, version=1)
    region.replace(tape, {combine.outputs[0]: y})


def lower_moe_op(node: ir.Node, tape: Tape) -> tuple[ir.Value]:
    """Build the nodes that replace a placeholder.

    Args:
        node: `sparsify::MoE(x [T, D], expert_ids [T, K], routing_weights [T, K], down_proj [E, D, M], down_bias [E, D]
            or none, up_proj [E, M, D], up_bias [E, M] or none[, gate_proj, gate_bias])`. Routing weights must be
            positive and ids not -1; `why_not_moe_op` sees to it.
        tape: takes the new nodes and initializers.

    Returns:
        `[T, D]`.
    """
    x, expert_ids, routing_weights, down_proj = (input_of(node, i) for i in range(4))
    activation = node.attributes["activation"].as_string()
    unit_weights = node.attributes["unit_weights"].as_int()
    top_k = node.attributes["top_k"].as_int()
    attributes: dict[str, int | float | str] = {
        "k": top_k,
        "activation_type": activation,
        # With 0, which is equal by the algebra above, the CPU kernel before onnxruntime 1.32 computes garbage where its
        # input is an intermediate value: the output then takes the memory of the input, which is still being read.
        "normalize_routing_weights": 1,
    }
    if activation == "swiglu":
        up_proj, up_bias = _interleaved(node, tape)
        attributes |= {"swiglu_fusion": 1, "activation_alpha": 1.0, "activation_beta": 0.0}
    else:
        up_proj, up_bias = input_of(node, 5), optional_input(node, 6)
    if unit_weights:
        logits = filled(tape, tape.op("Shape", [expert_ids]), 0.0, dtype_of(x))  # [T, K]
        total = _scalar(tape, top_k, dtype_of(x))
    else:
        weights = tape.op("CastLike", [routing_weights, x])
        logits = tape.op("Log", [weights])
        total = tape.op("ReduceSum", [weights, constant(tape, [1])], {"keepdims": 1})  # [T, 1]
    num_experts = node.attributes["num_experts"].as_int()
    probs = _router_probs(tape, expert_ids, logits, num_experts, dtype_of(x))
    inputs = [x, probs, up_proj, up_bias, down_proj, optional_input(node, 4)]
    mixed = tape.op("MoE", inputs, attributes, domain=DOMAIN, version=1)
    return (tape.op("Mul", [mixed, total]),)


def _router_probs(tape: Tape, ids: ir.Value, logits: ir.Value, num_experts: int, dtype: ir.DataType) -> ir.Value:
    """`[T, E]`: the logits at the chosen experts, -inf elsewhere."""
    tokens = tape.op("Shape", [ids], {"start": 0, "end": 1})
    shape = tape.op("Concat", [tokens, constant(tape, [num_experts])], {"axis": 0})
    return tape.op("ScatterElements", [filled(tape, shape, -np.inf, dtype), ids, logits], {"axis": 1})


def _scalar(tape: Tape, number: int, dtype: ir.DataType) -> ir.Value:
    return tape.op("Constant", [], {"value": ir.tensor(np.array(number, dtype=dtype.numpy()), dtype=dtype)})


def _interleaved(node: ir.Node, tape: Tape) -> tuple[ir.Value, ir.Value | None]:
    """Rows g0, l0, g1, l1, ... `[E, 2*M, D]`: the only layout of SwiGLU that the CPU kernel takes."""
    graph = node.graph
    assert graph is not None
    up_proj, up_bias = input_of(node, 5), optional_input(node, 6)
    gate_proj, gate_bias = input_of(node, 7), optional_input(node, 8)
    dtype = dtype_of(up_proj)
    rows = _alternate(stored(gate_proj), stored(up_proj))
    weight = packed(tape, graph, f"{up_proj.name}.interleaved", rows, dtype)
    if up_bias is None and gate_bias is None:
        return weight, None
    nothing = np.zeros(stored(up_proj).shape[:2], dtype=dtype.numpy())
    biases = [nothing if bias is None else stored(bias) for bias in (gate_bias, up_bias)]
    named = up_bias or gate_bias
    assert named is not None
    return weight, packed(tape, graph, f"{named.name}.interleaved", _alternate(*biases), dtype)


def _alternate(gate: np.ndarray, up: np.ndarray) -> np.ndarray:
    """`[E, M, ...]` twice -> `[E, 2*M, ...]`."""
    return np.stack([gate, up], axis=2).reshape(gate.shape[0], -1, *gate.shape[2:])
