"""`TopKRouter` against loops in fp64."""

from __future__ import annotations

import math

import pytest
import torch

from sparsify.routers import TopKRouter


@pytest.mark.parametrize("num_tokens", [0, 1, 13])
@pytest.mark.parametrize("top_k", [1, 2, 5])
def test_softmax_of_the_largest(num_tokens: int, top_k: int) -> None:
    """Protects: weights are the softmax over the chosen logits, as in Mixtral."""
    router, x = TopKRouter(7, 5, top_k), torch.randn(num_tokens, 7)
    weights, ids = router(x)
    for token in range(num_tokens):
        logits = [float(row @ x[token].double()) for row in router.weight.detach().double()]
        chosen = sorted(range(5), key=lambda e: -logits[e])[:top_k]
        total = sum(math.exp(logits[e]) for e in chosen)
        assert ids[token].tolist() == chosen
        torch.testing.assert_close(
            weights[token].detach().double(),
            torch.tensor([math.exp(logits[e]) / total for e in chosen], dtype=torch.float64),
            rtol=1e-5,
            atol=1e-6,
        )


def test_fit_finds_linear_scores() -> None:
    """Protects: experts that differ are chosen by what they contribute from the start."""
    torch.manual_seed(0)
    x, true = torch.randn(500, 12), torch.randn(6, 12)
    router = TopKRouter(12, 6, 2)
    router.fit(x, x @ true.t() + 3)
    assert torch.equal(router(x)[1][:, 0], (x @ true.t()).argmax(-1))
