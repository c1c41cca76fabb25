"""Regions under `torch.no_grad()` or `torch.enable_grad()` -> their nodes in the graph around them.

torch.export puts such a region into a graph of its own, where no FFN would be found. No gradient flows back into what
`no_grad` computes, so its results are detached.
"""

from __future__ import annotations

import operator
from dataclasses import dataclass
from typing import Any

import torch
from torch.fx import Graph, GraphModule, Node, map_arg

from sparsify.passes.base import Pass, PassResult

_REGION = torch.ops.higher_order.wrap_with_set_grad_enabled


@dataclass(frozen=True)
class InlineGradModesPass(Pass):
    """Leaves no such region; the values and their gradients stay as they are."""

    def call(self, graph_module: GraphModule) -> PassResult:
        """Edit in place."""
        regions = graph_module.graph.find_nodes(op="call_function", target=_REGION)
        for region in regions:
            _inline(graph_module, region)
        graph_module.delete_all_unused_submodules()
        return PassResult(graph_module, bool(regions))


def _inline(graph_module: GraphModule, region: Node) -> None:
    enabled, body, *operands = region.args
    assert isinstance(body, Node)
    inner = graph_module.get_submodule(str(body.target))
    assert isinstance(inner, GraphModule)
    InlineGradModesPass()(inner)
    with graph_module.graph.inserting_before(region):
        results = _copy_body(graph_module.graph, inner.graph, operands, f"{body.target}.")
        if not enabled:
            results = map_arg(results, _detach)
    for user in list(region.users):
        assert user.target is operator.getitem
        user.replace_all_uses_with(results[user.args[1]])
        graph_module.graph.erase_node(user)
    graph_module.graph.erase_node(region)
    if not body.users:
        graph_module.graph.erase_node(body)


def _copy_body(graph: Graph, inner: Graph, operands: list[Any], prefix: str) -> Any:
    """The nodes of `inner` in `graph`; return what stands for its output."""
    values: dict[Node, Any] = dict(zip(inner.find_nodes(op="placeholder"), operands, strict=True))
    for node in inner.nodes:
        if node.op == "output":
            return map_arg(node.args[0], values.__getitem__)
        if node.op == "placeholder":
            continue
        values[node] = graph.node_copy(node, values.__getitem__)
        if node.op == "get_attr":
            values[node].target = f"{prefix}{node.target}"
    raise AssertionError("a graph ends with its output")


def _detach(node: Node) -> Node:
    if not isinstance(node.meta.get("val"), torch.Tensor):
        return node
    detached = node.graph.call_function(torch.ops.aten.detach.default, (node,))
    detached.meta = node.meta.copy()
    return detached
