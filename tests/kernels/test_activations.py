"""`sparsify.kernels.activations` against float64, at values where formulas overflow too."""

from __future__ import annotations

import pytest
import torch
import triton
import triton.language as tl

from sparsify.kernels import common
from sparsify.kernels.activations import activate, activation_slope
from sparsify.kernels.reference import ACTIVATION_BACKWARDS, ACTIVATIONS


@triton.jit
def activations_kernel(z_ptr, value_ptr, slope_ptr, size, ACTIVATION: tl.constexpr, BLOCK: tl.constexpr):
    at = tl.arange(0, BLOCK)
    z = tl.load(z_ptr + at, mask=at < size, other=0.0)
    tl.store(value_ptr + at, activate(z, ACTIVATION), mask=at < size)
    tl.store(slope_ptr + at, activation_slope(z, ACTIVATION), mask=at < size)


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_values_and_slopes(activation, device):
    """Protects: value and derivative of each, finite far out, NaN for NaN."""
    z = torch.cat([torch.linspace(-9, 9, 91), torch.tensor([-1e4, -100, 100, 1e4, torch.nan])]).to(device)
    value, slope = torch.empty_like(z), torch.empty_like(z)
    common.launch(activations_kernel, 1, z, value, slope, z.numel(), ACTIVATION=activation, BLOCK=128)
    wide = z.double()[:-1]
    expected_slope = ACTIVATION_BACKWARDS[activation](torch.ones_like(wide), wide)
    torch.testing.assert_close(value[:-1].double(), ACTIVATIONS[activation](wide), rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(slope[:-1].double(), expected_slope, rtol=1e-6, atol=1e-6)
    assert value[-1].isnan()
