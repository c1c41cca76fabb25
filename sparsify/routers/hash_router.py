"""Hash layers (arXiv 2106.04426): a fixed table from token ids to experts. T tokens, E num_experts."""

from __future__ import annotations

import heapq

import torch
from torch import Tensor

from sparsify.routers.base import System, WeightRule, require_one
from sparsify.routers.id_routers import IdRouter

_SEED = 42


class HashRouter(IdRouter):
    """One expert with weight 1, `table[id]`. Nothing is learned, and the context plays no part.

    The table is random; a balanced one gives frequent ids, one after the other, to the expert with the fewest tokens.
    """

    system = System(
        name="hash",
        paper="Hash Layers For Large Sparse Models (arXiv 2106.04426)",
        mechanism="one expert by a fixed table of token ids, random or balanced by their frequency; weight 1",
        export_form="table",
        needs=("ids",),
    )
    default_top_k = 1
    table: Tensor

    def __init__(
        self, hidden_size: int, num_experts: int, top_k: int, num_ids: int = 0, balanced: bool = False
    ) -> None:
        """Draw the table, the same one in every layer.

        Args:
            top_k: 1.
            num_ids: size of the table. The conversion takes that of the embedding that reads the ids.
            balanced: have the conversion balance the table by the ids of the calibration data.
        """
        super().__init__(hidden_size, num_experts, top_k)
        self.num_ids = num_ids
        self.balanced = balanced
        drawn = torch.randint(num_experts, (num_ids,), generator=torch.Generator().manual_seed(_SEED), device="cpu")
        self.register_buffer("table", drawn)

    def check_top_k(self, top_k: int) -> None:
        """One expert a token."""
        super().check_top_k(top_k)
        require_one(self.system.name, top_k)

    @property
    def rule(self) -> WeightRule:
        """A single weight of 1."""
        return "one"

    def route_by_id(self, x: Tensor, ids: Tensor) -> tuple[Tensor, Tensor]:
        """One slot."""
        self.check_ids(ids)
        experts = self.table.index_select(0, ids).unsqueeze(-1)
        return torch.ones_like(experts, dtype=x.dtype), experts

    def fit_ids(self, ids: Tensor) -> None:
        """Balance the table if it is to be."""
        self.check_ids(ids)
        if self.balanced:
            self.balance(torch.bincount(ids, minlength=self.num_ids))

    def balance(self, counts: Tensor) -> None:
        """Make the table anew for ids that occur `counts` `[num_ids]` times; ties go to the lower expert."""
        loads = [(0, expert) for expert in range(self.num_experts)]
        order = torch.argsort(counts, descending=True, stable=True).tolist()
        amounts = counts.tolist()
        for index in order:
            load, expert = loads[0]
            self.table[index] = expert
            # Ids that never occurred are dealt out too, as if each occurred a little.
            heapq.heapreplace(loads, (load + amounts[index] * len(amounts) + 1, expert))
