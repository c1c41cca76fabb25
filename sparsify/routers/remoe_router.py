"""ReMoE (arXiv 2412.14711): the ReLU of a linear map is the routing weight; an expert with weight 0 does not run.

T tokens, D hidden_size, E num_experts, K the number of experts that a token is to have on average.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from sparsify.routers.base import Router, System, where_used, wide


class ReMoERouter(Router):
    """Weights `ReLU(x W^T + b)`, W = 0 and b = 1 at the start: every expert runs with weight 1.

    In training the L1 loss of the weights grows or shrinks with `strength`, the paper's lambda: after every call it is
    multiplied by `growth` where fewer than 1 - K/E of the weights are zero, and divided where more are. Each layer has
    its own `strength`, in the state dict; the paper has one for the model.
    """

    system = System(
        name="remoe",
        paper="ReMoE: Fully Differentiable Mixture-of-Experts with ReLU Routing (arXiv 2412.14711)",
        mechanism="the ReLU of linear logits is the weight; an L1 loss is steered until K of E are above 0 on average",
        export_form="mask",
    )

    strength: Tensor

    def __init__(
        self,
        hidden_size: int,
        num_experts: int,
        top_k: int,
        initial_strength: float = 1e-8,
        growth: float = 1.2,
        balanced: bool = True,
    ) -> None:
        """Start with all experts on.

        Args:
            hidden_size: D.
            num_experts: E.
            top_k: K, experts of a token on average that the L1 loss steers to.
            initial_strength: the first factor of the L1 loss.
            growth: of that factor, from call to call.
            balanced: weigh the L1 term of every expert by its share of the tokens.
        """
        super().__init__(hidden_size, num_experts, top_k)
        if growth <= 1:
            raise ValueError(f"growth must be above 1, got {growth}")
        self.initial_strength = initial_strength
        self.growth = growth
        self.balanced = balanced
        self.weight = nn.Parameter(torch.zeros(num_experts, hidden_size))
        self.bias = nn.Parameter(torch.ones(num_experts))
        self.register_buffer("strength", torch.tensor(initial_strength))

    @property
    def num_slots(self) -> int:
        """E: how many are used differs from token to token."""
        return self.num_experts

    @property
    def start_sum(self) -> float | None:
        """Every weight is 1 at the start."""
        return 1.0 if self.weights == "sum" else float(self.num_experts)

    def route(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Slot e is expert e."""
        tokens = wide(x)
        weights = torch.relu(nn.functional.linear(tokens, wide(self.weight).to(tokens), wide(self.bias).to(tokens)))
        if self.training:
            self._steer(weights)
        return where_used(weights, weights > 0)

    def _steer(self, weights: Tensor) -> None:
        used = (weights > 0).to(weights.dtype)
        share = self.num_experts / self.top_k * used.mean(0) if self.balanced else torch.ones_like(weights[0])  # [E]
        self.losses["l1"] = (share * weights).sum(-1).mean()
        self.coefficients["l1"] = self.strength.clone()
        with torch.no_grad():
            missing = 1 - self.top_k / self.num_experts - (1 - used.mean())
            self.strength.mul_(self.growth ** torch.sign(missing).to(self.strength.dtype))
