"""The mean of models against sums by hand; what is not alike is refused."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from sparsify import average_models


def norms(count: int) -> list[nn.Module]:
    """Models with parameters, floating buffers and an integer one, in two dtypes."""
    made = [nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 2).half()) for _ in range(count)]
    for i, model in enumerate(made):
        model[1].running_mean.normal_()  # pyright: ignore
        model[1].num_batches_tracked.fill_(i + 5)  # pyright: ignore
    return [*made]


@pytest.mark.parametrize("weights", [None, [1, 2, 5]])
def test_mean(weights: list[float] | None) -> None:
    """Protects: Branch-Train-Merge: the averaged weights are the manual average; models stay as they are."""
    models, shares = norms(3), [1 / 3] * 3 if weights is None else [1 / 8, 2 / 8, 5 / 8]
    before = [{name: tensor.clone() for name, tensor in model.state_dict().items()} for model in models]
    made = average_models(models, weights)
    for name, tensor in made.state_dict().items():
        by_hand = sum((p * state[name].double() for p, state in zip(shares, before, strict=True)), torch.zeros(()))
        expected = by_hand.to(tensor.dtype) if tensor.is_floating_point() else before[0][name]
        assert torch.equal(tensor, expected), name
    for model, state in zip(models, before, strict=True):
        assert all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items())


def test_refuses() -> None:
    """Protects: an error names what does not fit."""
    with pytest.raises(ValueError, match="give at least one model"):
        average_models([])
    with pytest.raises(ValueError, match="a number for each of 2 models, none below 0, got"):
        average_models(norms(2), [1.0, -1.0])
    with pytest.raises(ValueError, match=r"model 1 does not fit model 0: weight has the shape \(3, 2\) there and"):
        average_models([nn.Linear(2, 2), nn.Linear(2, 3)])
    with pytest.raises(ValueError, match="bias has the shape of nothing there"):
        average_models([nn.Linear(2, 2), nn.Linear(2, 2, bias=False)])
