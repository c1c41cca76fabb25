"""`STMoERouter`: the z-loss beside GShard's balance, and the factors of training and evaluation."""

from __future__ import annotations

import math

import pytest
import torch

from sparsify.routers.st_moe_router import STMoERouter


def test_losses_and_coefficients() -> None:
    """Protects: `1e-2 balance + 1e-3 mean (logsumexp)^2`, on the logits of fp64 loops; gradient `2 lse softmax / T`."""
    torch.manual_seed(0)
    router, x = STMoERouter(6, 5, 2).double(), torch.randn(13, 6, dtype=torch.float64)
    router.weight.data *= 30
    router(x)
    rows = [[float(row @ token) for row in router.weight.detach()] for token in x]
    lse = [math.log(sum(math.exp(v) for v in row)) for row in rows]
    z = sum(v * v for v in lse) / 13
    assert router.losses["z"].item() == pytest.approx(z, rel=1e-10)
    assert router.aux_loss().item() == pytest.approx(1e-2 * router.losses["balance"].item() + 1e-3 * z, rel=1e-10)
    (gradient,) = torch.autograd.grad(router.losses["z"], [router.weight])
    softmax = torch.tensor(rows, dtype=torch.float64).softmax(-1)
    expected = (2 / 13 * torch.tensor(lse).double()[:, None] * softmax).t() @ x
    torch.testing.assert_close(gradient, expected, rtol=1e-6, atol=1e-10)


def test_second_expert_below_the_threshold_is_random() -> None:
    """Protects: from a weight of 0.2 on the second expert always runs in training."""
    torch.manual_seed(0)
    router, x = STMoERouter(6, 5, 2, capacity_factor=None), torch.randn(400, 6)
    router.weight.data *= 30
    weights, _ = router.eval()(x)
    runs = router.train()(x)[1][:, 1] >= 0
    assert runs[weights[:, 1] > 0.2].all()
    assert not runs[weights[:, 1] < 0.1].all()


def test_evaluation_has_its_own_factor() -> None:
    """Protects: 1.25 in training and, where asked for, 2.0 at inference: fewer tokens are dropped there."""
    torch.manual_seed(0)
    router = STMoERouter(6, 4, 2, second="all", eval_capacity_factor=2.0)
    assert router.capacity_factor == 1.25
    x = torch.randn(1, 6).expand(32, 6)
    used = [(router.train(training)(x)[1] >= 0).sum().item() for training in (True, False)]
    assert used == [2 * math.ceil(1.25 * 2 * 32 / 4), 2 * 32]
