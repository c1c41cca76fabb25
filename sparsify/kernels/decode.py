"""Few tokens: no sorting, one program for each pair and column tile, which reads weights once and nothing twice.

T tokens, D hidden_size, D_out output features, E num_experts, K top_k, P = T * K pairs, I neurons of one expert. The
products are matrix times vector, bound by the bytes of the weights: hidden values and rows stay in fp32.
"""

# Arguments of kernels are pointers and scalars on the device, which have no type in Python.
# pyright: reportMissingParameterType=false

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from sparsify.kernels import common
from sparsify.kernels.activations import activate
from sparsify.kernels.combine import combine_rows
from sparsify.kernels.operands import Operands

_COLS = 16
_INNER = 256


def moe_ffn_decode(op: Operands) -> Tensor:
    """`sparsify::moe_ffn` in three launches: `[T, D_out]`, dtype of `x`."""
    hidden = op.x.new_empty((op.num_pairs, op.neurons), dtype=torch.float32)
    rows = op.x.new_empty((op.num_pairs, op.features), dtype=torch.float32)
    out = op.x.new_empty((op.x.shape[0], op.features))
    common.launch(
        decode_up_kernel,
        op.num_pairs * triton.cdiv(op.neurons, _COLS),
        op.x,
        op.expert_ids,
        op.up_proj,
        op.up_bias,
        op.gate_proj,
        op.gate_bias,
        hidden,
        op.num_experts,
        op.neurons,
        op.x.shape[1],
        op.x.stride(0),
        *op.up_proj.stride(),
        *((0, 0, 0) if op.gate_proj is None else op.gate_proj.stride()),
        0 if op.up_bias is None else op.up_bias.stride(0),
        0 if op.gate_bias is None else op.gate_bias.stride(0),
        TOP_K=op.top_k,
        ACTIVATION=op.activation,
        BN=_COLS,
        BK=_INNER,
    )
    common.launch(
        decode_down_kernel,
        op.num_pairs * triton.cdiv(op.features, _COLS),
        hidden,
        op.expert_ids,
        op.down_proj,
        rows,
        op.num_experts,
        op.features,
        op.neurons,
        *op.down_proj.stride(),
        BN=_COLS,
        BK=_INNER,
    )
    combine_rows(rows, op.expert_ids, op.num_experts, out, routing_weights=op.routing_weights, bias=op.down_bias)
    return out


@triton.jit
def decode_up_kernel(
    x_ptr,
    expert_ids_ptr,
    up_ptr,
    up_bias_ptr,
    gate_ptr,
    gate_bias_ptr,
    hidden_ptr,
    num_experts,
    neurons,
    size,
    stride_x,
    stride_up_e,
    stride_up_i,
    stride_up_d,
    stride_gate_e,
    stride_gate_i,
    stride_gate_d,
    stride_up_bias,
    stride_gate_bias,
    TOP_K: tl.constexpr,
    ACTIVATION: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
):
    """BN hidden values of one pair."""
    n_cols = tl.cdiv(neurons, BN)
    pair = (tl.program_id(0) // n_cols).to(tl.int64)
    e = tl.load(expert_ids_ptr + pair)
    if (e < 0) | (e >= num_experts):
        return
    cols = (tl.program_id(0) % n_cols * BN + tl.arange(0, BN)).to(tl.int64)
    col_mask = cols < neurons
    row_ptr = x_ptr + pair // TOP_K * stride_x
    up = _matrix_vector(row_ptr, up_ptr + e * stride_up_e, cols, col_mask, stride_up_i, stride_up_d, size, BN, BK)
    if up_bias_ptr is not None:
        up += tl.load(up_bias_ptr + e * stride_up_bias + cols, mask=col_mask, other=0.0).to(tl.float32)
    if gate_ptr is not None:
        w_ptr = gate_ptr + e * stride_gate_e
        gate = _matrix_vector(row_ptr, w_ptr, cols, col_mask, stride_gate_i, stride_gate_d, size, BN, BK)
        if gate_bias_ptr is not None:
            gate += tl.load(gate_bias_ptr + e * stride_gate_bias + cols, mask=col_mask, other=0.0).to(tl.float32)
        hidden = activate(gate, ACTIVATION) * up
    else:
        hidden = activate(up, ACTIVATION)
    tl.store(hidden_ptr + pair * neurons + cols, hidden, mask=col_mask)


@triton.jit
def decode_down_kernel(
    hidden_ptr,
    expert_ids_ptr,
    down_ptr,
    rows_ptr,
    num_experts,
    features,
    neurons,
    stride_down_e,
    stride_down_n,
    stride_down_i,
    BN: tl.constexpr,
    BK: tl.constexpr,
):
    """BN output features of one pair, before bias and routing weight."""
    n_cols = tl.cdiv(features, BN)
    pair = (tl.program_id(0) // n_cols).to(tl.int64)
    e = tl.load(expert_ids_ptr + pair)
    if (e < 0) | (e >= num_experts):
        return
    cols = (tl.program_id(0) % n_cols * BN + tl.arange(0, BN)).to(tl.int64)
    col_mask = cols < features
    w_ptr = down_ptr + e * stride_down_e
    row_ptr = hidden_ptr + pair * neurons
    row = _matrix_vector(row_ptr, w_ptr, cols, col_mask, stride_down_n, stride_down_i, neurons, BN, BK)
    tl.store(rows_ptr + pair * features + cols, row, mask=col_mask)


@triton.jit
def _matrix_vector(
    row_ptr,
    w_ptr,
    cols,
    col_mask,
    stride_col,
    stride_inner,
    size,
    BN: tl.constexpr,
    BK: tl.constexpr,
):
    """`sum_k w[cols[n], k] row[k]`, `[BN]` fp32."""
    inner = tl.arange(0, BK)
    w_ptrs = w_ptr + cols[:, None] * stride_col + inner[None, :].to(tl.int64) * stride_inner
    step = tl.full([], BK, tl.int64) * stride_inner
    acc = tl.zeros([BN, BK], dtype=tl.float32)
    for start in range(0, size, BK):
        inner_mask = inner < size - start
        a = tl.load(row_ptr + start + inner, mask=inner_mask, other=0.0).to(tl.float32)
        w = tl.load(w_ptrs, mask=col_mask[:, None] & inner_mask[None, :], other=0.0)
        acc += w.to(tl.float32) * a[None, :]
        w_ptrs += step
    return tl.sum(acc, 1)
