"""Kernel C: the rows of a token's slots, added up in fp32 in the order of the slots, without atomics.

T tokens, D_out output features, E num_experts, K top_k, P = T * K pairs, r routing_weights.
"""

# Arguments of kernels are pointers and scalars on the device, which have no type in Python.
# pyright: reportMissingParameterType=false

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from sparsify.kernels import common


def combine_rows(
    rows: Tensor,
    expert_ids: Tensor,
    num_experts: int,
    out: Tensor,
    *,
    inverse: Tensor | None = None,
    routing_weights: Tensor | None = None,
    bias: Tensor | None = None,
) -> None:
    """`out[t] = sum_k r[t, k] * (rows[inverse[t, k]] + bias[e])` over the slots that have an expert.

    Args:
        rows: `[P, D_out]` contiguous; rows of pairs without an expert are not read.
        expert_ids: `[T, K]` int64 contiguous.
        num_experts: E.
        out: `[T, D_out]` contiguous; every element is written.
        inverse: `[P]` int32, pair to row; without it the rows are in the order of the pairs.
        routing_weights: `[T, K]` contiguous; without them 1.
        bias: `[E, D_out]`, the last stride 1, or None.
    """
    num_tokens, top_k = expert_ids.shape
    features = out.shape[1]
    block = min(1024, max(32, triton.next_power_of_2(features)))
    common.launch(
        combine_kernel,
        num_tokens * triton.cdiv(features, block),
        rows,
        inverse,
        expert_ids,
        routing_weights,
        bias,
        out,
        num_experts,
        features,
        0 if bias is None else bias.stride(0),
        TOP_K=top_k,
        BN=block,
        warps=max(1, block // 256),
    )


@triton.jit
def combine_kernel(
    rows_ptr,
    inverse_ptr,
    expert_ids_ptr,
    routing_weights_ptr,
    bias_ptr,
    out_ptr,
    num_experts,
    features,
    stride_bias,
    TOP_K: tl.constexpr,
    BN: tl.constexpr,
):
    """BN features of one token. A slot without an expert is left out by selection: its row may be NaN."""
    n_cols = tl.cdiv(features, BN)
    token = tl.program_id(0).to(tl.int64) // n_cols
    cols = tl.program_id(0) % n_cols * BN + tl.arange(0, BN)
    col_mask = cols < features
    acc = tl.zeros([BN], dtype=tl.float32)
    for slot in range(TOP_K):
        pair = token * TOP_K + slot
        e = tl.load(expert_ids_ptr + pair)
        used = (e >= 0) & (e < num_experts)
        row = pair
        if inverse_ptr is not None:
            row = tl.load(inverse_ptr + pair).to(tl.int64)
        value = tl.load(rows_ptr + row * features + cols, mask=col_mask & used, other=0.0).to(tl.float32)
        if bias_ptr is not None:
            value += tl.load(bias_ptr + e * stride_bias + cols, mask=col_mask & used, other=0.0).to(tl.float32)
        if routing_weights_ptr is not None:
            value *= tl.load(routing_weights_ptr + pair).to(tl.float32)
        acc += tl.where(used, value, 0.0)
    tl.store(out_ptr + token * features + cols, acc, mask=col_mask)
