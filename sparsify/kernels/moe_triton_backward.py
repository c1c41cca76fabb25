"""The gradients of `sparsify::moe_ffn` on a GPU: the kernels of this folder, put in order.

T tokens, D hidden_size, D_out output features, E num_experts, K top_k, P = T * K pairs, I neurons of one expert, z
pre-activation, h hidden, r routing_weights.

1. `up_rows`: z and h again, h times r for the gradient of `down_proj`.
2. `hidden_grads`: dz, written over z, and the gradient of r in parts.
3. Sums over the rows of experts (`weight_grad`, `bias_grad`), over parts (`routing_grad`), over the slots of a token
   (`down_rows`, `combine_rows`).

No kernel runs whose result is not wanted.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
from torch import Tensor

from sparsify.kernels.backward_hidden import hidden_grads
from sparsify.kernels.backward_routing import routing_grad
from sparsify.kernels.backward_weight import bias_grad, weight_grad
from sparsify.kernels.combine import combine_rows
from sparsify.kernels.down import down_rows
from sparsify.kernels.layout import Layout, make_layout
from sparsify.kernels.operands import Operands, dense_rows
from sparsify.kernels.up import up_rows


def input_grads(grad: Tensor, op: Operands, wanted: Sequence[bool]) -> list[Tensor | None]:
    """Gradients of the nine tensors of the op, None where not wanted.

    Args:
        grad: `[T, D_out]`, dtype of `x`.
        op: the arguments of the forward, at least one pair.
        wanted: nine flags, in the order of the tensors.
    """
    wants_x, wants_r, _, wants_up, wants_up_bias, wants_gate, wants_gate_bias, wants_down, wants_down_bias = wanted
    wants_z = wants_x or wants_up or wants_up_bias or wants_gate or wants_gate_bias
    found: list[Tensor | None] = [None] * len(wanted)
    if not any(wanted):
        return found
    grad = dense_rows(grad)
    layout = make_layout(op.expert_ids, op.num_experts, op.row_tile().rows)
    sum_tile = op.weight_grad_tile()
    up_z, gate_z, hidden = _recompute(op, layout, wants_z=wants_z or wants_r, wants_hidden=wants_down)
    if hidden is not None:
        found[7] = weight_grad(grad, hidden, layout, op.top_k, sum_tile, a_by_token=True)
    if wants_down_bias:
        found[8] = bias_grad(grad, layout, routing_weights=op.routing_weights)
    if up_z is None:
        return found
    found[1] = _over_z(grad, op, layout, up_z, gate_z, wants_z=wants_z, wants_r=wants_r)
    if wants_up:
        found[3] = weight_grad(up_z, op.x, layout, op.top_k, sum_tile, b_by_token=True)
    if wants_up_bias:
        found[4] = bias_grad(up_z, layout)
    if gate_z is not None and wants_gate:
        found[5] = weight_grad(gate_z, op.x, layout, op.top_k, sum_tile, b_by_token=True)
    if gate_z is not None and wants_gate_bias:
        found[6] = bias_grad(gate_z, layout)
    if wants_x:
        found[0] = _x_grad(op, layout, up_z, gate_z)
    return found


def _recompute(
    op: Operands, layout: Layout, *, wants_z: bool, wants_hidden: bool
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Pre-activations of up and gate, r h: `[P, I]` each by sorted position, None where not wanted."""
    if not wants_z and not wants_hidden:
        return None, None, None
    shape = (op.num_pairs, op.neurons)
    up_z = op.x.new_empty(shape) if wants_z else None
    gate_z = op.x.new_empty(shape) if wants_z and op.gate_proj is not None else None
    hidden = op.x.new_empty(shape) if wants_hidden else None
    weights = op.routing_weights if wants_hidden else None
    up_rows(op, layout, op.up_tile(), hidden=hidden, row_weights=weights, up_z=up_z, gate_z=gate_z)
    return up_z, gate_z, hidden


def _over_z(
    grad: Tensor, op: Operands, layout: Layout, up_z: Tensor, gate_z: Tensor | None, *, wants_z: bool, wants_r: bool
) -> Tensor | None:
    """Write dz over `up_z` and `gate_z` if it is wanted; return the gradient of r if that is."""
    tile = op.hidden_grad_tile()
    parts = None
    if wants_r:
        parts = up_z.new_empty((triton.cdiv(op.neurons, tile.cols), op.num_pairs), dtype=torch.float32)
    hidden_grads(
        grad, layout, op.routing_weights, op.down_proj, up_z, gate_z, op.activation, tile,
        in_place=wants_z, partial_dr=parts,
    )  # fmt: skip
    if parts is None:
        return None
    return routing_grad(parts, op.expert_ids, op.num_experts, grad, op.down_bias, op.routing_weights.dtype)


def _x_grad(op: Operands, layout: Layout, d_up: Tensor, d_gate: Tensor | None) -> Tensor:
    """`[T, D]`: `sum_p dz_p up_proj[e] (+ dg_p gate_proj[e])` over the pairs of a token."""
    rows = op.x.new_empty((op.num_pairs, op.x.shape[1]))
    gate_weight = None if op.gate_proj is None else op.gate_proj.transpose(1, 2)
    down_rows(d_up, layout, op.up_proj.transpose(1, 2), op.row_tile(), rows, more_rows=d_gate, more_weight=gate_weight)
    d_x = op.x.new_empty(op.x.shape)
    combine_rows(rows, op.expert_ids, op.num_experts, d_x, inverse=layout.inverse)
    return d_x
