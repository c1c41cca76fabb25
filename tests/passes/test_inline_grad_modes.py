"""`InlineGradModesPass`: code under `no_grad` is part of the graph, and still sends no gradient back."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from sparsify import inspect, sparsify
from sparsify.passes.capture import capture


class Frozen(nn.Module):
    """A frozen block (with a nested region and a constant of its own), then a trained one."""

    def __init__(self) -> None:
        super().__init__()
        self.frozen = nn.Sequential(nn.Linear(6, 13), nn.GELU(), nn.Linear(13, 6))
        self.trained = nn.Sequential(nn.Linear(6, 13), nn.ReLU(), nn.Linear(13, 6))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        with torch.no_grad():
            y = x + self.frozen(x)
            with torch.enable_grad():
                y = y * torch.tensor([1.0, 2, 3, 4, 5, 6])
            z = y.sum(-1)
        return x + self.trained(y), z


X = torch.randn(2, 5, 6)


def test_values_gradients_and_names() -> None:
    """Protects: outputs and gradients are those of the model, at other sizes too; nodes keep their modules."""
    model = Frozen().eval()
    graph_module = capture(model, (X,))
    assert not [node for node in graph_module.graph.nodes if "grad_enabled" in str(node.target)]
    x = torch.randn(3, 7, 6)
    for ours, dense in zip(graph_module(x), model(x), strict=True):
        torch.testing.assert_close(ours, dense)
    graph_module(x)[0].square().sum().backward()
    assert model.get_parameter("trained.0.weight").grad is not None
    assert model.get_parameter("frozen.0.weight").grad is None


def test_ffns_in_both_are_found_and_converted() -> None:
    """Protects: a frozen tower can be converted, and grafted where it came from."""
    model = Frozen().eval()
    assert [ffn.name for ffn in inspect(model, (X,)).ffns] == ["frozen", "trained"]
    sparse = sparsify(model, (X,), num_experts=4, top_k=4, select="all", router_hidden_size=4)
    torch.testing.assert_close(sparse(X)[0], model(X)[0], rtol=1e-5, atol=1e-5)
    assert len(sparse.graft(model).grafted) == 2
    torch.testing.assert_close(sparse(X)[0], model(X)[0])
