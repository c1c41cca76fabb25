"""Gradients of `sparsify::moe_ffn` on a CPU: by the kernel, one expert after another, or all of them with a mask.

T tokens, D hidden_size, D_out output features, E num_experts, K top_k, I neurons of one expert, F = E * I.
"""

from __future__ import annotations

import torch
from torch import Tensor

from sparsify.cpu import kernel
from sparsify.cpu.experts import Experts, project_all
from sparsify.kernels.reference import ACTIVATION_BACKWARDS, ACTIVATIONS, moe_ffn_backward_reference

_EXPERT_MACS = 4e7  # multiply-adds that take as long as starting the products of one more expert
_NARROW_EXPERT_MACS = 3e8  # of bf16, whose small products cost no less
_MOST_VALUES = 1 << 24  # in a temporary tensor
_FEW_CHOSEN = 0.7  # share of the experts: with more of them the products of all are as fast
_WIDE_EXPERT = 3e5  # weights of a projection: with more of them the products of torch are as fast


def moe_ffn_backward_cpu(
    grad: Tensor,
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
    needs: list[bool],
) -> list[Tensor]:
    """See `sparsify::moe_ffn_backward`."""
    experts = Experts(up_proj, up_bias, gate_proj, gate_bias, down_proj, down_bias, activation)
    if kernel_pays(x, expert_ids, experts):
        return kernel.run_backward(grad, x, routing_weights, expert_ids, experts, needs)
    run = dense_masked_backward if masking_pays(x, expert_ids, experts) else _by_expert
    return run(grad, x, routing_weights, expert_ids, experts, needs)


def kernel_pays(x: Tensor, expert_ids: Tensor, experts: Experts) -> bool:
    """Whether the compiled kernel computes these gradients, and faster than products of torch."""
    num_experts, width, hidden_size = experts.up_proj.shape
    small = few_and_narrow(expert_ids.shape[1], num_experts, width, max(hidden_size, experts.down_proj.shape[1]))
    return small and width > 0 and len(x) > 0 and x.dtype == torch.float32 and kernel.covers(x, experts)


def few_and_narrow(top_k: int, num_experts: int, width: int, features: int) -> bool:
    """Whether so few experts run for a token, each with so few weights, that the compiled kernel is the fastest.

    Args:
        top_k: experts that run for a token.
        num_experts: of how many.
        width: neurons of an expert.
        features: that a neuron reads, or writes.
    """
    return top_k < _FEW_CHOSEN * num_experts and width * features < _WIDE_EXPERT


def masking_pays(x: Tensor, expert_ids: Tensor, experts: Experts) -> bool:
    """Whether products over all neurons cost less than small ones for each expert."""
    num_experts, width, hidden_size = experts.up_proj.shape
    if len(x) * num_experts * width > _MOST_VALUES:
        return False
    inputs = hidden_size * (1 if experts.gate_proj is None else 2)
    macs = 3 * width * (inputs + experts.down_proj.shape[1])  # of a token in one expert
    skipped = len(x) * num_experts - expert_ids.numel()
    return skipped * macs < num_experts * (_NARROW_EXPERT_MACS if x.dtype == torch.bfloat16 else _EXPERT_MACS)


def _by_expert(
    grad: Tensor, x: Tensor, routing_weights: Tensor, expert_ids: Tensor, experts: Experts, needs: list[bool]
) -> list[Tensor]:
    return moe_ffn_backward_reference(grad, x, routing_weights, expert_ids, *experts, needs)


def dense_masked_backward(
    grad: Tensor, x: Tensor, routing_weights: Tensor, expert_ids: Tensor, experts: Experts, needs: list[bool]
) -> list[Tensor]:
    """The formulas of `moe_ffn_backward_reference` over all F neurons; what experts not chosen would add is masked."""
    up_proj, up_bias, gate_proj, gate_bias, down_proj, down_bias, activation = experts
    shape = (len(x), up_proj.shape[0], up_proj.shape[1])  # [T, E, I]
    wide = torch.float64 if x.dtype == torch.float64 else torch.float32
    used, ids = expert_ids >= 0, expert_ids.clamp(min=0)
    nothing = x.new_zeros(shape[:2], dtype=wide)
    shares = nothing.scatter_add(1, ids, routing_weights.to(wide) * used)  # [T, E]
    skipped = (nothing.scatter_add(1, ids, used.to(wide)) == 0).unsqueeze(2)  # [T, E, 1]

    def weigh(by_neuron: Tensor) -> Tensor:
        return (by_neuron.view(shape).to(wide) * shares.unsqueeze(2)).to(x.dtype).flatten(1)

    def mask(by_neuron: Tensor) -> Tensor:  # no product with 0, as a value may be infinite
        return by_neuron.view(shape).masked_fill_(skipped, 0).flatten(1)

    up = project_all(x, up_proj, up_bias)
    gate = None if gate_proj is None else project_all(x, gate_proj, gate_bias)
    d_hidden = grad @ down_proj.transpose(1, 2).flatten(0, 1).t()  # [T, F], without the routing weight
    hidden, *d_rows = (mask(rows) for rows in _through_activation(activation, weigh(d_hidden), up, gate))
    projections = [(up_proj, 3)] if gate_proj is None else [(up_proj, 3), (gate_proj, 5)]  # and place of its gradient
    sides = [(rows, *projection) for rows, projection in zip(d_rows, projections, strict=True)]
    needs = [needed and t is not None for needed, t in zip(needs, (x, routing_weights, ids, *experts[:6]), strict=True)]
    grads = [x.new_empty(0) for _ in needs]
    if needs[0]:
        grads[0] = torch.stack([rows @ weight.flatten(0, 1) for rows, weight, _ in sides]).sum(0)
    if needs[1]:
        by_expert = (d_hidden.to(wide) * hidden.to(wide)).view(shape).sum(2)  # [T, E]
        by_expert = by_expert if down_bias is None else by_expert + grad.to(wide) @ down_bias.to(wide).t()
        grads[1] = torch.where(used, by_expert.gather(1, ids), 0).to(routing_weights.dtype)
    for rows, _, place in sides:
        if needs[place]:
            grads[place] = (rows.t() @ x).view(*shape[1:], -1)
        if needs[place + 1]:
            grads[place + 1] = rows.sum(0).view(shape[1:])
    if needs[7]:
        grads[7] = (weigh(hidden).t() @ grad).view(*shape[1:], -1).transpose(1, 2).contiguous()
    if needs[8]:
        grads[8] = (shares.t() @ grad.to(wide)).to(x.dtype)
    return grads


def _through_activation(activation: str, d_hidden: Tensor, up: Tensor, gate: Tensor | None) -> tuple[Tensor, ...]:
    """`[T, F]` each: hidden, and the gradient of `up` and, where there is one, of `gate`."""
    act, act_backward = ACTIVATIONS[activation], ACTIVATION_BACKWARDS[activation]
    if gate is None:
        return act(up), act_backward(d_hidden, up)
    acted = act(gate)
    return acted * up, d_hidden * acted, act_backward(d_hidden * up, gate)
