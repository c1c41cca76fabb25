"""The softmax of the K largest logits (Shazeer et al., arXiv 1701.06538, without noise; Mixtral, arXiv 2401.04088)."""

from __future__ import annotations

import torch
from torch import Tensor

from sparsify.routers.base import System, WeightRule
from sparsify.routers.linear_router import LinearRouter


class TopKRouter(LinearRouter):
    """Routing weights are the softmax over the K chosen logits, so they sum to 1."""

    system = System(
        name="top-k",
        paper="Mixtral of Experts (arXiv 2401.04088)",
        mechanism="the K largest of linear logits, weighted by their softmax",
        export_form="top-k",
    )

    @property
    def rule(self) -> WeightRule:
        """The weights of a token sum to 1."""
        return "one" if self.weights == "one" else "sum"

    def route(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """By falling logit."""
        logits, expert_ids = torch.topk(self.logits(x), self.top_k, dim=-1)
        return torch.softmax(logits, dim=-1), expert_ids
