"""Weights in blocks of outputs, as `blocks.h` reads them: each from its first byte to its last."""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional

from sparsify.cpu.experts import Experts

_MOST = 64  # outputs of a block: four vectors of AVX-512


def in_blocks(weight: Tensor) -> Tensor:
    """Lay out the weights of experts in the fewest blocks of at most 64 outputs, all of one size.

    Args:
        weight: `[E, N, M]`, N outputs of M inputs.

    Returns:
        `[E, B, M, b]`, contiguous: output n is `[:, n // b, :, n % b]`. B * b is N or a little more, the rest is zero.
    """
    num_experts, outputs, inputs = weight.shape
    blocks = -(-outputs // _MOST)
    size = -(-outputs // max(blocks, 1))
    padded = functional.pad(weight, (0, 0, 0, blocks * size - outputs))
    return padded.view(num_experts, blocks, size, inputs).transpose(2, 3).contiguous()


def experts_in_blocks(experts: Experts) -> Experts:
    """All weights `in_blocks`."""
    gate = experts.gate_proj
    return experts._replace(
        up_proj=in_blocks(experts.up_proj),
        gate_proj=None if gate is None else in_blocks(gate),
        down_proj=in_blocks(experts.down_proj),
    )
