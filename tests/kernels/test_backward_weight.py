"""`sparsify.kernels.backward_weight` by itself."""

from __future__ import annotations

import pytest
import torch

from sparsify.kernels.backward_weight import bias_grad, weight_grad
from sparsify.kernels.layout import make_layout
from sparsify.kernels.tiles import weight_grad_tile


@pytest.mark.parametrize("m", [4, 40, 400])
@pytest.mark.parametrize("by_token", ["a", "b"])
def test_sums_over_the_rows_of_each_expert(by_token, m, device):
    """Protects: either operand by token, every tile, zeros for experts 0 and 3, which have no rows."""
    ids = torch.randint(1, 3, (53, 2), device=device)
    ids[5] = -1
    layout = make_layout(ids, 4, 16)
    tokens, rows = torch.randn(53, 70, device=device), torch.randn(106, 131, device=device)
    a, b = (tokens, rows) if by_token == "a" else (rows, tokens)
    found = weight_grad(
        a, b, layout, 2, weight_grad_tile(m, 4, 99 * 1024), a_by_token=by_token == "a", b_by_token=by_token == "b"
    )
    pairs = layout.order[: int(layout.offsets[-1])].long()
    experts = ids.flatten()[pairs]
    for e in range(4):
        here = (experts == e).nonzero().flatten()
        expected = tokens[pairs[here] // 2].T @ rows[here]
        torch.testing.assert_close(found[e], expected if by_token == "a" else expected.T, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("weighted", [False, True])
def test_sums_of_rows(weighted, device):
    """Protects: the biases' gradients, by position or by token with the routing weight."""
    ids = torch.randint(-1, 2, (70, 2), device=device)
    layout = make_layout(ids, 3, 16)
    r, rows = torch.rand(70, 2, device=device), torch.randn(70 if weighted else 140, 67, device=device)
    found = bias_grad(rows, layout, routing_weights=r if weighted else None)
    pairs = layout.order[: int(layout.offsets[-1])].long()
    used = r.flatten()[pairs, None] * rows[pairs // 2] if weighted else rows[: len(pairs)]
    expected = torch.zeros(3, 67, device=device).index_add_(0, ids.flatten()[pairs], used)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
