"""`time_choices`: measured at the ends and in the middle, predicted in between, and only what pays."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from sparsify import SparsifyConfig, inspect
from sparsify.errors import BudgetError
from sparsify.passes import time_choices as file
from sparsify.passes.choices import Choice, FFNChoices
from sparsify.passes.layer_times import LayerTime
from sparsify.passes.match_ffn import FFNMatch
from sparsify.passes.plan import LayerPlan
from sparsify.passes.time_choices import time_choices

EXPERTS = 8


def ffn_choices(device: str = "cpu", dtype: torch.dtype = torch.float32, **options: Any) -> FFNChoices:
    """Routed with 2 ... 7 of 8 parts of which one is shared, pruned to 1 ... 7."""
    model = nn.Sequential(nn.Linear(8, 32), nn.ReLU(), nn.Linear(32, 8)).to(device, dtype).eval()
    (match,) = inspect(model, (torch.zeros(4, 8, device=device, dtype=dtype),)).ffns
    routed = [Choice(k, 1, EXPERTS, float(k), 0.1) for k in range(2, EXPERTS)]
    pruned = [Choice(k, k, EXPERTS, float(k), 0.2) for k in range(1, EXPERTS)]
    config = SparsifyConfig(num_experts=EXPERTS, target_tokens=(64,), **options)
    return FFNChoices(match, LayerPlan(match.name, ""), config, Choice(0, 0, 0, 8.0, 0.0), (*routed, *pruned))


def stand_in(monkeypatch: pytest.MonkeyPatch, predicted: bool) -> list[int]:
    """Routed parts take 1 ms each and 2 ms in all, pruned parts 1 ms; predictions are half of that, or missing."""
    measured: list[int] = []

    def predict(match: FFNMatch, config: SparsifyConfig, tokens: int) -> LayerTime:
        seconds = 1e-3 * (config.top_k + (0 if config.top_k == config.shared else 2))
        return LayerTime(tokens, 4e-3, seconds / 2 if predicted else None, "", None, None)

    def measure(match: FFNMatch, config: SparsifyConfig, tokens: int) -> LayerTime:
        measured.append(config.top_k)
        seconds = 1e-3 * (config.top_k + (0 if config.top_k == config.shared else 2))
        return LayerTime(tokens, None, seconds / 2 if predicted else None, "", 8e-3, seconds)

    monkeypatch.setattr(file, "predict_layer", predict)
    monkeypatch.setattr(file, "time_layer", measure)
    return measured


@pytest.mark.parametrize("predicted", [True, False])
def test_a_few_are_measured_and_the_rest_follows(monkeypatch: pytest.MonkeyPatch, predicted: bool) -> None:
    """Protects: the interpolation, with and without predictions, on costs that are linear in the parts."""
    measured = stand_in(monkeypatch, predicted)
    found = time_choices(ffn_choices(select="all"))
    assert sorted(measured) == [1, 2, 4, 5, 7, 7]
    assert found.dense.seconds == (8e-3,)
    assert [c.seconds[0] for c in found.sparse] == pytest.approx(
        [1e-3 * (c.top_k + 2 * (c.way == "routed")) for c in found.sparse]
    )
    assert len(found.sparse) == 13


def test_what_does_not_pay_is_left_out_by_a_preset(monkeypatch: pytest.MonkeyPatch) -> None:
    """Protects: promise 3: routing to 6 or 7 parts takes as long as the dense FFN."""
    stand_in(monkeypatch, predicted=True)
    found = time_choices(ffn_choices(select="auto"))
    assert sorted(c.top_k for c in found.sparse if c.way == "routed") == [2, 3, 4, 5]
    assert sorted(c.top_k for c in found.sparse if c.way == "pruned") == [1, 2, 3, 4, 5, 6, 7]


def test_without_weights_the_predictions_count() -> None:
    """Protects: plans for models on the meta device; fewer parts are never predicted to take longer when pruned."""
    found = time_choices(ffn_choices("meta", select="all"))
    pruned = [c.seconds[0] for c in found.sparse if c.way == "pruned"]
    assert pruned == sorted(pruned)
    assert 0 < pruned[0] <= found.dense.seconds[0]


def test_without_weights_and_predictions_there_is_no_time() -> None:
    """Protects: the message."""
    with pytest.raises(BudgetError, match=r"not known.*meta.*does not know torch.float64.*as a share"):
        time_choices(ffn_choices("meta", torch.float64))
