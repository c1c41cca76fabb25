"""Noisy top-k gating with losses of importance and load (Shazeer et al., arXiv 1701.06538)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from sparsify.routers.base import System, wide
from sparsify.routers.linear_router import LinearRouter
from sparsify.routers.losses import importance_loss, load_loss, load_probability
from sparsify.routers.token_choice import TokenChoiceRouter

_LEAST_SIGMA = 1e-2


class NoisyTopKRouter(LinearRouter, TokenChoiceRouter):
    """In training `x W^T + N(0, 1) (softplus(x W_noise^T) + 1e-2)`; weights are the softmax over the K largest.

    W_noise starts at 0, as there. W does not: without noise a router of ties sends all tokens to the same experts.
    """

    system = System(
        name="noisy-top-k",
        paper="Outrageously Large Neural Networks: The Sparsely-Gated Mixture-of-Experts Layer (arXiv 1701.06538)",
        mechanism="the softmax of the K largest logits, with learned noise and two balance losses in training",
        export_form="top-k",
    )
    normalised = True

    def __init__(
        self,
        hidden_size: int,
        num_experts: int,
        top_k: int,
        importance_coefficient: float = 0.1,
        load_coefficient: float = 0.1,
        **options: Any,
    ) -> None:
        super().__init__(hidden_size, num_experts, top_k, **options)
        self.importance_coefficient = importance_coefficient
        self.load_coefficient = load_coefficient
        self.coefficients = {"importance": importance_coefficient, "load": load_coefficient}
        self.noise_weight = nn.Parameter(torch.zeros(num_experts, hidden_size))

    def training_logits(self, x: Tensor) -> Tensor:
        """Noisy; leaves the load loss, which needs clean logits too."""
        clean, tokens = self.logits(x), wide(x)
        noise_logits = nn.functional.linear(tokens, wide(self.noise_weight).to(tokens.dtype))
        sigma = nn.functional.softplus(noise_logits) + _LEAST_SIGMA  # [T, E]
        noisy = clean + torch.randn_like(clean) * sigma
        self.losses["load"] = load_loss(load_probability(clean, noisy, sigma, self.top_k))
        return noisy

    def add_losses(self, logits: Tensor, scores: Tensor, expert_ids: Tensor, weights: Tensor) -> None:
        """Importance: the sums of the weights, zeros included."""
        self.losses["importance"] = importance_loss(torch.zeros_like(scores).scatter(1, expert_ids, weights))
