"""ST-MoE: GShard's top-2 with a loss that keeps logits small (arXiv 2202.08906)."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from sparsify.routers.base import System
from sparsify.routers.gshard_router import GShardRouter
from sparsify.routers.losses import z_loss


class STMoERouter(GShardRouter):
    """The second expert runs with the probability min(1, weight / 0.2) in training.

    The paper evaluates with `eval_capacity_factor=2.0`; dropless, the default here, keeps tokens independent.
    """

    system = System(
        name="st-moe",
        paper="ST-MoE: Designing Stable and Transferable Sparse Expert Models (arXiv 2202.08906)",
        mechanism="top-2 as GShard with threshold 0.2, and a z-loss on the logits",
        export_form="top-k",
    )

    def __init__(
        self,
        hidden_size: int,
        num_experts: int,
        top_k: int,
        z_coefficient: float = 1e-3,
        threshold: float = 0.2,
        **options: Any,
    ) -> None:
        super().__init__(hidden_size, num_experts, top_k, threshold=threshold, **options)
        self.z_coefficient = z_coefficient
        self.coefficients["z"] = z_coefficient

    def add_losses(self, logits: Tensor, scores: Tensor, expert_ids: Tensor, weights: Tensor) -> None:
        """Balance and z."""
        super().add_losses(logits, scores, expert_ids, weights)
        self.losses["z"] = z_loss(logits)
