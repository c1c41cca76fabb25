"""A budget for a model that was traced in parts: one budget for all of them, whatever its unit."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from sparsify import PartialSparseModel, sparsify

OPTIONS: dict[str, Any] = {"num_experts": 8, "select": "all", "router_hidden_size": 2, "distill_steps": 0}


class FeedForward(nn.Module):
    def __init__(self, scale: float) -> None:
        super().__init__()
        self.up, self.act, self.down = nn.Linear(8, 64), nn.ReLU(), nn.Linear(64, 8)
        nn.init.normal_(self.down.weight, std=scale)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(self.act(self.up(x)))


class Branching(nn.Module):
    """Cannot be traced as a whole; the first part adds little to its input."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = FeedForward(1e-3), FeedForward(0.5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        return self.second(x) if x.sum() < 1e9 else x


@pytest.mark.parametrize("budget", [0.5, "error<=0.3"])
def test_parts_share_a_budget(budget: float | str) -> None:
    """Protects: the part that matters gets more than its share; the model is left as it was."""
    model = Branching().eval()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    batches = [torch.randn(64, 8) for _ in range(6)]
    sparse = sparsify(model, batches[0][:4], calibration=batches, budget=budget, **OPTIONS)
    assert isinstance(sparse, PartialSparseModel)
    first, second = sparse.report.ffns
    spent, dense = first.flops_after + second.flops_after, first.flops_before + second.flops_before
    assert first.flops_after < second.flops_after
    assert spent < dense
    if budget == 0.5:
        assert 0.4 * dense < spent <= 0.5 * dense
    assert sum(note.startswith("budget=") for note in sparse.report.notes) == 1
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
