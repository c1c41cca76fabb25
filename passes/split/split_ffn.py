"""One dense FFN and a sample of its inputs -> routed experts: the methods of this folder in their order.

statistics -> which neurons -> divide -> fold the means (receipt) -> train the router -> refit
T tokens, D hidden_size, E num_experts, S shared, R = E - S routed, m neurons of an expert.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from sparsify.config import SparsifyConfig
from sparsify.passes.run_experts import run_experts
from sparsify.passes.split.choose_neurons import activation_profiles, choose_neurons
from sparsify.passes.split.dense_ffn import DenseFFN
from sparsify.passes.split.experts import Experts, divide
from sparsify.passes.split.fit_router import fit_router
from sparsify.passes.split.fold_mean import fold_mean
from sparsify.passes.split.refit import refit
from sparsify.passes.split.statistics import chunks, importance, measure_neurons
from sparsify.passes.verify import receipt
from sparsify.routers import Router

_RECEIPT_TOKENS = 256  # of each kind: an FFN may be zero on all tokens of a small example
_HELD_OUT = 10  # every tenth token is kept out of every fit


@dataclass(frozen=True)
class Sample:
    """Tokens `x` `[T, D]`, the output `target` `[T, D_out]` that is wanted for them, and their ids `[T]` if read."""

    x: Tensor
    target: Tensor
    ids: Tensor | None = None

    def take(self, chosen: Tensor) -> Sample:
        """Some of the tokens: `chosen` is `[T]` bool."""
        return Sample(self.x[chosen], self.target[chosen], None if self.ids is None else self.ids[chosen])

    def parts(self) -> Iterator[tuple[Tensor, Tensor | None]]:
        """Tokens and ids, a manageable number at a time."""
        parts = list(chunks(self.x))
        ids = [None] * len(parts) if self.ids is None else list(chunks(self.ids))
        return zip(parts, ids, strict=True)


@dataclass(frozen=True)
class SplitResult:
    """The experts, their router and what the report says of them (see `FFNReport` for the figures)."""

    experts: Experts
    router: Router
    receipt: float
    error: float
    error_before_refit: float | None
    tokens_per_expert: tuple[int, ...]


def split_ffn(
    dense: DenseFFN, original: DenseFFN, fit: Sample, measured: Sample, config: SparsifyConfig, *, may_refit: bool
) -> SplitResult:
    """Divide, route and refit.

    Args:
        dense: the FFN.
        original: the same before its vectors were folded; the receipt is taken against it.
        fit: tokens to fit to, T > 0, dtype of `dense`.
        measured: tokens for the reported errors.
        config: `num_experts` must not exceed F.
        may_refit: `fit` are real tokens, so the refit can be trusted.

    Returns:
        The split. Same inputs, same result.
    """
    routed_k = config.top_k - config.shared
    statistics = measure_neurons(dense, fit.x)
    profiles = activation_profiles(dense, fit.x)
    neurons = choose_neurons(profiles, importance(dense, statistics), config.num_experts, config.shared, config.seed)
    mean = statistics.mean[neurons.clamp(min=0)]  # [E, m]
    experts = fold_mean(divide(dense, neurons, config.shared), mean[config.shared :])
    router = fit_router(experts, fit.x, config, fit.ids)
    expert_ids = torch.cat([router(*part)[1] for part in fit.parts()])
    error = relative_error(experts, router, measured)
    result = SplitResult(
        experts=experts,
        router=router,
        receipt=receipt(original, experts, torch.cat([measured.x[:_RECEIPT_TOKENS], fit.x[:_RECEIPT_TOKENS]])),
        error=error,
        error_before_refit=None,
        tokens_per_expert=count_tokens(expert_ids, experts.num_routed),
    )
    if not (config.refit and may_refit and router.rule == "one") or routed_k == experts.num_routed:
        return result
    refitted = refit(experts, mean.flatten(), fit.x, fit.target, expert_ids, config.ridge)
    return replace(
        result, experts=refitted, error=relative_error(refitted, router, measured), error_before_refit=error
    )


def hold_out(sample: Sample) -> tuple[Sample, Sample]:
    """Divide into tokens to fit to and tokens to measure on; fewer than ten tokens serve both."""
    held = torch.arange(len(sample.x)) % _HELD_OUT == _HELD_OUT - 1
    if not held.any():
        return sample, sample
    return sample.take(~held), sample.take(held)


def count_tokens(expert_ids: Tensor, num_experts: int) -> tuple[int, ...]:
    """How many tokens each expert got: `[T, K]` -> E numbers; -1 counts for none."""
    return tuple(torch.bincount(expert_ids.flatten() + 1, minlength=num_experts + 1)[1:].tolist())


def relative_error(experts: Experts, router: Router, sample: Sample) -> float:
    """`|routed output - target| / |target|`, L2 over all tokens."""
    difference, size = 0.0, 0.0
    for (x, ids), target in zip(sample.parts(), chunks(sample.target), strict=True):
        y, _ = run_experts(experts, router, x, ids)
        difference += float((y - target).double().square().sum())
        size += float(target.double().square().sum())
    return (difference / size) ** 0.5 if size else difference**0.5
