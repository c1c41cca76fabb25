"""`sparsify::moe_ffn` on a CPU: the form that the cost model names, or the reference for what no form covers."""

from __future__ import annotations

import functools

import torch
from torch import Tensor, nn

from sparsify.cpu import kernel, packed
from sparsify.cpu.blocks import experts_in_blocks, kept_blocks
from sparsify.cpu.cost_model import Costs, FFNShape, available_forms, current_costs
from sparsify.cpu.experts import Experts
from sparsify.cpu.forms import FORMS
from sparsify.kernels.reference import moe_ffn_reference

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_FEW = 64  # so many slots are counted faster in Python than by torch ops


def moe_ffn_cpu(
    x: Tensor,
    routing_weights: Tensor,
    expert_ids: Tensor,
    up_proj: Tensor,
    up_bias: Tensor | None,
    gate_proj: Tensor | None,
    gate_bias: Tensor | None,
    down_proj: Tensor,
    down_bias: Tensor | None,
    activation: str,
) -> Tensor:
    """See `sparsify::moe_ffn`."""
    if x.dtype not in _DTYPES or up_proj.dtype != x.dtype:
        return moe_ffn_reference(
            x, routing_weights, expert_ids, up_proj, up_bias, gate_proj, gate_bias, down_proj, down_bias, activation
        )
    if not expert_ids.numel() or not down_proj.shape[1]:
        return x.new_zeros((x.shape[0], down_proj.shape[1]))
    experts = Experts(up_proj, up_bias, gate_proj, gate_bias, down_proj, down_bias, activation)
    form = choose_form(x, expert_ids, experts, blocks=_may_keep(x, routing_weights, experts))
    if form == "fused_blocks":
        y = _in_blocks(x, routing_weights, expert_ids, experts)
        if y is not None:
            return y
        form = choose_form(x, expert_ids, experts, blocks=False)
    if form == "fused":
        return kernel.run(x, routing_weights, expert_ids, experts)
    if form == "fused_new_blocks":
        return kernel.run(x, routing_weights, expert_ids, experts, experts_in_blocks(experts), new=True)
    return FORMS[form](x, routing_weights, expert_ids, experts)


def _may_keep(x: Tensor, routing_weights: Tensor, experts: Experts) -> bool:
    """Whether a copy of the weights may serve later calls: they are parameters, which no one trains in this call."""
    trained = x.requires_grad or routing_weights.requires_grad
    return not trained and all(isinstance(weight, nn.Parameter) for weight in experts.weights)


def _in_blocks(x: Tensor, routing_weights: Tensor, expert_ids: Tensor, experts: Experts) -> Tensor | None:
    """None where the weights are being changed, so that a copy would not last."""
    blocks = kept_blocks(experts)
    try:
        return None if blocks is None else kernel.run(x, routing_weights, expert_ids, experts, blocks)
    except kernel.StaleBlocksError:
        for weight in experts.weights:
            packed.forget(weight)
        return None


def choose_form(x: Tensor, expert_ids: Tensor, experts: Experts, *, blocks: bool = True) -> str:
    """The form for these sizes and slots in use; the same for the same numbers, options and file of costs.

    Args:
        x: `[T, D]`.
        expert_ids: `[T, K]`.
        experts: the weights.
        blocks: `fused_blocks` may be chosen, else `fused_new_blocks`.
    """
    num_experts, width, hidden_size = experts.up_proj.shape
    tokens = len(x)
    top_k = max(1, -(-_used_slots(expert_ids) // tokens))  # slots may be many and most of them unused
    return _choose(
        current_costs(), tokens, hidden_size, width, experts.down_proj.shape[1], num_experts, top_k,
        experts.gate_proj is not None, x.dtype, kernel.covers(x, experts), blocks, torch.get_num_threads(),
    )  # fmt: skip


def _used_slots(expert_ids: Tensor) -> int:
    if expert_ids.numel() > _FEW:
        return int((expert_ids >= 0).sum())
    return len([slot for slot in expert_ids.flatten().tolist() if slot >= 0])


@functools.lru_cache(maxsize=4096)
def _choose(
    costs: Costs, tokens: int, hidden_size: int, width: int, out_features: int, num_experts: int, top_k: int,
    gated: bool, dtype: torch.dtype, covered: bool, blocks: bool, threads: int,
) -> str:  # fmt: skip
    shape = FFNShape(hidden_size, width * num_experts, out_features, num_experts, top_k, gated, dtype)
    forms = [form for form in available_forms(dtype) if covered or not form.startswith("fused")]
    if not blocks:
        forms = ["fused_new_blocks" if form == "fused_blocks" else form for form in forms]
    return costs.experts(shape, tokens, forms)[0]
