"""S-BASE (arXiv 2202.01169): in training experts are chosen after Sinkhorn's algorithm balanced the logits.

    Q = exp(logits),   d_0 = (1/T) / (Q d_1),   d_1 = (1/E) / (Q^T d_0),   until d_1 stays;   plan = d_0 Q d_1

Training takes the K largest of the plan, inference the K largest logits. Rows of the plan sum to 1/T and columns to
1/E, but the loads of its largest entries are not equal, only closer. T tokens, E num_experts, K top_k.
"""

from __future__ import annotations

import torch
from torch import Tensor

from sparsify.routers.base import System
from sparsify.routers.linear_router import LinearRouter

_EPSILON = 1e-8
_TOLERANCE = 1e-4
_ROUNDS = 1000


class SBaseRouter(LinearRouter):
    """Weights are the sigmoid of the logit for K = 1, else the softmax over all experts, not renormalised."""

    system = System(
        name="s-base",
        paper="Unified Scaling Laws for Routed Language Models (S-BASE, arXiv 2202.01169)",
        mechanism="training: the K largest after Sinkhorn balancing; inference: the K largest logits",
        export_form="top-k",
    )
    default_top_k = 1

    def route(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """By falling plan, or logit."""
        logits = self.logits(x)
        scores = torch.sigmoid(logits) if self.top_k == 1 else torch.softmax(logits, dim=-1)
        ids = torch.topk(sinkhorn(logits) if self.training else logits, self.top_k, dim=-1).indices
        return scores.gather(-1, ids), ids


@torch.no_grad()
def sinkhorn(logits: Tensor) -> Tensor:
    """The plan of the module's formula, without a gradient.

    Args:
        logits: `[T, E]`, fp32 or fp64. Rows are shifted by their maximum, which the plan does not see.

    Returns:
        `[T, E]`: rows sum to 1/T, columns to 1/E, to about the tolerance of 1e-4.
    """
    tokens, experts = logits.shape
    if not tokens:
        return torch.zeros_like(logits)
    q = torch.exp(logits - logits.amax(-1, keepdim=True))
    d0, d1 = q.new_ones(tokens), q.new_ones(experts)
    for _ in range(_ROUNDS):
        d0 = (1 / tokens) / (q @ d1 + _EPSILON)
        before, d1 = d1, (1 / experts) / (q.t() @ d0 + _EPSILON)
        if (d1 - before).abs().mean() < _TOLERANCE:
            break
    return d0.unsqueeze(1) * q * d1
