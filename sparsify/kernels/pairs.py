"""The (token, slot) pairs of a batch sorted by expert: one sort instead of a scan for each."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class SortedPairs(NamedTuple):
    """Pairs `t * K + k` in the order of their experts, those of an unused slot left out.

    Attributes:
        pairs: `[n]` int64.
        tokens: `[n]` int64.
        counts: pairs of every expert.
        unused: how many slots hold -1.
    """

    pairs: Tensor
    tokens: Tensor
    counts: list[int]
    unused: int


def sort_pairs(expert_ids: Tensor, num_experts: int) -> SortedPairs:
    """Group the pairs of `expert_ids` `[T, K]`; a stable sort, so the order is the same every time.

    Raises:
        IndexError: an id is not below `num_experts`.
    """
    flat = expert_ids.reshape(-1)
    unused, *counts = torch.bincount(flat + 1, minlength=num_experts + 1).tolist()
    if len(counts) > num_experts:
        raise IndexError(f"expert_ids must lie in [-1, {num_experts}), got {len(counts) - 1}")
    pairs = flat.argsort(stable=True)[unused:]
    return SortedPairs(pairs, pairs // max(expert_ids.shape[1], 1), counts, unused)
