"""`MLPRouter`, and through it the contract of `Router`."""

from __future__ import annotations

import pytest
import torch

from sparsify.routers import MLPRouter


@pytest.mark.parametrize("num_tokens", [0, 1, 13])
@pytest.mark.parametrize("top_k", [1, 5])
def test_contract(num_tokens: int, top_k: int) -> None:
    """Protects: shapes, dtypes, distinct experts, weights of one."""
    router = MLPRouter(hidden_size=7, num_experts=5, top_k=top_k, router_hidden_size=3)
    weights, ids = router(torch.randn(num_tokens, 7))
    assert weights.shape == ids.shape == (num_tokens, top_k)
    assert ids.dtype == torch.int64
    assert torch.equal(weights, torch.ones(num_tokens, top_k))
    assert all(len(set(row)) == top_k for row in ids.tolist())


def test_takes_the_largest_logits() -> None:
    """Protects: selection by logit, largest first."""
    router = MLPRouter(6, 5, 2, 4)
    x = torch.randn(20, 6)
    assert torch.equal(router(x)[1], router.logits(x).topk(2).indices)


def test_routes_half_precision_tokens_in_fp32() -> None:
    """Protects: the logits of bf16 tokens do not tie for want of digits; the weights come in the tokens' dtype."""
    router = MLPRouter(6, 5, 2, 4)
    x = torch.randn(20, 6).bfloat16()
    weights, ids = router(x)
    assert router.logits(x).dtype == torch.float32
    assert weights.dtype == torch.bfloat16
    assert torch.equal(ids, router(x.float())[1])
