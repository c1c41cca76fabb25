"""`fold_vectors`: the same function of the tokens, with constants in the weights wherever that is possible."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from sparsify.passes.capture import capture
from sparsify.passes.match_ffn import match_ffn
from sparsify.passes.normalize_linear import NormalizeLinearPass
from sparsify.passes.split.dense_ffn import read_ffn
from sparsify.passes.split.fold_vectors import fold_vectors

# What a model does before, and after, its activation; and the vectors that must be left.
_SPELLINGS: dict[str, tuple[Callable[[Scaled, Tensor], Tensor], int]] = {}


class Scaled(nn.Module):
    """Both projections and the result pass through constants."""

    def __init__(self, spelling: Callable[[Scaled, Tensor], Tensor]) -> None:
        super().__init__()
        self.up, self.gate = nn.Linear(8, 16, bias=False), nn.Linear(8, 16)
        self.down = nn.Linear(16, 6, bias=False)
        self.norm = nn.BatchNorm1d(16)
        for buffer in (self.norm.weight, self.norm.bias, self.norm.running_mean, self.norm.running_var):
            assert buffer is not None
            nn.init.uniform_(buffer, 0.5, 2.0)
        self.a, self.b, self.one = (nn.Parameter(torch.rand(n) + 0.5) for n in (16, 16, 1))
        self.spelling = spelling

    def forward(self, x: Tensor) -> Tensor:
        return self.down(self.spelling(self, x))


def _spelling(left: int) -> Callable[[Callable[[Scaled, Tensor], Tensor]], Callable[[Scaled, Tensor], Tensor]]:
    def keep(function: Callable[[Scaled, Tensor], Tensor]) -> Callable[[Scaled, Tensor], Tensor]:
        _SPELLINGS[function.__name__] = (function, left)
        return function

    return keep


@_spelling(0)
def batch_norm(m: Scaled, x: Tensor) -> Tensor:
    return torch.relu(m.norm(m.up(x)))


@_spelling(0)
def scales_and_shifts(m: Scaled, x: Tensor) -> Tensor:
    hidden = torch.relu((m.up(x) * 3 + m.a - 0.5) / m.b + m.a)
    return ((0.5 + m.a * hidden) / m.one - m.b) * 1.5 + m.a


@_spelling(0)
def factors_of_a_product(m: Scaled, x: Tensor) -> Tensor:
    return (m.a * torch.relu(m.gate(x) * m.b)) * ((m.up(x) + m.a) / m.b) - m.one


@_spelling(1)
def shift_of_a_factor(m: Scaled, x: Tensor) -> Tensor:
    return (torch.relu(m.gate(x)) + m.a) * m.up(x)


@_spelling(1)
def read_twice(m: Scaled, x: Tensor) -> Tensor:
    up = m.up(x)
    hidden = up * torch.sigmoid(up * m.a)
    return hidden + torch.tanh(hidden)


@_spelling(1)
def constant_divided(m: Scaled, x: Tensor) -> Tensor:
    return m.a / (torch.relu(m.up(x)) + 2)


@_spelling(1)
def constant_minus(m: Scaled, x: Tensor) -> Tensor:
    return torch.relu(m.a - m.up(x))


@pytest.mark.parametrize("name", _SPELLINGS)
def test_same_function(name: str) -> None:
    """Protects: the algebra, and that what can be folded is."""
    spelling, left = _SPELLINGS[name]
    model, x = Scaled(spelling).double().eval(), torch.randn(5, 8, dtype=torch.float64)
    graph_module = NormalizeLinearPass()(capture(model, (x,))).graph_module
    (match,), _ = match_ffn(graph_module)
    dense = read_ffn(graph_module, match)
    folded_match, folded = fold_vectors(match, dense)
    torch.testing.assert_close(folded(x), model(x))
    torch.testing.assert_close(dense(x), model(x))
    assert len(folded.vectors) == len(folded_match.vectors) == left
    placeholders = folded_match.function.graph.find_nodes(op="placeholder")
    assert len(placeholders) == len(match.projections) + left


def test_nothing_to_fold_copies_nothing() -> None:
    """Protects: the memory of a conversion, and weights that stay bit by bit what they were."""
    model = nn.Sequential(nn.Linear(8, 16), nn.GELU(), nn.Linear(16, 8))
    graph_module = NormalizeLinearPass()(capture(model, (torch.randn(3, 8),))).graph_module
    (match,), _ = match_ffn(graph_module)
    dense = read_ffn(graph_module, match)
    _, folded = fold_vectors(match, dense)
    assert folded.projections[0].weight is dense.projections[0].weight
    assert folded.down.weight is dense.down.weight
    assert folded.down.bias is dense.down.bias
