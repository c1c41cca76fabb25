"""Kernel A: rows of tokens times the first projections of their experts, up to the hidden activation.

T tokens, D hidden_size, E num_experts, K top_k, P pairs, I neurons of one expert, z pre-activation, h hidden.
"""

# Arguments of kernels are pointers and scalars on the device, which have no type in Python.
# pyright: reportMissingParameterType=false

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from sparsify.kernels import common
from sparsify.kernels.activations import activate
from sparsify.kernels.common import tile_of_program
from sparsify.kernels.layout import Layout
from sparsify.kernels.operands import Operands
from sparsify.kernels.tiles import Tile, fp32_precision


def up_rows(
    op: Operands,
    layout: Layout,
    tile: Tile,
    *,
    hidden: Tensor | None = None,
    row_weights: Tensor | None = None,
    up_z: Tensor | None = None,
    gate_z: Tensor | None = None,
) -> None:
    """Write what is asked for of every pair that has an expert, in sorted order.

    Args:
        op: the arguments of the op.
        layout: of the pairs.
        tile: its rows are those of the layout.
        hidden: `[P, I]` or None: h, times the row's weight if there are any.
        row_weights: `[P]` by pair, or None.
        up_z: `[P, I]` or None: z of the up projection.
        gate_z: `[P, I]` or None: z of the gate.
    """
    common.launch(
        up_kernel,
        layout.max_tiles * triton.cdiv(op.neurons, tile.cols),
        op.x,
        layout.order,
        layout.offsets,
        layout.tile_expert,
        layout.tile_start,
        layout.n_tiles,
        op.up_proj,
        op.up_bias,
        op.gate_proj,
        op.gate_bias,
        row_weights,
        hidden,
        up_z,
        gate_z,
        op.neurons,
        op.x.shape[1],
        op.x.stride(0),
        *op.up_proj.stride(),
        *((0, 0, 0) if op.gate_proj is None else op.gate_proj.stride()),
        0 if op.up_bias is None else op.up_bias.stride(0),
        0 if op.gate_bias is None else op.gate_bias.stride(0),
        TOP_K=op.top_k,
        ACTIVATION=op.activation,
        PRECISION=fp32_precision(),
        BM=tile.rows,
        BN=tile.cols,
        BK=tile.inner,
        GROUP=tile.group,
        warps=tile.warps,
        stages=tile.stages,
    )


@triton.jit
def up_kernel(
    x_ptr,
    order_ptr,
    offsets_ptr,
    tile_expert_ptr,
    tile_start_ptr,
    n_tiles_ptr,
    up_ptr,
    up_bias_ptr,
    gate_ptr,
    gate_bias_ptr,
    row_weights_ptr,
    hidden_ptr,
    up_z_ptr,
    gate_z_ptr,
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
    PRECISION: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    GROUP: tl.constexpr,
):
    """One tile `[BM, BN]` of sorted pairs x neurons; pointers that are None are left out."""
    pid = tl.program_id(0)
    n_tiles = tl.load(n_tiles_ptr)
    n_cols = tl.cdiv(neurons, BN)
    if pid >= n_tiles * n_cols:
        return
    tile, col_tile = tile_of_program(pid, n_tiles, n_cols, GROUP)
    e = tl.load(tile_expert_ptr + tile).to(tl.int64)
    rows = tl.load(tile_start_ptr + tile) + tl.arange(0, BM)
    row_mask = rows < tl.load(offsets_ptr + e + 1)
    pairs = tl.load(order_ptr + rows, mask=row_mask, other=0)
    cols = (col_tile * BN + tl.arange(0, BN)).to(tl.int64)
    col_mask = cols < neurons

    inner = tl.arange(0, BK)
    x_ptrs = x_ptr + (pairs // TOP_K).to(tl.int64)[:, None] * stride_x + inner[None, :]
    wide_inner = inner.to(tl.int64)[:, None]
    up_ptrs = up_ptr + e * stride_up_e + cols[None, :] * stride_up_i + wide_inner * stride_up_d
    up_step = tl.full([], BK, tl.int64) * stride_up_d
    up = tl.zeros([BM, BN], dtype=tl.float32)
    gate = up
    gate_ptrs = up_ptrs
    gate_step = up_step
    if gate_ptr is not None:
        gate_ptrs = gate_ptr + e * stride_gate_e + cols[None, :] * stride_gate_i + wide_inner * stride_gate_d
        gate_step = tl.full([], BK, tl.int64) * stride_gate_d
    for start in range(0, size, BK):
        inner_mask = inner < size - start
        w_mask = col_mask[None, :] & inner_mask[:, None]
        a = tl.load(x_ptrs, mask=row_mask[:, None] & inner_mask[None, :], other=0.0)
        up = tl.dot(a, tl.load(up_ptrs, mask=w_mask, other=0.0), up, input_precision=PRECISION)
        x_ptrs += BK
        up_ptrs += up_step
        if gate_ptr is not None:
            gate = tl.dot(a, tl.load(gate_ptrs, mask=w_mask, other=0.0), gate, input_precision=PRECISION)
            gate_ptrs += gate_step

    out = rows.to(tl.int64)[:, None] * neurons + cols[None, :]
    out_mask = row_mask[:, None] & col_mask[None, :]
    if up_bias_ptr is not None:
        up += tl.load(up_bias_ptr + e * stride_up_bias + cols, mask=col_mask, other=0.0).to(tl.float32)[None, :]
    if up_z_ptr is not None:
        tl.store(up_z_ptr + out, up, mask=out_mask)
    if gate_ptr is not None:
        if gate_bias_ptr is not None:
            bias = tl.load(gate_bias_ptr + e * stride_gate_bias + cols, mask=col_mask, other=0.0)
            gate += bias.to(tl.float32)[None, :]
        if gate_z_ptr is not None:
            tl.store(gate_z_ptr + out, gate, mask=out_mask)
    if hidden_ptr is not None:
        if gate_ptr is not None:
            hidden = activate(gate, ACTIVATION) * up
        else:
            hidden = activate(up, ACTIVATION)
        if row_weights_ptr is not None:
            hidden *= tl.load(row_weights_ptr + pairs, mask=row_mask, other=0.0).to(tl.float32)[:, None]
        tl.store(hidden_ptr + out, hidden, mask=out_mask)
