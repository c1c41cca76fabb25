"""`NoisyTopKRouter` against loops in fp64: noise in training, softmax of the kept logits, importance and load."""

from __future__ import annotations

import math

import pytest
import torch

from sparsify.routers.noisy_top_k_router import NoisyTopKRouter


def make(top_k: int = 2) -> NoisyTopKRouter:
    torch.manual_seed(0)
    router = NoisyTopKRouter(6, 5, top_k).double()
    router.weight.data *= 30
    router.noise_weight.data.normal_(std=0.3)
    return router


def cv_squared(values: list[float]) -> float:
    mean = sum(values) / len(values)
    return sum((v - mean) ** 2 for v in values) / len(values) / mean**2


@pytest.mark.parametrize("top_k", [1, 2, 5])
def test_training_is_the_published_gate(top_k: int) -> None:
    """Protects: `x W + N(0, 1) softplus(x W_noise)`, softmax with -inf outside the K largest, both CV^2 losses."""
    router, x = make(top_k), torch.randn(13, 6, dtype=torch.float64)
    torch.manual_seed(7)
    weights, ids = router(x)
    torch.manual_seed(7)
    noise = torch.randn(13, 5, dtype=torch.float64)
    importance, load = [0.0] * 5, [0.0] * 5
    for t in range(13):
        clean = [float(row @ x[t]) for row in router.weight.detach()]
        sigma = [math.log1p(math.exp(float(row @ x[t]))) + 1e-2 for row in router.noise_weight.detach()]
        noisy = [clean[e] + noise[t, e].item() * sigma[e] for e in range(5)]
        chosen = sorted(range(5), key=lambda e: -noisy[e])[:top_k]
        total = sum(math.exp(noisy[e]) for e in chosen)
        assert ids[t].tolist() == chosen
        for slot, e in enumerate(chosen):
            gate = math.exp(noisy[e]) / total
            assert weights[t, slot].item() == pytest.approx(gate, rel=1e-10)
            importance[e] += gate
        for e in range(5):
            others = sorted((noisy[o] for o in range(5) if o != e), reverse=True)
            z = (clean[e] - others[top_k - 1]) / sigma[e] if top_k < 5 else math.inf
            load[e] += 0.5 * (1 + math.erf(z / math.sqrt(2)))
    expected = 0.1 * cv_squared(importance) + 0.1 * cv_squared(load)
    assert router.aux_loss().item() == pytest.approx(expected, rel=1e-8)


def test_gradients_of_the_losses() -> None:
    """Protects: both losses move W, and the load loss moves W_noise; against finite differences."""
    router, x = make(), torch.randn(13, 6, dtype=torch.float64)

    def loss(weight: torch.Tensor, noise_weight: torch.Tensor) -> torch.Tensor:
        torch.manual_seed(7)
        torch.func.functional_call(router, {"weight": weight, "noise_weight": noise_weight}, (x,))
        return router.aux_loss()

    parameters = [router.weight.detach().requires_grad_(), router.noise_weight.detach().requires_grad_()]
    assert torch.autograd.gradcheck(loss, parameters)


def test_no_noise_at_inference() -> None:
    """Protects: the clean logits choose."""
    router, x = make().eval(), torch.randn(13, 6, dtype=torch.float64)
    logits, ids = (x @ router.weight.detach().t()).topk(2)
    weights, found = router(x)
    assert torch.equal(found, ids)
    torch.testing.assert_close(weights.detach(), logits.softmax(-1))


def test_ties_are_broken_by_noise() -> None:
    """Protects: with both matrices 0, as the paper starts, noise spreads the tokens."""
    router = NoisyTopKRouter(6, 8, 2)
    router.weight.data.zero_()
    torch.manual_seed(0)
    load = torch.bincount(router(torch.randn(1000, 6))[1].flatten(), minlength=8)
    assert load.max() / load.float().mean() < 1.2
