"""The cheapest conversion within an error: the search, its batches, and `sparsify(budget="error<=...")`."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from sparsify import sparsify
from sparsify.errors import BudgetError, CalibrationError
from sparsify.models.bert import Bert, BertConfig
from sparsify.passes.output_change import relative_difference
from sparsify.run_outputs import run_outputs
from sparsify.search_budget import cheapest_within, hold_out_batches

OPTIONS: dict[str, Any] = {"num_experts": 8, "select": "all", "router_hidden_size": 4, "distill_steps": 0}


@pytest.mark.parametrize(("power", "most"), [(0.5, 0.1), (0.5, 0.4), (1.0, 0.02), (1.0, 0.4), (3.0, 0.02), (3.0, 0.1)])
def test_the_search_comes_close(power: float, most: float) -> None:
    """Protects: within the bound, and less than 0.1 of the multiply-adds above the cheapest that is."""
    tried: list[float] = []

    def convert(share: float) -> float:
        tried.append(share)
        return share

    found, summary = cheapest_within(convert, lambda share: 0.8 * (1 - share) ** power, most, 0.05)
    best = 1 - (most / 0.8) ** (1 / power)
    assert found.error <= most
    assert found.found == found.share
    assert max(best, 0.05) <= found.share <= max(best, 0.05) + 0.1
    assert len(tried) <= 6
    assert all(0.05 <= share < 1 for share in tried)
    assert f"{found.error:.3g} at {found.share:.0%}" in summary


def test_where_all_is_allowed_the_least_is_taken() -> None:
    """Protects: no budget below what can be kept is tried."""
    found, _ = cheapest_within(lambda share: share, lambda share: 0.1 * (1 - share), 0.5, 0.2)
    assert found.share == 0.2


def test_a_bound_that_nothing_keeps() -> None:
    """Protects: the message has what was tried, and advice."""
    with pytest.raises(BudgetError, match=r"at 0.001 or below \(.*0.3 at 50%.*Raise the bound.*select="):
        cheapest_within(lambda share: share, lambda share: 0.3, 0.001, 0.2)


def test_batches_that_are_kept_out() -> None:
    """Protects: every tenth, at least one, none in both."""
    assert hold_out_batches(list(range(25)))[1] == [9, 19]
    assert hold_out_batches([1, 2, 3]) == ([1, 2], [3])
    with pytest.raises(CalibrationError, match="give at least 2; there is 1"):
        hold_out_batches([1])


def test_an_error_is_kept_on_batches_that_no_fit_has_seen() -> None:
    """Protects: the error of the report's note is that of the last batch, and within the bound; the model is whole."""
    torch.manual_seed(0)
    model = Bert(BertConfig()).eval()
    ids = [torch.randint(0, 256, (8, 32)) for _ in range(4)]
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    sparse = sparsify(model, ids[0][:2], calibration=ids, budget="error<=0.1", **OPTIONS)
    error = relative_difference(zip(run_outputs(model, (ids[3],), {}), run_outputs(sparse, (ids[3],), {}), strict=True))
    note = next(note for note in sparse.report.notes if note.startswith("budget=error<=0.1"))
    assert error <= 0.1
    assert f"with {error:.3g}; " in note
    assert "1 batches that were kept out" in note
    assert sparse.report.calibration_tokens == 3 * 8 * 32
    assert sum(ffn.flops_after for ffn in sparse.report.ffns) < sum(ffn.flops_before for ffn in sparse.report.ffns)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
