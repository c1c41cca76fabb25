"""`DeepSeekMoERouter`: softmax not renormalised, expert and device balance, and the split with all experts on."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from sparsify import sparsify
from sparsify.routers.deepseek_moe_router import DeepSeekMoERouter


def test_weights_and_losses() -> None:
    """Protects: the K largest probabilities as they are; `a1 sum f P` with f = E n / (K T), and the device loss."""
    torch.manual_seed(0)
    router = DeepSeekMoERouter(7, 6, 3, num_devices=2).double()
    router.weight.data *= 30
    x = torch.randn(13, 7, dtype=torch.float64)
    weights, ids = router(x)
    n, p = [0] * 6, [0.0] * 6
    for t in range(13):
        exponentials = [math.exp(float(row @ x[t])) for row in router.weight.detach()]
        row = [v / sum(exponentials) for v in exponentials]
        chosen = sorted(range(6), key=lambda e: -row[e])[:3]
        assert ids[t].tolist() == chosen
        assert weights[t].tolist() == pytest.approx([row[e] for e in chosen], rel=1e-12)
        for e in range(6):
            n[e] += e in chosen
            p[e] += row[e] / 13
    f = [6 * count / (3 * 13) for count in n]
    assert router.losses["balance"].item() == pytest.approx(sum(map(math.prod, zip(f, p, strict=True))), rel=1e-10)
    devices = [(sum(f[d : d + 3]) / 3) * sum(p[d : d + 3]) for d in (0, 3)]
    assert router.losses["device"].item() == pytest.approx(sum(devices), rel=1e-10)
    assert router.coefficients == {"balance": 1e-3, "device": 5e-2}


def test_fine_grained_split_with_all_experts_on_is_dense() -> None:
    """Protects: shared and fine-grained experts of a split, all on with weight 1, are the dense FFN."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 32), nn.GELU(), nn.Linear(32, 8))
    x = torch.randn(13, 8)
    sparse = sparsify(
        model, (x,), num_experts=8, top_k=8, num_shared_experts=2, router="deepseek-moe", exact_start=True, select="all"
    ).eval()
    torch.testing.assert_close(sparse(x), model(x), rtol=1e-5, atol=1e-5)
    (router,) = sparse.routers.values()
    assert (router.num_experts, router.top_k) == (6, 6)
