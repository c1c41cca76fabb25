"""DeepSeekMoE: probabilities as they are, balance of experts and of devices (arXiv 2401.06066).

Its fine-grained experts are those of `start="split"`, or of `granularity`; its shared ones `num_shared_experts`, or
`start="shared"`.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from sparsify.routers.base import System
from sparsify.routers.linear_router import LinearRouter
from sparsify.routers.losses import balance_loss
from sparsify.routers.token_choice import TokenChoiceRouter


class DeepSeekMoERouter(LinearRouter, TokenChoiceRouter):
    """Weights are the K largest of the softmax over routed experts, not divided by their sum."""

    system = System(
        name="deepseek-moe",
        paper="DeepSeekMoE: Towards Ultimate Expert Specialization (arXiv 2401.06066)",
        mechanism="the K largest of many small experts by softmax, beside shared ones; expert and device balance",
        export_form="top-k",
    )

    def __init__(
        self,
        hidden_size: int,
        num_experts: int,
        top_k: int,
        balance_coefficient: float = 1e-3,
        num_devices: int = 1,
        device_coefficient: float = 5e-2,
        **options: Any,
    ) -> None:
        """Route without renormalising.

        Args:
            num_experts: routed experts.
            top_k: of them, for a token.
            balance_coefficient: of the balance of experts.
            num_devices: runs of experts whose loads are balanced too; 1 has no such loss.
            device_coefficient: of that balance.
            **options: of `TokenChoiceRouter`.
        """
        super().__init__(hidden_size, num_experts, top_k, **options)
        if num_devices < 1 or num_experts % num_devices:
            raise ValueError(f"num_devices must divide the {num_experts} routed experts, got {num_devices}")
        self.balance_coefficient = balance_coefficient
        self.num_devices = num_devices
        self.device_coefficient = device_coefficient
        self.coefficients = {"balance": balance_coefficient}
        if num_devices > 1:
            self.coefficients["device"] = device_coefficient

    def add_losses(self, logits: Tensor, scores: Tensor, expert_ids: Tensor, weights: Tensor) -> None:
        """Balance of experts, and of devices where there are several."""
        super().add_losses(logits, scores, expert_ids, weights)
        if self.num_devices > 1:
            self.losses["device"] = balance_loss(scores, expert_ids, num_groups=self.num_devices)
