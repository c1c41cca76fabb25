"""`GShardRouter` against loops in fp64: policies of the second expert, normalisation, order of overflow, balance."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from sparsify.routers.gshard_router import GShardRouter


def make(**options: Any) -> GShardRouter:
    torch.manual_seed(0)
    merged: dict[str, Any] = {"capacity_factor": None, **options}
    router = GShardRouter(6, 5, 2, **merged)
    router.weight.data *= 30
    return router.double()


def probabilities(router: GShardRouter, x: Tensor) -> list[list[float]]:
    rows = []
    for token in x:
        exponentials = [math.exp(float(row @ token)) for row in router.weight.detach()]
        rows.append([value / sum(exponentials) for value in exponentials])
    return rows


@pytest.mark.parametrize("normalise", ["before", "after"])
@pytest.mark.parametrize("second", ["all", "none", "threshold"])
@pytest.mark.parametrize("training", [True, False])
def test_fixed_policies(second: str, normalise: str, training: bool) -> None:
    """Protects: who runs, and with what weight; a second expert that was let go leaves id -1 and weight 0."""
    router, x = make(second=second, normalise=normalise, threshold=0.3).train(training), torch.randn(31, 6).double()
    weights, ids = router(x)
    lonely = 0
    for t, row in enumerate(probabilities(router, x)):
        first, other = sorted(range(5), key=lambda e: -row[e])[:2]
        g1, g2 = row[first] / (row[first] + row[other] + 1e-9), row[other] / (row[first] + row[other] + 1e-9)
        runs = {"all": True, "none": False, "threshold": g2 > 0.3}[second]
        lonely += not runs
        g1 = g1 if runs or normalise == "before" else 1.0
        assert ids[t].tolist() == [first, other if runs else -1]
        assert weights[t].tolist() == pytest.approx([g1, g2 if runs else 0.0], abs=1e-8)
    assert (lonely > 0) == (second != "all")


def test_rule_of_the_weights() -> None:
    """Protects: the start is called exact where weights sum to 1 at inference, and only there."""
    x = torch.randn(31, 6, dtype=torch.float64)
    for second in ("all", "none", "threshold", "random", "sampling"):
        for normalise in ("before", "after"):
            router = make(second=second, normalise=normalise).eval()
            sums = router(x)[0].sum(-1)
            assert (router.rule == "sum") == torch.allclose(sums, torch.ones_like(sums), atol=1e-6)


def test_random_second() -> None:
    """Protects: in training the second expert runs with the probability min(1, g2 / threshold); always at inference."""
    router, x = make(second="random", threshold=0.5), torch.randn(1, 6, dtype=torch.float64).expand(4000, 6)
    weights, ids = router(x)
    row = sorted(probabilities(router, x[:1])[0], reverse=True)
    g2 = row[1] / (row[0] + row[1])
    assert 0.02 < g2 / 0.5 < 0.98
    spread = math.sqrt(g2 / 0.5 * (1 - g2 / 0.5) / 4000)
    assert (ids[:, 1] >= 0).double().mean().item() == pytest.approx(g2 / 0.5, abs=4 * spread)
    assert weights.sum(-1).sub(1).abs().max() < 1e-8
    assert (router.eval()(x)[1] >= 0).all()


def test_sampled_second() -> None:
    """Protects: drawn from the softmax without the first expert; its own probability is the weight."""
    router, x = make(second="sampling"), torch.randn(1, 6, dtype=torch.float64).expand(4000, 6)
    weights, ids = router(x)
    row = probabilities(router, x[:1])[0]
    first = row.index(max(row))
    assert ids[:, 0].eq(first).all()
    for e in range(5):
        share = 0.0 if e == first else row[e] / (1 - row[first])
        spread = math.sqrt(share * (1 - share) / 4000)
        assert ids[:, 1].eq(e).double().mean().item() == pytest.approx(share, abs=4 * spread + 1e-12)
    token, other = 17, int(ids[17, 1])
    assert weights[token, 1].item() == pytest.approx(row[other] / (row[first] + row[other]), abs=1e-8)


def test_order_of_the_paper() -> None:
    """Protects: capacity by all first choices, then second ones, as a reference loop fills it; C of mesh."""
    router = make(second="all", capacity_factor=2.0, overflow="choice", capacity_rule="mesh")
    x = torch.randn(31, 6, dtype=torch.float64)
    weights, ids = router(x)
    slots, taken = math.floor(31 * 2.0 / 5), [0] * 5
    ranked = [sorted(range(5), key=lambda e: -row[e])[:2] for row in probabilities(router, x)]
    expected = [[-1, -1] for _ in range(31)]
    for k in range(2):
        for t in range(31):
            if taken[ranked[t][k]] < slots:
                expected[t][k] = ranked[t][k]
            taken[ranked[t][k]] += 1
    assert ids.tolist() == expected
    assert (ids < 0).any()
    assert weights[ids < 0].eq(0).all()


def test_balance_counts_first_choices() -> None:
    """Protects: `E sum_e density1_e P_e`, coefficient 1e-2, before capacity."""
    router, x = make(capacity_factor=0.5), torch.randn(31, 6, dtype=torch.float64)
    router(x)
    rows = probabilities(router, x)
    first = [row.index(max(row)) for row in rows]
    expected = 5 * sum(first.count(e) / 31 * sum(row[e] for row in rows) / 31 for e in range(5))
    assert router.losses["balance"].item() == pytest.approx(expected, rel=1e-10)
    assert router.coefficients == {"balance": 1e-2}
