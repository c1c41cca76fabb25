"""`InsertMoEPass`: the graph reads as the design says, computes the same, and the dense weights are gone."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from sparsify.errors import PassError
from sparsify.models.gpt import GPT, GPTConfig
from sparsify.models.llama import Llama, LlamaConfig
from sparsify.passes.capture import capture
from sparsify.passes.insert_moe import InsertMoEPass
from sparsify.passes.match_ffn import FFNMatch, match_ffn
from sparsify.passes.normalize_linear import NormalizeLinearPass
from sparsify.passes.split.dense_ffn import read_ffn
from sparsify.passes.split.experts import divide
from sparsify.routers import MLPRouter


def graph_of(model: nn.Module, *args: Tensor) -> tuple[torch.fx.GraphModule, list[FFNMatch]]:
    graph_module = NormalizeLinearPass()(capture(model, args)).graph_module
    return graph_module, match_ffn(graph_module)[0]


def insertion(graph_module: torch.fx.GraphModule, match: FFNMatch, num_shared: int) -> InsertMoEPass:
    """A random partition into 4 experts, with every expert on: exact."""
    dense = read_ffn(graph_module, match)
    neurons = torch.randperm(match.intermediate_size).view(4, -1)
    router = MLPRouter(match.hidden_size, 4 - num_shared, 4 - num_shared, 8)
    return InsertMoEPass(match, divide(dense, neurons, num_shared), router, dense.dtypes, dense.requires_grad)


@pytest.mark.parametrize("num_shared", [0, 1])
@pytest.mark.parametrize("name", ["gpt", "llama", "llama, fused gate and up"])
def test_same_values_at_every_size(name: str, num_shared: int) -> None:
    """Protects: the rewrite, for plain, gated and fused FFNs and 2-D and 3-D tokens, at sizes that were not traced."""
    model = GPT(GPTConfig()) if name == "gpt" else Llama(LlamaConfig(fused_gate_up="fused" in name))
    graph_module, matches = graph_of(model.eval(), torch.randint(0, 256, (2, 5)))
    for match in matches:
        insertion(graph_module, match, num_shared)(graph_module)
    for shape in ((2, 5), (1, 1), (3, 11)):
        ids = torch.randint(0, 256, shape)
        torch.testing.assert_close(graph_module(ids), model(ids), rtol=1e-5, atol=1e-5)


def test_the_graph_and_its_parameters() -> None:
    """Protects: the subgraph of the design, its state-dict names; dense weights and their modules are gone."""
    graph_module, (match, other) = graph_of(Llama(LlamaConfig()), torch.randint(0, 256, (2, 5)))
    insertion(graph_module, match, 1)(graph_module)
    names = [name for name in graph_module.state_dict() if name.startswith(match.name)]
    assert sorted(name.removeprefix(match.name + ".") for name in names) == [
        "experts.down_proj",
        "experts.gate_proj",
        "experts.up_proj",
        "router.hidden.bias",
        "router.hidden.weight",
        "router.output.bias",
        "router.output.weight",
        "shared.down_proj",
        "shared.gate_proj",
        "shared.up_proj",
    ]
    targets = [str(node.target) for node in graph_module.graph.nodes]
    assert targets.count("sparsify.dispatch.default") == targets.count("sparsify.combine.default") == 1
    assert targets.count("sparsify.expert_linear.default") == 3
    assert f"{other.name}.gate_proj.weight" in graph_module.state_dict()


def test_the_model_is_untouched() -> None:
    """Protects: deleting the dense weights from the graph does not delete them from the model."""
    model = Llama(LlamaConfig())
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    graph_module, (match, _) = graph_of(model, torch.randint(0, 256, (2, 5)))
    insertion(graph_module, match, 0)(graph_module)
    after = model.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(tensor, after[name]) for name, tensor in before.items())


def test_a_weight_that_others_read_stays() -> None:
    """Protects: weights tied with another layer."""

    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.up, self.down = nn.Linear(8, 16), nn.Linear(16, 8)

        def forward(self, x: Tensor) -> Tensor:
            return self.down(torch.relu(self.up(x))) + nn.functional.linear(x, self.up.weight).sum(-1, keepdim=True)

    model, x = Tied(), torch.randn(3, 8)
    graph_module, (match,) = graph_of(model, x)
    insertion(graph_module, match, 0)(graph_module)
    assert "up.weight" in graph_module.state_dict()
    assert "down.weight" not in graph_module.state_dict()
    torch.testing.assert_close(graph_module(x), model(x))


@pytest.mark.parametrize("where", ["output", "token by token", "learned scale", "size of the hidden"])
def test_places(where: str) -> None:
    """Protects: an FFN as the output, 1-D tokens, per-neuron vectors per row, sizes read off the hidden values."""

    class Placed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.up, self.down = nn.Linear(8, 16), nn.Linear(16, 8)
            self.scale = nn.Parameter(torch.rand(16))

        def forward(self, x: Tensor) -> Tensor:
            hidden = torch.relu(self.up(x))
            if where == "learned scale":
                hidden = hidden * self.scale
            y = self.down(hidden)
            return y.view(hidden.shape[0], -1) if where == "size of the hidden" else y

    model = Placed()
    shapes = ((8,),) if where == "token by token" else ((2, 5, 8), (3, 7, 8))
    graph_module, (match,) = graph_of(model, torch.randn(shapes[0]))
    insertion(graph_module, match, 1)(graph_module)
    for shape in shapes:
        x = torch.randn(shape)
        torch.testing.assert_close(graph_module(x), model(x))


def test_exports_again() -> None:
    """Protects: the result can be captured by torch.export, as ONNX export and users' own pipelines do."""
    model = GPT(GPTConfig()).eval()
    graph_module, (match, _) = graph_of(model, torch.randint(0, 256, (2, 5)))
    insertion(graph_module, match, 1)(graph_module)
    again = capture(graph_module, (torch.randint(0, 256, (2, 5)),))
    ids = torch.randint(0, 256, (3, 4))
    torch.testing.assert_close(again(ids), model(ids), rtol=1e-5, atol=1e-5)


def test_a_match_of_another_graph() -> None:
    """Protects: the message says that the match does not belong here."""
    graph_module, (match, _) = graph_of(Llama(LlamaConfig()), torch.randint(0, 256, (2, 5)))
    step = insertion(graph_module, match, 0)
    with pytest.raises(PassError, match="is not of this graph"):
        step(graph_of(nn.Linear(3, 3), torch.randn(2, 3))[0])
