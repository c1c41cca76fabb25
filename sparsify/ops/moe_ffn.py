"""`sparsify::moe_ffn`: dispatch, experts and combine of an FFN with a known activation, as one op.

T tokens, D hidden_size, D_out output features, E num_experts, K top_k, I neurons of one expert.

    y[t] = sum_k routing_weights[t, k] * (hidden_e @ down_proj[e].T + down_bias[e]),   e = expert_ids[t, k]
    hidden_e = act(x[t] @ up_proj[e].T + up_bias[e])                                                  plain
    hidden_e = act(x[t] @ gate_proj[e].T + gate_bias[e]) * (x[t] @ up_proj[e].T + up_bias[e])         gated
"""

from __future__ import annotations

import functools
import warnings
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from sparsify.kernels.reference import ACTIVATIONS, moe_ffn_backward_reference, moe_ffn_reference
from sparsify.ops.autocast import cast_inputs


@functools.cache
def _triton_kernels() -> ModuleType | None:
    """The GPU kernels, imported on first use: sparsify itself needs no Triton. None, and a warning, without it."""
    try:
        from sparsify.kernels import moe_triton
    except ImportError as error:
        warnings.warn(
            f"Triton cannot be imported ({error}): experts on this GPU run one after another as plain PyTorch ops, "
            "which is slow; install triton (on Windows triton-windows)",
            stacklevel=2,
        )
        return None
    return moe_triton


def _check_activation(activation: str) -> None:
    if activation not in ACTIVATIONS:
        raise ValueError(f"activation must be one of {', '.join(ACTIVATIONS)}, got {activation!r}")


@torch.library.custom_op("sparsify::moe_ffn", mutates_args=())
def moe_ffn(
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
    """Run the chosen experts of every token and add up their outputs.

    Args:
        x: `[T, D]`.
        routing_weights: `[T, K]`, any floating dtype.
        expert_ids: `[T, K]` int64 in `[-1, E)`; -1 is a slot that is not used.
        up_proj: `[E, I, D]`, dtype of `x`.
        up_bias: `[E, I]` or None.
        gate_proj: `[E, I, D]` of a gated FFN, else None.
        gate_bias: `[E, I]` or None.
        down_proj: `[E, D_out, I]`.
        down_bias: `[E, D_out]` or None.
        activation: a key of `ACTIVATIONS`; of the gate where there is one.

    Returns:
        `[T, D_out]`, dtype of `x`.

    Raises:
        ValueError: the activation is not known.
    """
    _check_activation(activation)
    return moe_ffn_reference(
        x, routing_weights, expert_ids, up_proj, up_bias, gate_proj, gate_bias, down_proj, down_bias, activation
    )


# Not `register_kernel`, whose checks are dear for one token. Without `disable`, Dynamo would trace into this from eager
# code within a compiled function.
@torch.library.impl("sparsify::moe_ffn", "cpu")
@torch.compiler.disable
def _moe_ffn_cpu(
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
    from sparsify.cpu.run import moe_ffn_cpu  # not before it is needed

    _check_activation(activation)
    return moe_ffn_cpu(
        x, routing_weights, expert_ids, up_proj, up_bias, gate_proj, gate_bias, down_proj, down_bias, activation
    )


@moe_ffn.register_kernel("cuda")
def _moe_ffn_cuda(
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
    _check_activation(activation)
    kernels = _triton_kernels()
    run = moe_ffn_reference if kernels is None else kernels.moe_ffn_triton
    return run(x, routing_weights, expert_ids, up_proj, up_bias, gate_proj, gate_bias, down_proj, down_bias, activation)


@moe_ffn.register_fake
def _(
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
    return x.new_empty((x.shape[0], down_proj.shape[1]))


@torch.library.custom_op("sparsify::moe_ffn_backward", mutates_args=())
def moe_ffn_backward(
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
    """Gradients of `sparsify::moe_ffn` for its nine tensors, in their order.

    Args:
        grad: `[T, D_out]`, contiguous.
        x: as in the forward, and so are all up to `activation`.
        routing_weights: see `x`.
        expert_ids: see `x`.
        up_proj: see `x`.
        up_bias: see `x`.
        gate_proj: see `x`.
        gate_bias: see `x`.
        down_proj: see `x`.
        down_bias: see `x`.
        activation: see `x`.
        needs: nine flags; a gradient that is not needed (or is of a tensor that is None) is not computed, and empty.

    Returns:
        Nine tensors, each of the shape and dtype of its input, or `[0]`.
    """
    return moe_ffn_backward_reference(
        grad, x, routing_weights, expert_ids, up_proj, up_bias, gate_proj, gate_bias, down_proj, down_bias,
        activation, needs,
    )  # fmt: skip


@moe_ffn_backward.register_kernel("cpu")
def _moe_ffn_backward_cpu(
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
    from sparsify.cpu.backward import moe_ffn_backward_cpu  # not before it is needed

    return moe_ffn_backward_cpu(
        grad, x, routing_weights, expert_ids, up_proj, up_bias, gate_proj, gate_bias, down_proj, down_bias,
        activation, needs,
    )  # fmt: skip


@moe_ffn_backward.register_kernel("cuda")
def _moe_ffn_backward_cuda(
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
    kernels = _triton_kernels()
    run = moe_ffn_backward_reference if kernels is None else kernels.moe_ffn_backward_triton
    return run(
        grad, x, routing_weights, expert_ids, up_proj, up_bias, gate_proj, gate_bias, down_proj, down_bias,
        activation, needs,
    )  # fmt: skip


@moe_ffn_backward.register_fake
def _(
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
    inputs = (x, routing_weights, expert_ids, up_proj, up_bias, gate_proj, gate_bias, down_proj, down_bias)
    return [
        x.new_empty(0) if tensor is None or not needed else tensor.new_empty(tensor.shape)
        for tensor, needed in zip(inputs, needs, strict=True)
    ]


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    *tensors, activation = inputs
    ctx.save_for_backward(*tensors)
    ctx.activation = activation


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    tensors = ctx.saved_tensors
    needs = [tensor is not None and needed for tensor, needed in zip(tensors, ctx.needs_input_grad[:9], strict=True)]
    grads = torch.ops.sparsify.moe_ffn_backward(grad.contiguous(), *tensors, ctx.activation, needs)
    return *(g if needed else None for g, needed in zip(grads, needs, strict=True)), None


moe_ffn.register_autograd(_backward, setup_context=_setup_context)
cast_inputs("moe_ffn", kept=frozenset({1}))  # routing weights are summed in fp32 in any case
