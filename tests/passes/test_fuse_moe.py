"""`FuseMoEPass` and `unfuse_moe`: one op or a chain of them, the same values."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sparsify import sparsify
from sparsify.passes.find_layers import MOE_FFN, find_layers
from sparsify.passes.fuse_moe import FuseMoEPass, unfuse_moe, why_not_fused

_ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "relu": F.relu,
    "squared_relu": lambda a: F.relu(a) ** 2,
    "gelu": lambda a: a * 0.5 * (1 + torch.erf(a / 2**0.5)),
    "gelu_tanh": lambda a: F.gelu(a, approximate="tanh"),
    "silu": lambda a: a * torch.sigmoid(a),
}


def _fused(graph: torch.fx.Graph) -> list[torch.fx.Node]:
    return list(graph.find_nodes(op="call_function", target=MOE_FFN))


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("activation", _ACTIVATIONS)
def test_there_and_back(sparse_layer, activation: str, gated: bool, bias: bool) -> None:
    """Protects: every known activation in any spelling, the places of gate, up and biases, shared experts."""
    sparse = sparse_layer(activation=_ACTIVATIONS[activation], gated=gated, bias=bias, shared=3, out=5).double()
    x = torch.randn(4, 7, 16, dtype=torch.float64)
    expected = sparse(x)
    assert FuseMoEPass()(sparse).modified
    (node,) = _fused(sparse.graph)
    assert node.args[-1] == activation
    assert not find_layers(sparse, sparse.graph)
    torch.testing.assert_close(sparse(x), expected)
    unfuse_moe(sparse, sparse.graph)
    sparse.recompile()
    assert not _fused(sparse.graph)
    (layer,) = find_layers(sparse, sparse.graph)
    assert (layer.facts.activation, layer.facts.gated) == (activation, gated)
    torch.testing.assert_close(sparse(x), expected)


@pytest.mark.parametrize(
    ("options", "reason"),
    [({"activation": torch.sin}, "activation (custom)"), ({"vector": True}, "values of its own for every neuron")],
)
def test_what_no_kernel_knows_stays_a_chain(sparse_layer, options: dict[str, object], reason: str) -> None:
    """Protects: any activation runs, and says why it is not fused."""
    sparse = sparse_layer(**options)
    before = str(sparse.graph)
    assert not FuseMoEPass()(sparse).modified
    assert str(sparse.graph) == before
    (layer,) = find_layers(sparse, sparse.graph)
    assert reason in str(why_not_fused(layer))


def test_unused_slots(sparse_layer, skipping_router) -> None:
    """Protects: ids of -1 and routing weights that are not one."""
    sparse = sparse_layer(router=skipping_router())
    x = torch.randn(4, 9, 16)
    expected = sparse(x)
    FuseMoEPass()(sparse)
    torch.testing.assert_close(sparse(x), expected)


@pytest.mark.parametrize("activation", [nn.GELU(), nn.Mish()])
def test_sparsify_fuses_and_reports(activation: nn.Module) -> None:
    """Protects: the pipeline fuses what it can; what it cannot is a note of the report."""
    model = nn.Sequential(nn.Linear(16, 64), nn.BatchNorm1d(64), activation, nn.Linear(64, 16)).eval()
    x = torch.randn(20, 16)
    sparse = sparsify(model, x, num_experts=4, top_k=4, select="all", refit=False)
    notes = " ".join(sparse.report.notes)
    is_known = isinstance(activation, nn.GELU)
    assert len(_fused(sparse.graph)) == is_known
    assert ("no fused kernel" in notes and "mish" in notes) is not is_known
    torch.testing.assert_close(sparse(x), model(x), rtol=1e-5, atol=1e-6)
