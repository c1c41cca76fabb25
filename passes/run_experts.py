"""Run the experts of one FFN behind their router, outside a graph. T tokens, D hidden_size, K slots of a token."""

from __future__ import annotations

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
    routing_weights, expert_ids, *mixtures = router(x, ids)
    if not mixtures:
        return experts(x, expert_ids, routing_weights), expert_ids
    slots, combine_weights = mixtures
    routed = replace(experts, shared=None, bias=None)(slots, expert_ids, routing_weights)
    y = torch.flatten(combine_weights @ routed.unflatten(0, (len(combine_weights), -1)), 0, 1)
    y = y if experts.shared is None else y + experts.shared(x)
    return (y if experts.bias is None else y + experts.bias), expert_ids
