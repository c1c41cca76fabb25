"""The receipts: they hold for a split, and would not hold for a wrong one."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from torch import nn

from sparsify.errors import VerificationError
from sparsify.passes import verify
from sparsify.passes.capture import capture
from sparsify.passes.match_ffn import match_ffn
from sparsify.passes.split.dense_ffn import read_ffn
from sparsify.passes.split.experts import divide
from sparsify.passes.verify import check_receipt, receipt


def test_receipt() -> None:
    """Protects: a receipt measures; one wrong column in one expert shows."""
    graph_module = capture(nn.Sequential(nn.Linear(7, 24), nn.GELU(), nn.Linear(24, 7)), (torch.randn(3, 7),))
    dense = read_ffn(graph_module, match_ffn(graph_module)[0][0])
    experts = divide(dense, torch.randperm(24).view(4, 6), 1)
    x = torch.randn(50, 7)
    assert receipt(dense, experts, x) <= 1e-5
    wrong = experts.down.clone()
    wrong[1, :, 2] *= 1.01
    assert receipt(dense, replace(experts, down=wrong), x) > 1e-5
    assert receipt(dense, experts, x[:0]) == 0.0
    assert math.isnan(receipt(dense, replace(experts, down=experts.down * float("nan")), x))


@pytest.mark.parametrize("row", [0, -1])
def test_a_receipt_of_many_experts(row: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Protects: where tokens are taken a few at a time, all of them count."""
    monkeypatch.setattr(verify, "_ROWS", 24)
    model = nn.Sequential(nn.Linear(7, 24, bias=False), nn.ReLU(), nn.Linear(24, 7, bias=False))
    graph_module = capture(model, (torch.randn(3, 7),))
    dense = read_ffn(graph_module, match_ffn(graph_module)[0][0])
    experts = divide(dense, torch.randperm(24).view(12, 2), 0)
    x = torch.zeros(5, 7)
    x[row] = torch.randn(7)
    assert receipt(dense, experts, x) <= 1e-5
    assert receipt(dense, replace(experts, down=1.01 * experts.down), x) > 1e-3


@pytest.mark.parametrize("value", [2e-5, float("nan"), float("inf")])
def test_a_receipt_that_does_not_hold(value: float) -> None:
    """Protects: NaN is no pass; the message names the layer and what to do."""
    with pytest.raises(VerificationError, match=r"layer\.1: with all experts on.*leave the layer dense"):
        check_receipt("layer.1", value)
