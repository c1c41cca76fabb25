"""`distill_block`: experts and router of one FFN learn together, and what comes out is what was trained."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from sparsify.passes.split.dense_ffn import DenseFFN
from sparsify.passes.split.distill_block import distill_block
from sparsify.passes.split.experts import Experts, divide
from sparsify.passes.split.fold_mean import fold_mean
from sparsify.routers import MLPRouter, UnitRouter


def setup(dense: DenseFFN, num_shared: int, tokens: int = 2000) -> tuple[Experts, UnitRouter, Tensor, Tensor]:
    """Four experts of six neurons by lot, a random router, tokens and their outputs."""
    torch.manual_seed(0)
    neurons, x = torch.randperm(24).view(4, 6), torch.randn(tokens, 7)
    experts = fold_mean(divide(dense, neurons, num_shared), dense.hidden(x).mean(0)[neurons[num_shared:]])
    router = MLPRouter(7, 4 - num_shared, 1, 8).requires_grad_(False)
    return experts, router, x, dense(x)


def squared_error(experts: Experts, router: UnitRouter, x: Tensor, target: Tensor) -> float:
    return float((experts(x, router(x)[1]) - target).square().sum())


@pytest.mark.parametrize("num_shared", [0, 1])
def test_the_error_falls(dense: DenseFFN, num_shared: int) -> None:
    """Protects: training, and that its result is put back in the right places (the experts run through the ops)."""
    experts, router, x, target = setup(dense, num_shared)
    before = squared_error(experts, router, x, target)
    trained, learned = distill_block(experts, router, x, target, torch.ones(2000), steps=60, seed=0)
    assert squared_error(trained, learned, x, target) < 0.9 * before
    assert squared_error(experts, router, x, target) == before  # the originals stay


def test_no_step_changes_nothing(dense: DenseFFN) -> None:
    """Protects: the way from experts to flat tensors and back."""
    experts, router, x, target = setup(dense, 1)
    same, _ = distill_block(experts, router, x, target, torch.ones(2000), steps=0, seed=0)
    torch.testing.assert_close(same(x, router(x)[1]), experts(x, router(x)[1]))


def test_the_router_learns(dense: DenseFFN) -> None:
    """Protects: with the trained experts, the trained router chooses better than the one it started as."""
    experts, router, x, target = setup(dense, 0, tokens=8_000)
    trained, learned = distill_block(experts, router, x, target, torch.ones(8_000), steps=200, seed=0)
    assert squared_error(trained, learned, x, target) < 0.95 * squared_error(trained, router, x, target)
    assert not any(parameter.requires_grad for parameter in learned.parameters())


def test_is_deterministic_and_spares_the_global_generator(dense: DenseFFN) -> None:
    """Protects: promise 6."""
    experts, router, x, target = setup(dense, 1)
    state = torch.get_rng_state()
    runs = [distill_block(experts, router, x, target, torch.ones(2000), steps=5, seed=3)[0] for _ in range(2)]
    assert torch.equal(runs[0].down, runs[1].down)
    assert torch.equal(torch.get_rng_state(), state)
