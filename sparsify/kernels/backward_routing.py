"""Gradient of the routing weights from the partial sums of `hidden_grads`, added in a fixed order.

T tokens, D_out output features, E num_experts, K top_k, P = T * K pairs, C partial sums of a pair.
"""

# Arguments of kernels are pointers and scalars on the device, which have no type in Python.
# pyright: reportMissingParameterType=false

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from sparsify.kernels import common

_PAIRS = 16
_FEATURES = 128


def routing_grad(
    partial_dr: Tensor, expert_ids: Tensor, num_experts: int, grad: Tensor, bias: Tensor | None, dtype: torch.dtype
) -> Tensor:
    """`out[t, k] = sum_c partial_dr[c, p] (+ <grad[t], bias[e]>)`, 0 for a slot without an expert.

    Args:
        partial_dr: `[C, P]` fp32 contiguous; columns of pairs without an expert are not read.
        expert_ids: `[T, K]` int64 contiguous.
        num_experts: E.
        grad: `[T, D_out]`, the last stride 1.
        bias: `[E, D_out]`, the last stride 1, or None.
        dtype: of the result.

    Returns:
        `[T, K]` contiguous.
    """
    out = torch.empty(expert_ids.shape, dtype=dtype, device=expert_ids.device)
    num_pairs = out.numel()
    common.launch(
        routing_grad_kernel,
        triton.cdiv(num_pairs, _PAIRS),
        partial_dr,
        expert_ids,
        grad,
        bias,
        out,
        partial_dr.shape[0],
        num_pairs,
        num_experts,
        grad.shape[1],
        grad.stride(0),
        0 if bias is None else bias.stride(0),
        TOP_K=expert_ids.shape[1],
        BP=_PAIRS,
        BN=_FEATURES,
    )
    return out


@triton.jit
def routing_grad_kernel(
    partial_ptr,
    expert_ids_ptr,
    grad_ptr,
    bias_ptr,
    out_ptr,
    num_partials,
    num_pairs,
    num_experts,
    features,
    stride_grad,
    stride_bias,
    TOP_K: tl.constexpr,
    BP: tl.constexpr,
    BN: tl.constexpr,
):
    """BP pairs."""
    pairs = tl.program_id(0).to(tl.int64) * BP + tl.arange(0, BP)
    mask = pairs < num_pairs
    e = tl.load(expert_ids_ptr + pairs, mask=mask, other=-1)
    used = (e >= 0) & (e < num_experts)
    total = tl.zeros([BP], dtype=tl.float32)
    for _ in range(num_partials):
        total += tl.load(partial_ptr + pairs, mask=used, other=0.0)
        partial_ptr += num_pairs
    if bias_ptr is not None:
        acc = tl.zeros([BP, BN], dtype=tl.float32)
        for first in range(0, features, BN):
            cols = first + tl.arange(0, BN)
            block = used[:, None] & (cols < features)[None, :]
            grad = tl.load(grad_ptr + (pairs // TOP_K)[:, None] * stride_grad + cols[None, :], mask=block, other=0.0)
            bias = tl.load(bias_ptr + e[:, None] * stride_bias + cols[None, :], mask=block, other=0.0)
            acc += grad.to(tl.float32) * bias.to(tl.float32)
        total += tl.sum(acc, 1)
    tl.store(out_ptr + pairs, total, mask=mask)
