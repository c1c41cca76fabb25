"""`sparsify::moe_ffn` and its gradients on a GPU: the kernels of this folder, put in order.

T tokens, D hidden_size, D_out output features, E num_experts, K top_k, P = T * K pairs, I neurons of one expert.
"""

from __future__ import annotations

import torch
from torch import Tensor

from sparsify.kernels.combine import combine_rows
from sparsify.kernels.decode import moe_ffn_decode
from sparsify.kernels.down import down_rows
from sparsify.kernels.layout import make_layout
from sparsify.kernels.reference import moe_ffn_reference
from sparsify.kernels.tiles import row_tile, shared_memory_of, skips_sorting
from sparsify.kernels.up import empty_rows, up_rows

_DTYPES = (torch.float32, torch.float16, torch.bfloat16)


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
    """See `sparsify::moe_ffn`. What the kernels do not take (fp64, mixed dtypes) runs as plain ops."""
    if not _takes(x, up_proj, up_bias, gate_proj, gate_bias, down_proj, down_bias):
        return moe_ffn_reference(
            x, routing_weights, expert_ids, up_proj, up_bias, gate_proj, gate_bias, down_proj, down_bias, activation
        )
    num_tokens, top_k = expert_ids.shape
    num_experts, neurons, _ = up_proj.shape
    features = down_proj.shape[1]
    if expert_ids.numel() == 0:
        return x.new_zeros((num_tokens, features))
    x, up_bias, gate_bias, down_bias = _rows(x), _rows(up_bias), _rows(gate_bias), _rows(down_bias)
    routing_weights, expert_ids = routing_weights.contiguous(), expert_ids.contiguous()
    with torch.cuda.device_of(x):
        if skips_sorting(num_tokens, top_k, num_experts):
            return moe_ffn_decode(
                x, routing_weights, expert_ids, up_proj, up_bias, gate_proj, gate_bias, down_proj, down_bias, activation
            )
        m, shared_memory = num_tokens * top_k / num_experts, shared_memory_of(x.device)
        gates = 1 if gate_proj is None else 2
        up_tile = row_tile(m, x.element_size(), shared_memory, accumulators=gates)
        down_tile = row_tile(m, x.element_size(), shared_memory)
        layout = make_layout(expert_ids, num_experts, up_tile.rows)
        hidden = empty_rows(x, expert_ids.numel(), neurons)
        up_rows(
            x, layout, up_proj, up_bias, gate_proj, gate_bias, activation, top_k, up_tile, hidden=hidden
        )
        if top_k == 1:
            # Each token has one row, which is final; a token without an expert has none and stays 0.
            out = x.new_zeros((num_tokens, features))
            down_rows(hidden, layout, down_proj, down_tile, out, row_weights=routing_weights, bias=down_bias)
            return out
        rows = empty_rows(x, expert_ids.numel(), features)
        down_rows(hidden, layout, down_proj, down_tile, rows)
        out = x.new_empty((num_tokens, features))
        combine_rows(
            rows, expert_ids, num_experts, out,
            inverse=layout.inverse, routing_weights=routing_weights, bias=down_bias,
        )  # fmt: skip
        return out


def _takes(x: Tensor, *others: Tensor | None) -> bool:
    """Whether the kernels can compute with these dtypes and sizes."""
    return x.dtype in _DTYPES and all(other is None or other.dtype == x.dtype for other in others)


def _rows(tensor):
    """The tensor with a last stride of 1, which the kernels count on."""
    return tensor if tensor is None or tensor.stride(-1) == 1 else tensor.contiguous()
