"""`allocate`: the least error under the budget, and `sparsify(budget=)` keeps it."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch

from sparsify import inspect, sparsify
from sparsify.models.bert import Bert, BertConfig
from sparsify.passes.allocate import Choice, minimise


def choice(cost: float, error: float) -> Choice:
    return Choice(1, 0, 4, cost, error)


def test_minimise_finds_the_best_of_all() -> None:
    """Protects: the price and the spending of the rest, against all combinations, on convex curves."""
    generator = torch.Generator().manual_seed(0)
    for _ in range(20):
        curves: list[list[Choice]] = []
        for _ in range(3):
            drops = torch.rand(5, generator=generator).sort(descending=True).values
            errors = drops.flip(0).cumsum(0).flip(0)
            curves.append([choice(k + 1.0, float(error)) for k, error in enumerate(errors)])
        found = minimise(curves, 8.0)
        assert sum(c.cost for c in found) <= 8.0
        best = min(sum(c.error for c in all_) for all_ in itertools.product(*curves) if sum(c.cost for c in all_) <= 8)
        assert sum(c.error for c in found) == pytest.approx(best)


def test_minimise_with_too_little_takes_the_cheapest() -> None:
    """Protects: a budget below the cheapest choices still gives a plan."""
    assert [c.cost for c in minimise([[choice(3, 0), choice(2, 1)]], 1.0)] == [2]


def test_a_budget_is_kept_and_goes_where_it_matters() -> None:
    """Protects: FLOPs of the report within the budget; a layer that adds almost nothing gets less."""
    torch.manual_seed(0)
    model = Bert(BertConfig()).eval()
    with torch.no_grad():
        quiet = next(p for name, p in model.named_parameters() if name.startswith("layers.0.ffn") and p.dim() == 2)
        quiet *= 1e-3
    ids = [torch.randint(0, 256, (8, 32)) for _ in range(4)]
    options: dict[str, Any] = {"num_experts": 8, "select": "all", "router_hidden_size": 4, "distill_steps": 0}
    sparse = sparsify(model, ids[0][:2], calibration=ids, budget=0.5, **options)
    first, second = sparse.report.ffns
    assert first.flops_after + second.flops_after <= 0.5 * (first.flops_before + second.flops_before)
    assert first.flops_after < second.flops_after
    assert first.action == "converted"
    assert "the budget" in second.reason


def test_what_does_not_go_with_a_budget() -> None:
    """Protects: contradictions are refused."""
    model, ids = Bert(BertConfig()).eval(), torch.randint(0, 256, (2, 5))
    with pytest.raises(ValueError, match=r"budget must be a share .* got 1\.5"):
        sparsify(model, ids, budget=1.5)
    with pytest.raises(ValueError, match="it needs calibration="):
        sparsify(model, ids, budget=0.5)
    with pytest.raises(ValueError, match="give one or the other"):
        sparsify(model, ids, budget=0.5, top_k=2, calibration=[ids])
    with pytest.raises(ValueError, match="give one or the other"):
        sparsify(model, ids, budget=0.5, calibration=[ids], plan=inspect(model, (ids,)).plan())
