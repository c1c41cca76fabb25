"""`NormalizeLinearPass`: the four cases fire once, near misses do not, values stay."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from sparsify.passes.capture import capture
from sparsify.passes.normalize_linear import NormalizeLinearPass


class Spelled(nn.Module):
    """One spelling of a linear layer from 3 to 5 features."""

    def __init__(self, spelling: Callable[[Spelled, Tensor], Tensor]) -> None:
        super().__init__()
        self.spelling = spelling
        self.out_in = nn.Parameter(torch.randn(5, 3))
        self.in_out = nn.Parameter(torch.randn(3, 5))
        self.bias = nn.Parameter(torch.randn(5))
        self.per_token = nn.Parameter(torch.randn(4, 1))

    def forward(self, x: Tensor) -> Tensor:
        return self.spelling(self, x)


FIRES = {
    "addmm": lambda m, x: torch.addmm(m.bias, x, m.in_out),
    "mm": lambda m, x: torch.mm(x, m.in_out),
    "matmul": lambda m, x: x @ m.in_out,
    "matmul of a transpose": lambda m, x: x @ m.out_in.t(),
    "matmul of a permute": lambda m, x: x @ m.out_in.permute(1, 0),
    "matmul of .T": lambda m, x: x @ m.out_in.T,
    "matmul plus bias": lambda m, x: x @ m.in_out + m.bias,
    "bias plus matmul": lambda m, x: m.bias + x @ m.in_out,
    "linear plus bias": lambda m, x: nn.functional.linear(x, m.out_in) + m.bias,
    "linear plus wide bias": lambda m, x: nn.functional.linear(x, m.out_in) + m.bias[None],
    "bmm": lambda m, x: torch.bmm(x[None], m.in_out.expand(1, -1, -1))[0],
    "bmm along a dynamic batch": lambda m, x: torch.bmm(x[:, None], m.in_out[None].expand(x.shape[0], -1, -1)),
    "baddbmm": lambda m, x: torch.baddbmm(m.bias[None, None].expand(1, 1, 5), x[None], m.in_out[None]),
    "weight times x": lambda m, x: m.out_in @ x.t(),
    "einsum": lambda m, x: torch.einsum("bd,fd->bf", x, m.out_in),
    "einsum, weight first": lambda m, x: torch.einsum("df,bd->bf", m.in_out, x),
    "einsum with an ellipsis": lambda m, x: torch.einsum("...d,df->...f", x, m.in_out),
    "einsum, features first": lambda m, x: torch.einsum("db,fd->fb", x.t(), m.out_in),
    "einsum, result transposed": lambda m, x: torch.einsum("bd,fd->fb", x, m.out_in),
    "tensordot": lambda m, x: torch.ops.aten.tensordot(x, m.out_in, [1], [1]),
}
DECLINES = {
    "linear": lambda m, x: nn.functional.linear(x, m.out_in, m.bias),
    "einsum, two sums": lambda m, x: torch.einsum("bd,fd->b", x, m.out_in),
    "einsum, another order": lambda m, x: torch.einsum("abd,fd->baf", x.view(2, 2, 3), m.out_in),
    "one matrix per batch": lambda m, x: torch.bmm(x.view(2, 2, 3), m.out_in[None].repeat(2, 1, 1).mT * 2),
    "two activations": lambda m, x: x @ x.t(),
    "product read twice": lambda m, x: (lambda y: torch.stack([y, y + m.bias]))(nn.functional.linear(x, m.out_in)),
    "not a bias": lambda m, x: nn.functional.linear(x, m.out_in) + m.per_token,
    "scaled addmm": lambda m, x: torch.addmm(m.bias, x, m.in_out, alpha=2),
}


@pytest.mark.parametrize("name", FIRES)
def test_fires_once(name: str) -> None:
    """Protects: each spelling becomes one aten.linear, and a second run finds nothing to do."""
    model, x = Spelled(FIRES[name]), torch.randn(4, 3)
    result = NormalizeLinearPass()(capture(model, (x,)))
    targets = [node.target for node in result.graph_module.graph.nodes if node.op == "call_function"]
    assert result.modified
    assert targets.count(torch.ops.aten.linear.default) == 1
    assert not {str(target).split(".")[1] for target in targets} & {"addmm", "mm", "matmul", "bmm", "baddbmm", "einsum"}
    torch.testing.assert_close(result.graph_module(x), model(x))
    assert not NormalizeLinearPass()(result.graph_module).modified


@pytest.mark.parametrize("name", DECLINES)
def test_declines(name: str) -> None:
    """Protects: what is no linear layer in another spelling is left alone."""
    graph_module = capture(Spelled(DECLINES[name]), (torch.randn(4, 3),))
    before = str(graph_module.graph)
    result = NormalizeLinearPass()(graph_module)
    assert not result.modified
    assert str(result.graph_module.graph) == before
