"""The chain of a MoE layer -> one `sparsify::moe_ffn`, where the kernels know its activation; and back again.

rows, order, offsets = dispatch(x, expert_ids, E)
hidden = act(expert_linear(rows, up_proj, ..)) [* expert_linear(rows, ..)]     ->  y = moe_ffn(x, routing_weights,
out = expert_linear(hidden, down_proj, ..)                                             expert_ids, up_proj, ..)
y = combine(out, routing_weights, order)
"""

from __future__ import annotations

import operator
from dataclasses import dataclass
from typing import Any

import torch
from torch.fx import Graph, GraphModule, Node

from sparsify.kernels.reference import ACTIVATIONS
from sparsify.passes.base import Pass, PassResult
from sparsify.passes.find_layers import COMBINE, DISPATCH, EXPERT_LINEAR, MOE_FFN, Layer, find_layers

aten = torch.ops.aten


@dataclass(frozen=True)
class FuseMoEPass(Pass):
    """Fuse every layer that can be, in place. Values change by rounding alone."""

    def call(self, graph_module: GraphModule) -> PassResult:
        """See the module."""
        layers = [layer for layer in find_layers(graph_module, graph_module.graph) if why_not_fused(layer) is None]
        for layer in layers:
            _fuse(graph_module.graph, layer)
        return PassResult(graph_module, modified=bool(layers))


def why_not_fused(layer: Layer) -> str | None:
    """Why a layer runs as a chain of ops; None where `FuseMoEPass` makes one op of it."""
    if layer.facts.irregular is not None:
        return layer.facts.irregular
    if layer.facts.activation not in ACTIVATIONS:
        gated = "gated by " if layer.facts.gated else ""
        return f"its activation ({gated}{layer.facts.activation}) is none of {', '.join(ACTIVATIONS)}"
    return None


def unfuse_moe(root: GraphModule, graph: Graph) -> None:
    """Write every `sparsify::moe_ffn` as the chain again, in place, for what looks into a layer.

    Args:
        root: owns the weights that `graph` refers to.
        graph: of `root`, or a copy of it.
    """
    for node in graph.find_nodes(op="call_function", target=MOE_FFN):
        up_proj: Any = node.args[3]
        with graph.inserting_before(node):
            y = _chain(graph, len(root.get_parameter(up_proj.target)), *node.args)
        y.meta = node.meta.copy()
        node.replace_all_uses_with(y)
        graph.erase_node(node)


def _fuse(graph: Graph, layer: Layer) -> None:
    x, expert_ids, _ = layer.dispatch.args
    gate, up = layer.projections if layer.facts.gated else (None, *layer.projections)
    nodes = (up, gate, layer.down)
    weights = [argument for node in nodes for argument in ((None, None) if node is None else node.args[1:3])]
    with graph.inserting_before(layer.combine):
        y = graph.call_function(MOE_FFN, (x, layer.combine.args[1], expert_ids, *weights, layer.facts.activation))
    y.meta = layer.combine.meta.copy()
    layer.combine.replace_all_uses_with(y)
    _erase_back(graph, layer.combine, layer.dispatch)


def _erase_back(graph: Graph, last: Node, first: Node) -> None:
    """Erase `last` and what only it was computed with, back to `first`; weights that others read stay."""
    nodes = list(graph.nodes)
    for node in reversed(nodes[nodes.index(first) : nodes.index(last) + 1]):
        if not node.users:
            graph.erase_node(node)


def _chain(graph: Graph, num_experts: int, *args: Any) -> Node:
    x, routing_weights, expert_ids, up_proj, up_bias, gate_proj, gate_bias, down_proj, down_bias, activation = args
    call = graph.call_function
    dispatched = call(DISPATCH, (x, expert_ids, num_experts))
    rows, order, offsets = (call(operator.getitem, (dispatched, i)) for i in range(3))
    up = call(EXPERT_LINEAR, (rows, up_proj, up_bias, offsets))
    if gate_proj is None:
        hidden = _activate(graph, activation, up)
    else:
        gate = call(EXPERT_LINEAR, (rows, gate_proj, gate_bias, offsets))
        hidden = call(aten.mul.Tensor, (_activate(graph, activation, gate), up))
    out = call(EXPERT_LINEAR, (hidden, down_proj, down_bias, offsets))
    return call(COMBINE, (out, routing_weights, order))


def _activate(graph: Graph, activation: str, z: Node) -> Node:
    if activation == "squared_relu":
        return graph.call_function(aten.square.default, (graph.call_function(aten.relu.default, (z,)),))
    if activation == "gelu_tanh":
        return graph.call_function(aten.gelu.default, (z,), {"approximate": "tanh"})
    return graph.call_function(getattr(aten, activation).default, (z,))
