"""`expert_norms`, `train_router`: the targets are the true norms, and a router learns what can be learnt."""

from __future__ import annotations

import torch

from sparsify.passes.split.dense_ffn import DenseFFN
from sparsify.passes.split.experts import divide, divide_unevenly
from sparsify.passes.split.fold_mean import fold_mean
from sparsify.passes.split.train_router import expert_norms, train_router


def test_norms(dense: DenseFFN) -> None:
    """Protects: the target is the deviation of each expert from its mean."""
    neurons, x = torch.randperm(24).view(4, 6), torch.randn(9, 7)
    hidden, mean = dense.hidden(x), dense.hidden(x).mean(0)
    experts = fold_mean(divide(dense, neurons, 0), mean[neurons])
    deviations = [(hidden - mean)[:, part] @ dense.down.weight[:, part].t() for part in neurons]
    expected = torch.stack([deviation.norm(dim=1) for deviation in deviations], dim=1)
    torch.testing.assert_close(expert_norms(experts, x), expected, rtol=1e-4, atol=1e-5)


def test_norms_of_experts_of_several_units(dense: DenseFFN) -> None:
    """Protects: the norm is that of the whole expert, not a sum over its units."""
    neurons, x, sizes = torch.randperm(24).view(8, 3), torch.randn(9, 7), (4, 1, 2, 1)
    hidden, mean = dense.hidden(x), dense.hidden(x).mean(0)
    experts = fold_mean(divide_unevenly(dense, neurons[:0].flatten(), neurons, sizes), mean[neurons])
    parts = neurons.flatten().split([3 * size for size in sizes])
    deviations = [(hidden - mean)[:, part] @ dense.down.weight[:, part].t() for part in parts]
    expected = torch.stack([deviation.norm(dim=1) for deviation in deviations], dim=1)
    torch.testing.assert_close(expert_norms(experts, x), expected, rtol=1e-4, atol=1e-5)


def test_learns_a_rule_and_takes_raw_tokens() -> None:
    """Protects: the regression, and the standardisation that is folded into the weights (inputs are not standard)."""
    x = torch.randn(2000, 6) * torch.tensor([1e-3, 1.0, 50.0, 1.0, 1.0, 1.0]) + torch.tensor([0.0, 5, 100, 0, 0, -3])
    standard = (x - x.mean(0)) / x.std(0)
    norms = torch.relu(standard[:, :4]) + 0.1
    router = train_router(x, norms, top_k=1, router_hidden_size=16, seed=0)
    share = (router(x)[1].flatten() == norms.argmax(1)).float().mean()
    assert share > 0.85  # measured 0.93; chance is 0.25
    assert not any(parameter.requires_grad for parameter in router.parameters())


def test_is_deterministic_and_leaves_the_random_state_alone() -> None:
    """Protects: promise 6, and the random stream of the caller."""
    x, norms = torch.randn(300, 6), torch.rand(300, 4)
    state = torch.get_rng_state()
    first, second = (train_router(x, norms, 2, 8, seed=1) for _ in range(2))
    assert torch.equal(state, torch.get_rng_state())
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), second.parameters(), strict=True))


def test_constant_tokens() -> None:
    """Protects: a feature without spread does not divide by zero."""
    router = train_router(torch.ones(50, 6), torch.zeros(50, 4), 2, 8, seed=0)
    assert torch.isfinite(router.logits(torch.ones(3, 6))).all()
