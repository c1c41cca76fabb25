"""`PRMoERouter` against loops in fp64."""

from __future__ import annotations

import math

import pytest
import torch

from sparsify.routers.pr_moe_router import PRMoERouter


def softmax(values: list[float]) -> list[float]:
    total = sum(map(math.exp, values))
    return [math.exp(value) / total for value in values]


@pytest.mark.parametrize("num_tokens", [0, 1, 13])
@pytest.mark.parametrize("top_k", [2, 3, 5])
def test_a_dense_expert_beside_chosen_ones(num_tokens: int, top_k: int) -> None:
    """Protects: slot 0 is expert 0 with c_1, the others share c_0 by their probability; the sum is 1 for any c."""
    router = PRMoERouter(7, 5, top_k).eval()
    for parameter in router.parameters():
        parameter.data.normal_()
    x = torch.randn(num_tokens, 7)
    weights, ids = router(x)
    for token in range(num_tokens):
        chances = softmax([float(row @ x[token].double()) for row in router.weight.detach().double()])
        c = softmax([float(row @ x[token].double()) for row in router.mixture.detach().double()])
        best = sorted(range(4), key=lambda e: -chances[e])[: top_k - 1]
        total = sum(chances[e] for e in best)
        assert ids[token].tolist() == [0, *(e + 1 for e in best)]
        expected = [c[1], *(c[0] * chances[e] / total for e in best)]
        assert weights[token].tolist() == pytest.approx(expected, rel=1e-5)


def test_the_gradient_is_that_of_the_probability() -> None:
    """Protects: with one routed expert its weight is c_0, and the router still learns, as from c_0 p / p."""
    router = PRMoERouter(4, 3, 2).double()
    x = torch.randn(1, 4, dtype=torch.float64)
    weights, ids = router(x)
    chance = torch.softmax(x @ router.weight.t(), -1)[0, ids[0, 1] - 1]
    c = torch.softmax(x @ router.mixture.t(), -1)[0, 0]
    torch.testing.assert_close(weights[0, 1], c)
    expected = torch.autograd.grad(c.detach() * chance / chance.detach(), router.weight)[0]
    torch.testing.assert_close(torch.autograd.grad(weights[0, 1], router.weight)[0], expected)
    assert expected.abs().max() > 0


def test_refuses_a_single_expert() -> None:
    """Protects: with top_k = 1 nothing would be chosen."""
    with pytest.raises(ValueError, match="top_k must be at least 2, got 1"):
        PRMoERouter(4, 3, 1)
