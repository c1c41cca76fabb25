"""Gradient of the hidden activation, and what follows from it while it is in registers.

T tokens, D_out output features, E num_experts, K top_k, P pairs, I neurons of one expert, r routing_weights, z
pre-activation, h hidden. For the pair p of token t and expert e:

    dh_p = dy_t down_proj[e]        dr_p = <dh_p, h_p>                plain: dz_p = r_p dh_p * act'(z_p)
    gated, g the pre-activation of the gate:  dz_p = r_p dh_p * act(g_p),    dg_p = r_p dh_p * z_p * act'(g_p)

dr is left as one partial sum a column tile: who adds them does so in a fixed order.
"""

# Arguments of kernels are pointers and scalars on the device, which have no type in Python.
# pyright: reportMissingParameterType=false

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from sparsify.kernels import common
from sparsify.kernels.activations import activate, activation_slope
from sparsify.kernels.common import accumulate, tile_of_program
from sparsify.kernels.layout import Layout
from sparsify.kernels.tiles import Tile, fp32_precision


def hidden_grads(
    grad: Tensor,
    layout: Layout,
    routing_weights: Tensor,
    down_proj: Tensor,
    up_z: Tensor,
    gate_z: Tensor | None,
    activation: str,
    tile: Tile,
    *,
    in_place: bool,
    partial_dr: Tensor | None,
) -> None:
    """For every pair that has an expert.

    Args:
        grad: `[T, D_out]`, the last stride 1.
        layout: of the pairs.
        routing_weights: `[T, K]` contiguous.
        down_proj: `[E, D_out, I]`, any strides.
        up_z: `[P, I]` contiguous, sorted: z, of the up projection where there is a gate.
        gate_z: `[P, I]` contiguous, sorted: z of the gate, or None.
        activation: a key of `ACTIVATIONS`.
        tile: its rows are those of the layout.
        in_place: write the gradients of `up_z` and `gate_z` over them.
        partial_dr: `[ceil(I / tile.cols), P]` fp32 by pair, or None.
    """
    _, features, neurons = down_proj.shape
    common.launch(
        hidden_grad_kernel,
        layout.max_tiles * triton.cdiv(neurons, tile.cols),
        grad,
        layout.order,
        layout.offsets,
        layout.tile_expert,
        layout.tile_start,
        layout.n_tiles,
        routing_weights,
        down_proj,
        up_z,
        gate_z,
        partial_dr,
        neurons,
        features,
        routing_weights.numel(),
        grad.stride(0),
        *down_proj.stride(),
        TOP_K=routing_weights.shape[1],
        ACTIVATION=activation,
        IN_PLACE=in_place,
        PRECISION=fp32_precision(),
        BM=tile.rows,
        BN=tile.cols,
        BK=tile.inner,
        GROUP=tile.group,
        warps=tile.warps,
        stages=tile.stages,
    )


@triton.jit
def hidden_grad_kernel(
    grad_ptr,
    order_ptr,
    offsets_ptr,
    tile_expert_ptr,
    tile_start_ptr,
    n_tiles_ptr,
    routing_weights_ptr,
    down_ptr,
    up_z_ptr,
    gate_z_ptr,
    partial_dr_ptr,
    neurons,
    features,
    num_pairs,
    stride_grad,
    stride_down_e,
    stride_down_n,
    stride_down_i,
    TOP_K: tl.constexpr,
    ACTIVATION: tl.constexpr,
    IN_PLACE: tl.constexpr,
    PRECISION: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    GROUP: tl.constexpr,
):
    """One tile `[BM, BN]` of sorted pairs x neurons. Only this program reads or writes its part of `up_z`, `gate_z`."""
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
    tokens = (pairs // TOP_K).to(tl.int64)
    cols = (col_tile * BN + tl.arange(0, BN)).to(tl.int64)
    col_mask = cols < neurons
    d_hidden = tl.zeros([BM, BN], dtype=tl.float32)
    d_hidden = accumulate(
        d_hidden, grad_ptr, tokens, row_mask, stride_grad, down_ptr + e * stride_down_e, cols, col_mask, stride_down_i,
        stride_down_n, features, BK, PRECISION,
    )  # fmt: skip

    at = rows.to(tl.int64)[:, None] * neurons + cols[None, :]
    mask = row_mask[:, None] & col_mask[None, :]
    up = tl.load(up_z_ptr + at, mask=mask, other=0.0).to(tl.float32)
    gate = up
    if gate_z_ptr is not None:
        gate = tl.load(gate_z_ptr + at, mask=mask, other=0.0).to(tl.float32)
    if partial_dr_ptr is not None:
        if gate_z_ptr is not None:
            hidden = activate(gate, ACTIVATION) * up
        else:
            hidden = activate(up, ACTIVATION)
        partial = tl.sum(d_hidden * hidden, 1)
        tl.store(partial_dr_ptr + col_tile.to(tl.int64) * num_pairs + pairs, partial, mask=row_mask)
    if IN_PLACE:
        weights = tl.load(routing_weights_ptr + pairs, mask=row_mask, other=0.0).to(tl.float32)
        d_hidden *= weights[:, None]
        if gate_z_ptr is not None:
            tl.store(up_z_ptr + at, d_hidden * activate(gate, ACTIVATION), mask=mask)
            tl.store(gate_z_ptr + at, d_hidden * up * activation_slope(gate, ACTIVATION), mask=mask)
        else:
            tl.store(up_z_ptr + at, d_hidden * activation_slope(up, ACTIVATION), mask=mask)
