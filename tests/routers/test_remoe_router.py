"""`ReMoERouter`: ReLU weights against loops, and the controller of their number."""

from __future__ import annotations

import copy

import pytest
import torch

from sparsify.routers.remoe_router import ReMoERouter


@pytest.mark.parametrize("num_tokens", [0, 1, 13])
def test_weights_are_the_relu(num_tokens: int) -> None:
    """Protects: weight max(0, x W^T + b), and a slot without weight is not used."""
    router = ReMoERouter(7, 5, 2).eval()
    router.weight.data.normal_()
    x = torch.randn(num_tokens, 7)
    weights, ids = router(x)
    for token in range(num_tokens):
        for expert in range(5):
            row = router.weight[expert].double()
            value = max(0.0, float(row @ x[token].double()) + float(router.bias[expert]))
            assert float(weights[token, expert]) == pytest.approx(value, rel=1e-5, abs=1e-6)
            assert int(ids[token, expert]) == (expert if value > 0 else -1)


def test_starts_with_all_experts_on() -> None:
    """Protects: W = 0 and b = 1: a split starts as the dense FFN."""
    weights, ids = ReMoERouter(7, 5, 2)(torch.randn(9, 7))
    assert weights.eq(1).all()
    assert ids.tolist() == [[0, 1, 2, 3, 4]] * 9


def test_loss_is_the_balanced_l1() -> None:
    """Protects: sum_e f_e mean_t R_te with f_e = E / (K T) times the tokens of e; its gradient leaves f_e alone."""
    router = ReMoERouter(4, 3, 2, initial_strength=0.5).double()
    router.weight.data.normal_()
    x = torch.randn(6, 4, dtype=torch.float64)
    router(x)
    relu = torch.relu(x @ router.weight.t() + router.bias)
    loss = sum(3 / (2 * 6) * float((relu[:, e] > 0).sum()) * relu[:, e].mean() for e in range(3))
    assert torch.is_tensor(loss)
    torch.testing.assert_close(router.losses["l1"], loss)
    expected = torch.autograd.grad(0.5 * loss, [router.weight, router.bias])
    torch.testing.assert_close(torch.autograd.grad(router.aux_loss(), [router.weight, router.bias]), expected)


def test_strength_rises_and_falls() -> None:
    """Protects: too many experts on: the L1 loss grows by 1.2 a step; too few: it shrinks; no call: it stays."""
    router, x = ReMoERouter(4, 4, 1, initial_strength=1.0), torch.randn(8, 4)
    router(x)
    router.after_step()
    assert float(router.strength) == pytest.approx(1.2)
    router.after_step()
    assert float(router.strength) == pytest.approx(1.2)
    router.bias.data.fill_(-1.0)
    router(x)
    router.after_step()
    assert float(router.strength) == pytest.approx(1.0)
    assert "strength" in router.state_dict()


def test_training_reaches_the_target() -> None:
    """Protects: lambda control: from all on, the number of experts of a token comes down to about K."""
    torch.manual_seed(0)
    router, x = ReMoERouter(8, 8, 2, initial_strength=1e-3), torch.randn(64, 8)
    optimizer = torch.optim.SGD(router.parameters(), lr=0.05)
    counts = []
    for _ in range(400):
        weights, ids = router(x)
        counts.append(float((ids >= 0).float().sum(-1).mean()))
        optimizer.zero_grad()
        (router.aux_loss() + (weights.sum(-1) - 2).square().mean()).backward()
        optimizer.step()
        router.after_step()
    assert counts[0] == 8
    assert 1.5 <= sum(counts[200:]) / 200 <= 2.5


def test_no_tokens_no_loss_and_copies() -> None:
    """Protects: an empty batch, and a copy after a call in training mode."""
    router = ReMoERouter(4, 3, 2)
    router(torch.randn(0, 4))
    router.after_step()
    assert float(router.aux_loss()) == 0
    router(torch.randn(3, 4))
    assert copy.deepcopy(router).losses == {}
