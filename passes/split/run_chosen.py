"""Only the neurons that run for a token, forward and backward, by the compiled kernel: for the training of a block.

T tokens, D hidden_size, K units that run for a token, U units of m neurons.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from sparsify.cpu import kernel
from sparsify.cpu.backward import few_and_narrow
from sparsify.cpu.blocks import in_blocks, stay_in_rows
from sparsify.cpu.experts import Experts as Weights
from sparsify.kernels.reference import ACTIVATIONS
from sparsify.passes.activation import name_activation
from sparsify.passes.split.experts import Experts

RunChosen = Callable[[Tensor, Tensor, Sequence[Tensor], Sequence[Tensor | None], Tensor], Tensor]


def run_chosen(experts: Experts, x: Tensor, chosen: int, units: int) -> RunChosen | None:
    """How to run some units, or None where products of all neurons are faster, or the kernel cannot.

    Args:
        experts: the split.
        x: tokens as they will come, `[T, D]`.
        chosen: units that run for a token, shared ones among them.
        units: all of them.

    Returns:
        Takes x `[T, D]`, the units `[T, K]` of each token, projections `[U, m, D]` and their biases `[U, m]` in the
        order of `experts`, and down `[U, m, D_out]`; gives `[T, D_out]`.
    """
    found = name_activation(experts.activation, len(experts.projections), len(experts.vectors))
    _, outputs, size = experts.down.shape
    if found.name not in ACTIVATIONS or experts.sizes is not None:
        return None
    if not few_and_narrow(chosen, units, size, max(x.shape[1], outputs)):
        return None
    if x.device.type != "cpu" or x.dtype != torch.float32 or not kernel.kernel_status().threaded:
        return None
    places = [0] if found.gate is None else [1 - found.gate, found.gate]

    def run(
        x: Tensor, ids: Tensor, projections: Sequence[Tensor], biases: Sequence[Tensor | None], down: Tensor
    ) -> Tensor:
        up, *gate = [(projections[place], biases[place]) for place in places]
        return _RunChosen.apply(x, ids, *up, *(gate[0] if gate else (None, None)), down, found.name)

    return run


class _RunChosen(torch.autograd.Function):
    """`sparsify::moe_ffn` with weights of one for all routing, and `down` by neuron, `[U, m, D_out]`."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, ids: Tensor, up: Tensor, up_bias: Tensor | None, gate: Tensor | None,
        gate_bias: Tensor | None, down: Tensor, activation: str,
    ) -> Tensor:  # fmt: skip
        weights = Weights(up, up_bias, gate, gate_bias, down.transpose(1, 2), None, activation)
        ctx.save_for_backward(x, ids, *weights[:5])
        ctx.activation = activation
        blocks = weights._replace(down_proj=down.unsqueeze(1))
        if not stay_in_rows(up.shape[1]):
            blocks = blocks._replace(up_proj=in_blocks(up), gate_proj=None if gate is None else in_blocks(gate))
        return kernel.run(x, x.new_ones(ids.shape), ids, weights, blocks, new=True)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        x, ids, up, up_bias, gate, gate_bias, down = ctx.saved_tensors
        weights = Weights(up, up_bias, gate, gate_bias, down, None, ctx.activation)
        needs = [False, False, False, *(part is not None for part in weights[:6])]
        made = kernel.run_backward(grad.contiguous(), x, x.new_ones(ids.shape), ids, weights, needs)
        grads = [made[place] if needs[place] else None for place in range(3, 7)]
        return None, None, *grads, made[7].transpose(1, 2), None
