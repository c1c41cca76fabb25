"""LIMoE: top-1 with entropy losses by modality (arXiv 2206.02770)."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from sparsify.routers.base import System, require_one
from sparsify.routers.capacity import Overflow
from sparsify.routers.linear_router import LinearRouter
from sparsify.routers.losses import global_entropy_loss, importance_loss, local_entropy_loss, z_loss
from sparsify.routers.token_choice import TokenChoiceRouter


class LIMoERouter(LinearRouter, TokenChoiceRouter):
    """Tokens of every modality are to be sure of their expert, and to use `soft_minimum` experts or more together.

    Without `modalities` all tokens are of one. Slots go to tokens by falling probability, as in V-MoE.

    Attributes:
        modalities: `[T]` int64 in `[0, num_modalities)`, for the next call in training mode; set it before.
    """

    system = System(
        name="limoe",
        paper="Multimodal Contrastive Learning with LIMoE (arXiv 2206.02770)",
        mechanism="the one largest probability; losses: low entropy of each token, high entropy of a modality's mean",
        export_form="top-k",
    )
    default_top_k = 1

    def __init__(
        self,
        hidden_size: int,
        num_experts: int,
        top_k: int,
        num_modalities: int = 1,
        soft_minimum: int | None = None,
        entropy_coefficient: float = 4e-2,
        importance_coefficient: float = 4e-2,
        z_coefficient: float = 4e-2,
        capacity_factor: float | None = 1.05,
        overflow: Overflow = "priority",
        **options: Any,
    ) -> None:
        """Top-1.

        Args:
            hidden_size: D.
            num_experts: E.
            top_k: 1.
            num_modalities: whose tokens are balanced apart.
            soft_minimum: S, experts that each modality is to use at least, or None for all.
            entropy_coefficient: of the local and of the global loss.
            importance_coefficient: of the importance loss.
            z_coefficient: of the z-loss.
            capacity_factor: of training.
            overflow: see `TokenChoiceRouter`.
            **options: of `TokenChoiceRouter`.
        """
        super().__init__(hidden_size, num_experts, top_k, capacity_factor=capacity_factor, overflow=overflow, **options)
        if num_modalities < 1 or not 1 <= (soft_minimum or num_experts) <= num_experts:
            raise ValueError(
                f"num_modalities must be at least 1 and soft_minimum between 1 and the {num_experts} routed experts, "
                f"got {num_modalities} and {soft_minimum}"
            )
        self.num_modalities = num_modalities
        self.soft_minimum = soft_minimum
        self.entropy_coefficient = entropy_coefficient
        self.importance_coefficient = importance_coefficient
        self.z_coefficient = z_coefficient
        self.coefficients = {
            "local": entropy_coefficient,
            "global": entropy_coefficient,
            "importance": importance_coefficient,
            "z": z_coefficient,
        }
        self.modalities: Tensor | None = None

    def check_top_k(self, top_k: int) -> None:
        """One expert a token."""
        super().check_top_k(top_k)
        require_one(self.system.name, top_k)

    def add_losses(self, logits: Tensor, scores: Tensor, expert_ids: Tensor, weights: Tensor) -> None:
        """Entropies are means over the modalities that have tokens."""
        parts = self._by_modality(scores)
        threshold = math.log(self.soft_minimum or self.num_experts)
        self.losses["local"] = torch.stack([local_entropy_loss(part) for part in parts]).mean()
        self.losses["global"] = torch.stack([global_entropy_loss(part, threshold) for part in parts]).mean()
        self.losses["importance"] = importance_loss(scores)
        self.losses["z"] = z_loss(logits)

    def _by_modality(self, scores: Tensor) -> list[Tensor]:
        modalities, self.modalities = self.modalities, None
        if self.num_modalities == 1:
            return [scores]
        if modalities is None or modalities.shape != scores.shape[:1]:
            raise ValueError(
                f"{self.num_modalities} modalities need the one of each of the {len(scores)} tokens: set `modalities` "
                "of the router, [T] int64, before every call in training mode"
            )
        parts = [scores[modalities == number] for number in range(self.num_modalities)]
        return [part for part in parts if len(part)] or [scores]
