"""Call the compiled gradients of `sparsify::moe_ffn`, on data pointers.

T tokens, D hidden_size, D_out output features, E num_experts, K top_k, I neurons of one expert.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from sparsify.cpu.experts import Experts
from sparsify.cpu.matrices import ACTIVATION_NUMBERS, matrices_of

_PACK = struct.Struct("40q").pack
_SLICE = 64  # neurons of a task: OUTPUTS in blocks.h


def call_backward(
    call: Callable[[bytes], int],
    grad: Tensor,
    x: Tensor,
    routing_weights: Tensor,
    expert_ids: Tensor,
    experts: Experts,
    needs: Sequence[bool],
    *,
    threads: int,
    parallel: int,
    poison: bool,
) -> tuple[int, list[Tensor]]:
    """See `sparsify::moe_ffn_backward`; all in fp32 but the routing weights.

    Args:
        call: `sparsify_moe_ffn_backward`.
        grad: `[T, D_out]`, T > 0.
        x: as in the forward, and so are `routing_weights`, `expert_ids` and `experts`.
        routing_weights: see `x`.
        expert_ids: see `x`.
        experts: see `x`; down_proj may be a view of `[E, I, D_out]`, and its gradient is one too then.
        needs: nine flags.
        threads: to run on.
        parallel: address of what runs a function in threads.
        poison: memory that was never written is NaN.

    Returns:
        What the kernel says, and the gradients where that is 0.
    """
    (num_experts, width, hidden_size), outputs = experts.up_proj.shape, experts.down_proj.shape[1]
    # The kernel reads the memory of what is named here.
    x = x if x.stride(1) == 1 else x.contiguous()
    weights, ids = routing_weights.float().contiguous(), expert_ids.contiguous()
    grads = [
        x.new_empty(tensor.shape if needed and tensor is not None else 0, dtype=torch.float32)
        for tensor, needed in zip((x, None, None, *experts[:6]), needs, strict=True)
    ]
    parts = x.new_zeros((-(-width // _SLICE), *ids.shape)) if needs[1] else x.new_empty(0)
    by_neuron = lies_by_neuron(experts.down_proj)
    if by_neuron:
        experts = experts._replace(down_proj=experts.down_proj.transpose(1, 2))
        grads[7] = grads[7].view(num_experts, width, outputs).transpose(1, 2) if needs[7] else grads[7]
    d_x, _, _, *d_experts = grads
    made = [tensor.data_ptr() for tensor in (d_x, parts, *d_experts)]
    packed = _PACK(
        x.data_ptr(), x.stride(0) * 4, weights.data_ptr(), ids.data_ptr(), grad.data_ptr(), grad.stride(0) * 4,
        len(x), hidden_size, width, outputs, num_experts, ids.shape[1], ACTIVATION_NUMBERS[experts.activation],
        threads, poison, parallel, *matrices_of(experts, 4), *made, by_neuron,
    )  # fmt: skip
    status = call(packed)
    if status:
        return status, []
    if needs[1]:
        grads[1] = parts.sum(0).to(routing_weights.dtype)
    return status, grads


def lies_by_neuron(down_proj: Tensor) -> bool:
    """`[E, D_out, I]` as a view of `[E, I, D_out]`."""
    return down_proj.stride(2) != 1 and down_proj.stride(1) == 1
