"""What is read off the graph of a converted model."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from sparsify.errors import ExportError
from sparsify.passes.find_layers import LayerFacts, find_layers
from sparsify.passes.graph_values import as_node


def _facts(sparse) -> LayerFacts:
    (layer,) = find_layers(sparse, sparse.graph)
    return layer.facts


def test_reads_names_and_sizes(sparse_transformer) -> None:
    """Layers come in the order of the graph, under the place of the FFN."""
    sparse = sparse_transformer(size=8, num_experts=5, top_k=3)
    layers = find_layers(sparse, sparse.graph)
    assert [layer.name for layer in layers] == ["layers.0", "layers.1"]
    assert layers[0].facts == LayerFacts(
        num_experts=5,
        top_k=3,
        hidden_size=16,
        output_size=16,
        expert_size=8,
        dtype=torch.float32,
        activation="relu",
        gated=False,
        plain_router=True,
        irregular=None,
        router_weights=12 * (16 + 1) + 5 * (12 + 1),  # two linear layers, with their biases
    )


@pytest.mark.parametrize(
    ("activation", "name"),
    [
        (F.relu, "relu"),
        (lambda a: a * torch.sigmoid(a), "silu"),
        (F.gelu, "gelu"),
        (lambda a: 0.5 * a * (1 + torch.tanh(0.7978845608 * (a + 0.044715 * a**3))), "gelu_tanh"),
        (lambda a: a, "identity"),
        (lambda a: torch.sin(a), "custom"),
    ],
)
def test_knows_an_activation_by_what_it_computes(
    sparse_layer, activation: Callable[[Tensor], Tensor], name: str
) -> None:
    """Exact and tanh GELU must not be confused, however they are spelled."""
    facts = _facts(sparse_layer(activation=activation))
    assert (facts.activation, facts.gated) == (name, False)


@pytest.mark.parametrize("activation", [F.silu, lambda a: a * torch.sigmoid(a)])
def test_puts_the_gate_first(sparse_layer, activation: Callable[[Tensor], Tensor]) -> None:
    """A swapped gate computes another function, and nothing would fail."""
    sparse = sparse_layer(activation=activation, gated=True)
    (layer,) = find_layers(sparse, sparse.graph)
    assert (layer.facts.activation, layer.facts.gated) == ("silu", True)
    assert [str(as_node(node.args[1]).target) for node in layer.projections] == ["experts.gate_proj", "experts.up_proj"]


def test_says_why_an_activation_is_irregular(sparse_layer) -> None:
    """Per-neuron vectors of each expert have no place in the MoE op."""
    assert _facts(sparse_layer(vector=True)).irregular == "its activation also reads values of its own for every neuron"


def test_says_that_intermediate_values_are_read_elsewhere(sparse_layer) -> None:
    """They would be gone inside one node."""
    sparse = sparse_layer()
    output = next(iter(reversed(sparse.graph.nodes)))
    hidden = next(node for node in sparse.graph.nodes if node.target is torch.ops.aten.relu.default)
    output.args = ((output.args[0][0], hidden),)
    assert _facts(sparse).irregular == "its intermediate values are also read elsewhere"


def test_trusts_only_the_plain_router(sparse_layer, skipping_router) -> None:
    """A router with a forward of its own may return -1, which the shorter lowerings leave out."""
    assert not _facts(sparse_layer(router=skipping_router())).plain_router


def test_refuses_ops_without_a_lowering(sparse_layer) -> None:
    """A fused op would fail deep inside torch.onnx.export otherwise."""
    sparse = sparse_layer()
    (combine,) = sparse.graph.find_nodes(op="call_function", target=torch.ops.sparsify.combine.default)
    combine.target = torch.ops.sparsify.combine_backward.default
    with pytest.raises(ExportError, match=r"combine calls sparsify.combine_backward.*no ONNX lowering"):
        find_layers(sparse, sparse.graph)


def test_refuses_a_broken_chain(sparse_layer) -> None:
    """The message says what the dispatch should lead to."""
    sparse = sparse_layer()
    (combine,) = sparse.graph.find_nodes(op="call_function", target=torch.ops.sparsify.combine.default)
    combine.replace_all_uses_with(combine.args[0])
    sparse.graph.erase_node(combine)
    with pytest.raises(ExportError, match=r"must lead to one sparsify\.combine"):
        find_layers(sparse, sparse.graph)
