"""What all expert kernels share: starting one, the order of its tiles, the inner loop of its matrix product."""

# Arguments of kernels are pointers and scalars on the device, which have no type in Python.
# pyright: reportMissingParameterType=false

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl


def launch(kernel: Any, programs: int, *args: Any, warps: int = 4, stages: int = 1, **constants: Any) -> None:
    """Start `programs` programs of a kernel on the current device and stream; none if there is nothing to do."""
    if programs:
        kernel[(programs,)](*args, **constants, num_warps=warps, num_stages=stages)


@triton.jit
def tile_of_program(pid, n_rows, n_cols, GROUP: tl.constexpr):
    """Row tile and column tile of a program of a grid of `n_rows * n_cols` tiles.

    GROUP row tiles go through all column tiles together, so that programs that run at the same time share rows of one
    operand and columns of the other in the L2 cache.
    """
    in_group = GROUP * n_cols
    first = pid // in_group * GROUP
    height = tl.minimum(n_rows - first, GROUP)
    return first + pid % in_group % height, pid % in_group // height


@triton.jit
def accumulate(
    acc,
    a_ptr,
    rows,
    row_mask,
    stride_row,
    w_ptr,
    cols,
    col_mask,
    stride_col,
    stride_inner,
    size,
    BLOCK_INNER: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """`acc[m, n] + sum_k a[rows[m], k] w[cols[n], k]`.

    Args:
        acc: `[BM, BN]` fp32.
        a_ptr: `[.., size]`, the last stride 1.
        rows: `[BM]` int64.
        row_mask: `[BM]`; other rows count as zeros.
        stride_row: of `a_ptr`.
        w_ptr: weights of one expert.
        cols: `[BN]` int64.
        col_mask: `[BN]`; other columns count as zeros.
        stride_col: of `w_ptr` along `cols`.
        stride_inner: of `w_ptr` along `k`.
        size: of the inner dimension.
        BLOCK_INNER: BK.
        PRECISION: of products of fp32.
    """
    inner = tl.arange(0, BLOCK_INNER)
    a_ptrs = a_ptr + rows[:, None] * stride_row + inner[None, :]
    w_ptrs = w_ptr + cols[None, :] * stride_col + inner[:, None].to(tl.int64) * stride_inner
    step = tl.full([], BLOCK_INNER, tl.int64) * stride_inner
    for start in range(0, size, BLOCK_INNER):
        inner_mask = inner < size - start
        a = tl.load(a_ptrs, mask=row_mask[:, None] & inner_mask[None, :], other=0.0)
        w = tl.load(w_ptrs, mask=col_mask[None, :] & inner_mask[:, None], other=0.0)
        acc = tl.dot(a, w, acc, input_precision=PRECISION)
        a_ptrs += BLOCK_INNER
        w_ptrs += step
    return acc
