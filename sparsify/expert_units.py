"""Experts of different widths: each is some of the equal parts, called units, of one bank of weights.

    expert 0 = units 0 .. sizes[0] - 1,   expert 1 = the next sizes[1] units,   ...

A router chooses experts; dispatch, products and combine work on the units of those experts, each with the weight of its
expert. So the kernels know nothing of widths, and the multiply-adds of T tokens are `sum_e n_e cost(width_e)`.
T tokens, E experts, K slots of a token, M units of the widest expert.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn


class ExpertUnits(nn.Module):
    """From experts to their units."""

    table: Tensor  # [E + 1, M]: the units of every expert, -1 behind the last; none for the last row

    def __init__(self, sizes: Sequence[int]) -> None:
        """Lay the experts one behind the other.

        Args:
            sizes: units of each expert, at least 1.
        """
        super().__init__()
        if not sizes or min(sizes) < 1:
            raise ValueError(f"every expert needs at least one unit, got {list(sizes)}")
        self.sizes = tuple(sizes)
        counts, places = torch.tensor([*sizes, 0]).unsqueeze(1), torch.arange(max(sizes))
        table = torch.where(places < counts, counts.cumsum(0) - counts + places, -1)
        self.register_buffer("table", table, persistent=False)

    @property
    def num_units(self) -> int:
        """Of all experts."""
        return sum(self.sizes)

    def of(self, experts: Sequence[int]) -> list[int]:
        """The units of some experts, in their order."""
        return [unit for expert in experts for unit in range(sum(self.sizes[:expert]), sum(self.sizes[: expert + 1]))]

    def forward(self, routing_weights: Tensor, expert_ids: Tensor) -> tuple[Tensor, Tensor]:
        """Give every expert M slots, of which it uses as many as it has units.

        Args:
            routing_weights: `[T, K]`.
            expert_ids: `[T, K]` int64 in `[-1, E)`; -1 is a slot that is not used.

        Returns:
            Weights of units `[T, K * M]`, 0 where not used; ids of units `[T, K * M]`, -1 where not used.
        """
        most = self.table.shape[1]
        rows = torch.where(expert_ids < 0, len(self.sizes), expert_ids).flatten()
        unit_ids = self.table.index_select(0, rows).view(-1, expert_ids.shape[1] * most)
        return torch.repeat_interleave(routing_weights, most, dim=1) * (unit_ids >= 0), unit_ids

    def extra_repr(self) -> str:
        """What `print` shows."""
        return f"sizes={list(self.sizes)}"


def units_of_widths(widths: Sequence[int]) -> tuple[int, tuple[int, ...]]:
    """The largest unit that the widths are multiples of, and how many each expert has.

    Args:
        widths: neurons of each expert, at least 1; at least one expert.
    """
    unit = math.gcd(*widths)
    return unit, tuple(width // unit for width in widths)
