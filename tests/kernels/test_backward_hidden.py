"""`sparsify.kernels.backward_hidden` by itself: what the op does not show."""

from __future__ import annotations

import pytest
import torch

from sparsify.kernels.backward_hidden import hidden_grads
from sparsify.kernels.layout import make_layout
from sparsify.kernels.tiles import row_tile


@pytest.mark.parametrize("in_place", [False, True])
def test_partial_sums_and_gradients_in_place(in_place, device):
    """Protects: parts of dr add up over column tiles; without `in_place` z is left alone."""
    ids = torch.randint(-1, 3, (40, 2), device=device)
    r, grad = torch.rand(40, 2, device=device), torch.randn(40, 21, device=device)
    down, z = torch.randn(3, 21, 150, device=device), torch.randn(80, 150, device=device)
    tile = row_tile(20, 4, 99 * 1024, accumulators=2)
    layout = make_layout(ids, 3, tile.rows)
    parts = torch.empty(-(-150 // tile.cols), 80, device=device)
    before = z.clone()
    hidden_grads(grad, layout, r, down, z, None, "relu", tile, in_place=in_place, partial_dr=parts)
    assert len(parts) > 1
    used = int(layout.offsets[-1])
    pairs = layout.order[:used].long()
    d_hidden = torch.einsum("pd,pdi->pi", grad[pairs // 2], down[ids.flatten()[pairs]])
    dr = (d_hidden * before[:used].relu()).sum(1)
    torch.testing.assert_close(parts.sum(0)[pairs], dr, rtol=1e-5, atol=1e-4)
    expected = d_hidden * r.flatten()[pairs, None] * (before[:used] > 0) if in_place else before[:used]
    torch.testing.assert_close(z[:used], expected, rtol=1e-5, atol=1e-5)
    assert torch.equal(z[used:], before[used:])
