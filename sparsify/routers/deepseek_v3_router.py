"""DeepSeek-V3: sigmoid scores, and a bias that balances without a loss (arXiv 2412.19437; 2408.15664).

T tokens, E num_experts, K top_k, G num_groups.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from sparsify.routers.base import System, WeightRule
from sparsify.routers.linear_router import LinearRouter
from sparsify.routers.losses import balance_loss, count_tokens
from sparsify.routers.token_choice import TokenChoiceRouter, chosen_scores


class DeepSeekV3Router(LinearRouter, TokenChoiceRouter):
    """Experts are chosen by `s + b`, s = sigmoid(x W^T); the weights are `s / sum s`, without b.

    After each step of the optimiser `b_e += bias_rate sign(mean load - load_e)`, from the tokens since the last step:
    `SparseModel.after_step` does it. b is in the state dict, and stays fp32 in a model that is not.
    """

    system = System(
        name="deepseek-v3",
        paper="DeepSeek-V3 (arXiv 2412.19437); Auxiliary-Loss-Free Load Balancing (arXiv 2408.15664)",
        mechanism="the K largest sigmoids plus a bias that follows the load; weights without the bias sum to 1",
        export_form="top-k",
        needs=("after_step",),
    )

    bias: Tensor
    load: Tensor

    def __init__(
        self,
        hidden_size: int,
        num_experts: int,
        top_k: int,
        bias_rate: float = 1e-3,
        num_groups: int = 1,
        top_groups: int = 1,
        routed_scaling: float = 1.0,
        balance_coefficient: float = 1e-4,
        **options: Any,
    ) -> None:
        """Route by groups, then experts.

        Args:
            bias_rate: change of b a step; 1e-2 oscillates.
            num_groups: G runs of experts; a group scores the sum of its two best `s + b`.
            top_groups: only the experts of so many groups can be chosen.
            routed_scaling: factor of all weights; with another than 1 the start of copies is not exact.
            balance_coefficient: of the complementary balance loss, here over all tokens of a call.
            **options: of `TokenChoiceRouter`.
        """
        if num_groups < 1 or num_experts % num_groups or not 1 <= top_groups <= num_groups:
            raise ValueError(
                f"num_groups must divide the {num_experts} routed experts and top_groups lie between 1 and num_groups, "
                f"got {num_groups} and {top_groups}"
            )
        self._reachable = num_experts // num_groups * top_groups
        super().__init__(hidden_size, num_experts, top_k, **options)
        if not (bias_rate >= 0 and routed_scaling > 0):
            raise ValueError(
                f"bias_rate must not be below 0 and routed_scaling be above 0, got {bias_rate} and {routed_scaling}"
            )
        self.bias_rate = bias_rate
        self.num_groups = num_groups
        self.top_groups = top_groups
        self.routed_scaling = routed_scaling
        self.balance_coefficient = balance_coefficient
        self.coefficients = {"balance": balance_coefficient}
        self.register_buffer("bias", torch.zeros(num_experts))
        self.register_buffer("load", torch.zeros(num_experts))  # tokens since the last step

    def check_top_k(self, top_k: int) -> None:
        """The chosen groups must hold K experts."""
        super().check_top_k(top_k)
        if top_k > self._reachable:
            raise ValueError(
                f"top_groups leave {self._reachable} experts to choose from, fewer than top_k={top_k}; raise "
                "top_groups, or lower num_groups or top_k"
            )

    @property
    def rule(self) -> WeightRule:
        """Weights sum to `routed_scaling`."""
        return "sum" if self.weights == "native" and self.routed_scaling == 1 else super().rule

    def scores(self, logits: Tensor) -> Tensor:
        """Each on its own."""
        return torch.sigmoid(logits)

    def select(self, scores: Tensor) -> Tensor:
        """By score and bias, within the best groups."""
        biased = scores + self.bias.to(scores.dtype)
        if self.top_groups < self.num_groups:
            groups = biased.unflatten(1, (self.num_groups, -1))  # [T, G, E / G]
            best = groups.topk(min(2, groups.shape[2]), dim=-1).values.sum(-1).topk(self.top_groups, dim=-1).indices
            allowed = torch.zeros_like(groups[:, :, 0], dtype=torch.bool).scatter(1, best, True)  # [T, G]
            # -inf, not 0: biased scores may be negative.
            biased = groups.masked_fill(~allowed.unsqueeze(-1), -torch.inf).flatten(1)
        return torch.topk(biased, self.top_k, dim=-1).indices

    def weigh(self, scores: Tensor, expert_ids: Tensor) -> Tensor:
        """Without the bias."""
        chosen = chosen_scores(scores, expert_ids)
        return chosen / (chosen.sum(-1, keepdim=True) + 1e-20) * self.routed_scaling

    def add_losses(self, logits: Tensor, scores: Tensor, expert_ids: Tensor, weights: Tensor) -> None:
        """The complementary balance loss, on scores that sum to 1; and the loads for `after_step`."""
        self.losses["balance"] = balance_loss(scores / (scores.sum(-1, keepdim=True) + 1e-20), expert_ids)
        with torch.no_grad():
            self.load += count_tokens(expert_ids, self.num_experts).to(self.load.dtype)

    @torch.no_grad()
    def after_step(self) -> None:
        """Move the bias, and count anew."""
        self.bias += self.bias_rate * torch.sign(self.load.mean() - self.load)
        self.load.zero_()

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> DeepSeekV3Router:
        """Steps of 1e-3 vanish in bf16, and counts in fp16: a cast of the model leaves both buffers in fp32."""
        before = (self.bias, self.load)
        super()._apply(fn, recurse)
        kept = [
            old.to(new.device) if new.dtype in (torch.float16, torch.bfloat16) else new
            for old, new in zip(before, (self.bias, self.load), strict=True)
        ]
        self.bias, self.load = kept
        return self
