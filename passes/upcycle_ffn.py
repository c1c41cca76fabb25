"""One dense FFN -> experts that are copies of it (sparse upcycling, arXiv 2212.05055), or shards of copies.

    upcycle    y = bias + sum over the selected e of w_e G E_e(x)        E_e is shard e mod G of a copy, G = granularity
    branches   as upcycle, E_e of a copy of the FFN of a branch, with its own output bias
    shared     y = FFN(x) + sum over the selected e of w_e E_e(x)        E_e as above with down_proj = 0

The scale G belongs to weights that sum to 1; a weight of 1 in each of K slots has the scale G / K. It goes into
down_proj alone, which is exact for every activation (`bias` stays outside the experts, and is added once).
T tokens, D hidden_size, F intermediate_size, E num_experts, K top_k.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from sparsify.config import SparsifyConfig
from sparsify.passes.branches import branch_receipt, join_branches
from sparsify.passes.run_experts import run_experts
from sparsify.passes.split.dense_ffn import DenseFFN
from sparsify.passes.split.experts import Experts, divide, take_neurons
from sparsify.passes.split.sample import Sample
from sparsify.passes.split.split_ffn import SplitResult, count_tokens, relative_error
from sparsify.routers import LinearRouter, Router, make_router


def upcycle_ffn(
    dense: DenseFFN,
    original: DenseFFN,
    sample: Sample,
    config: SparsifyConfig,
    ids: Tensor | None = None,
    branches: Sequence[DenseFFN] = (),
) -> SplitResult:
    """Copy, route and measure.

    Args:
        dense: the FFN.
        original: the same before its vectors were folded; the receipt is taken against it.
        sample: tokens for the receipt and the reported error.
        config: `granularity` must divide F.
        ids: `[T]` of calibration data, for a router that reads ids.
        branches: what to copy instead of `dense`, one after the other; without them every expert is a copy of it.

    Returns:
        The experts and their router. Where `starts_exact` the receipt is taken with its own routes, else with all
        experts on in equal parts, and `error` says how far the start is from the dense FFN. The receipt of branches is
        that of each expert alone against the FFN of its branch.
    """
    router = _make_router(dense, config)
    if ids is not None:
        router.fit_ids(ids)
    total = router.start_sum or 1.0
    exact = join_branches(branches, config.granularity, total) if branches else _copies(dense, router, config)
    expert_ids = torch.cat([router(*part)[1] for part in sample.parts()])
    by_routes = config.start == "shared" or starts_exact(router)
    experts = _redraw(exact, config) if config.reinitialise else exact
    return SplitResult(
        experts=experts,
        router=router,
        receipt=(
            branch_receipt(branches, exact, [x for x, _ in sample.parts()], total)
            if branches
            else _receipt(original, exact, sample, router if by_routes else None)
        ),
        error=relative_error(experts, router, sample),
        error_before_refit=None,
        tokens_per_expert=count_tokens(expert_ids, config.num_experts),
        routed_tokens=len(sample.x),
    )


def starts_exact(router: Router) -> bool:
    """Copies behind it are the dense FFN: the weights are known, and no token is left out for the sake of others."""
    return router.start_sum is not None and (router.batch_invariant or router.merges)


def _make_router(dense: DenseFFN, config: SparsifyConfig) -> Router:
    weight = dense.down.weight
    width, seed = dense.projections[0].weight.shape[1], config.seed
    router = make_router(config.router_name, width, config.num_experts, config.top_k, config.options, seed)
    router.weights = "sum" if config.exact_start else "native"
    if config.granularity > 1 and isinstance(router, LinearRouter):  # the shards of a copy are chosen together at first
        copies = router.weight.data[:: config.granularity]
        router.weight.data.copy_(copies.repeat_interleave(config.granularity, dim=0))
    return router.to(weight.device).eval()


def _copies(dense: DenseFFN, router: Router, config: SparsifyConfig) -> Experts:
    shards = torch.arange(dense.down.weight.shape[1]).view(config.granularity, -1)
    experts = divide(dense, shards.repeat(config.num_experts // config.granularity, 1), num_shared=0)
    if config.start == "shared":
        whole = take_neurons(dense, torch.arange(dense.down.weight.shape[1]))
        return replace(experts, down=torch.zeros_like(experts.down), shared=whole)
    scale = config.granularity / (router.start_sum or 1)
    return replace(experts, down=experts.down * scale)


def _redraw(experts: Experts, config: SparsifyConfig) -> Experts:
    """Draw neurons of every expert anew, from the mean and standard deviation of what they replace, per matrix."""
    generator = torch.Generator().manual_seed(config.seed)
    num_experts, _, size = experts.down.shape
    count = round(config.reinitialise * size)
    chosen = torch.rand(num_experts, size, generator=generator).argsort(1)[:, :count]  # [E, count]
    drawn = torch.zeros(num_experts, size, dtype=torch.bool).scatter_(1, chosen, True).unsqueeze(-1)
    return replace(
        experts,
        projections=tuple(_drawn(weight, drawn, generator) for weight in experts.projections),
        down=_drawn(experts.down.transpose(1, 2), drawn, generator).transpose(1, 2).contiguous(),
    )


def _drawn(weight: Tensor, drawn: Tensor, generator: torch.Generator) -> Tensor:
    """`[E, m, D]`; `drawn` `[E, m, 1]`."""
    replaced = weight[drawn.expand_as(weight)]
    noise = torch.randn(weight.shape, generator=generator, dtype=weight.dtype)
    return torch.where(drawn, replaced.mean() + replaced.std() * noise, weight)


def _receipt(dense: DenseFFN, experts: Experts, sample: Sample, router: Router | None) -> float:
    """Max |experts - dense| / max |dense|; without a router all experts are on, in equal parts."""
    difference, size = 0.0, 0.0
    for x, ids in sample.parts():
        expected = dense(x)
        if router is None:
            everyone = torch.arange(experts.num_routed).expand(len(x), -1)
            y = experts(x, everyone, torch.full_like(everyone, 1 / experts.num_routed, dtype=x.dtype))
        else:
            y, _ = run_experts(experts, router, x, ids)
        difference = max(difference, float((y - expected).abs().max()))
        size = max(size, float(expected.abs().max()))
    return difference / max(size, 1e-30)
