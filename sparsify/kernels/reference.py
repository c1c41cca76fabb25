"""`sparsify::moe_ffn` and its gradients in plain ops, one expert after another: what every kernel is held against.

It runs on any device and dtype. T tokens, D hidden_size, D_out output features, E num_experts, K top_k, I neurons of
one expert, p a pair of a token t and its slot, r routing_weights, z pre-activation, h hidden.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
import torch.nn.functional as functional
from torch import Tensor

from sparsify.kernels.pairs import sort_pairs

ACTIVATIONS: Mapping[str, Callable[[Tensor], Tensor]] = {
    "relu": torch.relu,
    "squared_relu": lambda z: torch.relu(z).square(),
    "gelu": functional.gelu,
    "gelu_tanh": lambda z: functional.gelu(z, approximate="tanh"),
    "silu": functional.silu,
}

# grad `[..]` by z `[..]`: grad * act'(z).
ACTIVATION_BACKWARDS: Mapping[str, Callable[[Tensor, Tensor], Tensor]] = {
    "relu": lambda grad, z: torch.ops.aten.threshold_backward(grad, z, 0),
    "squared_relu": lambda grad, z: grad * 2 * torch.relu(z),
    "gelu": lambda grad, z: torch.ops.aten.gelu_backward(grad, z),
    "gelu_tanh": lambda grad, z: torch.ops.aten.gelu_backward(grad, z, approximate="tanh"),
    "silu": lambda grad, z: torch.ops.aten.silu_backward(grad, z),
}


def moe_ffn_reference(
    x: Tensor,
    routing_weights: Tensor,
    expert_ids: Tensor,
    up_proj: Tensor,
    up_bias: Tensor | None,
    gate_proj: Tensor | None,
    gate_bias: Tensor | None,
    down_proj: Tensor,
    down_bias: Tensor | None,
    activation: str,
) -> Tensor:
    """See `sparsify::moe_ffn`. Sums over the slots run in fp32 (fp64 for fp64)."""
    act = ACTIVATIONS[activation]
    wide = torch.float64 if x.dtype == torch.float64 else torch.float32
    by_slot = x.new_zeros((*expert_ids.shape, down_proj.shape[1]), dtype=wide)  # [T, K, D_out]
    for e, (tokens, slots) in enumerate(_by_expert(expert_ids, up_proj.shape[0])):
        rows = x.index_select(0, tokens)
        hidden = functional.linear(rows, up_proj[e], None if up_bias is None else up_bias[e])
        if gate_proj is None:
            hidden = act(hidden)
        else:
            hidden = act(functional.linear(rows, gate_proj[e], None if gate_bias is None else gate_bias[e])) * hidden
        out = functional.linear(hidden, down_proj[e], None if down_bias is None else down_bias[e])
        by_slot[tokens, slots] = out.to(wide) * routing_weights[tokens, slots].to(wide).unsqueeze(-1)
    return by_slot.sum(1).to(x.dtype)


def _by_expert(expert_ids: Tensor, num_experts: int) -> list[tuple[Tensor, Tensor]]:
    """Tokens and slots of every expert, `[n]` each."""
    sorted_pairs = sort_pairs(expert_ids, num_experts)
    slots = sorted_pairs.pairs % max(expert_ids.shape[1], 1)
    return list(zip(sorted_pairs.tokens.split(sorted_pairs.counts), slots.split(sorted_pairs.counts), strict=True))


def moe_ffn_backward_reference(
    grad: Tensor,
    x: Tensor,
    routing_weights: Tensor,
    expert_ids: Tensor,
    up_proj: Tensor,
    up_bias: Tensor | None,
    gate_proj: Tensor | None,
    gate_bias: Tensor | None,
    down_proj: Tensor,
    down_bias: Tensor | None,
    activation: str,
    needs: list[bool],
) -> list[Tensor]:
    """See `sparsify::moe_ffn_backward`.

    With dA_p = dy_t down_proj[e], of pair p of token t and expert e:

    dr_p = <dA_p, h_p> + <dy_t, down_bias[e]>        dz_p = r_p dA_p * act'(z_p)      dx_t = sum_p dz_p up_proj[e]
    d up_proj[e] = sum_p dz_p^T x_t                  d down_proj[e] = sum_p dy_t^T (r_p h_p)
    """
    inputs = (x, routing_weights, expert_ids, up_proj, up_bias, gate_proj, gate_bias, down_proj, down_bias)
    wide = torch.float64 if x.dtype == torch.float64 else torch.float32
    grads = [
        None if tensor is None or not needed else torch.zeros_like(tensor, memory_format=torch.contiguous_format)
        for tensor, needed in zip(inputs, needs, strict=True)
    ]
    d_x, d_weights, _, d_up, d_up_bias, d_gate, d_gate_bias, d_down, d_down_bias = grads
    d_x = None if d_x is None else d_x.to(wide)
    act, act_backward = ACTIVATIONS[activation], ACTIVATION_BACKWARDS[activation]
    for e, (tokens, slots) in enumerate(_by_expert(expert_ids, up_proj.shape[0])):
        rows, dy = x.index_select(0, tokens), grad.index_select(0, tokens)  # [n, D], [n, D_out]
        weights = routing_weights[tokens, slots].to(wide).unsqueeze(-1)  # [n, 1]
        up = functional.linear(rows, up_proj[e], None if up_bias is None else up_bias[e])
        d_hidden = dy @ down_proj[e]  # [n, I], without the routing weight
        weighted = (d_hidden.to(wide) * weights).to(x.dtype)
        if gate_proj is None:
            hidden, d_up_rows = act(up), act_backward(weighted, up)
        else:
            gate = functional.linear(rows, gate_proj[e], None if gate_bias is None else gate_bias[e])
            acted = act(gate)
            hidden, d_up_rows = acted * up, weighted * acted
            d_gate_rows = act_backward(weighted * up, gate)
            _add_linear_grads(e, tokens, rows, d_gate_rows, gate_proj, d_x, d_gate, d_gate_bias)
        _add_linear_grads(e, tokens, rows, d_up_rows, up_proj, d_x, d_up, d_up_bias)
        weighted_dy = (dy.to(wide) * weights).to(x.dtype)
        if d_down is not None:
            d_down[e] = weighted_dy.t() @ hidden
        if d_down_bias is not None:
            d_down_bias[e] = weighted_dy.sum(0)
        if d_weights is not None:
            own = (d_hidden.to(wide) * hidden.to(wide)).sum(-1)
            own = own if down_bias is None else own + dy.to(wide) @ down_bias[e].to(wide)
            d_weights[tokens, slots] = own.to(d_weights.dtype)
    grads[0], grads[2] = None if d_x is None else d_x.to(x.dtype), None  # ids have no gradient
    return [x.new_empty(0) if g is None else g for g in grads]


def _add_linear_grads(
    e: int,
    tokens: Tensor,
    rows: Tensor,
    d_rows: Tensor,
    weight: Tensor,
    d_x: Tensor | None,
    d_weight: Tensor | None,
    d_bias: Tensor | None,
) -> None:
    """Take the output gradient `d_rows` `[n, I]` of one projection of expert `e` to what it was computed from."""
    if d_x is not None:
        d_x.index_add_(0, tokens, (d_rows @ weight[e]).to(d_x.dtype))
    if d_weight is not None:
        d_weight[e] = d_rows.t() @ rows
    if d_bias is not None:
        d_bias[e] = d_rows.sum(0)
