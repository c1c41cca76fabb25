"""`refit`: the closed form is the minimum, and never worse on its own tokens than what it starts from."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from sparsify.passes.split import refit as module
from sparsify.passes.split.bf16_products import has_bf16_products
from sparsify.passes.split.dense_ffn import DenseFFN
from sparsify.passes.split.experts import Experts, divide_unevenly
from sparsify.passes.split.fold_mean import fold_mean
from sparsify.passes.split.refit import refit

ONES = torch.ones(400)


def setup(
    dense: DenseFFN, num_shared: int, sizes: tuple[int, ...] | None = None
) -> tuple[Experts, Tensor, Tensor, Tensor]:
    """Folded experts (of six neurons, or of units of three), means in their order, 400 tokens, two experts for each."""
    neurons, x = torch.randperm(24).view(4, 6), torch.randn(400, 7)
    mean = dense.hidden(x).mean(0)[neurons]
    unit = 6 if sizes is None else 3
    routed = neurons[num_shared:].reshape(-1, unit)
    experts = divide_unevenly(dense, neurons[:num_shared].flatten(), routed, sizes)
    experts = fold_mean(experts, mean[num_shared:].reshape(-1, unit))
    ids = torch.rand(400, experts.num_routed).argsort(1)[:, :2]
    return experts, mean.flatten(), x, ids


def test_is_the_minimum(dense: DenseFFN) -> None:
    """Protects: the solution; at the minimum the gradient of the loss is zero."""
    for num_shared, sizes in ((0, None), (1, None), (0, (4, 1, 2, 1)), (1, (1, 3, 2))):
        experts, mean, x, ids = setup(dense, num_shared, sizes)
        fitted = refit(experts, mean, x, dense(x), ONES, ids, ridge=1e-6)
        assert fitted.expert_bias is not None
        down, bias = (tensor.clone().requires_grad_() for tensor in (fitted.down, fitted.expert_bias))
        loss = (replace(fitted, down=down, expert_bias=bias)(x, ids) - dense(x)).square().sum()
        gradients = torch.autograd.grad(loss, (down, bias))
        start = float((experts(x, ids) - dense(x)).square().sum())
        assert all(float(gradient.abs().max()) < 1e-3 * start for gradient in gradients)


def test_lowers_the_error(dense: DenseFFN) -> None:
    """Protects: reference line "layer error on calibration tokens not above the unrefitted one"."""
    for num_shared in (0, 1):
        experts, mean, x, ids = setup(dense, num_shared)
        before = (experts(x, ids) - dense(x)).norm()
        after = (refit(experts, mean, x, dense(x), ONES, ids, ridge=1e-3)(x, ids) - dense(x)).norm()
        assert after < 0.9 * before


def test_a_strong_pull_keeps_the_old_weights(dense: DenseFFN) -> None:
    """Protects: the prior, which holds neurons that never run at their old weights."""
    experts, mean, x, ids = setup(dense, 1)
    fitted = refit(experts, mean, x, dense(x), ONES, ids, ridge=1e9)
    torch.testing.assert_close(fitted.down, experts.down, rtol=1e-3, atol=1e-5)
    assert fitted.expert_bias is not None
    torch.testing.assert_close(fitted.expert_bias, experts.expert_bias, rtol=1e-3, atol=1e-4)


def test_a_token_counts_by_its_weight(dense: DenseFFN) -> None:
    """Protects: the weights of tokens; one of weight 0 is as good as absent."""
    experts, mean, x, ids = setup(dense, 1)
    wild = dense(x)
    wild[::2] += 100
    fitted = refit(experts, mean, x, wild, torch.arange(400.0) % 2, ids, ridge=1e-6)
    few = refit(experts, mean, x[1::2], wild[1::2], ONES[1::2], ids[1::2], ridge=1e-6)
    torch.testing.assert_close(fitted(x, ids), few(x, ids), rtol=1e-3, atol=1e-3)


def test_blocks_change_nothing(dense: DenseFFN, monkeypatch: pytest.MonkeyPatch) -> None:
    """Protects: the half of the Gram matrix that is not computed, where it has more rows than a block."""
    experts, mean, x, ids = setup(dense, 1)
    whole = refit(experts, mean, x, dense(x), ONES, ids, ridge=1e-3)
    monkeypatch.setattr(module, "_BLOCK", 5)
    parts = refit(experts, mean, x, dense(x), ONES, ids, ridge=1e-3)
    torch.testing.assert_close(parts.down, whole.down, rtol=1e-4, atol=1e-5)


def test_a_pull_below_rounding(dense: DenseFFN) -> None:
    """Protects: twice the same neurons, which only the pull tells apart, and sums in single precision."""
    experts, mean, x, ids = setup(dense, 1)
    twice = replace(experts, projections=tuple(p[[0, 0, 2]] for p in experts.projections))
    biases = tuple(None if b is None else b[[0, 0, 2]] for b in experts.projection_biases)
    twice, ids = replace(twice, projection_biases=biases), torch.tensor([[0, 1]]).expand(400, 2)
    for ridge in (1e-30, 1e-6):
        fitted = refit(twice, mean, 100 * x, dense(x), ONES, ids, ridge)
        assert fitted.down.isfinite().all()
        assert (fitted(100 * x, ids) - dense(x)).norm() < dense(x).norm()


@pytest.mark.skipif(not has_bf16_products(torch.device("cpu"), torch.float32), reason="no products of bf16 here")
def test_sums_of_rounded_products(dense: DenseFFN) -> None:
    """Protects: a refit that may round ends as near to what is wanted, to three digits."""
    neurons, x = torch.randperm(24).view(4, 6), torch.randn(4096, 7)
    mean = dense.hidden(x).mean(0)[neurons]
    experts = fold_mean(divide_unevenly(dense, neurons[:0].flatten(), neurons, None), mean)
    ids = torch.rand(len(x), 4).argsort(1)[:, :2]
    exact, rounded = (
        refit(experts, mean.flatten(), x, dense(x), torch.ones(len(x)), ids, ridge=0.1, may_round=may_round)
        for may_round in (False, True)
    )
    assert not torch.equal(exact.down, rounded.down)
    errors = [float((fitted(x, ids) - dense(x)).norm() / dense(x).norm()) for fitted in (exact, rounded)]
    assert errors[1] == pytest.approx(errors[0], rel=1e-3)
