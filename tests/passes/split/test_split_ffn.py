"""`split_ffn`: the methods in their order, and figures that are what they say."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from sparsify import SparsifyConfig
from sparsify.passes.split import split_ffn as module
from sparsify.passes.split.dense_ffn import DenseFFN, Linear
from sparsify.passes.split.experts import Experts
from sparsify.passes.split.refit import refit
from sparsify.passes.split.sample import Part, Sample, hold_out
from sparsify.passes.split.split_ffn import split_ffn
from sparsify.routers import Router


def part(dense: DenseFFN, tokens: int) -> Part:
    x = torch.randn(tokens, 7)
    return Part(x, dense(x), torch.ones(tokens))


def test_figures(dense: DenseFFN) -> None:
    """Protects: receipt, errors and loads of the report."""
    fit, measured = hold_out([part(dense, 600)])
    config = SparsifyConfig(num_experts=6, top_k=3, num_shared_experts=1, router_hidden_size=16)
    result = split_ffn(dense, dense, fit, measured, config, may_refit=True)
    assert result.receipt <= 1e-5
    assert result.router is not None
    assert sum(result.tokens_per_expert) == 2 * len(fit.x)  # one of the three is shared
    output = result.experts(measured.x, result.router(measured.x)[1])
    torch.testing.assert_close(result.error, float((output - measured.target).norm() / measured.target.norm()))
    assert result.error_before_refit is not None
    assert result.error < result.error_before_refit


def test_training_lowers_the_error_on_held_out_tokens(dense: DenseFFN) -> None:
    """Protects: block-wise training is part of the split, and no memory of the tokens."""
    fit, measured = hold_out([part(dense, 3000)])
    config = SparsifyConfig(num_experts=6, top_k=3, num_shared_experts=1, router_hidden_size=16)
    closed, trained = (
        split_ffn(dense, dense, fit, measured, replace(config, distill_steps=steps), may_refit=True).error
        for steps in (0, 60)
    )
    assert trained < 0.95 * closed


def test_training_that_does_not_help_is_dropped(dense: DenseFFN, monkeypatch: pytest.MonkeyPatch) -> None:
    """Protects: few tokens learned by heart never replace the closed form."""
    fit, measured = hold_out([part(dense, 600)])
    config = SparsifyConfig(num_experts=6, top_k=3, num_shared_experts=1, router_hidden_size=16)
    closed = split_ffn(dense, dense, fit, measured, replace(config, distill_steps=0), may_refit=True)

    def spoil(experts: Experts, router: Router, *_: Tensor, steps: int, seed: int) -> tuple[Experts, Router]:
        return replace(experts, down=10 * experts.down), router

    monkeypatch.setattr(module, "distill_block", spoil)
    result = split_ffn(dense, dense, fit, measured, config, may_refit=True)
    assert result.error == closed.error
    assert torch.equal(result.experts.down, closed.experts.down)


def test_where_tokens_are_many_only_the_trained_experts_are_refitted(
    dense: DenseFFN, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Protects: the time of a conversion, and that the last refit sees all tokens."""
    monkeypatch.setattr(module, "_CLOSED_FORM_TOKENS", 1000)
    fit, measured = hold_out([part(dense, 3000)])
    seen: list[int] = []

    def counted(experts: Experts, mean: Tensor, x: Tensor, *rest: Any, may_round: bool) -> Experts:
        assert may_round  # after training
        seen.append(len(x))
        return refit(experts, mean, x, *rest, may_round=may_round)

    monkeypatch.setattr(module, "refit", counted)
    config = SparsifyConfig(num_experts=6, top_k=3, router_hidden_size=16, distill_steps=60)
    result = split_ffn(dense, dense, fit, measured, config, may_refit=True)
    assert seen == [len(fit.x)]
    assert result.error_before_refit is not None
    assert result.error < 0.9 * result.error_before_refit


def test_nothing_is_refitted_where_nothing_is_skipped(dense: DenseFFN) -> None:
    """Protects: with top_k = num_experts the model stays the dense one."""
    fit, measured = hold_out([part(dense, 200)])
    result = split_ffn(dense, dense, fit, measured, SparsifyConfig(num_experts=6, top_k=6), may_refit=True)
    assert result.error_before_refit is None
    assert result.error <= 1e-5


@pytest.mark.parametrize("num_experts", [2, 24])
def test_the_error_is_that_of_the_outputs(dense: DenseFFN, num_experts: int) -> None:
    """Protects: few wide experts and many narrow ones, which are measured in different ways."""
    fit, measured = hold_out([part(dense, 300)])
    config = SparsifyConfig(num_experts=num_experts, top_k=num_experts // 2, num_shared_experts=0)
    result = split_ffn(dense, dense, fit, measured, config, may_refit=True)
    assert result.router is not None
    weights, ids = result.router(measured.x)
    difference = result.experts(measured.x, ids, weights) - measured.target
    assert result.error == pytest.approx(float((difference.norm() / measured.target.norm()).detach()), rel=1e-4)


def test_is_deterministic(dense: DenseFFN) -> None:
    """Protects: promise 6."""
    fit, measured = hold_out([part(dense, 300)])
    config = SparsifyConfig(num_experts=4, top_k=2)
    first, second = (split_ffn(dense, dense, fit, measured, config, may_refit=True) for _ in range(2))
    assert torch.equal(first.experts.down, second.experts.down)
    assert first.tokens_per_expert == second.tokens_per_expert


def test_an_ffn_that_is_zero_on_the_example(dense: DenseFFN) -> None:
    """Protects: the receipt is relative to what the FFN computes elsewhere, not to the zeros of a few tokens."""
    silent = replace(dense, down=replace(dense.down, bias=None), projections=tuple(map(_biased, dense.projections)))
    fit = Sample(torch.randn(400, 7), torch.empty(0), torch.empty(0))
    measured = Sample(torch.zeros(2, 7), torch.zeros(2, dense.down.weight.shape[0]), torch.ones(2))
    assert float(silent(measured.x).abs().max()) < 1e-6  # else nothing is tested here
    result = split_ffn(silent, silent, fit, measured, SparsifyConfig(num_experts=6, top_k=6), may_refit=False)
    assert result.receipt <= 1e-5


def _biased(linear: Linear) -> Linear:
    return replace(linear, bias=torch.full((linear.weight.shape[0],), -60.0), weight=linear.weight * 60)


@torch.no_grad()
def test_pruned_neurons_are_trained(dense: DenseFFN) -> None:
    """Protects: `distill_steps` where nothing is routed; it lowers the error on held-out tokens below the refit's."""
    torch.manual_seed(0)
    fit, measured = hold_out([part(dense, 4000)])
    errors: list[float] = []
    for steps in (0, 200):
        config = SparsifyConfig(num_experts=4, top_k=2, num_shared_experts=2, distill_steps=steps)
        errors.append(split_ffn(dense, dense, fit, measured, config, may_refit=True).error)
    assert errors[1] < errors[0]
