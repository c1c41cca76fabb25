"""The tensors of one call of `sparsify::moe_ffn`, in the form that the kernels take, or why they do not take them.

T tokens, D hidden_size, D_out output features, E num_experts, K top_k, P = T * K pairs, I neurons of one expert.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from sparsify.kernels.tiles import Tile, row_tile, shared_memory_of, weight_grad_tile

_DTYPES = (torch.float32, torch.float16, torch.bfloat16)
_OLDEST_CAPABILITY = (8, 0)
# Positions of pairs are 32 bits wide, and a tile may look past the last one.
_MOST_PAIRS = 2**31 - 1024


@dataclass(frozen=True)
class Operands:
    """Arguments of the op: last strides are 1 except for weights, routing is contiguous, the rest is as it came."""

    x: Tensor
    routing_weights: Tensor
    expert_ids: Tensor
    up_proj: Tensor
    up_bias: Tensor | None
    gate_proj: Tensor | None
    gate_bias: Tensor | None
    down_proj: Tensor
    down_bias: Tensor | None
    activation: str

    @property
    def top_k(self) -> int:
        """K."""
        return self.expert_ids.shape[1]

    @property
    def num_pairs(self) -> int:
        """P."""
        return self.expert_ids.numel()

    @property
    def num_experts(self) -> int:
        """E."""
        return self.up_proj.shape[0]

    @property
    def neurons(self) -> int:
        """I."""
        return self.up_proj.shape[1]

    @property
    def features(self) -> int:
        """D_out."""
        return self.down_proj.shape[1]

    @property
    def tokens_per_expert(self) -> float:
        """m, on average."""
        return self.num_pairs / self.num_experts

    def row_tile(self, accumulators: int = 1) -> Tile:
        """Tile of kernels over sorted pairs; all of them have the same rows."""
        return row_tile(
            self.tokens_per_expert, self.x.element_size(), shared_memory_of(self.x.device), accumulators=accumulators
        )

    def up_tile(self) -> Tile:
        """Tile of the first projections, of which a gated FFN has two."""
        return self.row_tile(1 if self.gate_proj is None else 2)

    def hidden_grad_tile(self) -> Tile:
        """Tile of the gradient of the hidden activation, whose epilogue holds z as well."""
        return self.row_tile(2)

    def weight_grad_tile(self) -> Tile:
        """Tile of the gradients of weights."""
        return weight_grad_tile(self.tokens_per_expert, self.x.element_size(), shared_memory_of(self.x.device))


def operands(
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
) -> Operands | None:
    """The operands, or None if the kernels do not take them: fp64, mixed dtypes, compute capability below 8.0."""
    tensors = (up_proj, up_bias, gate_proj, gate_bias, down_proj, down_bias)
    same = x.dtype in _DTYPES and all(tensor is None or tensor.dtype == x.dtype for tensor in tensors)
    if not same or expert_ids.numel() > _MOST_PAIRS or not _new_enough(x.device):
        return None
    return Operands(
        dense_rows(x),
        routing_weights.contiguous(),
        expert_ids.contiguous(),
        up_proj,
        None if up_bias is None else dense_rows(up_bias),
        gate_proj,
        None if gate_bias is None else dense_rows(gate_bias),
        down_proj,
        None if down_bias is None else dense_rows(down_bias),
        activation,
    )


def dense_rows(tensor: Tensor) -> Tensor:
    """The tensor with a last stride of 1, copied if need be."""
    return tensor if tensor.stride(-1) == 1 else tensor.contiguous()


def _new_enough(device: torch.device) -> bool:
    return device.type != "cuda" or torch.cuda.get_device_capability(device) >= _OLDEST_CAPABILITY
