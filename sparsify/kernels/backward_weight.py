"""Gradients of the weights and biases of the experts: sums over the rows of each expert, zeros where it has none.

T tokens, E num_experts, K top_k, P pairs, M x N a weight of one expert, r routing_weights.
"""

# Arguments of kernels are pointers and scalars on the device, which have no type in Python.
# pyright: reportMissingParameterType=false

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from sparsify.kernels import common
from sparsify.kernels.common import tile_of_program
from sparsify.kernels.layout import Layout
from sparsify.kernels.tiles import Tile, fp32_precision

_BIAS_ROWS = 32
_BIAS_COLS = 64


def weight_grad(
    a: Tensor, b: Tensor, layout: Layout, top_k: int, tile: Tile, *, a_by_token: bool = False, b_by_token: bool = False
) -> Tensor:
    """`out[e] = sum_p a_p^T b_p` over the pairs of expert e, each operand by sorted position or by token.

    Args:
        a: `[P, M]` or `[T, M]`, the last stride 1.
        b: `[P, N]` or `[T, N]`, the last stride 1, dtype of `a`.
        layout: of the pairs.
        top_k: K.
        tile: of `[M, N]`, its inner dimension is that of the pairs.
        a_by_token: `a` is `[T, M]`.
        b_by_token: `b` is `[T, N]`.

    Returns:
        `[E, M, N]` contiguous, dtype of `a`.
    """
    num_experts, size_m, size_n = layout.offsets.shape[0] - 1, a.shape[1], b.shape[1]
    out = torch.empty((num_experts, size_m, size_n), dtype=a.dtype, device=a.device)
    common.launch(
        weight_grad_kernel,
        num_experts * triton.cdiv(size_m, tile.rows) * triton.cdiv(size_n, tile.cols),
        a,
        b,
        layout.order,
        layout.offsets,
        out,
        size_m,
        size_n,
        a.stride(0),
        b.stride(0),
        TOP_K=top_k,
        A_BY_TOKEN=a_by_token,
        B_BY_TOKEN=b_by_token,
        PRECISION=fp32_precision(),
        BM=tile.rows,
        BN=tile.cols,
        BK=tile.inner,
        GROUP=tile.group,
        warps=tile.warps,
        stages=tile.stages,
    )
    return out


@triton.jit
def weight_grad_kernel(
    a_ptr,
    b_ptr,
    order_ptr,
    offsets_ptr,
    out_ptr,
    size_m,
    size_n,
    stride_a,
    stride_b,
    TOP_K: tl.constexpr,
    A_BY_TOKEN: tl.constexpr,
    B_BY_TOKEN: tl.constexpr,
    PRECISION: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    GROUP: tl.constexpr,
):
    """One tile `[BM, BN]` of the gradient of one expert; the programs of one expert run together."""
    n_rows = tl.cdiv(size_m, BM)
    n_cols = tl.cdiv(size_n, BN)
    pid = tl.program_id(0)
    e = (pid // (n_rows * n_cols)).to(tl.int64)
    row_tile, col_tile = tile_of_program(pid % (n_rows * n_cols), n_rows, n_cols, GROUP)
    start = tl.load(offsets_ptr + e)
    end = tl.load(offsets_ptr + e + 1)
    m = (row_tile * BM + tl.arange(0, BM)).to(tl.int64)
    n = (col_tile * BN + tl.arange(0, BN)).to(tl.int64)
    m_mask = m < size_m
    n_mask = n < size_n
    inner = tl.arange(0, BK)
    acc = tl.zeros([BM, BN], dtype=tl.float32)
    for first in range(start, end, BK):
        positions = first + inner
        inner_mask = positions < end
        a_rows = positions
        b_rows = positions
        if A_BY_TOKEN:
            a_rows = tl.load(order_ptr + positions, mask=inner_mask, other=0) // TOP_K
        if B_BY_TOKEN:
            b_rows = tl.load(order_ptr + positions, mask=inner_mask, other=0) // TOP_K
        a_ptrs = a_ptr + a_rows.to(tl.int64)[None, :] * stride_a + m[:, None]
        b_ptrs = b_ptr + b_rows.to(tl.int64)[:, None] * stride_b + n[None, :]
        a = tl.load(a_ptrs, mask=m_mask[:, None] & inner_mask[None, :], other=0.0)
        b = tl.load(b_ptrs, mask=inner_mask[:, None] & n_mask[None, :], other=0.0)
        acc = tl.dot(a, b, acc, input_precision=PRECISION)
    out = e * size_m * size_n + m[:, None] * size_n + n[None, :]
    tl.store(out_ptr + out, acc, mask=m_mask[:, None] & n_mask[None, :])


def bias_grad(rows: Tensor, layout: Layout, *, routing_weights: Tensor | None = None) -> Tensor:
    """`out[e] = sum_p rows_p` over the pairs of expert e.

    Args:
        rows: `[P, N]` by sorted position; with `routing_weights` `[T, N]` by token. The last stride is 1.
        layout: of the pairs.
        routing_weights: `[T, K]` contiguous: every row times the weight of its pair.

    Returns:
        `[E, N]` contiguous, dtype of `rows`.
    """
    num_experts, size = layout.offsets.shape[0] - 1, rows.shape[1]
    out = torch.empty((num_experts, size), dtype=rows.dtype, device=rows.device)
    common.launch(
        bias_grad_kernel,
        num_experts * triton.cdiv(size, _BIAS_COLS),
        rows,
        layout.order,
        layout.offsets,
        routing_weights,
        out,
        size,
        rows.stride(0),
        TOP_K=1 if routing_weights is None else routing_weights.shape[1],
        BR=_BIAS_ROWS,
        BN=_BIAS_COLS,
    )
    return out


@triton.jit
def bias_grad_kernel(
    rows_ptr,
    order_ptr,
    offsets_ptr,
    routing_weights_ptr,
    out_ptr,
    size,
    stride_rows,
    TOP_K: tl.constexpr,
    BR: tl.constexpr,
    BN: tl.constexpr,
):
    """BN columns of one expert."""
    n_cols = tl.cdiv(size, BN)
    e = (tl.program_id(0) // n_cols).to(tl.int64)
    cols = tl.program_id(0) % n_cols * BN + tl.arange(0, BN)
    col_mask = cols < size
    start = tl.load(offsets_ptr + e)
    end = tl.load(offsets_ptr + e + 1)
    acc = tl.zeros([BR, BN], dtype=tl.float32)
    for first in range(start, end, BR):
        positions = first + tl.arange(0, BR)
        row_mask = positions < end
        rows = positions
        pairs = positions
        if routing_weights_ptr is not None:
            pairs = tl.load(order_ptr + positions, mask=row_mask, other=0)
            rows = pairs // TOP_K
        at = rows.to(tl.int64)[:, None] * stride_rows + cols[None, :]
        value = tl.load(rows_ptr + at, mask=row_mask[:, None] & col_mask[None, :], other=0.0).to(tl.float32)
        if routing_weights_ptr is not None:
            value *= tl.load(routing_weights_ptr + pairs, mask=row_mask, other=0.0).to(tl.float32)[:, None]
        acc += value
    tl.store(out_ptr + e * size + cols, tl.sum(acc, 0), mask=col_mask)
