"""Soft MoE (arXiv 2308.00951): experts run on mixtures of the tokens of a sequence, and tokens get mixtures of those.

    logits = scale <x / |x|, phi / |phi|>                          [S, n],   n = E p slots, p for each expert
    slots  = softmax over tokens (logits)^T x                      [n, D]
    y      = softmax over slots (logits) E(slots)                  [S, D_out]

G groups of S tokens, D hidden_size, E num_experts. Nothing is dropped, no balance loss is needed, and the compute
depends on the number of slots alone.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from sparsify.routers.base import System, wide
from sparsify.routers.group_routers import GroupRouter, as_groups

_EPSILON = 1e-6


class SoftMoERouter(GroupRouter):
    """Makes the slots and the weights that bring them back. `top_k` is p, the slots of an expert."""

    mixes = True
    system = System(
        name="soft-moe",
        paper="From Sparse to Soft Mixtures of Experts (arXiv 2308.00951)",
        mechanism="experts read K slots each, soft mixtures of the tokens of a sequence; tokens read mixtures of slots",
        export_form="mixing",
    )
    default_top_k = 1

    def __init__(self, hidden_size: int, num_experts: int, top_k: int) -> None:
        super().__init__(hidden_size, num_experts, top_k)
        self.phi = nn.Parameter(torch.randn(hidden_size, num_experts * top_k) / hidden_size**0.5)
        self.scale = nn.Parameter(torch.ones(()))

    def check_top_k(self, top_k: int) -> None:
        """The slots have weights of their own, so their number stays."""
        if top_k < 1 or top_k != self.top_k:
            raise ValueError(f"the router 'soft-moe' has {self.top_k} slots for each expert, got top_k={top_k}")

    @property
    def num_slots(self) -> int:
        """What runs is a slot, with one expert."""
        return 1

    def mixtures(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """`x` `[G, S, D]` -> dispatch and combine weights, `[G, S, n]` each, fp32."""
        tokens, phi = wide(x), wide(self.phi).to(wide(x).dtype)
        tokens = tokens / (tokens.norm(dim=-1, keepdim=True) + _EPSILON)
        phi = phi / (phi.norm(dim=0, keepdim=True) + _EPSILON)
        logits = wide(self.scale).to(phi.dtype) * (tokens @ phi)
        return torch.softmax(logits, dim=1), torch.softmax(logits, dim=2)

    def margins(self, x: Tensor) -> Tensor:
        """One for each slot, whose expert is fixed."""
        return x.new_full((len(as_groups(x)) * self.num_experts * self.top_k,), torch.inf)

    def forward(self, x: Tensor, ids: Tensor | None = None) -> tuple[Tensor, ...]:
        """Mix.

        Args:
            x: `[G, .., D]`; `[S, D]` is one group.
            ids: not read.

        Returns:
            routing_weights: `[G*n, 1]`, ones: a slot has one expert.
            expert_ids: `[G*n, 1]` int64, the expert of each slot.
            slots: `[G*n, D]`, what the experts read in the place of tokens.
            combine_weights: `[G, S, n]`, what each token takes of the slots of its group.
        """
        if torch.is_autocast_enabled(x.device.type):
            with torch.autocast(x.device.type, enabled=False):
                return self.forward(x)
        x = as_groups(x)
        dispatch_weights, combine_weights = self.mixtures(x)
        slots = (dispatch_weights.transpose(1, 2) @ wide(x)).to(x.dtype).flatten(0, 1)
        routing_weights, expert_ids = self.route_groups(x)
        return routing_weights, expert_ids, slots, combine_weights.to(x.dtype)

    def route_groups(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Slots belong to experts in turn, p to each."""
        experts = torch.arange(self.num_experts, device=x.device).repeat_interleave(self.top_k)
        ids = experts.expand(x.shape[0], -1).reshape(-1, 1)
        return torch.ones_like(ids, dtype=x.dtype), ids
