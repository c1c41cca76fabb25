"""`sparsify::expert_linear`: a linear layer whose weight is chosen by the expert that a row belongs to.

R rows (T*K of them), E num_experts, M input and N output features.
"""

from __future__ import annotations

import itertools
from typing import Any

import torch
from torch import Tensor

from sparsify.ops.autocast import cast_inputs


@torch.library.custom_op("sparsify::expert_linear", mutates_args=())
def expert_linear(rows: Tensor, weight: Tensor, bias: Tensor | None, offsets: Tensor) -> Tensor:
    """Apply `rows @ weight[e].T + bias[e]` to the rows of every expert e.

    Only the rows that an expert owns are computed. Rows from `offsets[E]` on belong to no expert and become zero.

    Args:
        rows: `[R, M]`, sorted by expert (see `sparsify::dispatch`).
        weight: `[E, N, M]`, dtype of `rows`.
        bias: `[E, N]` or None.
        offsets: `[E+1]` int32.

    Returns:
        `[R, N]`, dtype of `rows`.
    """
    out = rows.new_zeros((rows.shape[0], weight.shape[1]))
    for expert, (start, stop) in enumerate(_spans(offsets)):
        if start == stop:
            continue
        if bias is None:
            torch.mm(rows[start:stop], weight[expert].t(), out=out[start:stop])
        else:
            torch.addmm(bias[expert], rows[start:stop], weight[expert].t(), out=out[start:stop])
    return out


@expert_linear.register_fake
def _(rows: Tensor, weight: Tensor, bias: Tensor | None, offsets: Tensor) -> Tensor:
    return rows.new_empty((rows.shape[0], weight.shape[1]))


@torch.library.custom_op("sparsify::expert_linear_backward", mutates_args=())
def expert_linear_backward(
    grad: Tensor, rows: Tensor, weight: Tensor, offsets: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of `sparsify::expert_linear` for rows `[R, M]`, weight `[E, N, M]` and bias `[E, N]`."""
    grad_rows = torch.zeros_like(rows, memory_format=torch.contiguous_format)
    grad_weight = torch.zeros_like(weight, memory_format=torch.contiguous_format)
    grad_bias = weight.new_zeros(weight.shape[:2])
    for expert, (start, stop) in enumerate(_spans(offsets)):
        if start == stop:
            continue
        grad_rows[start:stop] = grad[start:stop] @ weight[expert]
        grad_weight[expert] = grad[start:stop].t() @ rows[start:stop]
        grad_bias[expert] = grad[start:stop].sum(0)
    return grad_rows, grad_weight, grad_bias


@expert_linear_backward.register_fake
def _(grad: Tensor, rows: Tensor, weight: Tensor, offsets: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    return rows.new_empty(rows.shape), weight.new_empty(weight.shape), weight.new_empty(weight.shape[:2])


def _spans(offsets: Tensor) -> list[tuple[int, int]]:
    bounds: list[int] = offsets.tolist()
    return list(itertools.pairwise(bounds))


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    rows, weight, bias, offsets = inputs
    ctx.save_for_backward(rows, weight, offsets)
    ctx.has_bias = bias is not None


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    rows, weight, offsets = ctx.saved_tensors
    grads = torch.ops.sparsify.expert_linear_backward(grad.contiguous(), rows, weight, offsets)
    grad_rows, grad_weight, grad_bias = grads
    return grad_rows, grad_weight, grad_bias if ctx.has_bias else None, None


expert_linear.register_autograd(_backward, setup_context=_setup_context)
cast_inputs("expert_linear")
