"""What a refit of down_proj leaves of the error of pruning, by how many neurons are kept.

With H `[T, F]` the neurons beyond their means, the most important first, and n of them kept, the error H_> W_>^T is
regressed on the H_< that are kept (`passes/split/refit.py`, with the same ridge).

T tokens, F neurons, D_out output features, E parts.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

_NUMBERS = 16  # of parts kept that are measured; what lies between is on a straight line
_HELD_OUT = 8  # every eighth token is kept out of the fit
_LEAST_RIDGE = 1e-3


def refit_share(hidden: Tensor, down: Tensor, num_parts: int, ridge: float) -> list[float]:
    """Fit on most tokens, measure on the others.

    Args:
        hidden: `[T, F]`, beyond the mean, each token with the square root of its weight; the most important first.
        down: `[D_out, F]`, in the same order.
        num_parts: E.
        ridge: relative strength of the pull to the old weights.

    Returns:
        For 0, 1, .., E parts kept, the part of the squared error that is left: 1 for none and for all of them.
    """
    held = torch.arange(len(hidden)) % _HELD_OUT == 0
    fit, measured = hidden[~held], hidden[held]
    gram = fit.t() @ fit  # [F, F]
    pull = max(ridge, _LEAST_RIDGE) * gram.diagonal().mean().clamp(min=1e-12)
    size = -(-hidden.shape[1] // num_parts)
    counts = sorted({round(share * num_parts) for share in np.linspace(0, 1, _NUMBERS + 1)} - {0, num_parts})
    shares = [_share(gram, measured, down, min(k * size, hidden.shape[1]), pull) for k in counts]
    return np.interp(range(num_parts + 1), [0, *counts, num_parts], [1.0, *shares, 1.0]).tolist()


def _share(gram: Tensor, measured: Tensor, down: Tensor, kept: int, pull: Tensor) -> float:
    skipped = down[:, kept:].t()  # [F - n, D_out]
    error = measured[:, kept:] @ skipped
    size = float(error.square().sum())
    if not size:
        return 1.0
    own = gram[:kept, :kept].clone()
    own.diagonal().add_(pull)
    change = torch.cholesky_solve(gram[:kept, kept:] @ skipped, torch.linalg.cholesky(own))
    return float((error - measured[:, :kept] @ change).square().sum()) / size
