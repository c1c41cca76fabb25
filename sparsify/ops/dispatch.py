"""`sparsify::dispatch`: gather every (token, slot) pair into rows sorted by expert. Dropless; no shape depends on data.

T tokens, D hidden_size, E num_experts, K top_k.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


@torch.library.custom_op("sparsify::dispatch", mutates_args=())
def dispatch(x: Tensor, expert_ids: Tensor, num_experts: int) -> tuple[Tensor, Tensor, Tensor]:
    """Gather the tokens of every expert into adjacent rows.

    Args:
        x: `[T, D]`, any floating dtype.
        expert_ids: `[T, K]` int64 in `[-1, num_experts)`; -1 is a slot that is not used.
        num_experts: E.

    Returns:
        rows: `[T*K, D]`, sorted by expert, stable in the token; unused slots come last.
        order: `[T*K]` int64, the pair `t*K + k` that each row came from.
        offsets: `[E+1]` int32; the rows of expert e are `offsets[e]:offsets[e+1]`.

    Raises:
        IndexError: an id is outside `[-1, num_experts)` (checked on the CPU only, as a GPU would have to synchronise).
    """
    top_k = expert_ids.shape[1]
    ids = expert_ids.reshape(-1)  # [T*K]
    if ids.device.type == "cpu" and ids.numel() > 0:
        _check_range(ids, num_experts)
    key = torch.where(ids < 0, num_experts, ids)
    order = torch.argsort(key, stable=True)  # [T*K]
    rows = x.index_select(0, order.div(max(top_k, 1), rounding_mode="floor"))  # [T*K, D]
    tokens_per_expert = torch.zeros(num_experts + 1, dtype=torch.int64, device=ids.device)
    tokens_per_expert.scatter_add_(0, key, torch.ones_like(key))
    offsets = torch.zeros(num_experts + 1, dtype=torch.int32, device=ids.device)
    offsets[1:] = tokens_per_expert[:num_experts].cumsum(0)
    return rows, order, offsets


@dispatch.register_fake
def _(x: Tensor, expert_ids: Tensor, num_experts: int) -> tuple[Tensor, Tensor, Tensor]:
    pairs = expert_ids.shape[0] * expert_ids.shape[1]
    return (
        x.new_empty((pairs, x.shape[1])),
        expert_ids.new_empty((pairs,), dtype=torch.int64),
        expert_ids.new_empty((num_experts + 1,), dtype=torch.int32),
    )


def _check_range(ids: Tensor, num_experts: int) -> None:
    low, high = (int(bound) for bound in torch.aminmax(ids))
    if low < -1 or high >= num_experts:
        raise IndexError(f"expert_ids must lie in [-1, {num_experts}), got values from {low} to {high}")


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    _, expert_ids, _ = inputs
    _, order, _ = output
    ctx.save_for_backward(order)
    ctx.top_k = expert_ids.shape[1]
    ctx.num_tokens = expert_ids.shape[0]
    ctx.set_materialize_grads(False)


def _backward(ctx: Any, grad_rows: Tensor | None, *_: object) -> tuple[Tensor | None, ...]:
    if grad_rows is None:
        return None, None, None
    (order,) = ctx.saved_tensors
    ones = grad_rows.new_ones((ctx.num_tokens, ctx.top_k))
    return torch.ops.sparsify.combine(grad_rows.contiguous(), ones, order), None, None


dispatch.register_autograd(_backward, setup_context=_setup_context)
