"""`sparsify::expert_linear` by itself."""

from __future__ import annotations

import pytest
import torch

from sparsify import ops


@pytest.mark.parametrize("biased", [True, False])
@pytest.mark.parametrize("offsets", [[0, 2, 2, 5], [0, 0, 0, 0], [0, 3, 5, 7]])
def test_opcheck(biased: bool, offsets: list[int]) -> None:
    """Protects: schema, fake kernel and autograd registration, with empty experts and rows that nobody owns."""
    rows, weight = torch.randn(7, 4, requires_grad=True), torch.randn(3, 5, 4, requires_grad=True)
    bias = torch.randn(3, 5, requires_grad=True) if biased else None
    op = torch.ops.sparsify.expert_linear.default
    torch.library.opcheck(op, (rows, weight, bias, torch.tensor(offsets, dtype=torch.int32)))


def test_rows_that_nobody_owns_are_zero() -> None:
    """Protects: unused slots add nothing in combine, whatever the bias."""
    offsets = torch.tensor([0, 1, 2], dtype=torch.int32)
    y = ops.expert_linear(torch.full((4, 3), float("nan")), torch.randn(2, 5, 3), torch.randn(2, 5), offsets)
    assert torch.equal(y[2:], torch.zeros(2, 5))


def test_computes_only_the_rows_of_an_expert() -> None:
    """Protects: skipped experts are not computed and masked; one with NaN weights and no rows leaves no trace."""
    weight = torch.randn(3, 5, 4)
    weight[1] = float("nan")
    offsets = torch.tensor([0, 2, 2, 3], dtype=torch.int32)
    assert torch.isfinite(ops.expert_linear(torch.randn(3, 4), weight, None, offsets)).all()
