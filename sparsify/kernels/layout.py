"""Which rows each program of the expert kernels works on, as arrays of static size on the device.

T tokens, E num_experts, K top_k, P = T * K pairs of a token and a slot, BM rows of a tile. A pair is the number
`token * K + slot`. Pairs are sorted by expert, those without one last, and the rows of each expert are cut into tiles
of BM. How many tiles that are depends on the routing; arrays have the largest number there can be, so that nothing is
read back to the host and a CUDA graph can hold it.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Layout:
    """Pairs sorted by expert, cut into tiles. All arrays are int32."""

    order: Tensor
    """`[P]`: sorted position to pair."""
    inverse: Tensor
    """`[P]`: pair to sorted position."""
    offsets: Tensor
    """`[E + 1]`: first sorted position of each expert; from the last entry on rows belong to none and are unwritten."""
    tile_expert: Tensor
    """`[max_tiles]`: expert of each tile; of tiles from `n_tiles` on any in `[0, E)`."""
    tile_start: Tensor
    """`[max_tiles]`: first sorted position of each tile."""
    n_tiles: Tensor
    """`[1]`: how many tiles there are."""

    @property
    def max_tiles(self) -> int:
        """Number of tiles that programs must be started for."""
        return self.tile_expert.shape[0]


def max_tiles(num_pairs: int, num_experts: int, block_m: int) -> int:
    """The least number of tiles that suffices for every routing.

    At most `A = min(E, P)` experts have rows, and each has at most one tile that is not full: with `n` rows it has
    at most `(n + BM - 1) / BM` tiles, together `(P + A (BM - 1)) / BM`, and no tile is empty.
    """
    active = min(num_experts, num_pairs)
    return min(num_pairs, (num_pairs + active * (block_m - 1)) // block_m)


def make_layout(expert_ids: Tensor, num_experts: int, block_m: int) -> Layout:
    """Sort the pairs by expert and cut them into tiles, without a synchronisation.

    Args:
        expert_ids: `[T, K]` int64; what is not in `[0, E)` is a slot that is not used.
        num_experts: E, at least 1.
        block_m: BM.
    """
    device, num_pairs = expert_ids.device, expert_ids.numel()
    ids = expert_ids.reshape(-1)
    experts = torch.where(ids < 0, num_experts, ids).to(torch.int32)  # [P]
    by_expert, order = torch.sort(experts, stable=True)
    positions = torch.arange(num_pairs, dtype=torch.int32, device=device)
    inverse = torch.empty_like(positions).scatter_(0, order, positions)
    # bincount reads its result's size back, histc adds with atomics; the array is sorted already.
    bounds = torch.arange(num_experts + 1, dtype=torch.int32, device=device)
    offsets = torch.searchsorted(by_expert, bounds, out_int32=True)  # [E + 1]
    tiles = (offsets.diff() + (block_m - 1)) // block_m  # [E]
    ends = tiles.cumsum(0, dtype=torch.int32)
    tile_ids = torch.arange(max_tiles(num_pairs, num_experts, block_m), dtype=torch.int32, device=device)
    tile_expert = torch.searchsorted(ends, tile_ids, right=True, out_int32=True).clamp_(max=num_experts - 1)
    tile_start = offsets[tile_expert] + (tile_ids - (ends - tiles)[tile_expert]) * block_m
    return Layout(order.to(torch.int32), inverse, offsets, tile_expert, tile_start, ends[-1:])
