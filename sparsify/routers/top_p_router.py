"""Top-p routing (arXiv 2403.07652): as many experts as it takes for their probabilities to exceed P.

T tokens, E num_experts, K the most experts that a token may have.
"""

from __future__ import annotations

import torch
from torch import Tensor

from sparsify.routers.base import System
from sparsify.routers.linear_router import LinearRouter
from sparsify.routers.losses import balance_loss, local_entropy_loss


class TopPRouter(LinearRouter):
    """Experts by falling probability, through the first at which the sum exceeds `threshold`; weights as they are."""

    system = System(
        name="top-p",
        paper="Harder Tasks Need More Experts: Dynamic Routing in MoE Models (arXiv 2403.07652)",
        mechanism="the most likely experts until their probabilities exceed P, at most K; unnormalised probabilities",
        export_form="mask",
    )

    def __init__(
        self,
        hidden_size: int,
        num_experts: int,
        top_k: int,
        threshold: float = 0.4,
        entropy_coefficient: float = 1e-4,
        balance_coefficient: float = 1e-2,
    ) -> None:
        """Make the logits.

        Args:
            top_k: K; the paper has no such bound, which is `top_k = num_experts`.
            threshold: P. 0 is top-1, above 1 all K.
            entropy_coefficient: of the mean entropy, which keeps the number of experts small.
            balance_coefficient: of the balance loss.
        """
        super().__init__(hidden_size, num_experts, top_k)
        if threshold < 0:
            raise ValueError(f"threshold is a probability to exceed, at least 0, got {threshold}")
        self.threshold = threshold
        self.entropy_coefficient = entropy_coefficient
        self.balance_coefficient = balance_coefficient
        self.coefficients = {"entropy": entropy_coefficient, "balance": balance_coefficient}

    def route(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """By falling probability; the slots behind are not used."""
        chances = torch.softmax(self.logits(x), dim=-1)
        weights, ids = torch.topk(chances, self.top_k, dim=-1)
        before = weights.cumsum(-1) - weights
        used = before <= self.threshold
        used = torch.cat([torch.ones_like(used[:, :1]), used[:, 1:]], dim=-1)  # rounding may not cost the first one
        ids = torch.where(used, ids, -1)
        if self.training:
            self.losses = {"entropy": local_entropy_loss(chances), "balance": balance_loss(chances, ids)}
        return weights * used, ids
