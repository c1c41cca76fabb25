"""The experts as the numbers that the compiled kernel reads them by."""

from __future__ import annotations

from torch import Tensor

from sparsify.cpu.experts import Experts

ACTIVATION_NUMBERS = {"relu": 0, "squared_relu": 1, "gelu": 2, "gelu_tanh": 3, "silu": 4}  # as in activations.h
_NO_MATRIX = (0,) * 5
NO_MATRICES = _NO_MATRIX * 3


def matrices_of(experts: Experts, size: int) -> tuple[int, ...]:
    """Of up, gate and down: pointer, bytes from expert to expert and from row to row, and the same of the bias.

    Args:
        experts: whose rows have no gaps; or the same in blocks.
        size: bytes of a value.
    """
    return (
        *_matrix(experts.up_proj, experts.up_bias, size),
        *_matrix(experts.gate_proj, experts.gate_bias, size),
        *_matrix(experts.down_proj, experts.down_bias, size),
    )


def _matrix(weight: Tensor | None, bias: Tensor | None, size: int) -> tuple[int, ...]:
    if weight is None:
        return _NO_MATRIX
    expert, row = weight.stride(0), weight.stride(-2)
    if bias is None:
        return weight.data_ptr(), expert * size, row * size, 0, 0
    return weight.data_ptr(), expert * size, row * size, bias.data_ptr(), bias.stride()[0] * size
