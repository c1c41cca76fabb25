"""`refit_share`: how much of the error of pruning a refit leaves, against the regression made by itself."""

from __future__ import annotations

import pytest
import torch

from sparsify.passes.refit_share import refit_share


def test_neurons_that_others_know_cost_nothing() -> None:
    """Protects: the regression. The second half of the neurons are sums of the first half."""
    torch.manual_seed(0)
    known = torch.randn(4000, 8)
    hidden, down = torch.cat([known, known @ torch.randn(8, 8)], 1), torch.randn(5, 16)
    shares = refit_share(hidden, down, 4, 0.0)
    assert [shares[0], shares[4]] == [1, 1]
    assert shares[2] < 1e-3
    assert shares[3] < 1e-3
    assert 0.1 < shares[1] < 1


def test_neurons_by_themselves_cost_all_they_did() -> None:
    """Protects: tokens are held out: independent neurons tell nothing of each other, however few the tokens."""
    torch.manual_seed(0)
    shares = refit_share(torch.randn(400, 24), torch.randn(5, 24), 3, 0.1)
    assert shares == pytest.approx([1, 1, 1, 1], abs=0.15)


def test_it_is_the_ridge_regression() -> None:
    """Protects: the formula, against `torch.linalg.lstsq` on stacked equations in fp64."""
    torch.manual_seed(0)
    hidden, down = torch.randn(80, 6) @ torch.randn(6, 6), torch.randn(3, 6)
    held = torch.arange(80) % 8 == 0
    fit, measured = hidden[~held].double(), hidden[held].double()
    error = [part[:, 4:] @ down[:, 4:].t().double() for part in (fit, measured)]
    pull = 0.1 * fit.square().sum(0).mean()
    stacked = torch.cat([fit[:, :4], pull.sqrt() * torch.eye(4, dtype=torch.float64)])
    change = torch.linalg.lstsq(stacked, torch.cat([error[0], torch.zeros(4, 3, dtype=torch.float64)])).solution
    expected = (error[1] - measured[:, :4] @ change).square().sum() / error[1].square().sum()
    assert refit_share(hidden, down, 3, 0.1)[2] == pytest.approx(float(expected), rel=1e-4)


def test_numbers_between_are_on_a_line() -> None:
    """Protects: many parts, of which not each is measured, and a last part that is not full."""
    torch.manual_seed(0)
    shares = refit_share(torch.randn(500, 37), torch.randn(5, 37), 36, 0.1)
    assert len(shares) == 37
    assert all(0 < share < 1.3 for share in shares)
