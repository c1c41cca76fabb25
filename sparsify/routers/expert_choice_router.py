"""Expert choice (arXiv 2202.09368): every expert takes the C tokens of a group that score highest with it.

    scores = softmax over experts of x W^T,      C = ceil(S K / E)

S tokens of a group, E num_experts, K the mean number of experts of a token. A token has as many experts as chose it,
from none to E.
"""

from __future__ import annotations

import torch
from torch import Tensor

from sparsify.routers.base import System, where_used
from sparsify.routers.group_routers import GroupRouter, as_groups, distance, largest, linear, small_weight


class ExpertChoiceRouter(GroupRouter):
    """Loads are equal by construction, at the price of looking at all tokens of the group."""

    system = System(
        name="expert-choice",
        paper="Mixture-of-Experts with Expert Choice Routing (arXiv 2202.09368)",
        mechanism="every expert takes the C = S K / E best tokens of a sequence of S (of the call, without sequences)",
        export_form="top-tokens",
    )

    def __init__(self, hidden_size: int, num_experts: int, top_k: int) -> None:
        super().__init__(hidden_size, num_experts, top_k)
        self.weight = small_weight(num_experts, hidden_size)

    def check_group(self, tokens: int) -> None:
        """An expert takes at least one token."""
        if tokens * self.top_k < self.num_experts:
            raise ValueError(
                f"with groups of {tokens} tokens each of {self.num_experts} experts would take {tokens} * "
                f"{self.top_k} / {self.num_experts} tokens, less than one; use fewer experts, a larger top_k, or "
                "longer example sequences"
            )

    @property
    def num_slots(self) -> int:
        """E: how many are used differs from token to token."""
        return self.num_experts

    def _capacity(self, x: Tensor) -> int:
        return (x.shape[1] * self.top_k + self.num_experts - 1) // self.num_experts

    def margins(self, x: Tensor) -> Tensor:
        """Over all experts."""
        x = as_groups(x)
        scores = torch.softmax(linear(x, self.weight), dim=-1)
        distances = distance(scores.transpose(1, 2).flatten(0, 1), self._capacity(x))  # [G*E, S]
        return distances.view(x.shape[0], self.num_experts, -1).amin(1).flatten()

    def route_groups(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Slot e is expert e."""
        scores = torch.softmax(linear(x, self.weight), dim=-1)  # [G, S, E]
        chosen = largest(scores.transpose(1, 2).flatten(0, 1), self._capacity(x))  # [G*E, S]
        chosen = chosen.view(x.shape[0], self.num_experts, x.shape[1]).transpose(1, 2)
        return where_used(scores.reshape(-1, self.num_experts), chosen.reshape(-1, self.num_experts))
