"""`sparsify::combine`: bring the expert outputs back to their tokens and add them up, weighted.

T tokens, D hidden_size, K top_k. Sums run over the K slots in a fixed order and in fp32, so results repeat bit by bit.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


@torch.library.custom_op("sparsify::combine", mutates_args=())
def combine(rows: Tensor, routing_weights: Tensor, order: Tensor) -> Tensor:
    """Compute `y[t] = sum_k routing_weights[t, k] * rows[place of pair t*K + k]`.

    Args:
        rows: `[T*K, D]`, sorted by expert.
        routing_weights: `[T, K]`, any floating dtype.
        order: `[T*K]` int64, from `sparsify::dispatch`.

    Returns:
        `[T, D]`, dtype of `rows`.
    """
    by_slot = rows.index_select(0, _inverse(order)).view(*routing_weights.shape, rows.shape[1])  # [T, K, D]
    wide = _accumulation_dtype(rows.dtype)
    weighted = by_slot.to(wide) * routing_weights.to(wide).unsqueeze(-1)
    return weighted.sum(1).to(rows.dtype)


@combine.register_fake
def _(rows: Tensor, routing_weights: Tensor, order: Tensor) -> Tensor:
    return rows.new_empty((routing_weights.shape[0], rows.shape[1]))


@torch.library.custom_op("sparsify::combine_backward", mutates_args=())
def combine_backward(grad: Tensor, rows: Tensor, routing_weights: Tensor, order: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients of `sparsify::combine` for rows `[T*K, D]` and routing_weights `[T, K]`."""
    num_tokens, top_k = routing_weights.shape
    grad_rows = grad.index_select(0, order.div(max(top_k, 1), rounding_mode="floor"))  # [T*K, D]
    wide = _accumulation_dtype(rows.dtype)
    row_dots = (grad_rows.to(wide) * rows.to(wide)).sum(-1)  # [T*K], by sorted place
    grad_weights = row_dots.index_select(0, _inverse(order)).view(num_tokens, top_k)
    row_weights = routing_weights.reshape(-1).index_select(0, order).to(wide)
    grad_rows = (grad_rows.to(wide) * row_weights.unsqueeze(-1)).to(rows.dtype)
    return grad_rows, grad_weights.to(routing_weights.dtype)


@combine_backward.register_fake
def _(grad: Tensor, rows: Tensor, routing_weights: Tensor, order: Tensor) -> tuple[Tensor, Tensor]:
    return rows.new_empty(rows.shape), routing_weights.new_empty(routing_weights.shape)


def _inverse(order: Tensor) -> Tensor:
    """The sorted place of every pair: `inverse[order[i]] = i`."""
    inverse = torch.empty_like(order)
    inverse[order] = torch.arange(order.numel(), device=order.device)
    return inverse


def _accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    rows, routing_weights, order = inputs
    ctx.save_for_backward(rows, routing_weights, order)


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    rows, routing_weights, order = ctx.saved_tensors
    grads = torch.ops.sparsify.combine_backward(grad.contiguous(), rows, routing_weights, order)
    grad_rows, grad_weights = grads
    return grad_rows, grad_weights, None


combine.register_autograd(_backward, setup_context=_setup_context)
