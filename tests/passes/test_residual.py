"""`residual_terms` and `sums_behind`: what the model adds to the output of an FFN, and the hidden state then."""

from __future__ import annotations

import torch
import torch.nn.functional as functional
from torch import Tensor, nn

from sparsify.models.bert import Bert, BertConfig
from sparsify.models.gpt import GPT, GPTConfig
from sparsify.passes.capture import capture
from sparsify.passes.match_ffn import match_ffn
from sparsify.passes.normalize_linear import NormalizeLinearPass
from sparsify.passes.residual import residual_terms, sums_behind


def terms(model: nn.Module, x: Tensor) -> list[tuple[str, ...]]:
    """Names of the residual terms of every FFN, and of the node that the FFN reads."""
    graph_module = NormalizeLinearPass()(capture(model, (x,))).graph_module
    nodes = {node.name: node for node in graph_module.graph.nodes}
    found = [
        (residual_terms(nodes[site.down]), site.x) for match in match_ffn(graph_module)[0] for site in match.sites
    ]
    return [(*(term.name for term in terms), x) for terms, x in found]


def test_blocks() -> None:
    """Protects: in a post-norm block the FFN reads its residual; in a pre-norm block it reads a norm of it."""
    ids = torch.randint(0, 256, (2, 5))
    assert all(residual == x for residual, x in terms(Bert(BertConfig()), ids))
    assert all(residual.startswith("add") and x.startswith("view") for residual, x in terms(GPT(GPTConfig()), ids))


class Ending(nn.Module):
    """An FFN whose output goes where `end` says."""

    def __init__(self, end: object) -> None:
        super().__init__()
        self.end, self.up, self.down = end, nn.Linear(4, 8), nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.end(x, self.down(torch.relu(self.up(x))))  # pyright: ignore[reportCallIssue] - a lambda


def test_chains_and_ends() -> None:
    """Protects: several sums count; a scale, a second reader, a broadcast vector or no sum end the search."""
    x = torch.randn(2, 3, 4)
    assert terms(Ending(lambda x, y: x + (x + functional.dropout(y, 0.1, False))), x) == [("x", "x", "x")]
    assert terms(Ending(lambda x, y: x.sin() + y), x) == [("x",)]  # sin is computed after the FFN
    assert terms(Ending(lambda x, y: x + y * 0.5), x) == [("x",)]
    assert terms(Ending(lambda x, y: torch.stack([x + y, y])), x) == [("x",)]
    assert terms(Ending(lambda x, y: y + x[:1, :1]), x) == [("x",)]
    assert terms(Ending(lambda x, y: y), x) == [("x",)]


def test_sums_behind() -> None:
    """Protects: what the dense stream may run ahead; not what waits for another branch (sin), nor a scale."""
    x = torch.randn(2, 3, 4)
    for end, names in (
        (lambda x, y: 2 * (x + (x + y)), ["add", "add_1"]),
        (lambda x, y: x.sin() + (x + y), ["add"]),
        (lambda x, y: y, []),
    ):
        graph_module = NormalizeLinearPass()(capture(Ending(end), (x,))).graph_module
        ((match,), _) = match_ffn(graph_module)
        down = next(node for node in graph_module.graph.nodes if node.name == match.sites[0].down)
        assert [node.name for node in sums_behind(down)] == names
