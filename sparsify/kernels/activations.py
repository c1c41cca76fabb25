"""The activations of `sparsify.kernels.reference.ACTIVATIONS` and their derivatives, on fp32 values in registers."""

# Arguments of kernels are pointers and scalars on the device, which have no type in Python.
# pyright: reportMissingParameterType=false

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def activate(z, ACTIVATION: tl.constexpr):
    """`act(z)`. NaN stays NaN."""
    tl.static_assert(
        (ACTIVATION == "relu")
        | (ACTIVATION == "squared_relu")
        | (ACTIVATION == "gelu")
        | (ACTIVATION == "gelu_tanh")
        | (ACTIVATION == "silu")
    )
    if ACTIVATION == "relu":
        a = tl.where(z < 0.0, 0.0, z)
    elif ACTIVATION == "squared_relu":
        a = tl.where(z < 0.0, 0.0, z * z)
    elif ACTIVATION == "gelu":
        a = 0.5 * z * (1.0 + tl.erf(z * 0.7071067811865476))
    elif ACTIVATION == "gelu_tanh":
        a = z * _tanh_gate(z)
    else:
        a = z * _logistic(z)
    return a


@triton.jit
def activation_slope(z, ACTIVATION: tl.constexpr):
    """`act'(z)`."""
    if ACTIVATION == "relu":
        slope = tl.where(z > 0.0, 1.0, 0.0)
    elif ACTIVATION == "squared_relu":
        slope = tl.where(z > 0.0, 2.0 * z, 0.0)
    elif ACTIVATION == "gelu":
        density = 0.3989422804014327 * tl.exp(-0.5 * z * z)
        slope = 0.5 * (1.0 + tl.erf(z * 0.7071067811865476)) + z * density
    elif ACTIVATION == "gelu_tanh":
        gate = _tanh_gate(z)
        inner_slope = 1.5957691216057308 + 0.21406444881780076 * z * z
        slope = gate * (1.0 + z * (1.0 - gate) * inner_slope)
    else:
        gate = _logistic(z)
        slope = gate * (1.0 + z * (1.0 - gate))
    return slope


@triton.jit
def _tanh_gate(z):
    """`(1 + tanh(u)) / 2` with `u = sqrt(2 / pi) (z + 0.044715 z^3)`, which is the logistic function of `2 u`."""
    return _logistic(1.5957691216057308 * (z + 0.044715 * z * z * z))


@triton.jit
def _logistic(u):
    return 1.0 / (1.0 + tl.exp(-u))
