"""`sparsify.kernels.combine` by itself."""

from __future__ import annotations

import torch

from sparsify.kernels.combine import combine_rows


def test_rows_of_unused_slots_are_not_read(device):
    """Protects: 0 * NaN is NaN, so such rows are left out, and weights of such slots with them."""
    rows = torch.tensor([[1.0, 2.0], [torch.nan, torch.nan], [3.0, 5.0], [torch.nan, torch.nan]], device=device)
    ids = torch.tensor([[0, -1], [7, 1]], device=device)
    inverse = torch.tensor([0, 1, 3, 2], dtype=torch.int32, device=device)
    weights = torch.tensor([[2.0, torch.nan], [torch.nan, 0.5]], device=device)
    bias = torch.tensor([[0.0, 1.0], [1.0, 0.0]], device=device)
    out = torch.empty(2, 2, device=device)
    combine_rows(rows, ids, 2, out, inverse=inverse, routing_weights=weights, bias=bias)
    torch.testing.assert_close(out, torch.tensor([[2.0, 6.0], [2.0, 2.5]], device=device))


def test_adds_in_fp32_in_the_order_of_slots(device):
    """Protects: fp16 sums one by one would stay at 1, and another order would round otherwise."""
    rows = torch.full((65, 1), 2.0**-12, dtype=torch.float16, device=device)
    rows[0] = 1.0
    ids = torch.zeros(1, 65, dtype=torch.int64, device=device)
    out = torch.empty(1, 1, device=device)
    combine_rows(rows, ids, 1, out)
    assert out.item() == 1 + 64 * 2.0**-12


def test_columns_beyond_one_block(device):
    """Protects: the grid covers wide rows, and the last block is masked."""
    rows = torch.randn(4, 1031, device=device)
    out = torch.empty(2, 1031, device=device)
    combine_rows(rows, torch.zeros(2, 2, dtype=torch.int64, device=device), 1, out)
    torch.testing.assert_close(out, rows.view(2, 2, -1).sum(1))
