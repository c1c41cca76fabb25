"""`sparsify::moe_ffn` on a GPU: the kernels of this folder, put in order.

T tokens, D hidden_size, D_out output features, K top_k, P = T * K pairs, I neurons of one expert. Memory that no kernel
writes is never read: rows of pairs without an expert, and tiles beyond the last one.
"""

from __future__ import annotations

import torch
from torch import Tensor

from sparsify.kernels.combine import combine_rows
from sparsify.kernels.decode import moe_ffn_decode
from sparsify.kernels.down import down_rows
from sparsify.kernels.layout import make_layout
from sparsify.kernels.moe_triton_backward import input_grads
from sparsify.kernels.operands import Operands, operands
from sparsify.kernels.reference import moe_ffn_backward_reference, moe_ffn_reference
from sparsify.kernels.tiles import skips_sorting
from sparsify.kernels.up import up_rows


def moe_ffn_triton(
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
    """See `sparsify::moe_ffn`. What the kernels do not take (`operands`) runs as plain ops."""
    arguments = (
        x, routing_weights, expert_ids, up_proj, up_bias, gate_proj, gate_bias, down_proj, down_bias, activation,
    )  # fmt: skip
    op = operands(*arguments)
    if op is None:
        return moe_ffn_reference(*arguments)
    if op.num_pairs == 0:
        return x.new_zeros((x.shape[0], op.features))
    with torch.cuda.device_of(x):
        if skips_sorting(x.shape[0], op.top_k, op.num_experts):
            return moe_ffn_decode(op)
        return _moe_ffn_sorted(op)


def _moe_ffn_sorted(op: Operands) -> Tensor:
    """`[T, D_out]` by kernels A, B and, unless K = 1, C."""
    tile = op.row_tile()
    layout = make_layout(op.expert_ids, op.num_experts, tile.rows)
    hidden = op.x.new_empty((op.num_pairs, op.neurons))
    up_rows(op, layout, op.up_tile(), hidden=hidden)
    if op.top_k == 1:
        # Each token has one row, which is final; a token without an expert has none and stays 0.
        out = op.x.new_zeros((op.num_pairs, op.features))
        down_rows(hidden, layout, op.down_proj, tile, out, row_weights=op.routing_weights, bias=op.down_bias)
        return out
    rows = op.x.new_empty((op.num_pairs, op.features))
    down_rows(hidden, layout, op.down_proj, tile, rows)
    out = op.x.new_empty((op.x.shape[0], op.features))
    combine_rows(
        rows, op.expert_ids, op.num_experts, out,
        inverse=layout.inverse, routing_weights=op.routing_weights, bias=op.down_bias,
    )  # fmt: skip
    return out


def moe_ffn_backward_triton(
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
    """See `sparsify::moe_ffn_backward`. What the kernels do not take (`operands`) runs as plain ops."""
    inputs = (x, routing_weights, expert_ids, up_proj, up_bias, gate_proj, gate_bias, down_proj, down_bias)
    op = operands(*inputs, activation)
    if op is None or grad.dtype != x.dtype:
        return moe_ffn_backward_reference(grad, *inputs, activation, needs)
    wanted = [needed and tensor is not None for needed, tensor in zip(needs, inputs, strict=True)]
    wanted[2] = False
    if op.num_pairs:
        with torch.cuda.device_of(x):
            found = input_grads(grad, op, wanted)
    else:
        found = [None if tensor is None else tensor.new_zeros(tensor.shape) for tensor in inputs]
    return [g if wants and g is not None else x.new_empty(0) for g, wants in zip(found, wanted, strict=True)]
