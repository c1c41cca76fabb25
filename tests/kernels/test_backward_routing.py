"""`sparsify.kernels.backward_routing` by itself."""

from __future__ import annotations

import pytest
import torch

from sparsify.kernels.backward_routing import routing_grad


@pytest.mark.parametrize("bias", [False, True])
def test_adds_parts_and_the_bias(bias, device):
    """Protects: unused slots are 0 whatever their parts hold; features beyond one block; the weights' dtype."""
    ids = torch.randint(-1, 3, (9, 3), device=device)
    ids[0, 0] = 3
    parts, grad = torch.randn(5, 27, device=device), torch.randn(9, 150, device=device)
    used = ((ids >= 0) & (ids < 3)).flatten()
    parts[:, ~used] = torch.nan
    down_bias = torch.randn(3, 150, device=device)
    found = routing_grad(parts, ids, 3, grad, down_bias if bias else None, torch.float64)
    expected = torch.where(used, parts.sum(0), 0.0).view(9, 3)
    if bias:
        inner = (grad[:, None] * down_bias[ids.clamp(0, 2)]).sum(-1)
        expected += torch.where(used.view(9, 3), inner, 0.0)
    assert found.dtype == torch.float64
    torch.testing.assert_close(found.float(), expected, rtol=1e-5, atol=1e-4)
