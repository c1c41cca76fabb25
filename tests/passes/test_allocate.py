"""`allocate`: the least error under the budget, and `sparsify(budget=)` keeps it."""

from __future__ import annotations

import itertools
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from sparsify import SparsifyConfig, inspect, sparsify
from sparsify.budget import Budget
from sparsify.errors import BudgetError
from sparsify.models.bert import Bert, BertConfig
from sparsify.passes import allocate as allocate_file
from sparsify.passes import time_choices
from sparsify.passes.allocate import allocate, minimise
from sparsify.passes.choices import Choice, FFNChoices
from sparsify.passes.layer_times import LayerTime
from sparsify.passes.match_ffn import FFNMatch
from sparsify.passes.plan import ConversionPlan, LayerPlan

OPTIONS: dict[str, Any] = {"num_experts": 8, "select": "all", "router_hidden_size": 4, "distill_steps": 0}


def choice(cost: float, error: float) -> Choice:
    return Choice(1, 0, 4, cost, error)


def macs(choice: Choice) -> float:
    return choice.macs


def bert_and_ids(quiet: str | None = None) -> tuple[Bert, list[Tensor]]:
    """A model of two FFNs, of which that in `quiet` adds almost nothing."""
    torch.manual_seed(0)
    model = Bert(BertConfig()).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if quiet is not None and name.startswith(quiet) and parameter.dim() == 2:
                parameter *= 1e-3
    return model, [torch.randint(0, 256, (8, 32)) for _ in range(4)]


def test_minimise_finds_the_best_of_all() -> None:
    """Protects: the price and the spending of the rest, against all combinations, on convex curves, in any unit."""
    generator = torch.Generator().manual_seed(0)
    for scale in (1.0, 1e-6, 1e12) * 7:
        curves: list[list[Choice]] = []
        for _ in range(3):
            drops = torch.rand(5, generator=generator).sort(descending=True).values
            errors = drops.flip(0).cumsum(0).flip(0)
            curves.append([choice(scale * (k + 1), float(error)) for k, error in enumerate(errors)])
        found = minimise(curves, 8.1 * scale, macs)
        assert sum(map(macs, found)) <= 8.1 * scale
        fits = (all_ for all_ in itertools.product(*curves) if sum(map(macs, all_)) <= 8.1 * scale)
        best = min(sum(c.error for c in all_) for all_ in fits)
        assert sum(c.error for c in found) == pytest.approx(best)


def test_a_budget_is_kept_and_goes_where_it_matters() -> None:
    """Protects: FLOPs of the report within the budget; a layer that adds almost nothing gets less; the reasons."""
    model, ids = bert_and_ids("layers.0.ffn")
    sparse = sparsify(model, ids[0][:2], calibration=ids, budget=0.5, **OPTIONS)
    first, second = sparse.report.ffns
    assert first.flops_after + second.flops_after <= 0.5 * (first.flops_before + second.flops_before)
    assert first.flops_after < second.flops_after
    assert first.action == "converted"
    assert "of its multiply-adds" in first.reason
    assert "adds" in first.reason
    assert "budget=50%" in second.reason
    assert "budget=50% for 2 FFNs: 50% is spent; they take 100% dense, and 12.5% at least" in " ".join(
        sparse.report.notes
    )


def test_a_budget_that_cannot_be_kept_is_refused() -> None:
    """Protects: no quiet excess; the message says what can be reached."""
    model, ids = bert_and_ids()
    with pytest.raises(BudgetError, match=r"budget=5% cannot be kept.* 12.5% at least.*num_experts"):
        sparsify(model, ids[0][:2], calibration=ids, budget="5%", **OPTIONS)


def test_what_does_not_go_with_a_budget() -> None:
    """Protects: contradictions are refused."""
    model, ids = Bert(BertConfig()).eval(), torch.randint(0, 256, (2, 5))
    with pytest.raises(ValueError, match="it needs calibration="):
        sparsify(model, ids, budget=0.5)
    with pytest.raises(ValueError, match="give one or the other"):
        sparsify(model, ids, budget=0.5, top_k=2, calibration=[ids])
    with pytest.raises(ValueError, match="give one or the other"):
        sparsify(model, ids, budget=0.5, calibration=[ids], plan=inspect(model, (ids,)).plan())
    with pytest.raises(ValueError, match="leave consume_model out"):
        sparsify(model, ids, budget="error<=0.1", calibration=[ids], consume_model=True)


def timed_ffn(match: FFNMatch, config: SparsifyConfig) -> FFNChoices:
    """Three choices of 10, 5 and 1 milliseconds."""
    layer = LayerPlan(match.name, "selected", 4, 2, 1)
    dense = Choice(0, 0, 0, 8.0, 0.0, (0.010,))
    return FFNChoices(
        match, layer, config, dense, (Choice(2, 1, 4, 4.0, 0.2, (0.005,)), Choice(1, 1, 4, 2.0, 0.9, (0.001,)))
    )


def test_milliseconds(monkeypatch: pytest.MonkeyPatch) -> None:
    """Protects: seconds are what is spent, not multiply-adds; what was chosen is measured, and chosen again."""
    model, ids = bert_and_ids()
    matches = inspect(model, (ids[0],)).ffns
    config = SparsifyConfig(num_experts=4, top_k=2, budget="11ms", target_tokens=64)
    ffns = [timed_ffn(match, config) for match in matches]
    plan = ConversionPlan(tuple(ffn.layer for ffn in ffns))

    def as_expected(ffn: FFNChoices, choice: Choice) -> tuple[LayerTime, ...]:
        return (LayerTime(64, None, None, "", 0.010, choice.seconds[0]),)

    monkeypatch.setattr(allocate_file, "measured_times", as_expected)
    found = allocate(ffns, plan, Budget("ms", 11.0))
    assert sorted((layer.top_k, layer.converts) for layer in found.plan.layers) in (
        [(0, False), (1, True)],
        [(2, True)] * 2,
    )
    assert found.spent == pytest.approx(10 if all(layer.converts for layer in found.plan.layers) else 11)
    assert (found.least, found.dense) == pytest.approx((2, 20))

    def slower(ffn: FFNChoices, choice: Choice) -> tuple[LayerTime, ...]:
        return (replace(as_expected(ffn, choice)[0], experts=1.5 * choice.seconds[0]),)

    monkeypatch.setattr(allocate_file, "measured_times", slower)
    assert allocate(ffns, plan, Budget("ms", 11.0)).spent <= 11
    with pytest.raises(BudgetError, match=r"1.5ms cannot be kept.* 20ms dense and 2ms at least.*fewer target_tokens"):
        allocate(ffns, plan, Budget("ms", 1.5))


def test_milliseconds_end_to_end(monkeypatch: pytest.MonkeyPatch) -> None:
    """Protects: times reach the choices and the report, at the asked tokens; choices that do not pay are left out."""
    model, ids = bert_and_ids()
    seen: list[int] = []

    def fake(match: FFNMatch, config: SparsifyConfig, tokens: int) -> LayerTime:
        seen.append(tokens)
        share = config.top_k / config.num_experts + (0.0 if config.top_k == config.shared else 0.3)
        return LayerTime(tokens, 1.0, share, "", 0.010, 0.010 * share)

    for file in (time_choices,):
        monkeypatch.setattr(file, "time_layer", fake)
        monkeypatch.setattr(file, "predict_layer", fake)
    options: dict[str, Any] = {**OPTIONS, "select": "auto", "num_experts": 4}
    sparse = sparsify(model, ids[0][:2], calibration=ids, budget="12ms", target_tokens=64, **options)
    assert set(seen) == {64}
    spent = sum(ffn.times[0].experts or 0.010 for ffn in sparse.report.converted if ffn.times)
    assert spent + 0.010 * (2 - len(sparse.report.converted)) <= 0.012
    assert "is spent" in " ".join(sparse.report.notes)
    slow = sparsify(model, ids[0][:2], calibration=ids, budget=0.9, target_tokens=64, **options)
    routed = [ffn.top_k for ffn in slow.report.converted if ffn.top_k > ffn.num_shared_experts]
    assert all(top_k < 3 for top_k in routed), "with 3 of 4 parts and the router it is no faster than dense"
