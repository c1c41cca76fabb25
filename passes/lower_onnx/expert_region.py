"""The placeholders of one layer and the activation nodes between them, for lowerings that write a layer as a whole.

Dispatch -> rows [R, D] -> ExpertLinear .. -> activation nodes -> ExpertLinear (down) -> Combine
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

import onnx_ir as ir
from onnx_ir.tape import Tape

from sparsify.errors import ExportError
from sparsify.passes.lower_onnx.values import input_of

DOMAIN = "sparsify"
SCOPE = "sparsify.scope"  # in the metadata of a node: the part of the layer that it belongs to
Linear = Callable[[ir.Node, ir.Value], ir.Value]


@dataclass(frozen=True)
class ExpertRegion:
    """One layer of an exported graph; `inner` is what lies between dispatch and down, in the order of the graph."""

    dispatch: ir.Node
    inner: tuple[ir.Node, ...]
    down: ir.Node
    combine: ir.Node

    @property
    def graph(self) -> ir.Graph:
        """That it is in."""
        graph = self.dispatch.graph
        assert isinstance(graph, ir.Graph)
        return graph

    @property
    def num_experts(self) -> int:
        """E."""
        return self.dispatch.attributes["num_experts"].as_int()

    @property
    def top_k(self) -> int:
        """K."""
        return self.dispatch.attributes["top_k"].as_int()

    @property
    def units(self) -> list[int] | None:
        """How many each expert has, where they differ in width; E are these units then."""
        sizes = self.dispatch.attributes.get("units")
        return None if sizes is None else list(sizes.as_ints())

    @property
    def expert_ids(self) -> ir.Value:
        """What the router chose."""
        return input_of(self.dispatch, 1 if self.units is None else 2)

    @property
    def routing_weights(self) -> ir.Value:
        """Of what the router chose."""
        return input_of(self.combine, 1 if self.units is None else 3)

    def take_whole_experts(self) -> None:
        """From now on dispatch and combine work on experts, not on units; the weights are still those of units."""
        sizes = self.units
        if sizes is None:
            return
        plain, top_k = (self.dispatch.attributes[name].as_int() for name in ("plain_router", "routed_k"))
        numbers = {"num_experts": len(sizes), "num_parts": len(sizes) + (not plain), "top_k": top_k}
        self.dispatch.replace_input_with(1, self.expert_ids)
        self.combine.replace_input_with(1, self.routing_weights)
        for node, changed in ((self.dispatch, numbers), (self.combine, {"top_k": top_k, "unit_weights": plain})):
            for name, number in changed.items():
                node.attributes[name] = ir.AttrInt64(name, int(number))

    @property
    def unit_weights(self) -> bool:
        """Every routing weight is one, and no slot is unused."""
        return bool(self.combine.attributes["unit_weights"].as_int())

    def scope(self, part: str) -> str:
        """Where the nodes of a part of this layer stand, as in `encoder.layer.3.ffn.router`."""
        return f"{layer_of(self.dispatch)}.{part}"

    def replay(self, tape: Tape, rows: ir.Value, linear: Linear) -> ir.Value:
        """Write what lies between dispatch and down once more, for other rows.

        Args:
            tape: takes the copies.
            rows: stand in for those of the dispatch.
            linear: writes an `ExpertLinear`, given the placeholder and its rows.

        Returns:
            What down reads.
        """
        copies: dict[ir.Value, ir.Value] = {self.dispatch.outputs[0]: rows}
        for node in self.inner:
            if is_linear(node):
                copies[node.outputs[0]] = linear(node, copies[input_of(node, 0)])
            else:
                copies.update(zip(node.outputs, _copy(tape, node, copies), strict=True))
        return copies[input_of(self.down, 0)]

    def replace(self, tape: Tape, values: Mapping[ir.Value, ir.Value]) -> None:
        """Put new nodes in the place of the layer, or of its part before the combine.

        Args:
            tape: holds them; they stand before the last node that they replace.
            values: old value -> new one. The nodes of the old ones go, and so does what only they read.
        """
        ends_with_combine = self.combine.outputs[0] in values
        place = self.combine if ends_with_combine else self.down
        put_nodes(self.graph, tape, place, self.scope("experts"), values)
        gone = [self.dispatch, *self.inner, self.down, *([self.combine] if ends_with_combine else [])]
        self.graph.remove(gone, safe=True)


def find_regions(graph: ir.Graph) -> list[ExpertRegion]:
    """Every layer, in the order of the graph.

    Raises:
        ExportError: a dispatch does not lead to one combine.
    """
    return [_read(graph, node) for node in graph if node.domain == DOMAIN and node.op_type == "Dispatch"]


def layer_of(placeholder: ir.Node) -> str:
    """The name of the layer that a placeholder belongs to."""
    return placeholder.attributes["layer"].as_string()


def mark_nodes(nodes: Iterable[ir.Node], scope: str) -> None:
    """Note a scope on those nodes that have none yet."""
    for node in nodes:
        node.metadata_props.setdefault(SCOPE, scope)


def put_nodes(graph: ir.Graph, tape: Tape, place: ir.Node, scope: str, values: Mapping[ir.Value, ir.Value]) -> None:
    """Put new nodes before `place`, whose values take over name and readers of old ones.

    Args:
        graph: that `place` is in.
        tape: holds the nodes and their initializers.
        place: stays, and so does all that computes the old values.
        scope: of those nodes that have none yet.
        values: old value -> new one.
    """
    for initializer in tape.initializers:
        graph.initializers[str(initializer.name)] = initializer
    mark_nodes(tape.nodes, scope)
    graph.insert_before(place, tape.nodes)
    for old, new in values.items():
        new.shape, new.type, new.name = old.shape, old.type, old.name
        ir.convenience.replace_all_uses_with(old, new, replace_graph_outputs=True)


def nodes_of(region: ExpertRegion, part: str) -> list[ir.Node]:
    """The nodes that were marked as a part of the layer, in the order of the graph."""
    return [node for node in region.graph if node.metadata_props.get(SCOPE) == region.scope(part)]


def is_linear(node: ir.Node) -> bool:
    """The node is an `ExpertLinear` placeholder."""
    return node.domain == DOMAIN and node.op_type == "ExpertLinear"


def _read(graph: ir.Graph, dispatch: ir.Node) -> ExpertRegion:
    combines = [usage.node for usage in dispatch.outputs[1].uses() if usage.node.op_type == "Combine"]
    down = input_of(combines[0], 0).producer() if len(combines) == 1 else None
    if down is None:
        raise ExportError(f"{dispatch.name} must lead to one Combine, but leads to {len(combines)}; report this model")
    return ExpertRegion(dispatch, tuple(_between(graph, dispatch, down)), down, combines[0])


def _between(graph: Iterable[ir.Node], dispatch: ir.Node, down: ir.Node) -> list[ir.Node]:
    """What is computed from the dispatched rows and leads to `down`."""
    from_rows = {dispatch.outputs[0]}
    found: list[ir.Node] = []
    for node in graph:
        if node is down:
            break
        if node is not dispatch and any(value in from_rows for value in node.inputs):
            found.append(node)
            from_rows.update(node.outputs)
    return found


def _copy(tape: Tape, node: ir.Node, copies: Mapping[ir.Value, ir.Value]) -> list[ir.Value]:
    inputs = [value if value is None else copies.get(value, value) for value in node.inputs]
    outputs = tape.op_multi_out(
        node.op_type, inputs, dict(node.attributes), domain=node.domain, num_outputs=len(node.outputs)
    )
    for old, new in zip(node.outputs, outputs, strict=True):
        new.type = old.type
    return list(outputs)
