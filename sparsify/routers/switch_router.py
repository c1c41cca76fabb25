"""Switch: one expert a token, weighted by its probability (arXiv 2101.03961)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from sparsify.routers.base import System, require_one, wide
from sparsify.routers.linear_router import LinearRouter
from sparsify.routers.token_choice import TokenChoiceRouter


class SwitchRouter(LinearRouter, TokenChoiceRouter):
    """The weight p of the chosen expert is below 1: the start is not exact unless `exact_start` divides it out.

    In training the router reads `x U[1 - jitter, 1 + jitter]`.
    """

    system = System(
        name="switch",
        paper="Switch Transformers (arXiv 2101.03961)",
        mechanism="the one expert of the largest softmax probability, weighted by it; capacity and balance loss",
        export_form="top-k",
    )
    default_top_k = 1

    def __init__(
        self,
        hidden_size: int,
        num_experts: int,
        top_k: int,
        jitter: float = 1e-2,
        balance_coefficient: float = 1e-2,
        capacity_factor: float | None = 1.25,
        **options: Any,
    ) -> None:
        super().__init__(hidden_size, num_experts, top_k, capacity_factor=capacity_factor, **options)
        if not 0 <= jitter < 1:
            raise ValueError(f"jitter must be from 0 to below 1, got {jitter}")
        self.jitter = jitter
        self.balance_coefficient = balance_coefficient
        self.coefficients = {"balance": balance_coefficient}

    def check_top_k(self, top_k: int) -> None:
        """One expert a token."""
        super().check_top_k(top_k)
        require_one(self.system.name, top_k)

    def training_logits(self, x: Tensor) -> Tensor:
        """Of the tokens times uniform noise."""
        tokens = wide(x)
        return self.logits(tokens * (1 + self.jitter * (2 * torch.rand_like(tokens) - 1)))
