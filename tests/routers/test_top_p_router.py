"""`TopPRouter` against loops in fp64."""

from __future__ import annotations

import itertools
import math

import pytest
import torch

from sparsify.routers.top_p_router import TopPRouter


def plain(router: TopPRouter, token: torch.Tensor) -> dict[int, float]:
    """Expert -> weight, as the paper says it."""
    logits = [float(row @ token.double()) for row in router.weight.detach().double()]
    total = sum(math.exp(logit) for logit in logits)
    ranked = sorted(((math.exp(logit) / total, e) for e, logit in enumerate(logits)), reverse=True)
    chosen, mass = {}, 0.0
    for chance, expert in ranked[: router.top_k]:
        chosen[expert] = chance
        mass += chance
        if mass > router.threshold:
            break
    return chosen


@pytest.mark.parametrize("num_tokens", [0, 1, 13])
@pytest.mark.parametrize("top_k", [1, 3, 5])
def test_experts_until_the_mass_is_reached(num_tokens: int, top_k: int) -> None:
    """Protects: the first expert at which the sum exceeds P is the last one; weights are the probabilities."""
    router = TopPRouter(7, 5, top_k, threshold=0.6).eval()
    router.weight.data.normal_()
    x = torch.randn(num_tokens, 7)
    weights, ids = router(x)
    assert ids.shape == (num_tokens, top_k)
    for token in range(num_tokens):
        found = {int(e): float(w) for e, w in zip(ids[token], weights[token], strict=True) if e >= 0}
        assert found == pytest.approx(plain(router, x[token]), rel=1e-5)
        assert weights[token][ids[token] < 0].eq(0).all()


def test_threshold_says_how_many() -> None:
    """Protects: P = 0 is top-1, P above 1 all experts, and between the number never falls."""
    x = torch.randn(50, 7)
    router = TopPRouter(7, 5, 5).eval()
    router.weight.data.normal_()
    counts = []
    for threshold in (0.0, 0.3, 0.6, 0.9, 1.01):
        router.threshold = threshold
        counts.append((router(x)[1] >= 0).sum(-1))
    assert counts[0].eq(1).all()
    assert counts[-1].eq(5).all()
    assert all((a <= b).all() for a, b in itertools.pairwise(counts))


def test_losses_reach_the_router() -> None:
    """Protects: entropy and balance are there in training alone, and their gradient is that of the formula."""
    router = TopPRouter(4, 3, 3, entropy_coefficient=0.5, balance_coefficient=0.25).double()
    router.weight.data.normal_()
    x = torch.randn(6, 4, dtype=torch.float64)
    router(x)
    chances = torch.softmax(x @ router.weight.t(), -1)
    entropy = -(chances * chances.log()).sum(-1).mean()
    used = torch.zeros(6, 3, dtype=torch.float64)
    for token in range(6):
        used[token, list(plain(router, x[token]))] = 1
    balance = 3 * (used.sum(0) / used.sum() * chances.mean(0)).sum()
    expected = torch.autograd.grad(0.5 * entropy + 0.25 * balance, router.weight)[0]
    found = torch.autograd.grad(router.aux_loss(), router.weight)[0]
    torch.testing.assert_close(found, expected)
    router.eval()(x)
    assert router.losses == {}


def test_refuses_a_negative_threshold() -> None:
    """Protects: no threshold below which nothing is chosen."""
    with pytest.raises(ValueError, match=r"at least 0, got -0\.1"):
        TopPRouter(4, 3, 3, threshold=-0.1)
