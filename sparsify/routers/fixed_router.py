"""Every token has all experts, with the same weights: what label routing leaves for one label."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from sparsify.routers.base import Router, System, WeightRule, wide


class FixedRouter(Router):
    """Weights are the softmax of E numbers, equal at first."""

    system = System(
        name="fixed",
        paper="Beyond Distillation: Task-level Mixture-of-Experts for Efficient Inference (arXiv 2110.03742)",
        mechanism="all experts for every token, weighted alike; what `specialise` leaves of label routing",
        export_form="mixing",
    )
    default_top_k = 4

    def __init__(self, hidden_size: int, num_experts: int, top_k: int) -> None:
        super().__init__(hidden_size, num_experts, top_k)
        self.weight = nn.Parameter(torch.zeros(num_experts))

    def check_top_k(self, top_k: int) -> None:
        """All experts run."""
        super().check_top_k(top_k)
        if top_k != self.num_experts:
            raise ValueError(f"the router 'fixed' runs all experts: give top_k={self.num_experts}, got {top_k}")

    @property
    def rule(self) -> WeightRule:
        """The weights of a token sum to 1."""
        return "one" if self.weights == "one" else "sum"

    def route(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Slot e is expert e."""
        weights = torch.softmax(wide(self.weight).to(wide(x).dtype), dim=-1).expand(x.shape[0], -1)
        return weights, torch.arange(self.num_experts, device=x.device).expand(x.shape[0], -1)
