"""What a router has to learn from an error: which experts were worth running. T tokens, R routed experts, K that run.

With d_e what expert e adds and r the error that is left, running e lowers the squared error by

    gain_e = 2 <r, d_e> + |d_e|^2   where e ran,        2 <r, d_e> - |d_e|^2   where it did not,

exactly, the other choices as they are. The K largest gains belong above the threshold of the logits.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

_TEMPERATURE = 0.3  # of the sigmoid, in logits, whose unit is the mean norm of an expert's output


def choice_gains(inner: Tensor, squares: Tensor, chosen: Tensor) -> Tensor:
    """`gain_e` `[T, R]` from `<r, d_e>`, `|d_e|^2` and 1 or True where e ran, else 0, each `[T, R]`."""
    return 2 * inner + torch.where(chosen > 0, squares, -squares)


def squared_outputs(hidden: Tensor, columns: Tensor, bias: Tensor | None) -> Tensor:
    """`|d_e|^2` of E experts, without their outputs, as they have fewer neurons than outputs.

    Args:
        hidden: `[E, T, m]`.
        columns: `[E, m, D_out]`, those of `down_proj`.
        bias: `[E, D_out]`, or None.

    Returns:
        `[E, T]`.
    """
    squares = (hidden @ (columns @ columns.transpose(1, 2)) * hidden).sum(2)
    if bias is None:
        return squares
    return squares + 2 * (hidden @ (columns @ bias.unsqueeze(2))).squeeze(2) + bias.square().sum(1, keepdim=True)


def choose(logits: Tensor, top_k: int) -> Tensor:
    """`[T, R]`: 1 at the K largest of each row, else 0."""
    return torch.zeros_like(logits).scatter_(1, logits.topk(top_k, dim=1, sorted=False).indices, 1.0)


def choice_loss(logits: Tensor, gains: Tensor, top_k: int) -> Tensor:
    """`[T]`: binary cross entropy of every choice, weighted by what it is worth; `top_k` is below R."""
    worth = gains - _threshold(gains, top_k)
    side = (logits - _threshold(logits.detach(), top_k)) / _TEMPERATURE
    losses = functional.binary_cross_entropy_with_logits(side, (worth > 0).to(side.dtype), reduction="none")
    return (worth.abs() * losses).sum(1)


def _threshold(scores: Tensor, top_k: int) -> Tensor:
    """`[T, 1]`, half-way between the last that is chosen and the first that is not."""
    return scores.topk(top_k + 1, dim=1).values[:, top_k - 1 :].mean(1, keepdim=True)
