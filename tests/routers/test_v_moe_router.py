"""`VMoERouter` against loops in fp64: noise of 1/E, priority by the largest probability, importance and load."""

from __future__ import annotations

import math

import pytest
import torch

from sparsify.routers.v_moe_router import VMoERouter


def cv_squared(values: list[float]) -> float:
    mean = sum(values) / len(values)
    return sum((v - mean) ** 2 for v in values) / len(values) / mean**2


def test_training_is_the_published_gate() -> None:
    """Protects: noisy softmax values as weights, sure tokens served first, and both losses."""
    torch.manual_seed(0)
    router, x = VMoERouter(6, 5, 2, capacity_factor=0.75).double(), torch.randn(31, 6, dtype=torch.float64)
    router.weight.data *= 30
    torch.manual_seed(7)
    weights, ids = router(x)
    torch.manual_seed(7)
    noise = torch.randn(31, 5, dtype=torch.float64)
    rows: list[list[float]] = []
    load = [0.0] * 5
    for t in range(31):
        clean = [float(row @ x[t]) for row in router.weight.detach()]
        noisy = [clean[e] + noise[t, e].item() / 5 for e in range(5)]
        total = sum(math.exp(v) for v in noisy)
        rows.append([math.exp(v) / total for v in noisy])
        threshold = sorted(noisy, reverse=True)[1]
        for e in range(5):
            load[e] += 1 - 0.5 * (1 + math.erf((threshold - clean[e]) * 5 / math.sqrt(2)))
    taken = [0] * 5
    slots = math.ceil(0.75 * 2 * 31 / 5)
    ranked = [sorted(range(5), key=lambda e: -row[e])[:2] for row in rows]
    expected = [[-1, -1] for _ in range(31)]
    for k in range(2):
        for t in sorted(range(31), key=lambda t: -max(rows[t])):
            if taken[ranked[t][k]] < slots:
                expected[t][k] = ranked[t][k]
            taken[ranked[t][k]] += 1
    assert ids.tolist() == expected
    for t in range(31):
        gates = [rows[t][e] if e >= 0 else 0.0 for e in expected[t]]
        assert weights[t].tolist() == pytest.approx(gates, rel=1e-10)
    importance = [sum((row[e] for row in rows), 0.0) for e in range(5)]
    assert router.losses["importance"].item() == pytest.approx(cv_squared(importance), rel=1e-8)
    assert router.losses["load"].item() == pytest.approx(cv_squared(load), rel=1e-8)


def test_keeps_more_mass_than_first_come() -> None:
    """Protects: claim 16 end to end: at CF 0.5 the sure tokens keep their experts."""
    torch.manual_seed(0)
    x, mass = torch.randn(200, 6), {}
    for overflow in ("priority", "token"):
        router = VMoERouter(6, 5, 1, eval_capacity_factor=0.5, overflow=overflow).eval()
        router.weight.data = torch.randn(5, 6, generator=torch.Generator().manual_seed(1))
        mass[overflow] = router(x)[0].sum().item()
        assert not router.causal
    assert mass["priority"] > mass["token"]


def test_a_later_token_takes_the_slot() -> None:
    """Protects: what the flag says: with priority a later, surer token evicts an earlier one."""
    router = VMoERouter(2, 2, 1, eval_capacity_factor=0.5).eval()
    router.weight.data = torch.eye(2)
    x = torch.tensor([[1.0, 0.0], [2.0, 0.0]])
    assert router(x)[1].tolist() == [[-1], [0]]
    assert router(x[[0, 0]])[1].tolist() == [[0], [-1]]
