"""Weights in blocks of outputs, as `blocks.h` reads them: each from its first byte to its last."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor
from torch.nn import functional

from sparsify.cpu import packed
from sparsify.cpu.experts import Experts

_MOST = 64  # outputs of a block: four vectors of AVX-512
_MOST_IN_ROWS = 16  # MOST_IN_ROWS in blocks.h


def in_blocks(weight: Tensor) -> Tensor:
    """Lay out the weights of experts in the fewest blocks of at most 64 outputs, all of one size.

    Args:
        weight: `[E, N, M]`, N outputs of M inputs.

    Returns:
        `[E, B, M, b]`, contiguous: output n is `[:, n // b, :, n % b]`. B * b is N or a little more, the rest is zero.
    """
    outputs = weight.shape[1]
    blocks = -(-outputs // _MOST)
    size = -(-outputs // max(blocks, 1))
    if blocks * size > outputs:
        weight = functional.pad(weight, (0, 0, 0, blocks * size - outputs))
    return weight.unflatten(1, (blocks, size)).transpose(2, 3).contiguous()


def stay_in_rows(width: int) -> bool:
    """Whether the kernel reads up_proj and gate_proj of experts of `width` neurons as they lie, and not `in_blocks`."""
    return width <= _MOST_IN_ROWS


def experts_in_blocks(experts: Experts) -> Experts:
    """All weights `in_blocks`, but for projections that `stay_in_rows`."""
    return _laid_out(experts, in_blocks)


def kept_blocks(experts: Experts) -> Experts | None:
    """`experts_in_blocks`, made once for weights that stay as they are; None while they are being changed."""
    settled = [packed.settled(weight) for weight in experts.weights]  # all of them, as each counts its calls
    if not all(settled):
        return None
    return _laid_out(experts, lambda weight: packed.cached(weight, "blocks", lambda: in_blocks(weight)))


def _laid_out(experts: Experts, layout: Callable[[Tensor], Tensor]) -> Experts:
    up, gate = experts.up_proj, experts.gate_proj
    if not stay_in_rows(up.shape[1]):
        up, gate = layout(up), None if gate is None else layout(gate)
    return experts._replace(up_proj=up, gate_proj=gate, down_proj=layout(experts.down_proj))
