"""`sparsify::combine` by itself."""

from __future__ import annotations

import pytest
import torch

from sparsify import ops


@pytest.mark.parametrize("num_tokens", [0, 1, 7])
def test_opcheck(num_tokens: int) -> None:
    """Protects: schema, fake kernel and autograd registration."""
    rows = torch.randn(num_tokens * 2, 4, requires_grad=True)
    routing_weights = torch.rand(num_tokens, 2, requires_grad=True)
    torch.library.opcheck(
        torch.ops.sparsify.combine.default, (rows, routing_weights, torch.randperm(num_tokens * 2))
    )


def test_adds_in_fp32() -> None:
    """Protects: 1 + 256 * 2^-9 is 1.5, which bf16 additions one by one would never reach."""
    rows = torch.full((257, 1), 2.0**-9, dtype=torch.bfloat16)
    rows[0] = 1.0
    y = ops.combine(rows, torch.ones(1, 257, dtype=torch.bfloat16), torch.arange(257))
    assert y.item() == 1.5
