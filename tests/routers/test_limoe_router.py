"""`LIMoERouter` against loops in fp64: entropies by modality, and where both are zero."""

from __future__ import annotations

import math

import pytest
import torch

from sparsify.routers.limoe_router import LIMoERouter


def entropy(p: list[float]) -> float:
    return -sum(v * math.log(v) for v in p if v > 0)


def test_losses_by_modality() -> None:
    """Protects: local and global entropy as means over modalities, importance and z over all tokens."""
    torch.manual_seed(0)
    router = LIMoERouter(7, 5, 1, num_modalities=2, soft_minimum=4).double()
    router.weight.data *= 30
    x, modalities = torch.randn(13, 7, dtype=torch.float64), torch.arange(13) % 3 % 2
    router.modalities = modalities
    router(x)
    local, spread, lse = [], [], []
    for kind in (0, 1):
        rows = []
        for token in x[modalities == kind]:
            exponentials = [math.exp(float(row @ token)) for row in router.weight.detach()]
            rows.append([v / sum(exponentials) for v in exponentials])
            lse.append(math.log(sum(exponentials)))
        local.append(sum(map(entropy, rows)) / len(rows))
        mean = [sum(row[e] for row in rows) / len(rows) for e in range(5)]
        spread.append(max(0.0, math.log(4) - entropy(mean)))
    assert router.losses["local"].item() == pytest.approx(sum(local) / 2, rel=1e-10)
    assert router.losses["global"].item() == pytest.approx(sum(spread) / 2, rel=1e-10, abs=1e-12)
    assert router.losses["z"].item() == pytest.approx(sum(v * v for v in lse) / 13, rel=1e-10)


def test_both_losses_vanish_together() -> None:
    """Protects: sure tokens on S experts or more cost nothing; on fewer the global loss is above 0, not below."""
    router = LIMoERouter(8, 8, 1, soft_minimum=4)
    router.weight.data = 100 * torch.eye(8)
    for busy, expected in ((8, 0.0), (4, 0.0), (2, math.log(2)), (1, math.log(4))):
        router(torch.eye(8)[torch.arange(16) % busy])
        assert router.losses["local"].item() == pytest.approx(0, abs=1e-6)
        assert router.losses["global"].item() == pytest.approx(expected, abs=1e-5)


def test_modalities_are_asked_for() -> None:
    """Protects: no stale or missing modality is taken for another one."""
    router, x = LIMoERouter(7, 5, 1, num_modalities=2), torch.randn(13, 7)
    router.modalities = torch.zeros(13).long()
    router(x)
    with pytest.raises(ValueError, match="2 modalities need the one of each of the 13 tokens"):
        router(x)
    router.eval()(x)
