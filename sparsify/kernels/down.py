"""Kernel B: sorted rows times a matrix of their expert. The down projection; in the backward the gradient of the input.

D_out output features, E num_experts, K top_k, P pairs, S inner size.
"""

# Arguments of kernels are pointers and scalars on the device, which have no type in Python.
# pyright: reportMissingParameterType=false

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from sparsify.kernels import common
from sparsify.kernels.common import accumulate, tile_of_program
from sparsify.kernels.layout import Layout
from sparsify.kernels.tiles import Tile, fp32_precision


def down_rows(
    rows: Tensor,
    layout: Layout,
    weight: Tensor,
    tile: Tile,
    out: Tensor,
    *,
    more_rows: Tensor | None = None,
    more_weight: Tensor | None = None,
    row_weights: Tensor | None = None,
    bias: Tensor | None = None,
) -> None:
    """`out[p] = rows[p] @ weight[e].T (+ more_rows[p] @ more_weight[e].T)` for every pair that has an expert.

    With `row_weights` the row is final, as for K = 1: it is written at its pair, `r * (row + bias[e])`.

    Args:
        rows: `[P, S]` contiguous, sorted.
        layout: of the pairs.
        weight: `[E, D_out, S]`, any strides.
        tile: its rows are those of the layout.
        out: `[P, D_out]` contiguous.
        more_rows: as `rows`, or None.
        more_weight: as `weight`, or None.
        row_weights: `[P]` by pair, or None.
        bias: `[E, D_out]`, the last stride 1, or None; only read with `row_weights`.
    """
    _, features, size = weight.shape
    common.launch(
        down_kernel,
        layout.max_tiles * triton.cdiv(features, tile.cols),
        rows,
        more_rows,
        layout.order,
        layout.offsets,
        layout.tile_expert,
        layout.tile_start,
        layout.n_tiles,
        weight,
        more_weight,
        row_weights,
        bias,
        out,
        features,
        size,
        *weight.stride(),
        *((0, 0, 0) if more_weight is None else more_weight.stride()),
        0 if bias is None else bias.stride(0),
        PRECISION=fp32_precision(),
        BM=tile.rows,
        BN=tile.cols,
        BK=tile.inner,
        GROUP=tile.group,
        warps=tile.warps,
        stages=tile.stages,
    )


@triton.jit
def down_kernel(
    rows_ptr,
    more_rows_ptr,
    order_ptr,
    offsets_ptr,
    tile_expert_ptr,
    tile_start_ptr,
    n_tiles_ptr,
    weight_ptr,
    more_weight_ptr,
    row_weights_ptr,
    bias_ptr,
    out_ptr,
    features,
    size,
    stride_e,
    stride_n,
    stride_k,
    stride_more_e,
    stride_more_n,
    stride_more_k,
    stride_bias,
    PRECISION: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    GROUP: tl.constexpr,
):
    """One tile `[BM, BN]` of sorted pairs x features; pointers that are None are left out."""
    pid = tl.program_id(0)
    n_tiles = tl.load(n_tiles_ptr)
    n_cols = tl.cdiv(features, BN)
    if pid >= n_tiles * n_cols:
        return
    tile, col_tile = tile_of_program(pid, n_tiles, n_cols, GROUP)
    e = tl.load(tile_expert_ptr + tile).to(tl.int64)
    positions = tl.load(tile_start_ptr + tile) + tl.arange(0, BM)
    row_mask = positions < tl.load(offsets_ptr + e + 1)
    rows = positions.to(tl.int64)
    cols = (col_tile * BN + tl.arange(0, BN)).to(tl.int64)
    col_mask = cols < features

    acc = tl.zeros([BM, BN], dtype=tl.float32)
    w_ptr = weight_ptr + e * stride_e
    acc = accumulate(
        acc, rows_ptr, rows, row_mask, size, w_ptr, cols, col_mask, stride_n, stride_k, size, BK, PRECISION
    )
    if more_rows_ptr is not None:
        w_ptr = more_weight_ptr + e * stride_more_e
        acc = accumulate(
            acc, more_rows_ptr, rows, row_mask, size, w_ptr, cols, col_mask, stride_more_n, stride_more_k, size, BK,
            PRECISION,
        )  # fmt: skip

    if row_weights_ptr is not None:
        if bias_ptr is not None:
            acc += tl.load(bias_ptr + e * stride_bias + cols, mask=col_mask, other=0.0).to(tl.float32)[None, :]
        pairs = tl.load(order_ptr + positions, mask=row_mask, other=0)
        acc *= tl.load(row_weights_ptr + pairs, mask=row_mask, other=0.0).to(tl.float32)[:, None]
        rows = pairs.to(tl.int64)
    tl.store(out_ptr + rows[:, None] * features + cols[None, :], acc, mask=row_mask[:, None] & col_mask[None, :])
