"""`fold_mean`: still exact with every expert on, and the mean stands in for what is skipped."""

from __future__ import annotations

import torch

from sparsify.passes.split.dense_ffn import DenseFFN
from sparsify.passes.split.experts import divide
from sparsify.passes.split.fold_mean import fold_mean


def test_algebra(dense: DenseFFN) -> None:
    """Protects: both lines of the derivation."""
    neurons, x = torch.randperm(24).view(4, 6), torch.randn(9, 7)
    mean = dense.hidden(x).mean(0)
    experts = fold_mean(divide(dense, neurons, 1), mean[neurons][1:])
    torch.testing.assert_close(experts(x, torch.arange(3).expand(9, -1)), dense(x), rtol=1e-5, atol=1e-6)
    selected = torch.tensor([2]).expand(9, 1)
    hidden = dense.hidden(x)
    skipped = neurons[1:3].flatten()
    hidden[:, skipped] = mean[skipped]
    torch.testing.assert_close(experts(x, selected), dense.down(hidden), rtol=1e-5, atol=1e-6)
