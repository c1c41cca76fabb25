"""LIMoE: top-1 with entropy losses by modality (arXiv 2206.02770)."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from sparsify.routers.base import Reads, System, require_one
from sparsify.routers.capacity import Overflow
from sparsify.routers.id_routers import check_ids
from sparsify.routers.linear_router import LinearRouter
from sparsify.routers.losses import global_entropy_loss, importance_loss, local_entropy_loss, z_loss
from sparsify.routers.token_choice import TokenChoiceRouter


class LIMoERouter(LinearRouter, TokenChoiceRouter):
    """Tokens of every modality are to be sure of their expert, and to use `soft_minimum` experts or more together.

    With several modalities the label of a token says which is its own; it plays no part in the route. Slots go to
    tokens by falling probability, as in V-MoE.
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
            top_k: 1.
            num_modalities: M, whose tokens are balanced apart. With more than one the router reads labels.
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
        self._members: Tensor | None = None  # [T, M], of one call

    @property
    def reads(self) -> Reads | None:
        """The modality of every token, where there is more than one."""
        return "labels" if self.num_modalities > 1 else None

    def check_top_k(self, top_k: int) -> None:
        """One expert a token."""
        super().check_top_k(top_k)
        require_one(self.system.name, top_k)

    def route(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """As `TokenChoiceRouter`.

        Raises:
            ValueError: there are several modalities, and in training mode nothing says which are those of the tokens.
        """
        if self.training and self.num_modalities > 1 and self._members is None:
            raise ValueError(
                f"{self.num_modalities} modalities are balanced apart in training, so the router 'limoe' needs the one "
                "of each token: call router(x, modalities), [T] int64"
            )
        return super().route(x)

    def route_by_id(self, x: Tensor, ids: Tensor) -> tuple[Tensor, Tensor]:
        """As `route`; `ids` `[T]` are modalities."""
        advice = "give num_modalities in router_options as large as there are modalities, or correct the label"
        check_ids(ids, self.num_modalities, self.system.name, advice)
        self._members = torch.nn.functional.one_hot(ids, self.num_modalities)
        try:
            return self.route(x)
        finally:
            self._members = None

    def add_losses(self, logits: Tensor, scores: Tensor, expert_ids: Tensor, weights: Tensor) -> None:
        """Entropies are means over the modalities that have tokens."""
        threshold = math.log(self.soft_minimum or self.num_experts)
        self.losses["local"] = local_entropy_loss(scores, self._members)
        self.losses["global"] = global_entropy_loss(scores, threshold, self._members)
        self.losses["importance"] = importance_loss(scores)
        self.losses["z"] = z_loss(logits)
