"""The receipts: with every expert on, a split FFN is the dense FFN.

T tokens, D hidden_size, R routed experts.
"""

from __future__ import annotations

import torch
from torch import Tensor

from sparsify.errors import VerificationError
from sparsify.passes.split.dense_ffn import DenseFFN
from sparsify.passes.split.experts import Experts

RECEIPT_BOUND = 1e-5
_SAMPLE = 512
_ROWS = 1 << 12  # of tokens and experts at a time: each is a row of inputs and one of outputs


def receipt(dense: DenseFFN, experts: Experts, x: Tensor) -> float:
    """Run both with every expert on, through the same ops as the graph.

    Args:
        dense: the FFN, fp32 or fp64.
        experts: its split before any refit.
        x: `[T, D]`; at most 512 tokens are used.

    Returns:
        max |split - dense| / max |dense|.
    """
    if not len(x):
        return 0.0
    differences: list[Tensor] = []
    sizes: list[Tensor] = []
    for part in x[:_SAMPLE].split(max(1, _ROWS // max(1, experts.num_routed))):
        expected = dense(part)
        everyone = torch.arange(experts.num_routed).expand(len(part), -1)
        differences.append((experts(part, everyone) - expected).abs().max())
        sizes.append(expected.abs().max())
    return float(torch.stack(differences).max() / torch.stack(sizes).max().clamp(min=1e-30))


def check_receipt(name: str, value: float) -> None:
    """Refuse a split that does not reproduce its FFN.

    Raises:
        VerificationError: the receipt is above 1e-5.
    """
    if not value <= RECEIPT_BOUND:
        raise VerificationError(
            f"{name}: with all experts on, the split differs from the dense FFN by {value:.1e} (relative; the bound is "
            f"{RECEIPT_BOUND:.0e}). This is a defect of sparsify or a model whose values overflow: leave the layer "
            "dense with select= and report it."
        )
