"""The posterior of labels against Bayes by hand, and by the chain rule: mixed predictions are the mixed likelihood."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from sparsify import label_posterior


def bayes(likelihoods: Tensor, prior: list[float], seen: int) -> list[float]:
    joint = [p * math.prod(math.exp(v) for v in row[:seen].tolist()) for p, row in zip(prior, likelihoods, strict=True)]
    return [value / sum(joint) for value in joint]


@pytest.mark.parametrize("prior", [[0.5, 0.3, 0.2], [1.0, 0.0, 0.0], None])
def test_bayes(prior: list[float] | None) -> None:
    """Protects: tokens before t count, and token t does not; sequences of a batch do not meet."""
    likelihoods = -torch.rand(3, 2, 5, dtype=torch.float64) * 4
    found = label_posterior(likelihoods, None if prior is None else torch.tensor(prior).double())
    assert found.shape == (3, 2, 6)
    for b in range(2):
        for t in range(6):
            expected = bayes(likelihoods[:, b], prior or [1 / 3] * 3, t)
            assert found[:, b, t].tolist() == pytest.approx(expected, rel=1e-6)


def test_chain_rule() -> None:
    """Protects: sum_t log sum_D p(D | x_<t) p(x_t | D) = log sum_D p(D) p(x | D)."""
    likelihoods, prior = -torch.rand(4, 7, dtype=torch.float64) * 3, torch.tensor([0.1, 0.2, 0.3, 0.4]).double()
    posterior = label_posterior(likelihoods, prior)
    mixed = (posterior[:, :-1] * likelihoods.exp()).sum(0).log().sum()
    whole = (prior * likelihoods.sum(-1).exp()).sum().log()
    torch.testing.assert_close(mixed, whole)


def test_refuses() -> None:
    """Protects: a prior that fits."""
    with pytest.raises(ValueError, match=r"a probability for each of 3 labels, got \[2\]"):
        label_posterior(torch.zeros(3, 4), torch.ones(2))
