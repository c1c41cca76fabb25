"""`sparsify.kernels.down` by itself: what the op does not show."""

from __future__ import annotations

import torch

from sparsify.kernels.down import down_rows
from sparsify.kernels.layout import make_layout
from sparsify.kernels.tiles import row_tile


def test_two_products_in_one_sum(device):
    """Protects: the gradient of the input of a gated FFN, transposed weights; unwritten rows are not read."""
    ids = torch.randint(-1, 3, (41, 2), device=device)
    tile = row_tile(20, 4, 99 * 1024)
    layout = make_layout(ids, 3, tile.rows)
    rows, more = torch.randn(82, 29, device=device), torch.randn(82, 29, device=device)
    weight, more_weight = torch.randn(3, 29, 31, device=device), torch.randn(3, 29, 31, device=device)
    out = torch.empty(82, 31, device=device)
    used = int(layout.offsets[-1])
    rows[used:] = more[used:] = torch.nan
    down_rows(rows, layout, weight.transpose(1, 2), tile, out, more_rows=more, more_weight=more_weight.transpose(1, 2))
    experts = ids.flatten()[layout.order[:used].long()]
    expected = torch.einsum("pi,pid->pd", rows[:used], weight[experts])
    expected += torch.einsum("pi,pid->pd", more[:used], more_weight[experts])
    torch.testing.assert_close(out[:used], expected, rtol=1e-5, atol=1e-5)
    assert out[used:].isnan().all()


def test_final_rows_are_written_at_their_pairs(device):
    """Protects: K = 1, where weight and bias are applied at once and nothing is gathered."""
    ids = torch.tensor([[1], [-1], [0], [1]], device=device)
    tile = row_tile(2, 4, 99 * 1024)
    layout = make_layout(ids, 2, tile.rows)
    rows, weight = torch.randn(4, 5, device=device), torch.randn(2, 3, 5, device=device)
    r, bias, out = torch.rand(4, 1, device=device), torch.randn(2, 3, device=device), torch.zeros(4, 3, device=device)
    down_rows(rows, layout, weight, tile, out, row_weights=r, bias=bias)
    sorted_pairs = [2, 0, 3]
    for position, pair in enumerate(sorted_pairs):
        e = int(ids[pair])
        torch.testing.assert_close(out[pair], r[pair] * (weight[e] @ rows[position] + bias[e]), rtol=1e-5, atol=1e-5)
    assert not out[1].any()
