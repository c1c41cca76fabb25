"""GraphModule -> [FFNMatch] + [Rejection]: find FFNs by their data flow, never by a name. Matching does not mutate.

    y = down_proj(act(x W_up + b_up [, x W_gate + b_gate]))

Expects the graph after `normalize_linear`. T tokens, D hidden_size, F intermediate_size.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch.fx import GraphModule, Node

from sparsify.passes.activation import extract_activation, is_view, name_activation
from sparsify.passes.ffn_region import Part, Region, find_region
from sparsify.passes.graph_values import as_node, fake_tensor, last_size

aten = torch.ops.aten


@dataclass(frozen=True)
class Projection:
    """A linear layer from D to F: rows `start:stop` of a weight, or columns where the weight is stored `[in, out]`.

    Attributes:
        role: "up_proj" or "gate_proj" (a third and later one: "proj_2", ...).
        node: the node that holds its output.
        weight: path of the parameter.
        bias: path of the bias, or None.
        transposed: the parameter is stored `[in, out]`.
        start: first row.
        stop: row after the last.
    """

    role: str
    node: str
    weight: str
    bias: str | None
    transposed: bool
    start: int
    stop: int


@dataclass(frozen=True)
class FFNMatch:
    """A feed-forward subgraph that can be split. Nodes are given by name, so a match prints well and can be compared.

    Attributes:
        name: the innermost module that holds all of its weights.
        kind: "plain" or "gated".
        activation: the function of one neuron: relu, gelu, gelu_tanh, silu, ... or "custom".
        hidden_size: D, features of the input.
        intermediate_size: F, neurons.
        out_features: features of the output, D in a block.
        flops_per_token: of the linear layers, 2 per multiply-add.
        x: node of the input `[..., D]`.
        projections: one, or two if gated.
        down: node of down_proj.
        down_proj: the weight of down_proj; its rows are the output features.
        interior: neuron-wise nodes, in graph order.
        vectors: nodes of the per-neuron vectors that `interior` reads.
    """

    name: str
    kind: Literal["plain", "gated"]
    activation: str
    hidden_size: int
    intermediate_size: int
    out_features: int
    flops_per_token: int
    x: str = field(repr=False)
    projections: tuple[Projection, ...] = field(repr=False)
    down: str = field(repr=False)
    down_proj: Projection = field(repr=False)
    interior: tuple[str, ...] = field(repr=False)
    vectors: tuple[str, ...] = field(repr=False)

    @property
    def num_parameters(self) -> int:
        """Weights and biases of the FFN, per-neuron vectors left out."""
        biased = [p for p in (*self.projections, self.down_proj) if p.bias is not None]
        widths = sum(p.stop - p.start for p in biased)
        return self.flops_per_token // 2 + widths


@dataclass(frozen=True)
class Rejection:
    """A subgraph that resembles an FFN but cannot be split, why, and the node to blame."""

    name: str
    reason: str
    node: str

    def __str__(self) -> str:
        return f"{self.name}: {self.reason} (node `{self.node}`)"


def match_ffn(graph_module: GraphModule) -> tuple[list[FFNMatch], list[Rejection]]:
    """Find every FFN.

    Args:
        graph_module: a captured model after `NormalizeLinearPass`.

    Returns:
        The legal FFNs and the refused near misses, each in graph order. No two matches share a node or a weight.
    """
    matches: list[FFNMatch] = []
    rejections: list[Rejection] = []
    for down in graph_module.graph.find_nodes(op="call_function", target=aten.linear.default):
        found = _match_one(graph_module, down, matches)
        if isinstance(found, FFNMatch):
            matches.append(found)
        if isinstance(found, Rejection):
            rejections.append(found)
    return matches, rejections


def _match_one(graph_module: GraphModule, down: Node, earlier: list[FFNMatch]) -> FFNMatch | Rejection | None:
    """A match, a near miss, or None where nothing resembles an FFN."""
    region = find_region(down)
    if not region.parts or not region.has_activation or region.is_residual_stream:
        return None
    inputs = {as_node(part.linear.args[0]) for part in region.parts}
    if region.blocked and len(inputs) > 1:
        return None
    place = _place(region)
    for node, reason in (*region.blocked, *_faults(region), *_conflicts(region, earlier)):
        return Rejection(place or "model", reason, node.name)
    return _build(_unique_name(graph_module, place, {match.name for match in earlier}), region)


def _faults(region: Region) -> Iterator[tuple[Node, str]]:
    """Reasons that lie in the region itself."""
    x = region.parts[0].linear.args[0]
    width = last_size(as_node(region.down.args[0]))
    for part in region.parts:
        if part.linear.args[0] is not x:
            yield part.linear, "its projections read different inputs"
        if part.stop - part.start != width:
            yield part.linear, f"projects to {part.stop - part.start} neurons, but down_proj reads {width}"
    for linear in (*(part.linear for part in region.parts), region.down):
        if _weight_of(linear) is None:
            yield linear, "its weight is computed in the graph (quantised, LoRA or tied by arithmetic), not a parameter"
    for node in region.interior:
        if not is_view(node) and any(_tokens(arg) not in ("", _tokens(node)) for arg in node.all_input_nodes):
            yield node, f"`{node.name}` broadcasts over tokens, so a token is not processed by itself"
    inside = _inside(region)
    for node in inside - {region.down}:
        for reader in node.users:
            if reader not in inside and reader.target is not aten.sym_size.int:
                yield reader, f"`{reader.name}` also reads the intermediate values, so neurons cannot be divided"


def _tokens(node: Node) -> str:
    """The leading dimensions of a value, "" where they are all one, as in a per-neuron vector."""
    value = fake_tensor(node)
    sizes = [str(size) for size in value.shape[:-1]] if value is not None else []
    return ",".join(sizes) if set(sizes) - {"1"} else ""


def _conflicts(region: Region, earlier: list[FFNMatch]) -> Iterator[tuple[Node, str]]:
    """Reasons that lie in FFNs that were matched before."""
    weights = {_weight_of(linear) for linear in (*(part.linear for part in region.parts), region.down)}
    nodes = {*(part.node.name for part in region.parts), region.down.name}
    for match in earlier:
        if nodes & {match.down, *(projection.node for projection in match.projections)}:
            yield region.down, f"a linear layer of it belongs to the FFN {match.name}"
        if weights & {projection.weight for projection in (*match.projections, match.down_proj)}:
            yield region.down, f"it shares its weights with the FFN {match.name}"


def _inside(region: Region) -> set[Node]:
    """All nodes that vanish with the FFN, the chunks of a fused projection included."""
    parts = {node for part in region.parts for node in (part.node, part.linear)}
    chunks = {as_node(part.node.args[0]) for part in region.parts if part.node is not part.linear}
    return {*parts, *chunks, *region.interior, region.down}


def _build(name: str, region: Region) -> FFNMatch:
    inputs = [part.node for part in region.parts] + region.vectors
    hidden, x = as_node(region.down.args[0]), as_node(region.parts[0].linear.args[0])
    activation = extract_activation(inputs, region.interior, hidden)
    named = name_activation(activation, len(region.parts), len(region.vectors))
    hidden_size, width, out_features = (last_size(node) or 0 for node in (x, hidden, region.down))
    return FFNMatch(
        name=name,
        kind="plain" if len(region.parts) == 1 else "gated",
        activation=named.name,
        hidden_size=hidden_size,
        intermediate_size=width,
        out_features=out_features,
        flops_per_token=2 * width * (len(region.parts) * hidden_size + out_features),
        x=x.name,
        projections=tuple(_projection(part, _role(i, named.gate)) for i, part in enumerate(region.parts)),
        down=region.down.name,
        down_proj=_projection(Part(region.down, region.down, 0, out_features), "down_proj"),
        interior=tuple(node.name for node in region.interior),
        vectors=tuple(node.name for node in region.vectors),
    )


def _role(index: int, gate: int | None) -> str:
    if gate is None:
        return "up_proj"
    if index > 1:
        return f"proj_{index}"
    return "gate_proj" if index == gate else "up_proj"


def _projection(part: Part, role: str) -> Projection:
    weight, bias = as_node(part.linear.args[1]), part.linear.args[2] if len(part.linear.args) > 2 else None
    path = _weight_of(part.linear)
    if path is None:
        raise ValueError(f"`{part.linear.name}` has no parameter as its weight")
    bias_path = None if bias is None else str(as_node(bias).target)
    return Projection(role, part.node.name, path, bias_path, weight.op != "get_attr", part.start, part.stop)


def _weight_of(linear: Node) -> str | None:
    """Path of the weight parameter; None if weight or bias are not plain parameters."""
    weight, bias = as_node(linear.args[1]), linear.args[2] if len(linear.args) > 2 else None
    if bias is not None and as_node(bias).op != "get_attr":
        return None
    stored = as_node(weight.args[0]) if weight.target is aten.t.default else weight
    return str(stored.target) if stored.op == "get_attr" else None


def _place(region: Region) -> str:
    """The innermost module that holds all weights, by their paths; the nodes' modules where a weight has no path."""
    paths = [_weight_of(linear) or _module_of(linear) for linear in (*(p.linear for p in region.parts), region.down)]
    parents = [path.rpartition(".")[0].split(".") for path in paths]
    return ".".join(os.path.commonprefix(parents))


def _module_of(node: Node) -> str:
    stack = node.meta.get("nn_module_stack") or {}
    return str(list(stack.values())[-1][0]) + ".weight" if stack else ""


def _unique_name(graph_module: GraphModule, place: str, taken: set[str]) -> str:
    """`place`, unless an FFN or a submodule there already uses the names that experts will have."""
    try:
        module = graph_module.get_submodule(place)
    except AttributeError:
        module = graph_module
    if place and place not in taken and not any(hasattr(module, name) for name in ("experts", "router", "shared")):
        return place
    prefix = f"{place}.ffn" if place else "ffn"
    return next(f"{prefix}{i}" for i in range(len(taken) + 1) if f"{prefix}{i}" not in taken)
