"""M6-T: expert prototyping, one expert from each of K groups (arXiv 2105.15082)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from sparsify.routers.base import System
from sparsify.routers.linear_router import LinearRouter
from sparsify.routers.losses import balance_loss
from sparsify.routers.token_choice import TokenChoiceRouter


class M6TRouter(LinearRouter, TokenChoiceRouter):
    """Softmax and top-1 within each group of E / K experts; the outputs of the groups are added up.

    Group g holds the experts from `g E / K` on. The balance loss is the mean over the groups.
    """

    system = System(
        name="m6-t",
        paper="M6-T: Exploring Sparse Expert Models and Beyond (arXiv 2105.15082)",
        mechanism="K groups of experts, in each the one of the largest probability within the group, weighted by it",
        export_form="top-k",
    )

    def __init__(
        self, hidden_size: int, num_experts: int, top_k: int, balance_coefficient: float = 1e-2, **options: Any
    ) -> None:
        super().__init__(hidden_size, num_experts, top_k, **options)
        self.balance_coefficient = balance_coefficient
        self.coefficients = {"balance": balance_coefficient}

    def check_top_k(self, top_k: int) -> None:
        """Equal groups."""
        super().check_top_k(top_k)
        if self.num_experts % top_k:
            raise ValueError(
                f"{self.num_experts} routed experts do not fall into top_k={top_k} groups of equal size; make "
                "num_experts a multiple of top_k"
            )

    def scores(self, logits: Tensor) -> Tensor:
        """Rows sum to K: to 1 in each group."""
        return torch.softmax(self._groups(logits), dim=-1).flatten(1)

    def select(self, scores: Tensor) -> Tensor:
        """By group."""
        first = torch.arange(self.top_k, device=scores.device) * (self.num_experts // self.top_k)
        return self._groups(scores).argmax(-1) + first

    def add_losses(self, logits: Tensor, scores: Tensor, expert_ids: Tensor, weights: Tensor) -> None:
        """Balance within each group."""
        size = self.num_experts // self.top_k
        probabilities = self._groups(scores)
        terms = [balance_loss(probabilities[:, g], expert_ids[:, g : g + 1] - g * size) for g in range(self.top_k)]
        self.losses["balance"] = torch.stack(terms).mean()

    def _groups(self, values: Tensor) -> Tensor:
        """`[T, E]` to `[T, K, E / K]`."""
        return values.unflatten(1, (self.top_k, self.num_experts // self.top_k))
