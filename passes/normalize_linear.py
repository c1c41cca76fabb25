"""Every spelling of a linear layer -> `aten.linear(x, W, b)`, W a `get_attr` node or `aten.t` of one.

1. addmm(b, x, W) -> linear(x, t(W), b)                    W is [in, out], as in GPT-2's Conv1D
2. mm(x, W), matmul(x, W) -> linear(x, t(W))               W has two dimensions
3. t(t(W)) -> W;  transpose(W, 0, 1), permute(W, [1, 0]) -> t(W)
4. linear(x, W) + b -> linear(x, W, b)                     b is [out] and nothing else reads the product
"""

from __future__ import annotations

import operator
from dataclasses import dataclass
from typing import cast

import torch
from torch.fx import GraphModule, Node

from sparsify.passes.base import Pass, PassResult
from sparsify.passes.graph_values import as_node, fake_tensor, last_size

aten = torch.ops.aten


@dataclass(frozen=True)
class NormalizeLinearPass(Pass):
    """Rewrite the four cases above. Values are the same up to the order of the sums."""

    def call(self, graph_module: GraphModule) -> PassResult:
        """See the module."""
        count = 0
        for node in list(graph_module.graph.nodes):
            count += _rewrite_product(graph_module, node) or _rewrite_bias(graph_module, node)
        if count:
            graph_module.graph.eliminate_dead_code()
        return PassResult(graph_module, modified=count > 0)


def _rewrite_product(graph_module: GraphModule, node: Node) -> bool:
    product = _as_product(node)
    if product is None:
        return False
    x, weight, bias = product
    with graph_module.graph.inserting_before(node):
        transposed = _transposed(graph_module, weight)
        linear = graph_module.graph.call_function(aten.linear.default, (x, transposed, bias))
    _replace(node, linear)
    return True


def _as_product(node: Node) -> tuple[Node, Node, Node | None] | None:
    """(x, W, b) of cases 1 and 2, W being [in, out]."""
    if node.target is aten.addmm.default and not node.kwargs:
        bias, x, weight = (as_node(arg) for arg in node.args)
        return (x, weight, bias) if _is_weight(weight) and _is_vector(bias) else None
    if node.target in (aten.mm.default, aten.matmul.default):
        x, weight = (as_node(arg) for arg in node.args)
        return (x, weight, None) if _is_weight(weight) and not _is_weight(x) else None
    return None


def _rewrite_bias(graph_module: GraphModule, node: Node) -> bool:
    """Case 4."""
    if node.target not in (aten.add.Tensor, operator.add) or node.kwargs:
        return False
    addends = [arg for arg in node.args if isinstance(arg, Node)]
    linear = next((addend for addend in addends if _is_bare_linear(addend)), None)
    bias = next((addend for addend in addends if _is_vector(addend)), None)
    if linear is None or bias is None or last_size(bias) != last_size(linear):
        return False
    with graph_module.graph.inserting_before(node):
        merged = graph_module.graph.call_function(aten.linear.default, (linear.args[0], linear.args[1], bias))
    merged.meta.update(linear.meta)
    node.replace_all_uses_with(merged)
    graph_module.graph.erase_node(node)
    return True


def _transposed(graph_module: GraphModule, weight: Node) -> Node:
    """Case 3."""
    if weight.op != "get_attr":
        return as_node(weight.args[0])
    node = graph_module.graph.call_function(aten.t.default, (weight,))
    node.meta["val"] = weight.meta["val"].t()
    return node


def _replace(node: Node, linear: Node) -> None:
    linear.meta.update(node.meta)
    node.replace_all_uses_with(linear)
    node.graph.erase_node(node)


def _is_bare_linear(node: Node) -> bool:
    if node.target is not aten.linear.default or len(node.users) != 1:
        return False
    return len(node.args) < 3 or node.args[2] is None


def _is_weight(node: Node) -> bool:
    """A matrix parameter, plain or transposed once."""
    if _rank(node) != 2:
        return False
    return node.op == "get_attr" or (_is_transpose(node) and as_node(node.args[0]).op == "get_attr")


def _is_transpose(node: Node) -> bool:
    """Of a matrix."""
    if node.target in (aten.t.default, aten.numpy_T.default, aten.mT.default):
        return True
    if node.target is aten.transpose.int:
        return sorted(cast("int", dim) % 2 for dim in node.args[1:]) == [0, 1]
    return node.target is aten.permute.default and [d % 2 for d in cast("list[int]", node.args[1])] == [1, 0]


def _is_vector(node: Node) -> bool:
    return node.op == "get_attr" and _rank(node) == 1


def _rank(node: Node) -> int:
    value = fake_tensor(node)
    return -1 if value is None else value.dim()
