"""What every router is: a module that maps tokens to the experts that run for them.

T tokens, D hidden_size, E num_experts, K top_k.
"""

from __future__ import annotations

import abc

import torch
from torch import Tensor, nn


class Router(nn.Module, abc.ABC):
    """Choose `top_k` of `num_experts` experts for every token.

    A subclass defines `logits`; the K experts of the largest logits run, each with routing weight 1, which is what a
    split FFN needs: its experts are disjoint parts of one sum. Logits are computed in the dtype of the router's own
    weights (fp32 unless the user casts the model), whatever the dtype of the tokens.
    """

    def __init__(self, num_experts: int, top_k: int) -> None:
        super().__init__()
        self.num_experts = num_experts
        self.top_k = top_k

    @abc.abstractmethod
    def logits(self, x: Tensor) -> Tensor:
        """Score the experts: `[T, D]` to `[T, E]`, in the dtype of the router's weights."""

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Route `x` `[T, D]`.

        Returns:
            routing_weights: `[T, K]`, dtype of `x`, all one.
            expert_ids: `[T, K]` int64, by falling logit.
        """
        if torch.is_autocast_enabled(x.device.type):  # rounded logits would choose other experts
            with torch.autocast(x.device.type, enabled=False):
                return self.forward(x)
        expert_ids = torch.topk(self.logits(x), self.top_k, dim=-1).indices
        return torch.ones_like(expert_ids, dtype=x.dtype), expert_ids

    def extra_repr(self) -> str:
        """What `print` shows."""
        return f"num_experts={self.num_experts}, top_k={self.top_k}"
