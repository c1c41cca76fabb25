"""The gradients of `sparsify::moe_ffn` by Triton kernels, against float64."""

from __future__ import annotations

import pytest
import torch

from sparsify.kernels.moe_triton import moe_ffn_backward_triton
from sparsify.kernels.reference import ACTIVATIONS

FP32_ERROR = 1e-5
SHAPES = [
    (5, 1, 1, 1, 1, 1),
    (7, 2, 3, 19, 23, 17),
    (37, 5, 5, 48, 40, 33),
    (130, 3, 5, 33, 131, 67),
    (150, 1, 1, 67, 71, 139),
]
NAMES = ("x", "routing_weights", "expert_ids", "up", "up_bias", "gate", "gate_bias", "down", "down_bias")


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("gated", [False, True])
def test_shapes(shape, gated, problem, relative_error):
    """Protects: masks of every dimension, unused slots, every row of the table, shapes and dtypes."""
    given = problem(*shape, gated=gated, activation="gelu")
    expected = given.to(torch.float64).backward()
    found = given.backward(moe_ffn_backward_triton)
    for name, ours, theirs, plain in zip(NAMES, found, expected, given.backward(), strict=True):
        assert ours.dtype == plain.dtype
        assert ours.is_contiguous()
        assert relative_error(ours, theirs) <= FP32_ERROR, name


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_forms(activation, gated, bias, dtype, problem, relative_error):
    """Protects: every form; in fp16 twice the error of plain fp16 ops is allowed, which round after every step."""
    given = problem(20, 2, 3, gated=gated, bias=bias, activation=activation, dtype=dtype)
    expected = given.to(torch.float64).backward()
    found = given.backward(moe_ffn_backward_triton)
    for name, ours, theirs, plain in zip(NAMES, found, expected, given.backward(), strict=True):
        allowed = FP32_ERROR if dtype == torch.float32 else 2 * relative_error(plain, theirs) + 2e-4
        assert relative_error(ours, theirs) <= allowed, name


def test_empty_experts_and_no_tokens(problem):
    """Protects: weights of experts without rows get zeros, unused slots too, in unwritten memory; T = 0."""
    found = problem(40, 1, 6, crowd=2).backward(moe_ffn_backward_triton)
    for index in (3, 4, 7, 8):
        assert not found[index][2:].any()
        assert found[index][:2].any()
    for gradient in problem(20, 2, 3, gated=True, unused=1.1).backward(moe_ffn_backward_triton):
        assert not gradient.any()
    given = problem(0, 2, 3, gated=True)
    for ours, theirs in zip(given.backward(moe_ffn_backward_triton), given.backward(), strict=True):
        assert torch.equal(ours, theirs)


KERNELS_OF = {
    "x": ["up_kernel", "hidden_grad_kernel", "down_kernel", "combine_kernel"],
    "routing_weights": ["up_kernel", "hidden_grad_kernel", "routing_grad_kernel"],
    "expert_ids": [],
    "up": ["up_kernel", "hidden_grad_kernel", "weight_grad_kernel"],
    "up_bias": ["up_kernel", "hidden_grad_kernel", "bias_grad_kernel"],
    "gate": ["up_kernel", "hidden_grad_kernel", "weight_grad_kernel"],
    "gate_bias": ["up_kernel", "hidden_grad_kernel", "bias_grad_kernel"],
    "down": ["up_kernel", "weight_grad_kernel"],
    "down_bias": ["bias_grad_kernel"],
}


@pytest.mark.parametrize("name", NAMES)
def test_one_gradient_alone(name, problem, launches):
    """Protects: frozen experts, adapters: nothing runs that is not needed, the rest is empty, values are the same."""
    given = problem(20, 2, 3, gated=True)
    index = NAMES.index(name)
    everything = given.backward(moe_ffn_backward_triton)
    launches.clear()
    found = given.backward(moe_ffn_backward_triton, [other == name for other in NAMES])
    assert launches == KERNELS_OF[name]
    assert torch.equal(found[index], everything[index])
    assert all(gradient.shape == (0,) for other, gradient in enumerate(found) if other != index)


def test_repeats_bit_by_bit(problem):
    """Protects: no atomics, no order that depends on timing."""
    given = problem(61, 3, 5, gated=True, dtype=torch.float16)
    for first, second in zip(*(given.backward(moe_ffn_backward_triton) for _ in range(2)), strict=True):
        assert torch.equal(first, second)


def test_views_as_arguments(problem, relative_error):
    """Protects: an expanded gradient, transposed weights; gradients are contiguous all the same."""
    given = problem(20, 2, 3, size=16)
    x, r, ids, up, up_bias, gate, gate_bias, down, down_bias = given.tensors
    grad = given.grad[:1, :1].expand_as(given.grad)
    up, down = (w.transpose(1, 2).contiguous().transpose(1, 2) for w in (up, down))
    tensors = (x.T.contiguous().T, r, ids, up, up_bias, gate, gate_bias, down, down_bias)
    views = type(given)(tensors, given.activation, grad)
    found = views.backward(moe_ffn_backward_triton)
    for ours, theirs in zip(found, views.to(torch.float64).backward(), strict=True):
        assert relative_error(ours, theirs) <= FP32_ERROR
        assert ours.is_contiguous()
