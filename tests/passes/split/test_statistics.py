"""`measure_neurons`, `importance`."""

from __future__ import annotations

import torch

from sparsify.passes.split.dense_ffn import DenseFFN
from sparsify.passes.split.statistics import chunks, importance, measure_neurons


def test_mean_and_variance_over_chunks(dense: DenseFFN) -> None:
    """Protects: sums over several chunks, the last one short, give the moments of all tokens."""
    x = torch.randn(4096 + 37, 7)
    hidden = dense.hidden(x).double()
    statistics = measure_neurons(dense, x)
    torch.testing.assert_close(statistics.mean, hidden.mean(0), rtol=1e-6, atol=1e-8)
    torch.testing.assert_close(statistics.variance, hidden.var(0, correction=0), rtol=1e-5, atol=1e-8)
    norms = dense.down.weight.double().norm(dim=0)
    torch.testing.assert_close(importance(dense, statistics), statistics.variance * norms**2)


def test_no_tokens_give_no_chunks() -> None:
    """Protects: T = 0."""
    assert list(chunks(torch.empty(0, 7))) == []
