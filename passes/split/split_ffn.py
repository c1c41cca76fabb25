"""One dense FFN and a sample of its inputs -> routed experts: the methods of this folder in their order.

statistics -> which neurons -> divide -> fold the means (receipt) -> train the router -> distil -> refit
T tokens, D hidden_size, E num_experts, S shared, R = E - S routed, U units of m neurons (one an expert, if all are of
one width).
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from sparsify.config import SparsifyConfig
from sparsify.expert_units import units_of_widths
from sparsify.passes.heap import trim_heap
from sparsify.passes.run_experts import run_experts
from sparsify.passes.split.choose_neurons import activation_profiles, choose_by_width, choose_neurons
from sparsify.passes.split.dense_ffn import DenseFFN
from sparsify.passes.split.distill_block import distill_block
from sparsify.passes.split.experts import Experts, divide_unevenly
from sparsify.passes.split.fit_router import fit_router
from sparsify.passes.split.fold_mean import fold_mean
from sparsify.passes.split.prune import prune
from sparsify.passes.split.refit import refit
from sparsify.passes.split.sample import Sample
from sparsify.passes.split.statistics import chunks, importance, measure_neurons
from sparsify.passes.verify import receipt
from sparsify.routers import Router, UnitRouter

_RECEIPT_TOKENS = 256  # of each kind: an FFN may be zero on all tokens of a small example
_CLOSED_FORM_TOKENS = 16_384  # where training on all of them follows


@dataclass(frozen=True)
class SplitResult:
    """The experts, their router and what the report says of them (see `FFNReport` for the figures).

    Without routed experts `router` is None. `tokens_per_expert` are the loads of `routed_tokens` tokens.
    """

    experts: Experts
    router: Router | None
    receipt: float
    error: float
    error_before_refit: float | None
    tokens_per_expert: tuple[int, ...]
    routed_tokens: int


def split_ffn(
    dense: DenseFFN, original: DenseFFN, fit: Sample, measured: Sample, config: SparsifyConfig, *, may_refit: bool
) -> SplitResult:
    """Divide, route and fit.

    Args:
        dense: the FFN.
        original: the same before its vectors were folded; the receipt is taken against it.
        fit: tokens to fit to, T > 0, dtype of `dense`.
        measured: tokens for the reported errors; training that does not lower the error on them is dropped, also where
            the refit alone lowers it more, which is tried where tokens are few.
        config: `num_experts` must not exceed F.
        may_refit: `fit` are real tokens, so the refit can be trusted.

    Returns:
        The split. Same inputs, same result.
    """
    if config.shared == config.top_k:
        return _prune(dense, original, fit, measured, config, may_refit=may_refit)
    may_fit = config.refit and may_refit and config.top_k < config.num_experts
    trains = may_fit and config.distill_steps > 0 and config.router_name == "mlp"
    few = _thin(fit) if trains else fit  # what comes before the training only has to begin it
    statistics = measure_neurons(dense, few.x)
    profiles = activation_profiles(dense, few.x)
    trim_heap()
    shared, routed, sizes = _choose(profiles, importance(dense, statistics), config)
    del profiles
    mean = statistics.mean[routed.clamp(min=0)]  # [U, m]
    experts = fold_mean(divide_unevenly(dense, shared, routed, sizes), mean)
    trim_heap()
    router = fit_router(experts, few.x, config, few.ids)
    trim_heap()
    error = relative_error(experts, router, measured)
    result = SplitResult(
        experts=experts,
        router=router,
        receipt=receipt(original, experts, torch.cat([measured.x[:_RECEIPT_TOKENS], fit.x[:_RECEIPT_TOKENS]])),
        error=error,
        error_before_refit=None,
        tokens_per_expert=(),
        routed_tokens=len(fit.x),
    )
    del few
    trim_heap()
    if may_fit and router.rule == "one":
        mean = torch.cat([statistics.mean[shared.clamp(min=0)], mean.flatten()])
        result = _fit(result, router, mean, fit, measured, config, trains=trains)
    router = result.router or router
    return replace(result, tokens_per_expert=tokens_per_expert(result.experts, router, fit))


def _fit(
    folded: SplitResult,
    router: Router,
    mean: Tensor,
    fit: Sample,
    measured: Sample,
    config: SparsifyConfig,
    *,
    trains: bool,
) -> SplitResult:
    """Trained experts, or refitted ones where tokens are few, which can be learned by heart, or training fails."""
    trained = _train(folded, router, mean, fit, measured, config) if trains and isinstance(router, UnitRouter) else None
    if trained is not None and len(fit.x) > _CLOSED_FORM_TOKENS and trained.error < folded.error:
        return trained
    closed = _refit(folded, router, mean, _thin(fit) if trains else fit, measured, config)
    return closed if trained is None or trained.error >= closed.error else trained


def _train(
    folded: SplitResult, router: UnitRouter, mean: Tensor, fit: Sample, measured: Sample, config: SparsifyConfig
) -> SplitResult:
    """Train, then refit on all tokens; a refit before the training would change nothing in the end."""
    experts, trained = distill_block(
        folded.experts, router, fit.x, fit.target, fit.weight, steps=config.distill_steps, seed=config.seed
    )
    trim_heap()
    started = replace(folded, experts=experts, router=trained)
    return _refit(started, trained or router, mean, fit, measured, config, may_round=True)


def _refit(
    result: SplitResult,
    router: Router,
    mean: Tensor,
    sample: Sample,
    measured: Sample,
    config: SparsifyConfig,
    *,
    may_round: bool = False,
) -> SplitResult:
    """`mean` is that of the neurons before any training, shared ones first: it only centres."""
    expert_ids = torch.cat([router(*part)[1].int() for part in sample.parts()])
    tokens = (sample.x, sample.target, sample.weight)
    experts = refit(result.experts, mean, *tokens, expert_ids, config.ridge, may_round=may_round)
    trim_heap()
    error = relative_error(experts, router, measured)
    return replace(result, experts=experts, error=error, error_before_refit=result.error)


def _prune(
    dense: DenseFFN, original: DenseFFN, fit: Sample, measured: Sample, config: SparsifyConfig, *, may_refit: bool
) -> SplitResult:
    """No routed experts. The receipt is that of the neurons in their new order, before any is dropped."""
    neurons = dense.down.weight.shape[1]
    everything, _ = prune(dense, fit.x, neurons)
    experts, mean = prune(dense, fit.x, sum(config.widths_of(neurons)[: config.top_k]))
    error = relative_error(experts, None, measured)
    tokens = torch.cat([measured.x[:_RECEIPT_TOKENS], fit.x[:_RECEIPT_TOKENS]])
    result = SplitResult(experts, None, receipt(original, everything, tokens), error, None, (), 0)
    if not (config.refit and may_refit):
        return result
    closed = _refit_pruned(result, experts, mean, fit, measured, config)
    if not config.distill_steps:
        return closed
    tokens = (fit.x, fit.target, fit.weight)
    experts, _ = distill_block(experts, None, *tokens, steps=config.distill_steps, seed=config.seed)
    trained = _refit_pruned(result, experts, mean, fit, measured, config)
    return trained if trained.error < closed.error else closed


def _refit_pruned(
    result: SplitResult, experts: Experts, mean: Tensor, fit: Sample, measured: Sample, config: SparsifyConfig
) -> SplitResult:
    experts = refit(experts, mean, fit.x, fit.target, fit.weight, nobody(fit.x), config.ridge)
    error = relative_error(experts, None, measured)
    return replace(result, experts=experts, error=error, error_before_refit=result.error)


def _choose(profiles: Tensor, scores: Tensor, config: SparsifyConfig) -> tuple[Tensor, Tensor, tuple[int, ...] | None]:
    """Neurons of the shared experts `[s]` and of the units `[U, m]` of routed ones; units of each, if these differ."""
    if config.expert_widths is None:
        neurons = choose_neurons(profiles, scores, config.num_experts, config.shared, config.seed)
        return neurons[: config.shared].flatten(), neurons[config.shared :], None
    shared, routed = choose_by_width(profiles, scores, config.expert_widths, config.shared, config.seed)
    _, sizes = units_of_widths(config.expert_widths[config.shared :])
    return shared, routed, None if max(sizes) == 1 else sizes


def _thin(sample: Sample) -> Sample:
    return sample.every(-(-len(sample.x) // _CLOSED_FORM_TOKENS))


def count_tokens(expert_ids: Tensor, num_experts: int) -> tuple[int, ...]:
    """How many tokens each expert got: `[T, K]` -> E numbers; -1 counts for none."""
    return tuple(torch.bincount(expert_ids.flatten() + 1, minlength=num_experts + 1)[1:].tolist())


@torch.no_grad()
def relative_error(experts: Experts, router: Router | None, sample: Sample) -> float:
    """`|routed output - target| / |target|`, L2 over all tokens by their weights."""
    difference, size = 0.0, 0.0
    outputs = zip(sample.parts(), chunks(sample.target), chunks(sample.weight), strict=True)
    for (x, ids), target, weight in outputs:
        y = experts(x, nobody(x)) if router is None else run_experts(experts, router, x, ids)[0]
        difference += float(weight.double() @ (y - target).double().square().sum(1))
        size += float(weight.double() @ target.double().square().sum(1))
    trim_heap()
    return (difference / size) ** 0.5 if size else difference**0.5


def tokens_per_expert(experts: Experts, router: Router, sample: Sample) -> tuple[int, ...]:
    """How many tokens of `sample` each routed expert gets."""
    loads = [count_tokens(router(*part)[1], experts.num_routed) for part in sample.parts()]
    return tuple(map(sum, zip(*loads, strict=True)))


def nobody(x: Tensor) -> Tensor:
    """The expert ids of tokens `[T, D]` that nothing is routed for: `[T, 0]`."""
    return x.new_empty(len(x), 0, dtype=torch.int64)
