"""`sparsify.kernels.layout` against counting by hand."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from sparsify.kernels.layout import make_layout, max_tiles

SYNCHRONISING = ("nonzero", "bincount", "_local_scalar_dense", "item", "unique", "masked_select", "repeat_interleave")


@pytest.mark.parametrize("block_m", [16, 64])
@pytest.mark.parametrize(("tokens", "top_k", "experts"), [(1, 1, 1), (5, 1, 3), (37, 2, 5), (64, 3, 3), (130, 2, 7)])
def test_every_pair_is_in_one_tile_of_its_expert(tokens, top_k, experts, block_m, device):
    """Protects: the order is stable, unused pairs come last, and tiles cover the rows of each expert once."""
    ids = torch.randint(-1, experts, (tokens, top_k), device=device)
    layout = make_layout(ids, experts, block_m)
    flat = ids.flatten().tolist()
    expected = sorted(range(len(flat)), key=lambda pair: (flat[pair] if flat[pair] >= 0 else experts, pair))
    assert layout.order.tolist() == expected
    assert [expected[position] for position in layout.inverse.tolist()] == list(range(len(flat)))
    assert layout.offsets.tolist() == [sum(0 <= e < bound for e in flat) for bound in range(experts + 1)]
    rows = []
    for tile in range(int(layout.n_tiles)):
        e, start = int(layout.tile_expert[tile]), int(layout.tile_start[tile])
        end = min(start + block_m, int(layout.offsets[e + 1]))
        assert start < end
        rows += [(e, row) for row in range(start, end)]
    assert rows == [(flat[expected[row]], row) for row in range(int(layout.offsets[-1]))]
    assert layout.tile_expert.min() >= 0
    assert layout.tile_expert.max() < experts


@pytest.mark.parametrize("ids", [[[-1], [-1]], [[2], [2]], [[7], [0]]])
def test_odd_routings(ids, device):
    """Protects: no expert at all, all on one, an id that is too large counts as none."""
    layout = make_layout(torch.tensor(ids, device=device), 3, 16)
    valid = [e for [e] in ids if 0 <= e < 3]
    assert int(layout.offsets[-1]) == len(valid)
    assert int(layout.n_tiles) == len(set(valid))


def test_max_tiles_is_enough_and_no_more():
    """Protects: the bound is reached by some routing and passed by none, for every small case."""
    for pairs, experts, block_m in itertools.product(range(1, 8), range(1, 5), (1, 2, 3)):
        needed = max(
            sum(-(-n // block_m) for n in counts)
            for counts in itertools.product(range(pairs + 1), repeat=experts)
            if sum(counts) == pairs
        )
        assert max_tiles(pairs, experts, block_m) == needed


def test_reads_nothing_back():
    """Protects: a CUDA graph can hold it, as no op's result has a size that depends on data."""
    called = set()

    class Record(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            called.add(func.__name__)
            return func(*args, **(kwargs or {}))

    with Record():
        make_layout(torch.randint(-1, 3, (9, 2)), 3, 16)
    assert called
    assert not [name for name in called if name.startswith(SYNCHRONISING)]
