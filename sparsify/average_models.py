"""Dense models of one architecture -> one with the mean of their weights (Branch-Train-Merge, arXiv 2208.03306)."""

from __future__ import annotations

import copy
from collections.abc import Sequence

import torch
from torch import nn


@torch.no_grad()
def average_models(models: Sequence[nn.Module], weights: Sequence[float] | None = None) -> nn.Module:
    """Average weights, number by number.

    Args:
        models: of one class and configuration, left as they are. Averages are only of use where they were trained from
            the same weights.
        weights: how much each counts, relative to their sum, such as `label_posterior` of some text; None: all alike.

    Returns:
        A copy of the first model with the means of floating parameters and buffers, computed in fp64 and rounded to
        their dtypes; integers are those of the first.

    Raises:
        ValueError: there is no model, parameters differ in name or shape, or the weights do not fit.
    """
    if not models:
        raise ValueError("there is nothing to average: give at least one model")
    shares = [1.0] * len(models) if weights is None else [float(weight) for weight in weights]
    if len(shares) != len(models) or min(shares) < 0 or not sum(shares) > 0:
        raise ValueError(f"weights must hold a number for each of {len(models)} models, none below 0, got {weights}")
    require_alike(models)
    made = copy.deepcopy(models[0])
    states = [model.state_dict() for model in models]
    for name, tensor in made.state_dict().items():
        if tensor.is_floating_point():
            parts = [share / sum(shares) * state[name].double() for share, state in zip(shares, states, strict=True)]
            tensor.copy_(torch.stack(parts).sum(0))
    return made


def require_alike(models: Sequence[nn.Module]) -> None:
    """Do nothing if all parameters and buffers have the names and shapes of those of the first model.

    Raises:
        ValueError: says which does not.
    """
    first = {name: tuple(tensor.shape) for name, tensor in models[0].state_dict().items()}
    for i, model in enumerate(models[1:], 1):
        other = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
        wrong = next((name for name in {**first, **other} if first.get(name) != other.get(name)), None)
        if wrong is not None:
            raise ValueError(
                f"model {i} does not fit model 0: {wrong} has the shape {other.get(wrong, 'of nothing')} there and "
                f"{first.get(wrong, 'of nothing')} here; give models of one class and configuration"
            )
