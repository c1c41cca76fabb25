"""Run the experts of one FFN behind their router, outside a graph. T tokens, D hidden_size, K slots of a token."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from sparsify.passes.split.experts import Experts
from sparsify.routers import Router


def run_experts(experts: Experts, router: Router, x: Tensor, ids: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """The output of tokens that are one group.

    Args:
        experts: of the FFN.
        router: chooses among them.
        x: `[T, D]`.
        ids: `[T]` int64, for a router that reads ids.

    Returns:
        The output `[T, D_out]`, and the expert ids that ran, `[T, K]`; `[n, 1]` for a router that mixes n slots.
    """
    routing_weights, expert_ids, *others = router(x, ids)
    if router.merges:
        segments, merge_weights, places = others
        y = _merged(experts, segments, merge_weights).flatten(0, 1).index_select(0, places)
    elif router.mixes:
        slots, combine_weights = others
        routed = replace(experts, shared=None, bias=None)(slots, expert_ids, routing_weights)
        y = torch.flatten(combine_weights @ routed.unflatten(0, (len(combine_weights), -1)), 0, 1)
    else:  # in the way that holds fewer values of a token
        by_choice = expert_ids.shape[1] * x.shape[1] < sum(experts.widths)
        run = experts if by_choice else experts.masked
        return run(x, expert_ids, routing_weights), expert_ids
    return experts.with_shared(y, x), expert_ids


def _merged_vector(vector: Tensor, merge: Callable[[Tensor], Tensor]) -> Tensor:
    """`[R, m]` to `[N, 1, m]`; integers are the same in all copies."""
    if vector.dim() < 2:
        return vector
    return merge(vector).unsqueeze(1) if vector.is_floating_point() else vector[0]


def _merged(experts: Experts, segments: Tensor, merge_weights: Tensor) -> Tensor:
    """One FFN for each segment, without shared experts and bias: `[N, L, D]`, `[N, E]` -> `[N, L, D_out]`."""

    def merge(bank: Tensor) -> Tensor:
        return torch.einsum("ne,e...->n...", merge_weights, bank)

    def linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        y = x @ merge(weight).transpose(1, 2)
        return y if bias is None else y + merge(bias).unsqueeze(1)

    biases = zip(experts.projections, experts.projection_biases, strict=True)
    projected = [linear(segments, weight, bias) for weight, bias in biases]
    vectors = [_merged_vector(vector, merge) for vector in experts.vectors]
    return linear(experts.activation(*projected, *vectors), experts.down, experts.expert_bias)
