"""`XMoERouter`: cosine logits against loops in fp64, blind to the length of a token."""

from __future__ import annotations

import math

import pytest
import torch

from sparsify.routers.x_moe_router import XMoERouter


def make() -> XMoERouter:
    torch.manual_seed(0)
    return XMoERouter(6, 5, 2, projected_size=3).double().eval()


def test_cosines() -> None:
    """Protects: `cos(P x, m_e) exp(t)`, t = log 2 at first, and weights that sum to 1 over the K largest."""
    router, x = make(), torch.randn(13, 6, dtype=torch.float64)
    logits = router.logits(x)
    weights, ids = router(x)
    for t in range(13):
        projected = [float(row @ x[t]) for row in router.projection.detach()]
        expected = []
        for row in router.embeddings.detach().tolist():
            product = sum(a * b for a, b in zip(projected, row, strict=True))
            expected.append(2 * product / (math.hypot(*projected) * math.hypot(*row)))
        assert logits[t].tolist() == pytest.approx(expected, rel=1e-6)  # log 2 was stored in fp32
        chosen = sorted(range(5), key=lambda e: -expected[e])[:2]
        total = sum(math.exp(expected[e]) for e in chosen)
        assert ids[t].tolist() == chosen
        assert weights[t].tolist() == pytest.approx([math.exp(expected[e]) / total for e in chosen], rel=1e-6)


def test_length_does_not_matter() -> None:
    """Protects: `x -> a x`, a > 0 leaves the logits as they are; and a token of zeros is no NaN."""
    router, x = make(), torch.randn(13, 6, dtype=torch.float64)
    torch.testing.assert_close(router.logits(7 * x), router.logits(x), rtol=1e-12, atol=1e-12)
    assert router.logits(torch.zeros(1, 6)).eq(0).all()


def test_the_scale_is_clamped() -> None:
    """Protects: `exp(min(t, log 100))`."""
    router, x = make(), torch.randn(13, 6, dtype=torch.float64)
    before = router.logits(x)
    router.log_scale.data.fill_(50)
    torch.testing.assert_close(router.logits(x), before * 50, rtol=1e-6, atol=1e-9)
