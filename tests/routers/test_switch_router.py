"""`SwitchRouter` against loops in fp64: probability as weight, jitter, balance loss, overflow, the exact start."""

from __future__ import annotations

import math

import pytest
import torch

from sparsify.routers.base import Router
from sparsify.routers.switch_router import SwitchRouter


def make(**options: float | None) -> SwitchRouter:
    torch.manual_seed(0)
    router = SwitchRouter(6, 5, 1, **options)  # pyright: ignore[reportArgumentType]
    router.weight.data *= 30
    return router.double()


def probabilities(router: SwitchRouter, x: torch.Tensor) -> list[list[float]]:
    rows = []
    for token in x:
        exponentials = [math.exp(float(row @ token)) for row in router.weight.detach()]
        rows.append([value / sum(exponentials) for value in exponentials])
    return rows


@pytest.mark.parametrize("num_tokens", [0, 1, 13])
def test_the_weight_is_the_probability(num_tokens: int) -> None:
    """Protects: y / E(x) = p at inference, `argmax p` the expert."""
    router, x = make().eval(), torch.randn(num_tokens, 6, dtype=torch.float64)
    weights, ids = router(x)
    for token, row in enumerate(probabilities(router, x)):
        assert ids[token].item() == row.index(max(row))
        assert weights[token].item() == pytest.approx(max(row), rel=1e-12)


def test_training_matches_the_published_losses() -> None:
    """Protects: alpha E sum f P over all tokens, dropped ones included, and its gradient in the weights."""
    router, x = make(jitter=0.0, capacity_factor=0.5), torch.randn(31, 6, dtype=torch.float64)
    _, ids = router(x)
    rows = probabilities(router, x)
    choices = [row.index(max(row)) for row in rows]
    f = [choices.count(e) / 31 for e in range(5)]
    expected = 1e-2 * 5 * sum(f[e] * sum(row[e] for row in rows) / 31 for e in range(5))
    assert router.aux_loss().item() == pytest.approx(expected, rel=1e-10)
    assert (ids < 0).any()
    router.aux_loss().backward()
    gradient = torch.zeros(5, 6, dtype=torch.float64)
    for token, row in zip(x, rows, strict=True):
        centre = sum(f[e] * row[e] for e in range(5))
        for j in range(5):
            gradient[j] += 1e-2 * 5 / 31 * row[j] * (f[j] - centre) * token
    torch.testing.assert_close(router.weight.grad, gradient, rtol=1e-8, atol=1e-14)


def test_overflow_rows_are_zero() -> None:
    """Protects: over capacity a token has no expert and weight 0, the earlier one wins."""
    router = make(jitter=0.0, capacity_factor=1.0)
    x = torch.randn(1, 6, dtype=torch.float64).expand(10, 6)
    weights, ids = router(x)
    assert ids.flatten().tolist() == [ids[0].item()] * 2 + [-1] * 8
    assert weights[2:].eq(0).all()


def test_jitter_is_uniform_and_for_training() -> None:
    """Protects: the router's input times U[1 - eps, 1 + eps], drawn from the global generator, not at inference."""
    router = make(jitter=0.1, capacity_factor=None)
    x = torch.ones(4000, 6, dtype=torch.float64)
    router.weight.data = torch.zeros(5, 6).double()
    router.weight.data[0, 0] = 1
    ratio = router.training_logits(x)[:, 0]
    assert ratio.min() >= 0.9
    assert ratio.max() <= 1.1
    assert ratio.mean().item() == pytest.approx(1, abs=4 * 0.1 / math.sqrt(3 * 4000))
    assert ratio.std().item() == pytest.approx(0.1 / math.sqrt(3), rel=0.05)
    assert torch.equal(router.eval()(x)[0], router(x)[0])


def test_the_router_gets_a_gradient() -> None:
    """Protects: the task moves the router through p, and through `p / stop_gradient(p)` where the start is exact."""
    router, x = make(jitter=0.0, capacity_factor=None), torch.randn(13, 6, dtype=torch.float64)

    def gradient(router: Router) -> torch.Tensor:
        (found,) = torch.autograd.grad(router(x)[0].sum(), list(router.parameters()))
        return found

    native, p = gradient(router), router(x)[0].detach()
    router.weights = "sum"
    assert torch.equal(router(x)[0], torch.ones(13, 1).double())
    exact = gradient(router)
    rows = torch.tensor(probabilities(router, x), dtype=torch.float64)
    ids = rows.argmax(-1)
    one_hot = torch.nn.functional.one_hot(ids, 5).double()
    torch.testing.assert_close(native, (p * (one_hot - rows)).t() @ x, rtol=1e-8, atol=1e-12)
    torch.testing.assert_close(exact, (one_hot - rows).t() @ x, rtol=1e-8, atol=1e-12)
