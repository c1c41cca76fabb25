"""The forward of `sparsify::moe_ffn` by Triton kernels, against float64."""

from __future__ import annotations

import importlib
from typing import Any

import numpy as np
import pytest
import torch

from sparsify.kernels.moe_triton import moe_ffn_backward_triton, moe_ffn_triton
from sparsify.kernels.reference import ACTIVATIONS, moe_ffn_reference

FP32_ERROR = 1e-5
# The package holds the op under the name of its module.
op = importlib.import_module("sparsify.ops.moe_ffn")
# T, K, E, D, I, D_out: each row of the table of tiles, primes, K = 1, K = E, E = 1, a tile that is full.
SHAPES = [
    (5, 1, 1, 1, 1, 1),
    (7, 2, 3, 19, 23, 17),
    (64, 1, 4, 64, 64, 64),
    (37, 5, 5, 48, 40, 33),
    (130, 3, 5, 33, 131, 67),
    (150, 1, 1, 67, 71, 139),
]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("gated", [False, True])
def test_shapes(shape, gated, problem, relative_error):
    """Protects: masks of every dimension, unused slots, every row of the table."""
    given = problem(*shape, gated=gated, activation="silu")
    expected = given.to(torch.float64).forward()
    assert relative_error(given.forward(moe_ffn_triton), expected) <= FP32_ERROR


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("bias", [False, True])
def test_forms_in_fp16(activation, gated, bias, problem, relative_error):
    """Protects: every form; twice the error of plain fp16 ops is allowed, which round after every step."""
    given = problem(20, 2, 3, gated=gated, bias=bias, activation=activation, dtype=torch.float16)
    expected = given.to(torch.float64).forward()
    plain = relative_error(given.forward(), expected)
    assert relative_error(given.forward(moe_ffn_triton), expected) <= 2 * plain + 1e-4


@pytest.mark.parametrize("top_k", [1, 2])
def test_no_experts_and_no_tokens(top_k, problem):
    """Protects: all slots unused give zeros, in unwritten memory; T = 0 and K = 0 launch nothing."""
    found = problem(20, top_k, 3, unused=1.1).forward(moe_ffn_triton)
    assert torch.equal(found, torch.zeros_like(found))
    assert problem(0, top_k, 3).forward(moe_ffn_triton).shape == (0, 17)
    assert not problem(6, 0, 3).forward(moe_ffn_triton).any()


def test_one_crowded_expert(problem, relative_error):
    """Protects: experts without rows have no tiles, one with all rows has many."""
    given = problem(90, 1, 7, crowd=1, unused=0.0)
    assert relative_error(given.forward(moe_ffn_triton), given.to(torch.float64).forward()) <= FP32_ERROR


def test_repeats_bit_by_bit(problem):
    """Protects: no atomics, no order that depends on timing."""
    given = problem(61, 3, 5, gated=True, dtype=torch.float16)
    first, second = given.forward(moe_ffn_triton), given.forward(moe_ffn_triton)
    assert torch.equal(first, second)


def test_number_of_launches(problem, launches):
    """Protects: three kernels, two where each token has one row."""
    problem(20, 2, 3).forward(moe_ffn_triton)
    problem(20, 1, 3).forward(moe_ffn_triton)
    assert launches == ["up_kernel", "down_kernel", "combine_kernel", "up_kernel", "down_kernel"]


def test_views_as_arguments(problem, relative_error):
    """Protects: expanded and transposed inputs, a projection that is half of another tensor."""
    given = problem(20, 2, 3, size=16)
    x, r, ids, up, up_bias, _, _, down, down_bias = given.tensors
    assert up is not None
    both = torch.cat([up, up], 1)
    views: list[Any] = [
        x.T.contiguous().T, r[:, :1].expand(-1, 2), ids, both[:, :23], up_bias[:1].expand(3, -1), both[:, 23:], None,
        down.transpose(1, 2).contiguous().transpose(1, 2), down_bias, "gelu",
    ]  # fmt: skip
    wide: list[Any] = [t.double() if isinstance(t, torch.Tensor) and t.is_floating_point() else t for t in views]
    expected = moe_ffn_reference(*wide)
    assert relative_error(moe_ffn_triton(*views), expected) <= FP32_ERROR


@pytest.mark.parametrize("tokens", [2, 20])
def test_offsets_beyond_32_bits(tokens, problem, relative_error, device):
    """Protects: `e * stride`, `row * stride`, `k * stride` in 64 bits. Of 4 GiB only some pages are ever touched."""
    given = problem(tokens, 2, 3, dtype=torch.float16, unused=0.0)
    x, r, ids, up, up_bias, _, _, down, down_bias = given.tensors
    size = 2**31 + 2**18
    if device.type == "cuda":
        reserved = torch.zeros(size, dtype=torch.float16, device=device)
    else:
        reserved = torch.from_numpy(np.zeros(size, dtype=np.float16))
    far_x = torch.as_strided(reserved, x.shape, (2**31 // (tokens - 1) + 1, 1), 2**10)
    far_up = torch.as_strided(reserved, up.shape, (2**30, up.shape[2], 1), 2**12)
    far_down = torch.as_strided(reserved, down.shape, (1, down.shape[0], 2**31 // (down.shape[2] - 1) + 1), 2**14)
    for far, near in ((far_x, x), (far_up, up), (far_down, down)):
        far.copy_(near)
        assert sum((n - 1) * stride for n, stride in zip(far.shape, far.stride(), strict=True)) >= 2**31
    found = moe_ffn_triton(far_x, r, ids, far_up, up_bias, None, None, far_down, down_bias, "gelu")
    assert torch.equal(found, given.forward(moe_ffn_triton))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_the_cuda_key_of_the_ops(dtype, problem, launches):
    """Protects: what CUDA tensors reach runs kernels, and plain ops for fp64; an unknown activation is refused."""
    given = problem(20, 2, 3, gated=True, dtype=dtype)
    torch.testing.assert_close(given.forward(op._moe_ffn_cuda), given.forward(), rtol=1e-5, atol=1e-5)
    for found, expected in zip(given.backward(op._moe_ffn_backward_cuda), given.backward(), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    assert bool(launches) == (dtype == torch.float32)
    with pytest.raises(ValueError, match="activation must be one of relu"):
        op._moe_ffn_cuda(*given.tensors, "mish")


def test_both_ops_have_a_cuda_kernel():
    """Protects: the registration itself, which no CPU tensor reaches."""
    assert torch._C._dispatch_has_kernel_for_dispatch_key("sparsify::moe_ffn", "CUDA")
    assert torch._C._dispatch_has_kernel_for_dispatch_key("sparsify::moe_ffn_backward", "CUDA")
    assert moe_ffn_backward_triton is op._triton_kernels().moe_ffn_backward_triton
