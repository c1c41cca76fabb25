"""`SBaseRouter`: Sinkhorn's plan against numpy in fp64."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from sparsify.routers.s_base_router import SBaseRouter, sinkhorn


def test_the_plan_has_its_marginals() -> None:
    """Protects: claim 11: rows sum to 1/T and columns to 1/E, within 1e-3; logits of 300 do not overflow."""
    torch.manual_seed(0)
    assert sinkhorn(100 * torch.randn(64, 8)).isfinite().all()
    for scale in (1.0, 3.0):
        plan = sinkhorn(scale * torch.randn(64, 8))
        assert (plan.sum(0) - 1 / 8).abs().max() <= 1e-3
        assert (plan.sum(1) - 1 / 64).abs().max() <= 1e-3


def test_the_plan_is_that_of_a_plain_loop() -> None:
    """Protects: the update and when it stops; the shift of rows does not show."""
    logits = torch.randn(13, 5, dtype=torch.float64)
    q, d1 = np.exp(logits.numpy()), np.ones(5)
    while True:
        d0 = 1 / 13 / (q @ d1 + 1e-8)
        new = 1 / 5 / (q.T @ d0 + 1e-8)
        error, d1 = np.abs(new - d1).mean(), new
        if error < 1e-4:
            break
    expected = torch.from_numpy(d0[:, None] * q * d1)
    torch.testing.assert_close(sinkhorn(logits), expected, rtol=2e-3, atol=1e-6)
    assert torch.equal(sinkhorn(logits).argmax(1), expected.argmax(1))


def test_balances_in_training_only() -> None:
    """Protects: the largest load falls below that of the greedy choice on biased logits, which inference keeps."""
    torch.manual_seed(0)
    router, x = SBaseRouter(8, 8, 1), torch.eye(8)[torch.zeros(64, dtype=torch.long)] + 0.3 * torch.randn(64, 8)
    router.weight.data.normal_()
    trained = torch.bincount(router(x)[1][:, 0], minlength=8).max()
    _, ids = router.eval()(x)
    assert torch.equal(ids[:, 0], router.logits(x).argmax(-1))
    assert trained < torch.bincount(ids[:, 0], minlength=8).max()


@pytest.mark.parametrize("num_tokens", [0, 1, 13])
@pytest.mark.parametrize("top_k", [1, 2, 5])
@pytest.mark.parametrize("training", [True, False])
def test_weights(num_tokens: int, top_k: int, training: bool) -> None:
    """Protects: sigmoid for K = 1, else the softmax over all experts, not renormalised; distinct experts."""
    router = SBaseRouter(7, 5, top_k).train(training)
    router.weight.data.normal_()
    x = torch.randn(num_tokens, 7)
    weights, ids = router(x)
    assert ids.shape == (num_tokens, top_k)
    logits = x.double() @ router.weight.detach().double().t()
    scores = torch.sigmoid(logits) if top_k == 1 else torch.softmax(logits, -1)
    torch.testing.assert_close(weights.double(), scores.gather(1, ids), rtol=1e-5, atol=1e-6)
    assert all(len(set(row)) == top_k for row in ids.tolist())


def test_the_gradient_passes_the_weights_alone() -> None:
    """Protects: no gradient through Sinkhorn, one through the scores."""
    router, x = SBaseRouter(4, 3, 1).double(), torch.randn(6, 4, dtype=torch.float64)
    weights, ids = router(x)
    expected = torch.sigmoid((x * router.weight[ids[:, 0]]).sum(-1)).sum()
    found = torch.autograd.grad(weights.sum(), router.weight)[0]
    torch.testing.assert_close(found, torch.autograd.grad(expected, router.weight)[0])
