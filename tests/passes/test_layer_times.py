"""Prediction and measurement of an FFN, and what `plan` makes of them."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from sparsify import SparsifyConfig, inspect, sparsify
from sparsify.passes import layer_times, plan
from sparsify.passes.layer_times import LayerTime, time_layer
from sparsify.passes.match_ffn import FFNMatch
from sparsify.passes.plan import ConversionPlan


def block(hidden: int, width: int, activation: Callable[[Tensor], Tensor] = torch.relu) -> nn.Module:
    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.up, self.norm, self.down = nn.Linear(hidden, width), nn.BatchNorm1d(width), nn.Linear(width, hidden)

        def forward(self, x: Tensor) -> Tensor:
            return self.down(activation(self.norm(self.up(x))))

    return Block().eval()


def match_of(model: nn.Module, hidden: int) -> FFNMatch:
    (match,) = inspect(model, (torch.randn(4, hidden, device=next(model.parameters()).device),)).ffns
    return match


@pytest.mark.parametrize("activation", [torch.relu, torch.sin])
def test_times(activation: Callable[[Tensor], Tensor]) -> None:
    """Protects: fused or not, with shared experts and a width that no number of experts divides."""
    found = time_layer(match_of(block(16, 67, activation), 16), SparsifyConfig(num_experts=4, top_k=2), 5)
    assert found.tokens == 5
    times = (found.dense, found.experts, found.predicted_dense, found.predicted_experts)
    assert all(time is not None and 0 < time < 1 for time in times)
    assert "measured" in str(found)
    assert "ms" in str(found)


def test_pruned(monkeypatch: pytest.MonkeyPatch) -> None:
    """Protects: without routed experts no router runs, only the neurons that are kept, and less is predicted."""
    subjects: list[Any] = []
    monkeypatch.setattr(layer_times, "_measure", lambda subject, *_: subjects.append(subject) or (2.0, 1.0))
    match, x = match_of(block(16, 68), 16), torch.randn(5, 16)
    few, most = (time_layer(match, SparsifyConfig(num_experts=4, top_k=k, num_shared_experts=k), 256) for k in (1, 3))
    assert few.form == "pruned"
    assert few.experts == 1.0
    assert few.predicted_experts is not None
    assert most.predicted_experts is not None
    assert few.predicted_experts < most.predicted_experts
    dense = layer_times._random_ffn(subjects[1])
    hidden = dense.hidden(x)
    hidden[:, 51:] = 0
    torch.testing.assert_close(layer_times._runner(subjects[1], dense)(x), dense.down(hidden))


def test_without_data_there_is_a_prediction_only() -> None:
    """Protects: plans of models on the meta device."""
    found = time_layer(match_of(block(16, 64).to("meta"), 16), SparsifyConfig(num_experts=4, top_k=2), 512)
    assert found.dense is None
    assert found.experts is None
    assert found.predicted_dense
    assert "not measured" in str(found)


def test_large_layers_pay_and_tiny_ones_do_not() -> None:
    """Protects: what is measured is what runs: a quarter of a wide FFN is faster at many tokens, 5 neurons never."""
    wide = time_layer(match_of(block(256, 4096), 256), SparsifyConfig(num_experts=8, top_k=1), 512)
    assert wide.pays
    tiny = time_layer(match_of(block(8, 64), 8), SparsifyConfig(num_experts=8, top_k=7), 1)
    assert not tiny.pays


@pytest.mark.parametrize(
    ("time", "pays"),
    [
        (LayerTime(1, 2.0, 1.0, "", 1.0, 2.0), False),
        (LayerTime(1, 1.0, 2.0, "", 2.0, 1.0), True),
        (LayerTime(1, 1.0, 2.0, "", None, None), False),
        (LayerTime(1, None, None, "", None, None), True),
    ],
)
def test_a_measurement_counts_more_than_a_prediction(time: LayerTime, pays: bool) -> None:
    """Protects: `pays`."""
    assert time.pays is pays


def test_auto_leaves_dense_what_is_slower(monkeypatch: pytest.MonkeyPatch) -> None:
    """Protects: the decision, its reason, and the times in plan, JSON and report; a name overrules it."""
    slow, fast = LayerTime(1, 1.0, 2.0, "fused", 0.001, 0.002), LayerTime(9, 1.0, 2.0, "fused", 0.002, 0.001)
    monkeypatch.setattr(plan, "time_layer", lambda match, config, tokens: replace(slow if tokens == 1 else fast))
    model, x = nn.Sequential(block(16, 256), block(16, 256)), torch.randn(4, 16)
    options: dict[str, Any] = {"num_experts": 4, "top_k": 2, "target_tokens": (1, 9)}
    planned = inspect(model, (x,)).plan(**options)
    assert [layer.converts for layer in planned.layers] == [False, False]
    assert "not be faster at 1 tokens: dense -> experts 1 -> 2 ms measured" in planned.layers[0].reason
    assert "9 tokens" not in planned.layers[0].reason
    assert ConversionPlan.from_json(json.loads(json.dumps(planned.to_json()))) == planned
    sparse = sparsify(model, x, select=("1",), **options)
    assert [ffn.times for ffn in sparse.report.ffns] == [(slow, fast)] * 2
    assert "Time of an FFN" in str(sparse.report)
    assert len(sparse.report.converted) == 1
    assert inspect(model, (x,)).plan(num_experts=4, top_k=2, target_tokens=9).layers[0].converts


def test_bad_target_tokens() -> None:
    """Protects: the message."""
    with pytest.raises(ValueError, match="target_tokens must be at least 1, got 0"):
        SparsifyConfig(target_tokens=(8, 0))
