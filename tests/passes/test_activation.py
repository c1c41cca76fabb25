"""`name_activation`: the name follows from the values, not from the spelling."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as functional
from torch.fx import symbolic_trace

from sparsify.passes.activation import name_activation

PLAIN = {
    "relu": lambda a: a.clamp(min=0),
    "squared_relu": lambda a: torch.relu(a) * torch.relu(a),
    "gelu": lambda a: a * 0.5 * (1.0 + torch.erf(a / math.sqrt(2.0))),
    "gelu_tanh": lambda a: 0.5 * a * (1 + torch.tanh(math.sqrt(2 / math.pi) * (a + 0.044715 * a**3))),
    "quick_gelu": lambda a: a * torch.sigmoid(1.702 * a),
    "silu": lambda a: a / (1 + torch.exp(-a)),
    "mish": lambda a: a * torch.tanh(functional.softplus(a)),
    "custom": lambda a: torch.sin(a),
}
# Equal to a known one near zero alone.
CLAMPED = {
    "relu6": functional.relu6,
    "relu, clamped far out": lambda a: torch.relu(a).clamp(max=2.0**14),
    "gelu, clamped below": lambda a: functional.gelu(a).clamp(max=100),
    "silu, clamped": lambda a: functional.silu(a.clamp(-50, 50)),
}


@pytest.mark.parametrize("name", PLAIN)
def test_plain(name: str) -> None:
    """Protects: hand-written activations are recognised, and exact GELU is told from its tanh form."""
    assert name_activation(symbolic_trace(PLAIN[name]), 1, 0).name == name


@pytest.mark.parametrize("name", CLAMPED)
def test_clamped(name: str) -> None:
    """Protects: what differs for large values only is another function, as a gate on either side too."""
    function = CLAMPED[name]
    for projections, written in ((1, function), (2, lambda a, b: function(a) * b), (2, lambda a, b: a * function(b))):
        assert name_activation(symbolic_trace(written), projections, 0).name == "custom"


GATED: dict[str, tuple[Callable[..., torch.Tensor], str, int]] = {
    "gate first": (lambda a, b: functional.silu(a) * b, "silu", 0),
    "gate second": (lambda a, b: a * functional.gelu(b), "gelu", 1),
    "neither known": (lambda a, b: a * torch.sin(b), "custom", 1),
    "bilinear": (lambda a, b: a * b, "custom", 0),
}


@pytest.mark.parametrize("case", GATED)
def test_gated(case: str) -> None:
    """Protects: which of the two projections is the gate."""
    function, name, gate = GATED[case]
    named = name_activation(symbolic_trace(function), 2, 0)
    assert (named.name, named.gate) == (name, gate)
