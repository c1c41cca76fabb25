"""V-MoE: batch prioritised routing, which drops the least sure tokens first (arXiv 2106.05974)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from sparsify.routers.base import System
from sparsify.routers.capacity import Overflow
from sparsify.routers.linear_router import LinearRouter
from sparsify.routers.losses import importance_loss, load_loss, load_probability
from sparsify.routers.token_choice import TokenChoiceRouter


class VMoERouter(LinearRouter, TokenChoiceRouter):
    """Softmax of logits with noise of standard deviation 1 / E in training; weights are not divided by their sum.

    Slots go to tokens by falling largest probability, so in training a token may lose its slot to a later one: give
    `overflow="token"` for a causal model. With an `eval_capacity_factor` this goes for inference too.
    """

    system = System(
        name="v-moe",
        paper="Scaling Vision with Sparse Mixture of Experts (arXiv 2106.05974)",
        mechanism="the K largest probabilities; over capacity the tokens of the smallest ones are dropped (BPR)",
        export_form="top-k",
    )

    def __init__(
        self,
        hidden_size: int,
        num_experts: int,
        top_k: int,
        importance_coefficient: float = 5e-3,
        load_coefficient: float = 5e-3,
        capacity_factor: float | None = 1.05,
        overflow: Overflow = "priority",
        **options: Any,
    ) -> None:
        super().__init__(hidden_size, num_experts, top_k, capacity_factor=capacity_factor, overflow=overflow, **options)
        self.importance_coefficient = importance_coefficient
        self.load_coefficient = load_coefficient
        self.coefficients = {"importance": importance_coefficient, "load": load_coefficient}

    def training_logits(self, x: Tensor) -> Tensor:
        """Noisy; leaves the load loss, which needs clean logits too."""
        clean, sigma = self.logits(x), 1 / self.num_experts
        noisy = clean + torch.randn_like(clean) * sigma
        probability = load_probability(clean, noisy, sigma, self.top_k, drawn_again=False)
        self.losses["load"] = load_loss(probability)
        return noisy

    def add_losses(self, logits: Tensor, scores: Tensor, expert_ids: Tensor, weights: Tensor) -> None:
        """Importance: the sums of the probabilities, chosen or not."""
        self.losses["importance"] = importance_loss(scores)
