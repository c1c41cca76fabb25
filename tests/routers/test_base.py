"""The contract of `Router`: straightened weights, losses, options, autocast."""

from __future__ import annotations

from typing import Literal

import pytest
import torch

from sparsify.routers import TopKRouter
from sparsify.routers.base import straighten

WEIGHTS = torch.tensor([[0.5, 0.25], [0.3, 0.1], [0.2, 0.2]])
IDS = torch.tensor([[1, 0], [2, -1], [-1, -1]])


def test_one_divides_each_weight_by_itself() -> None:
    """Protects: a used slot counts 1, an unused one 0, in training and at inference."""
    expected = torch.tensor([[1.0, 1.0], [1.0, 0.0], [0.0, 0.0]])
    for keep_gradient in (True, False):
        assert torch.equal(straighten(WEIGHTS, IDS, "one", keep_gradient=keep_gradient), expected)


def test_sum_counts_used_slots_alone() -> None:
    """Protects: the used slots of a token sum to 1, and a token without any does not become NaN."""
    sums = straighten(WEIGHTS, IDS, "sum", keep_gradient=True).sum(-1)
    torch.testing.assert_close(sums, torch.tensor([1.0, 1.0, 0.0]))


@pytest.mark.parametrize("rule", ["one", "sum"])
def test_the_gradient_is_that_of_the_weights(rule: Literal["one", "sum"]) -> None:
    """Protects: `p / stop_gradient(p)`: the router learns although its weight is 1."""
    weights = WEIGHTS.clone().double().requires_grad_()
    straighten(weights, IDS, rule, keep_gradient=True)[0, 0].backward()
    divisor = WEIGHTS[0, 0] if rule == "one" else WEIGHTS[0].sum()
    expected = torch.zeros(3, 2, dtype=torch.float64)
    expected[0, 0] = 1 / divisor
    torch.testing.assert_close(weights.grad, expected)


def test_autocast_does_not_round_logits() -> None:
    """Protects: routing in fp32 under autocast."""
    router, x = TopKRouter(64, 8, 2), torch.randn(200, 64)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        weights, ids = router(x)
    assert torch.equal(ids, router(x)[1])
    assert torch.equal(weights, router(x)[0])


def test_no_loss_is_zero() -> None:
    """Protects: `loss + aux_loss()` for any router."""
    router = TopKRouter(4, 4, 2)
    router(torch.randn(3, 4))
    assert router.aux_loss().item() == 0


@pytest.mark.parametrize("top_k", [0, 5])
def test_refuses_more_slots_than_experts(top_k: int) -> None:
    """Protects: a top_k that no topk could serve is refused where it is given."""
    with pytest.raises(ValueError, match=f"between 1 and the 4 routed experts, got {top_k}"):
        TopKRouter(4, 4, top_k)
