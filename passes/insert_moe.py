"""Put experts in the place of one FFN. The only file that edits a graph to insert experts.

    flat = reshape(x, [-1, D])                                           # [T, D]
    routing_weights, expert_ids = router(flat)                           # [T, K] each
    rows, order, offsets = dispatch(flat, expert_ids, R)                 # [T*K, D]
    hidden = activation(expert_linear(rows, up_proj, ..), ..)            # [T*K, m], the model's own nodes, copied
    out = expert_linear(hidden, down_proj, down_proj_bias, offsets)      # [T*K, D_out]
    y = combine(out, routing_weights, order)                             # [T, D_out]
    y = y + shared_down(activation(shared_up(flat), ..))                 # where there are shared experts
    y = reshape(y + bias, leading dimensions of x)

Parameters: `<ffn>.experts.{up_proj, gate_proj, down_proj, *_bias, bias}`, `<ffn>.shared.*`, `<ffn>.router.*`.
T tokens, K slots, R routed experts, m neurons of an expert.
"""

from __future__ import annotations

import operator
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.fx import Graph, GraphModule, Node

from sparsify.errors import PassError
from sparsify.passes.base import Pass, PassResult
from sparsify.passes.graph_values import as_node, fixed_size
from sparsify.passes.match_ffn import FFNMatch
from sparsify.passes.split.experts import Experts
from sparsify.routers import Router

aten = torch.ops.aten
moe = torch.ops.sparsify  # registered by sparsify.ops, which split.experts imports


@dataclass(frozen=True)
class InsertMoEPass(Pass):
    """Replace the FFN of `match` by `experts` behind `router`, in place. Weights take the dtype of the model."""

    match: FFNMatch
    experts: Experts
    router: Router
    weight_dtype: torch.dtype
    requires_grad: bool

    def requires(self, graph_module: GraphModule) -> None:
        """The nodes of the match must be there."""
        missing = {self.match.x, self.match.down} - {node.name for node in graph_module.graph.nodes}
        if missing:
            raise PassError(f"the match {self.match.name} is not of this graph: it has no node {sorted(missing)}")

    def call(self, graph_module: GraphModule) -> PassResult:
        """See the module."""
        nodes = {node.name: node for node in graph_module.graph.nodes}
        down, read_before = nodes[self.match.down], _read_tensors(graph_module)
        self._register(graph_module)
        with graph_module.graph.inserting_before(down):
            output = self._build(graph_module, nodes[self.match.x], down)
        output.meta.update(down.meta)
        down.replace_all_uses_with(output)
        _erase(graph_module, down, {nodes[projection.node] for projection in self.match.projections})
        _forget(graph_module, read_before)
        return PassResult(graph_module, modified=True)

    def _register(self, graph_module: GraphModule) -> None:
        name, experts = self.match.name, self.experts
        tensors: dict[str, Tensor | None] = {"down_proj": experts.down, "down_proj_bias": experts.expert_bias}
        for role, weight, bias in zip(experts.roles, experts.projections, experts.projection_biases, strict=True):
            tensors |= {role: weight, f"{role}_bias": bias}
        tensors |= {f"vector_{i}": vector for i, vector in enumerate(experts.vectors)}
        tensors["bias"] = experts.bias
        graph_module.add_submodule(f"{name}.experts", self._holder(tensors))
        graph_module.add_submodule(f"{name}.router", self.router)
        if experts.shared is None:
            return
        linears = (*experts.shared.projections, experts.shared.down)
        shared: dict[str, Tensor | None] = {linear.role: linear.weight for linear in linears}
        shared |= {f"{linear.role}_bias": linear.bias for linear in linears}
        shared |= {f"vector_{i}": vector for i, vector in enumerate(experts.shared.vectors)}
        graph_module.add_submodule(f"{name}.shared", self._holder(shared))

    def _holder(self, tensors: dict[str, Tensor | None]) -> nn.Module:
        holder = nn.Module()
        for name, tensor in tensors.items():
            if tensor is None:
                continue
            value = tensor.to(self.weight_dtype).contiguous()
            holder.register_parameter(name, nn.Parameter(value, requires_grad=self.requires_grad))
        return holder

    def _build(self, graph_module: GraphModule, x: Node, down: Node) -> Node:
        graph, name = graph_module.graph, self.match.name
        call = graph.call_function
        flat = call(aten.reshape.default, (x, [-1, self.match.hidden_size]))
        routed = graph.call_module(f"{name}.router", (flat,))
        routing_weights, expert_ids = call(operator.getitem, (routed, 0)), call(operator.getitem, (routed, 1))
        dispatched = call(moe.dispatch.default, (flat, expert_ids, self.experts.num_routed))
        rows, order, offsets = (call(operator.getitem, (dispatched, i)) for i in range(3))
        parameters = _Parameters(graph, graph_module.get_submodule(f"{name}.experts"), f"{name}.experts")
        projected = [
            call(moe.expert_linear.default, (rows, parameters[role], parameters.get(f"{role}_bias"), offsets))
            for role in self.experts.roles
        ]
        vectors = self._row_vectors(graph, parameters, expert_ids, order)
        hidden = self._activate(graph, [*projected, *vectors])
        down_proj, down_bias = parameters["down_proj"], parameters.get("down_proj_bias")
        out = call(moe.expert_linear.default, (hidden, down_proj, down_bias, offsets))
        y = call(moe.combine.default, (out, routing_weights, order))
        if self.experts.shared is not None:
            y = call(aten.add.Tensor, (y, self._shared(graph_module, flat)))
        bias = parameters.get("bias")
        y = y if bias is None else call(aten.add.Tensor, (y, bias))
        return call(aten.reshape.default, (y, _output_shape(graph, x, down)))

    def _row_vectors(self, graph: Graph, parameters: _Parameters, expert_ids: Node, order: Node) -> list[Node]:
        """The per-neuron vectors of each row's expert: `[T*K, m]`; single numbers stay as they are."""
        if not self.experts.vectors:
            return []
        slots = graph.call_function(aten.reshape.default, (expert_ids, [-1]))
        by_row = graph.call_function(aten.index_select.default, (slots, 0, order))
        by_row = graph.call_function(aten.clamp.default, (by_row, 0))
        nodes = [parameters[f"vector_{i}"] for i in range(len(self.experts.vectors))]
        return [
            graph.call_function(aten.index_select.default, (node, 0, by_row)) if vector.dim() == 2 else node
            for node, vector in zip(nodes, self.experts.vectors, strict=True)
        ]

    def _shared(self, graph_module: GraphModule, flat: Node) -> Node:
        graph, path = graph_module.graph, f"{self.match.name}.shared"
        parameters = _Parameters(graph, graph_module.get_submodule(path), path)
        projected = [
            graph.call_function(aten.linear.default, (flat, parameters[role], parameters.get(f"{role}_bias")))
            for role in self.experts.roles
        ]
        vectors = [parameters[f"vector_{i}"] for i in range(len(self.experts.vectors))]
        hidden = self._activate(graph, [*projected, *vectors])
        return graph.call_function(aten.linear.default, (hidden, parameters["down_proj"], None))

    def _activate(self, graph: Graph, inputs: list[Node]) -> Node:
        source = self.experts.activation.graph
        copied = dict(zip(source.find_nodes(op="placeholder"), inputs, strict=True))
        result = graph.graph_copy(source, copied)
        if not isinstance(result, Node):
            raise PassError(f"the activation of {self.match.name} does not return one tensor")
        return result


class _Parameters:
    """`get_attr` nodes for the tensors of one module."""

    def __init__(self, graph: Graph, module: nn.Module, path: str) -> None:
        self._graph, self._module, self._path = graph, module, path

    def __getitem__(self, name: str) -> Node:
        return self._graph.get_attr(f"{self._path}.{name}")

    def get(self, name: str) -> Node | None:
        """None where the module has no such tensor."""
        return self[name] if hasattr(self._module, name) else None


def _output_shape(graph: Graph, x: Node, down: Node) -> list[Node | int]:
    """The shape of down_proj's output, its dynamic sizes read from `x`; at most one may be left to reshape as -1."""
    sizes = x.meta["val"].shape[:-1]
    shape: list[Node | int] = []
    for size in down.meta["val"].shape:
        fixed = fixed_size(size)
        if fixed is not None:
            shape.append(fixed)
            continue
        dim = next((i for i, other in enumerate(sizes) if str(other) == str(size)), None)
        shape.append(-1 if dim is None else graph.call_function(aten.sym_size.int, (x, dim)))
    if shape.count(-1) > 1:
        raise PassError(f"the sizes {list(down.meta['val'].shape)} of `{down.name}` do not follow from `{x.name}`")
    return shape


def _erase(graph_module: GraphModule, down: Node, projections: set[Node]) -> None:
    """Erase the FFN. Sizes that others read off its intermediate values are read off an equal dimension elsewhere."""
    graph = graph_module.graph
    for node in _between(down, projections):
        for reader in [user for user in node.users if user.target is aten.sym_size.int]:
            _reroute_size(graph, reader)
    graph.eliminate_dead_code()


def _between(down: Node, projections: set[Node]) -> list[Node]:
    """Every node from the projections to `down`."""
    stack, seen = [as_node(down.args[0])], set[Node]()
    while stack:
        node = stack.pop()
        if node not in seen and node.op == "call_function":
            seen.add(node)
            stack += [] if node in projections else node.all_input_nodes
    return list(seen)


def _reroute_size(graph: Graph, reader: Node) -> None:
    """Replace `sym_size(inner, dim)` by the size of an input of the graph, or of an earlier node, that is equal."""
    wanted = str(reader.meta["val"])
    for node in graph.find_nodes(op="placeholder"):
        value = node.meta.get("val")
        dims = [i for i, size in enumerate(value.shape) if str(size) == wanted] if isinstance(value, Tensor) else []
        if dims:
            reader.args = (node, dims[0])
            return
    raise PassError(f"`{reader.name}` reads a size of the intermediate values that no input of the model has")


def _forget(graph_module: GraphModule, read_before: set[str]) -> None:
    """Drop the tensors that only the erased nodes read, and modules that became empty."""
    for path in read_before - _read_tensors(graph_module):
        owner, _, name = path.rpartition(".")
        delattr(graph_module.get_submodule(owner), name)
    graph_module.delete_all_unused_submodules()


def _read_tensors(graph_module: GraphModule) -> set[str]:
    return {str(node.target) for node in graph_module.graph.find_nodes(op="get_attr")}
