"""Run a converted model with gradients, and read at each of its FFNs what light training needs.

T tokens, D hidden_size, R routed experts, K that run.
"""

from __future__ import annotations

import operator
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.fx import Graph, GraphModule, Interpreter, Node

from sparsify.cpu.experts import Experts
from sparsify.passes.activation import is_view
from sparsify.passes.find_layers import COMBINE, MOE_FFN
from sparsify.passes.graph_values import op_name
from sparsify.passes.neuron_wise import is_inert
from sparsify.passes.split.bf16_products import has_bf16_products
from sparsify.passes.taught_experts import TaughtRun, run_taught
from sparsify.routers import Router

_PRODUCTS = (torch.ops.aten.linear.default, MOE_FFN)


@dataclass(frozen=True)
class RoutedFFN:
    """One converted FFN at one of its sites in the graph of a model.

    Attributes:
        name: of the FFN.
        router_call: returns routing weights and expert ids.
        mixed: what the chosen experts add up to, `[T, D_out]`.
        hidden: the hidden state that the output of the FFN becomes part of; the dense graph calls it the same.
        experts: from `(x, routing_weights, expert_ids)` to the routed sum.
    """

    name: str
    router_call: Node
    mixed: Node
    hidden: Node
    experts: GraphModule


def routed_ffns(sparse: GraphModule, dense: GraphModule) -> list[RoutedFFN]:
    """Find every converted FFN at every site, in graph order.

    Args:
        sparse: the converted model; a loaded one does not know the shapes of its values.
        dense: the model that it was made from, captured in the same way.
    """
    calls = [node for node in sparse.graph.nodes if node.op == "call_module" and _is_router(sparse, node)]
    dense_nodes, nodes = ({node.name: node for node in graph.graph.nodes} for graph in (dense, sparse))
    return [_read(sparse, call, dense_nodes, nodes) for call in calls]


def _is_router(sparse: GraphModule, node: Node) -> bool:
    return isinstance(sparse.get_submodule(str(node.target)), Router)


def _read(sparse: GraphModule, router_call: Node, dense_nodes: dict[str, Node], nodes: dict[str, Node]) -> RoutedFFN:
    mixed = _mixed(router_call)
    down = mixed
    while down.name not in dense_nodes and len(down.users) == 1:
        (down,) = down.users
    hidden = _hidden(dense_nodes[down.name]).name if down.name in dense_nodes else down.name
    experts = _experts(sparse, router_call, mixed)
    name = str(router_call.target).removesuffix(".router")
    return RoutedFFN(name, router_call, mixed, nodes.get(hidden, down), experts)


def _mixed(call: Node) -> Node:
    """What reads the weights that a router returns, or that its units get."""
    weights = next(user for user in call.users if user.target is operator.getitem and user.args[1] == 0)
    units = next((user for user in weights.users if user.op == "call_module"), None)
    return _mixed(units) if units else next(user for user in weights.users if user.target in (MOE_FFN, COMBINE))


def _hidden(down: Node) -> Node:
    """Behind the residual connection, if there is one."""
    node = last = down
    while len(node.users) == 1:
        (reader,) = node.users
        if op_name(reader) == "add":
            last = reader
        elif not is_inert(reader) and not is_view(reader):
            break
        node = reader
    return last


def _experts(sparse: GraphModule, router_call: Node, mixed: Node) -> GraphModule:
    """The nodes from the dispatched tokens to their sum, as a module of its own that shares the weights."""
    graph = Graph()
    x = router_call.all_input_nodes[0]
    outputs = {node.args[1]: node for node in router_call.users}
    names = {x: "x", outputs[0]: "routing_weights", outputs[1]: "expert_ids"}
    copied = {node: graph.placeholder(name) for node, name in names.items()}
    stack, needed = [mixed], set[Node]()
    while stack:
        node = stack.pop()
        if node not in copied and node not in needed:
            needed.add(node)
            stack += node.all_input_nodes
    for node in sorted(needed):
        copied[node] = graph.node_copy(node, copied.__getitem__)
    graph.output(copied[mixed])
    return GraphModule(sparse, graph)


class TracingInterpreter(Interpreter):
    """Runs a graph and keeps the values of some nodes.

    Attributes:
        kept: by name of the node, after a run.
        taught: of the layers that ran as `run_taught`, by name of the node that adds up their experts.
    """

    def __init__(
        self,
        graph_module: GraphModule,
        keep: Sequence[str],
        *,
        detach: Sequence[str] = (),
        rounds: bool = False,
        teaches: bool = False,
    ) -> None:
        """Prepare to run.

        Args:
            graph_module: the model.
            keep: names of nodes.
            detach: nodes whose readers send no gradient back.
            rounds: run products of fp32 in bf16 on a CPU that is faster at it. What lies between them stays in fp32, as
                the backward of attention is slow in bf16 there.
            teaches: run layers as `run_taught` where that is faster; all routing weights are 1.
        """
        super().__init__(graph_module)
        self.kept: dict[str, Any] = {}
        self.taught: dict[str, TaughtRun] = {}
        self._keep, self._detach, self._rounds, self._teaches = frozenset(keep), frozenset(detach), rounds, teaches

    def run_node(self, n: Node) -> Any:
        """Run one node."""
        value = self._run(n)
        if n.name in self._keep:
            self.kept[n.name] = value
        return value.detach() if n.name in self._detach and isinstance(value, Tensor) else value

    def _run(self, n: Node) -> Any:
        x = self.env[n.all_input_nodes[0]] if self._rounds and n.target in _PRODUCTS else None
        if x is None or not has_bf16_products(x.device, x.dtype):
            return self._compute(n)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return self._compute(n).to(x.dtype)

    def _compute(self, n: Node) -> Any:
        if not self._teaches or n.target is not MOE_FFN:
            return super().run_node(n)
        args, _ = self.fetch_args_kwargs_from_env(n)
        x, _, expert_ids, *experts = args
        found = run_taught(x, expert_ids, Experts(*experts))
        if found is None:
            return super().run_node(n)
        y, self.taught[n.name] = found
        return y


@torch.no_grad()
def expert_outputs(ffn: RoutedFFN, x: Tensor, num_routed: int) -> Tensor:
    """What each routed expert adds for each token of `x` `[T, D]`: `[T, R, D_out]`."""
    rows = x.repeat_interleave(num_routed, dim=0)  # [T * R, D]
    ids = torch.arange(num_routed, device=x.device).repeat(len(x)).unsqueeze(1)  # [T * R, 1]
    return ffn.experts(rows, torch.ones_like(ids, dtype=x.dtype), ids).unflatten(0, (len(x), num_routed))
