"""Small FFNs and tokens for the tests of the split."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from sparsify.passes.capture import capture
from sparsify.passes.match_ffn import match_ffn
from sparsify.passes.normalize_linear import NormalizeLinearPass
from sparsify.passes.split.dense_ffn import DenseFFN, read_ffn


class Gated(nn.Module):
    """SwiGLU with biases and a learned scale per neuron, stored [in, out] for up, so that every path is taken."""

    def __init__(self, hidden_size: int, intermediate_size: int, biased: bool) -> None:
        super().__init__()
        self.gate = nn.Linear(hidden_size, intermediate_size, bias=biased)
        self.up = nn.Parameter(torch.randn(hidden_size, intermediate_size) / hidden_size**0.5)
        self.scale = nn.Parameter(torch.rand(intermediate_size) + 0.5)
        self.down = nn.Linear(intermediate_size, hidden_size, bias=biased)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(nn.functional.silu(self.gate(x)) * (x @ self.up) * self.scale)


@pytest.fixture
def read() -> Callable[[nn.Module, int], DenseFFN]:
    """Capture a module that is one FFN of inputs `[T, D]`, and read it."""

    def read_module(module: nn.Module, hidden_size: int) -> DenseFFN:
        graph_module = NormalizeLinearPass()(capture(module, (torch.randn(3, hidden_size),))).graph_module
        return read_ffn(graph_module, match_ffn(graph_module)[0][0])

    return read_module


@pytest.fixture(params=["plain", "gated", "gated, biased"])
def module(request: pytest.FixtureRequest) -> nn.Module:
    """An FFN from 7 to 24 neurons."""
    if request.param == "plain":
        return nn.Sequential(nn.Linear(7, 24), nn.GELU(), nn.Linear(24, 7))
    return Gated(7, 24, biased="biased" in request.param)


@pytest.fixture
def dense(module: nn.Module, read: Callable[[nn.Module, int], DenseFFN]) -> DenseFFN:
    """The same, read."""
    return read(module, 7)
