"""Put experts in the place of one FFN. The only file that edits a graph to insert experts.

    flat = reshape(x, [-1, D])                                           # [T, D], features moved last before
    routing_weights, expert_ids = router(flat[, ids])                    # [T, K] each
    rows, order, offsets = dispatch(flat, expert_ids, R)                 # [T*K, D]
    hidden = activation(expert_linear(rows, up_proj, ..), ..)            # [T*K, m], the model's own nodes, copied
    out = expert_linear(hidden, down_proj, down_proj_bias, offsets)      # [T*K, D_out]
    y = combine(out, routing_weights, order)                             # [T, D_out]
    y = y + shared_down(activation(shared_up(flat), ..))                 # where there are shared experts
    y = reshape(y + bias, leading dimensions of x)

A router that reads groups is given the tokens as the model has them, [G, .., D]. One that mixes them returns slots,
which take the place of the tokens up to the combine, and the weights that bring them back:

    routing_weights, expert_ids, slots, combine_weights = router(x)      # [N, 1], [N, 1], [N, D], [G, S, n], N = G n
    ..                                                                   # with slots for flat, to y [N, D_out]
    y = bmm(combine_weights, view(y, [G, n, D_out]))                     # [T, D_out]

Where experts differ in width, each is several units of the bank (`sparsify.expert_units`), which take their place:

    unit_weights, unit_ids = units(routing_weights, expert_ids)          # [T, K M] each
    rows, order, offsets = dispatch(flat, unit_ids, U)                   # and so on, U for R and K M for K

Without routed experts (static pruning) only the shared expert and the bias remain.
Sites that share their weights call the same experts and router.
Parameters: `<ffn>.experts.{up_proj, gate_proj, down_proj, *_bias, bias}`, `<ffn>.shared.*`, `<ffn>.router.*`.
T tokens, K slots, R routed experts, m neurons of an expert, U units, M units of the widest expert.
"""

from __future__ import annotations

import operator
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.fx import Graph, GraphModule, Node

from sparsify.errors import PassError
from sparsify.passes.base import Pass, PassResult
from sparsify.passes.graph_values import fixed_size
from sparsify.passes.match_ffn import FFNMatch, Site
from sparsify.passes.split.experts import Experts
from sparsify.passes.token_layout import before_flattening
from sparsify.routers import Router, UnitRouter

aten = torch.ops.aten
moe = torch.ops.sparsify  # registered by sparsify.ops, which split.experts imports


@dataclass(frozen=True)
class InsertMoEPass(Pass):
    """Replace the FFN of `match` by `experts` behind `router`, in place, at every site.

    `dtypes` are those of the model's own weights, by role; `ids` are the nodes with the ids of the tokens, one for each
    site, where the router reads ids.
    """

    match: FFNMatch
    experts: Experts
    router: Router | None
    dtypes: Mapping[str, torch.dtype]
    requires_grad: bool
    ids: tuple[str, ...] = ()

    def requires(self, graph_module: GraphModule) -> None:
        """The nodes of the match must be there."""
        wanted = {name for site in self.match.sites for name in (site.x, site.down)} | set(self.ids)
        missing = wanted - {node.name for node in graph_module.graph.nodes}
        if missing:
            raise PassError(f"the match {self.match.name} is not of this graph: it has no node {sorted(missing)}")

    def call(self, graph_module: GraphModule) -> PassResult:
        """See the module."""
        nodes = {node.name: node for node in graph_module.graph.nodes}
        read_before = _read_tensors(graph_module)
        self._register(graph_module, [nodes[vector.node] for vector in self.match.vectors])
        dying = {nodes[name] for site in self.match.sites for name in site.interior}
        for site, ids in zip(self.match.sites, self.ids or (None,) * len(self.match.sites), strict=True):
            down = nodes[site.down]
            with graph_module.graph.inserting_before(down):
                shape = _output_shape(graph_module.graph, nodes[site.x], down, site, dying)
                output = self._build(graph_module, nodes[site.x], shape, site, None if ids is None else nodes[ids])
            output.meta.update(down.meta)
            down.replace_all_uses_with(output)
            nodes[site.down] = output
            for name in site.interior:
                _reroute_sizes(nodes[name], dying)
            graph_module.graph.erase_node(down)
            output.name = site.down  # what other matches read keeps its name
        graph_module.graph.eliminate_dead_code()
        _erase_in_place(graph_module.graph, dying)
        _forget(graph_module, read_before)
        return PassResult(graph_module, modified=True)

    def _register(self, graph_module: GraphModule, vectors: list[Node]) -> None:
        name, experts = self.match.name, self.experts
        vector_dtypes = {f"vector_{i}": node.meta["val"].dtype for i, node in enumerate(vectors)}
        tensors = {**({} if self.router is None else self._routed_tensors()), "bias": experts.bias}
        graph_module.add_submodule(f"{name}.experts", self._holder(tensors, vector_dtypes))
        if self.router is not None:
            self.router.requires_grad_(not isinstance(self.router, UnitRouter))  # weights of one pass no gradient on
            graph_module.add_submodule(f"{name}.router", self.router)
            if experts.units is not None:
                graph_module.add_submodule(f"{name}.units", experts.units)
        if experts.shared is None:
            return
        linears = (*experts.shared.projections, experts.shared.down)
        shared: dict[str, Tensor | None] = {linear.role: linear.weight for linear in linears}
        shared |= {f"{linear.role}_bias": linear.bias for linear in linears}
        shared |= {f"vector_{i}": vector for i, vector in enumerate(experts.shared.vectors)}
        graph_module.add_submodule(f"{name}.shared", self._holder(shared, vector_dtypes))

    def _routed_tensors(self) -> dict[str, Tensor | None]:
        experts = self.experts
        tensors: dict[str, Tensor | None] = {"down_proj": experts.down, "down_proj_bias": experts.expert_bias}
        for role, weight, bias in zip(experts.roles, experts.projections, experts.projection_biases, strict=True):
            tensors |= {role: weight, f"{role}_bias": bias}
        return tensors | {f"vector_{i}": vector for i, vector in enumerate(experts.vectors)}

    def _holder(self, tensors: dict[str, Tensor | None], vector_dtypes: dict[str, torch.dtype]) -> nn.Module:
        dtypes = {**self.dtypes, **vector_dtypes}
        holder = nn.Module()
        for name, tensor in tensors.items():
            if tensor is None:
                continue
            dtype = dtypes.get(name.removesuffix("_bias"), self.dtypes["down_proj"])
            requires_grad = self.requires_grad and dtype.is_floating_point
            holder.register_parameter(name, nn.Parameter(tensor.to(dtype).contiguous(), requires_grad=requires_grad))
        return holder

    def _build(
        self, graph_module: GraphModule, x: Node, shape: list[Node | int], site: Site, ids: Node | None
    ) -> Node:
        graph, name = graph_module.graph, self.match.name
        call = graph.call_function
        x = before_flattening(x, site.x_axis) if self.router is not None and self.router.reads_groups else x
        tokens = x if site.x_axis == -1 else call(aten.movedim.int, (x, site.x_axis, -1))
        flat = call(aten.reshape.default, (tokens, [-1, self.match.hidden_size]))
        parameters = _Parameters(graph, graph_module.get_submodule(f"{name}.experts"), f"{name}.experts")
        y = None if self.router is None else self._routed(graph, parameters, self.router, tokens, flat, ids)
        if self.experts.shared is not None:
            shared = self._shared(graph_module, flat)
            y = shared if y is None else call(aten.add.Tensor, (y, shared))
        if y is None:
            raise PassError(f"{name} has neither routed nor shared experts")
        bias = parameters.get("bias")
        y = y if bias is None else call(aten.add.Tensor, (y, bias))
        y = call(aten.reshape.default, (y, shape))
        return y if site.down_axis == -1 else call(aten.movedim.int, (y, -1, site.down_axis))

    def _routed(
        self, graph: Graph, parameters: _Parameters, router: Router, tokens: Node, flat: Node, ids: Node | None
    ) -> Node:
        call = graph.call_function
        read = (tokens if router.reads_groups else flat,) if ids is None else (flat, ids)
        routed = graph.call_module(f"{self.match.name}.router", read)
        routing_weights, expert_ids = call(operator.getitem, (routed, 0)), call(operator.getitem, (routed, 1))
        rows_of = call(operator.getitem, (routed, 2)) if router.mixes else flat
        if self.experts.sizes is not None:
            units = graph.call_module(f"{self.match.name}.units", (routing_weights, expert_ids))
            routing_weights, expert_ids = call(operator.getitem, (units, 0)), call(operator.getitem, (units, 1))
        dispatched = call(moe.dispatch.default, (rows_of, expert_ids, self.experts.num_units))
        rows, order, offsets = (call(operator.getitem, (dispatched, i)) for i in range(3))
        projected = [
            call(moe.expert_linear.default, (rows, parameters[role], parameters.get(f"{role}_bias"), offsets))
            for role in self.experts.roles
        ]
        vectors = self._row_vectors(graph, parameters, expert_ids, order)
        hidden = self._activate(graph, [*projected, *vectors])
        down_proj, down_bias = parameters["down_proj"], parameters.get("down_proj_bias")
        out = call(moe.expert_linear.default, (hidden, down_proj, down_bias, offsets))
        y = call(moe.combine.default, (out, routing_weights, order))
        return self._mix(graph, y, routed, router) if router.mixes else y

    def _mix(self, graph: Graph, y: Node, routed: Node, router: Router) -> Node:
        """Outputs of slots `[N, D_out]` to those of tokens `[T, D_out]`."""
        slots, features = router.num_experts * router.top_k, self.experts.down.shape[1]
        weights = graph.call_function(operator.getitem, (routed, 3))
        y = graph.call_function(aten.view.default, (y, [-1, slots, features]))
        y = graph.call_function(aten.bmm.default, (weights, y))
        return graph.call_function(aten.view.default, (y, [-1, features]))

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
        source = self.match.function.graph
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


def _output_shape(graph: Graph, x: Node, down: Node, site: Site, dying: set[Node]) -> list[Node | int]:
    """The shape of the output with its features last; dynamic sizes are read off `x` or an earlier value that has them.

    One may be left as -1.
    """
    value = down.meta["val"]
    shape: list[Node | int] = []
    for size in value.movedim(site.down_axis, -1).shape:
        fixed = fixed_size(size)
        if fixed is not None:
            shape.append(fixed)
            continue
        place = _find_size(x, str(size), dying)
        shape.append(-1 if place is None else graph.call_function(aten.sym_size.int, place))
    if shape.count(-1) > 1:
        raise PassError(f"the sizes {list(value.shape)} of `{down.name}` do not follow from `{x.name}`")
    return shape


def _find_size(node: Node, wanted: str, dying: set[Node]) -> tuple[Node, int] | None:
    """A value with that size, and in which dimension: `node` itself or an input, as others may be forgotten already."""
    for other in (node, *node.graph.find_nodes(op="placeholder")):
        value = other.meta.get("val")
        if other in dying or not isinstance(value, Tensor):
            continue
        dims = [i for i, size in enumerate(value.shape) if str(size) == wanted]
        if dims:
            return other, dims[0]
    return None


def _reroute_sizes(node: Node, dying: set[Node]) -> None:
    """Sizes that others read off an intermediate value are read off another value that has an equal one."""
    for reader in [user for user in node.users if user.target is aten.sym_size.int]:
        place = _find_size(node, str(reader.meta["val"]), dying)
        if place is None:
            raise PassError(f"`{reader.name}` reads a size of the intermediate values that nothing else has")
        reader.args = place


def _erase_in_place(graph: Graph, dying: set[Node]) -> None:
    """What writes in place is never dead to fx, and holds what it reads."""
    for node in sorted(dying & set(graph.nodes), reverse=True):
        graph.erase_node(node)


def _forget(graph_module: GraphModule, read_before: set[str]) -> None:
    """Drop the tensors that only the erased nodes read, and modules that became empty."""
    for path in read_before - _read_tensors(graph_module):
        owner, _, name = path.rpartition(".")
        delattr(graph_module.get_submodule(owner), name)
    graph_module.delete_all_unused_submodules()


def _read_tensors(graph_module: GraphModule) -> set[str]:
    return {str(node.target) for node in graph_module.graph.find_nodes(op="get_attr")}
