"""One dense FFN and a sample of its inputs -> routed experts: the methods of this folder in their order.

statistics -> which neurons -> divide (receipt) -> fold the means -> train the router -> refit
T tokens, D hidden_size, E num_experts, S shared, R = E - S routed, m neurons of an expert.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from sparsify.config import SparsifyConfig
from sparsify.passes.split.choose_neurons import choose_neurons
from sparsify.passes.split.dense_ffn import DenseFFN
from sparsify.passes.split.experts import Experts, divide
from sparsify.passes.split.fold_mean import fold_mean
from sparsify.passes.split.refit import refit
from sparsify.passes.split.statistics import chunks, importance, measure_neurons
from sparsify.passes.split.train_router import expert_norms, train_router
from sparsify.passes.verify import receipt
from sparsify.routers import MLPRouter

_HELD_OUT = 10  # every tenth token is kept out of every fit


@dataclass(frozen=True)
class SplitResult:
    """The experts, their router and what the report says of them (see `FFNReport` for the figures)."""

    experts: Experts
    router: MLPRouter
    receipt: float
    error: float
    error_before_refit: float | None
    tokens_per_expert: tuple[int, ...]


def split_ffn(dense: DenseFFN, x: Tensor, config: SparsifyConfig, *, may_refit: bool, measured_on: Tensor) -> SplitResult:
    """Divide, route and refit.

    Args:
        dense: the FFN.
        x: `[T, D]` tokens to fit to, T > 0, dtype of `dense`.
        config: `num_experts` must not exceed F.
        may_refit: `x` are real tokens, so the refit can be trusted.
        measured_on: `[T', D]` real tokens for the reported errors, not among those in `x`.

    Returns:
        The split. Same inputs, same result.
    """
    routed_k = config.top_k - config.shared
    statistics = measure_neurons(dense, x)
    neurons = choose_neurons(dense, importance(dense, statistics), config.num_experts, config.shared, config.seed)
    exact = divide(dense, neurons, config.shared)
    mean = statistics.mean[neurons.clamp(min=0)]  # [E, m]
    experts = fold_mean(exact, mean[config.shared :])
    router = train_router(x, expert_norms(experts, x), routed_k, config.router_hidden_size, config.seed)
    expert_ids = torch.cat([router(part)[1] for part in chunks(x)])
    unfitted_error = relative_error(dense, experts, router, measured_on)
    nothing_skipped = routed_k == experts.num_routed
    refitted = experts
    if config.refit and may_refit and not nothing_skipped:
        refitted = refit(dense, experts, mean.flatten(), x, expert_ids, config.ridge)
    return SplitResult(
        experts=refitted,
        router=router,
        receipt=receipt(dense, experts, measured_on),
        error=unfitted_error if refitted is experts else relative_error(dense, refitted, router, measured_on),
        error_before_refit=None if refitted is experts else unfitted_error,
        tokens_per_expert=tuple(torch.bincount(expert_ids.flatten(), minlength=experts.num_routed).tolist()),
    )


def hold_out(x: Tensor) -> tuple[Tensor, Tensor]:
    """Divide `[T, D]` into tokens to fit to and tokens to measure on; a single token serves both."""
    held = torch.arange(len(x)) % _HELD_OUT == _HELD_OUT - 1
    return (x[~held], x[held]) if held.any() else (x, x)


def relative_error(dense: DenseFFN, experts: Experts, router: MLPRouter, x: Tensor) -> float:
    """`|routed - dense| / |dense|` over tokens `[T, D]`, L2."""
    difference, size = 0.0, 0.0
    for part in chunks(x):
        expected = dense(part).double()
        difference += float((experts(part, router(part)[1]).double() - expected).square().sum())
        size += float(expected.square().sum())
    return (difference / size) ** 0.5 if size else difference**0.5
