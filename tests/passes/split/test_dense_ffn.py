"""`read_ffn`: one orientation and dtype, whatever the model has."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn

from sparsify.passes.split.dense_ffn import DenseFFN


def test_computes_what_the_module_computes(module: nn.Module, dense: DenseFFN) -> None:
    """Protects: roles, orientation, biases, per-neuron vectors."""
    x = torch.randn(11, 7)
    torch.testing.assert_close(dense(x), module(x))
    torch.testing.assert_close(dense.down(dense.hidden(x)), module(x))


def test_widens_half_precision(read: Callable[[nn.Module, int], DenseFFN]) -> None:
    """Protects: statistics and fits of a bf16 model are made in fp32; its own dtype is remembered."""
    module = nn.Sequential(nn.Linear(7, 24), nn.ReLU(), nn.Linear(24, 7))
    wide = read(module, 7)
    module.bfloat16()

    class Cast(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.ffn = module

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.ffn(x.bfloat16())

    dense = read(Cast(), 7)
    assert (dense.dtypes["down_proj"], wide.dtypes["down_proj"]) == (torch.bfloat16, torch.float32)
    assert dense(torch.randn(2, 7)).dtype == torch.float32
