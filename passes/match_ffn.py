"""GraphModule -> [FFNMatch] + [Rejection]: find FFNs by their data flow, never by a name. Matching does not mutate.

    y = down_proj(act(x W_up + b_up [, x W_gate + b_gate]))

Expects the graph after `normalize_linear`. T tokens, D hidden_size, F intermediate_size.
"""

from __future__ import annotations

import os
from dataclasses import dataclass, field, replace
from typing import Literal

import torch
from torch.fx import GraphModule, Node

from sparsify.passes.activation import name_activation
from sparsify.passes.constants import describe_constant, weight_source
from sparsify.passes.ffn_faults import find_fault
from sparsify.passes.ffn_region import Part, Region
from sparsify.passes.graph_values import size_at
from sparsify.passes.linear_layer import read_grouped, read_linear
from sparsify.passes.walk_back import find_region


@dataclass(frozen=True)
class Projection:
    """A linear layer of an FFN, or the rows of one that the FFN reads.

    Attributes:
        role: "up_proj", "gate_proj" or "down_proj" (a third and later projection: "proj_2", ...).
        weight: path of the parameter.
        bias: path of the bias, or None.
        rows: the row of the weight that each neuron reads; all rows of down_proj.
    """

    role: str
    weight: str
    bias: str | None
    rows: range | tuple[int, ...] = field(repr=False)


@dataclass(frozen=True)
class NeuronVector:
    """A constant of the activation.

    Attributes:
        node: holds it.
        dims: its dimensions that count neurons, counted from the end; () for a single number.
        index: the place of each neuron in these dimensions, flattened.
    """

    node: str
    dims: tuple[int, ...]
    index: range | tuple[int, ...] = field(repr=False)


@dataclass(frozen=True)
class Site:
    """One place in the graph where the FFN is called; all nodes by name.

    Attributes:
        x: holds the input.
        x_axis: of its features, counted from the end: -1, or that of the channels of a convolution.
        projections: the linear layers, in the order of `FFNMatch.projections`.
        down: down_proj.
        down_axis: of the features of the output.
        interior: every node that vanishes with the FFN, projections included.
    """

    x: str
    x_axis: int
    projections: tuple[str, ...]
    down: str
    down_axis: int
    interior: tuple[str, ...]


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
        flops_per_token: of the linear layers, at one site, 2 per multiply-add.
        dtype: of the output.
        device: of the output, as "cpu" or "cuda:0".
        sites: where it is called; several where sites share all weights.
        projections: one, or two if gated.
        down_proj: the last layer.
        vectors: per-neuron vectors and single numbers that the activation reads.
        function: from projections and vectors to the input of down_proj.
    """

    name: str
    kind: Literal["plain", "gated"]
    activation: str
    hidden_size: int
    intermediate_size: int
    out_features: int
    flops_per_token: int
    dtype: torch.dtype
    device: str
    sites: tuple[Site, ...] = field(repr=False)
    projections: tuple[Projection, ...] = field(repr=False)
    down_proj: Projection = field(repr=False)
    vectors: tuple[NeuronVector, ...] = field(repr=False)
    function: GraphModule = field(repr=False, compare=False)

    @property
    def num_parameters(self) -> int:
        """Weights and biases of the FFN, per-neuron vectors left out."""
        biased = [p for p in (*self.projections, self.down_proj) if p.bias is not None]
        return self.flops_per_token // 2 + sum(len(p.rows) for p in biased)


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
        The legal FFNs and the refused near misses, each in graph order. Sites that share all weights are one match. No
        two matches share a node.
    """
    matches: dict[object, FFNMatch] = {}
    rejections: list[Rejection] = []
    taken: dict[Node, str] = {}
    for node in graph_module.graph.nodes:
        region = _resembling(node)
        if region is None:
            continue
        place = _place(region)
        fault = find_fault(region, taken)
        if fault is not None:
            rejections.append(Rejection(place or "model", fault[1], fault[0].name))
            continue
        key = _identity(graph_module, region)
        name = (
            matches[key].name
            if key in matches
            else _unique_name(graph_module, place, {match.name for match in matches.values()})
        )
        matches[key] = _with_site(matches.get(key), name, region)
        taken |= dict.fromkeys((*region.interior, region.down.node), name)
    return list(matches.values()), rejections


def _resembling(down: Node) -> Region | None:
    """The region of something that is an FFN, or nearly; None where nothing resembles one."""
    layer = read_linear(down) or read_grouped(down)
    if layer is None:
        return None
    region = find_region(layer)
    if not region.parts or region.is_foreign or not region.has_activation or region.is_residual_stream:
        return None
    inputs = {part.layer.x for part in region.parts}
    return None if region.blocked and len(inputs) > 1 else region


def _identity(graph_module: GraphModule, region: Region) -> object:
    """Equal for sites that compute the same function with the same weights."""
    layers = [part.layer for part in region.parts] + [region.down]
    constants = [node for layer in layers for node in (layer.weight, layer.bias) if node is not None]
    constants += [vector.node for vector in region.vectors]
    rows = tuple(part.rows for part in region.parts)
    places = tuple((vector.dims, vector.index) for vector in region.vectors)
    texts = tuple(describe_constant(graph_module, node) for node in constants)
    return texts, rows, places, str(region.function.code)


def _with_site(match: FFNMatch | None, name: str, region: Region) -> FFNMatch:
    site = Site(
        x=region.parts[0].layer.x.name,
        x_axis=region.parts[0].layer.axis,
        projections=tuple(part.layer.node.name for part in region.parts),
        down=region.down.node.name,
        down_axis=region.down.axis,
        interior=tuple(node.name for node in sorted(region.interior)),
    )
    if match is not None:
        return replace(match, sites=(*match.sites, site))
    named = name_activation(region.function, len(region.parts), len(region.vectors))
    first, width = region.parts[0], len(region.parts[0].rows)
    hidden_size = size_at(first.layer.x, first.layer.axis) or 0
    out_features = region.down.out_features
    return FFNMatch(
        name=name,
        kind="plain" if len(region.parts) == 1 else "gated",
        activation=named.name,
        hidden_size=hidden_size,
        intermediate_size=width,
        out_features=out_features,
        flops_per_token=2 * width * (len(region.parts) * hidden_size + out_features),
        dtype=region.down.node.meta["val"].dtype,
        device=str(region.down.node.meta["val"].device),
        sites=(site,),
        projections=tuple(_projection(part, _role(i, named.gate)) for i, part in enumerate(region.parts)),
        down_proj=_projection(Part(region.down, tuple(range(out_features))), "down_proj"),
        vectors=tuple(NeuronVector(v.node.name, v.dims, _compact(v.index)) for v in region.vectors),
        function=region.function,
    )


def _role(index: int, gate: int | None) -> str:
    if gate is None:
        return "up_proj"
    if index > 1:
        return f"proj_{index}"
    return "gate_proj" if index == gate else "up_proj"


def _projection(part: Part, role: str) -> Projection:
    bias = part.layer.bias
    return Projection(role, _path(part.layer.weight), None if bias is None else _path(bias), _compact(part.rows))


def _path(weight: Node) -> str:
    source = weight_source(weight)
    return "" if source is None else str(source.target)


def _compact(index: tuple[int, ...]) -> range | tuple[int, ...]:
    """A range where the numbers are evenly spaced."""
    step = index[1] - index[0] if len(index) > 1 else 1
    if not index or step == 0:
        return index
    spaced = range(index[0], index[0] + step * len(index), step)
    return spaced if tuple(spaced) == index else index


def _place(region: Region) -> str:
    """The innermost module that holds all weights, by their paths; the nodes' modules where a weight has no path."""
    layers = [part.layer for part in region.parts] + [region.down]
    paths = [_path(layer.weight) or _module_of(layer.node) for layer in layers]
    return ".".join(os.path.commonprefix([path.rpartition(".")[0].split(".") for path in paths]))


def _module_of(node: Node) -> str:
    stack = node.meta.get("nn_module_stack") or {}
    return str(list(stack.values())[-1][0]) + ".weight" if stack else ""


def _unique_name(graph_module: GraphModule, place: str, taken: set[str]) -> str:
    """`place`, unless an FFN or a submodule there already uses the names that experts will have."""
    try:
        module = graph_module.get_submodule(place)
    except AttributeError:
        module = graph_module
    ours = ("experts", "router", "shared", "units")
    if place and place not in taken and not any(hasattr(module, name) for name in ours):
        return place
    prefix = f"{place}.ffn" if place else "ffn"
    return next(f"{prefix}{i}" for i in range(len(taken) + 1) if f"{prefix}{i}" not in taken)
