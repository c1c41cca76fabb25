"""THOR (arXiv 2110.04260): one expert, drawn at random for the whole batch, in every training call.

T tokens, E num_experts. Call the model twice for every batch and add `losses.consistency_loss` of the two outputs to
the loss, times 5 in the paper: the experts then learn to agree.
"""

from __future__ import annotations

import torch
from torch import Tensor

from sparsify.routers.base import Router, System, WeightRule, require_one
from sparsify.routers.hash_router import HashRouter


class ThorRouter(Router):
    """Weight 1. At inference one expert that stays the same, or the mean of all."""

    system = System(
        name="thor",
        paper="Taming Sparsely Activated Transformer with Stochastic Experts (THOR, arXiv 2110.04260)",
        mechanism="training: a random expert for the batch, two calls must agree; inference: a fixed one, or the mean",
        export_form="table",
        needs=("consistency",),
    )
    default_top_k = 1

    def __init__(
        self, hidden_size: int, num_experts: int, top_k: int, average: bool = False, inference_expert: int = 0
    ) -> None:
        """No weights.

        Args:
            top_k: 1.
            average: run all experts at inference, each with weight 1/E.
            inference_expert: the one that runs at inference otherwise.
        """
        super().__init__(hidden_size, num_experts, top_k)
        if not 0 <= inference_expert < num_experts:
            raise ValueError(f"inference_expert must be from 0 to {num_experts - 1}, got {inference_expert}")
        self.average = average
        self.inference_expert = inference_expert

    def check_top_k(self, top_k: int) -> None:
        """One expert a token."""
        super().check_top_k(top_k)
        require_one(self.system.name, top_k)

    @property
    def num_slots(self) -> int:
        """E for the mean, of which training uses one."""
        return self.num_experts if self.average else 1

    @property
    def rule(self) -> WeightRule:
        """Weights of 1, or E times 1/E."""
        return "sum"

    def route(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """The same for every token."""
        if self.average and not self.training:
            ids = torch.arange(self.num_experts, device=x.device).expand(x.shape[0], -1)
            return torch.full_like(ids, 1 / self.num_experts, dtype=x.dtype), ids
        unused = x.new_zeros(x.shape[0], self.num_slots - 1)
        weights = torch.cat([x.new_ones(x.shape[0], 1), unused], dim=-1)
        if not self.training:
            return weights, torch.full_like(weights, self.inference_expert, dtype=torch.int64)
        drawn = torch.randint(self.num_experts, (1, 1), device=x.device).expand(x.shape[0], 1)
        return weights, torch.cat([drawn, torch.full_like(unused, -1, dtype=torch.int64)], dim=-1)


class ThorHashRouter(HashRouter):
    """As `ThorRouter`; at inference the expert that a fixed random table has for the token's id, or its sentence's."""

    system = System(
        name="thor-hash",
        paper="Taming Sparsely Activated Transformer with Stochastic Experts (THOR, arXiv 2110.04260)",
        mechanism="training: as thor; inference: one expert by a fixed random table of token or sentence ids; weight 1",
        export_form="table",
        needs=("ids", "consistency"),
    )

    def route_by_id(self, x: Tensor, ids: Tensor) -> tuple[Tensor, Tensor]:
        """One expert for all tokens in training, one slot."""
        weights, expert_ids = super().route_by_id(x, ids)
        if not self.training:
            return weights, expert_ids
        drawn = torch.randint(self.num_experts, (1, 1), device=x.device)
        return weights, drawn.expand(x.shape[0], 1)
