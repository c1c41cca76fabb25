"""ReMoE (arXiv 2412.14711): the ReLU of a linear map is the routing weight; an expert with weight 0 does not run.

T tokens, D hidden_size, E num_experts, K the number of experts that a token is to have on average.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from sparsify.routers.base import Router, System, where_used, wide


class ReMoERouter(Router):
    """Weights `ReLU(x W^T + b)`, W = 0 and b = 1 at the start: every expert runs with weight 1.

    The L1 loss of the weights has the factor `strength`, the paper's lambda. `after_step` multiplies it by `growth`
    where fewer than 1 - K/E of the weights of the last call were zero, and divides it where more were. Each layer has
    its own `strength`, in the state dict; the paper has one for the model.
    """

    system = System(
        name="remoe",
        paper="ReMoE: Fully Differentiable Mixture-of-Experts with ReLU Routing (arXiv 2412.14711)",
        mechanism="the ReLU of linear logits is the weight; an L1 loss is steered until K of E are above 0 on average",
        export_form="mask",
        needs=("after_step",),
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
        self.zero_share: Tensor | None = None  # of the last call in training mode

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
            self._add_loss(weights)
        return where_used(weights, weights > 0)

    def after_step(self) -> None:
        """Steer the number of experts of a token towards K."""
        if self.zero_share is None:
            return
        missing = torch.sign(1 - self.top_k / self.num_experts - self.zero_share)
        self.strength.mul_(self.growth ** missing.to(self.strength.dtype))
        self.zero_share = None

    def _add_loss(self, weights: Tensor) -> None:
        tokens = max(weights.shape[0], 1)
        used = (weights > 0).to(weights.dtype).sum(0) / tokens  # [E]
        share = self.num_experts / self.top_k * used if self.balanced else torch.ones_like(used)
        self.losses["l1"] = (share * weights).sum() / tokens
        self.coefficients["l1"] = self.strength.clone()
        self.zero_share = (1 - used).detach().mean() if weights.shape[0] else None
