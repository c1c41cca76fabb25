"""The MoE layers of a captured graph, read off its `sparsify` ops, and what is known about each.

E num_experts, K top_k, D hidden_size, N output features, M neurons of one expert. Where experts differ in width, E are
their units and K the slots for units (`sparsify.expert_units`).
"""

from __future__ import annotations

import operator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.fx import Node

import sparsify.ops  # noqa: F401  # pyright: ignore[reportUnusedImport]  # puts torch.ops.sparsify into the dispatcher
from sparsify.errors import ExportError
from sparsify.expert_units import ExpertUnits
from sparsify.passes.activation import ActivationName, extract_activation, name_activation
from sparsify.routers import Router, UnitRouter

DISPATCH = torch.ops.sparsify.dispatch.default
EXPERT_LINEAR = torch.ops.sparsify.expert_linear.default
MOE_FFN = torch.ops.sparsify.moe_ffn.default
COMBINE = torch.ops.sparsify.combine.default
_REGROUPING = (torch.ops.aten.view.default, torch.ops.aten.reshape.default, torch.ops.aten.unsqueeze.default)


@dataclass(frozen=True)
class LayerFacts:
    """What decides how a layer can be lowered.

    Attributes:
        num_experts: E.
        top_k: K, slots of a token.
        hidden_size: D.
        output_size: N.
        expert_size: M.
        dtype: of the expert weights.
        activation: its name, e.g. "relu", "gelu_tanh"; "custom" when it is none of the known ones; in a gated FFN the
            function that the gate passes through.
        gated: the activation multiplies two projections.
        plain_router: the router takes the largest logits, each with weight one, so none of its expert ids is -1.
        irregular: why the activation is no function of the projections alone, None if it is.
        units: of each expert, where they differ in width; else None.
    """

    num_experts: int
    top_k: int
    hidden_size: int
    output_size: int
    expert_size: int
    dtype: torch.dtype
    activation: str
    gated: bool
    plain_router: bool
    irregular: str | None
    units: tuple[int, ...] | None = None

    @property
    def routed_k(self) -> int:
        """Experts that the router chooses for a token: K, unless they differ in width."""
        return self.top_k // max(self.units or (1,))

    @property
    def plain_slots(self) -> bool:
        """All K slots of a token are used, each with weight one."""
        return self.plain_router and self.units is None

    @property
    def widths(self) -> tuple[int, ...]:
        """Neurons of each expert that the router can choose."""
        return tuple(size * self.expert_size for size in self.units or (1,) * self.num_experts)


@dataclass(frozen=True)
class Layer:
    """One converted FFN: its nodes in the graph, and the facts.

    `projections` are the `expert_linear` nodes that read the dispatched rows, the gate first in a gated FFN.
    `expert_ids` and `routing_weights` are what the router chose, which is not what `dispatch` and `combine` read where
    experts are several units.
    """

    name: str
    facts: LayerFacts
    dispatch: Node
    projections: tuple[Node, ...]
    down: Node
    combine: Node
    expert_ids: Node
    routing_weights: Node


def find_layers(root: fx.GraphModule, graph: fx.Graph) -> list[Layer]:
    """Find every MoE layer that is a chain of ops, in the order of the graph; `unfuse_moe` makes the others chains.

    Args:
        root: owns the weights and routers that `graph` refers to.
        graph: a graph with `sparsify` ops.

    Raises:
        ExportError: the graph holds a `sparsify` op that has no ONNX lowering, or a chain of ops that is broken.
    """
    _check_ops(graph)
    return [_read_layer(root, node) for node in graph.find_nodes(op="call_function", target=DISPATCH)]


def router_of(root: fx.GraphModule, dispatch: Node) -> Router | None:
    """The `Router` that the expert ids come from, None if they come from elsewhere."""
    module = _module_of(root, chosen_ids(root, dispatch))
    return module if isinstance(module, Router) else None


def chosen_ids(root: fx.GraphModule, dispatch: Node) -> Node:
    """The ids of experts that the router chose: those that `dispatch` reads, or of which it reads the units."""
    ids: Any = dispatch.args[1]
    return ids.args[0].args[1] if isinstance(_module_of(root, ids), ExpertUnits) else ids


def _chosen_weights(root: fx.GraphModule, combine: Node) -> Node:
    weights: Any = combine.args[1]
    return weights.args[0].args[0] if isinstance(_module_of(root, weights), ExpertUnits) else weights


def _module_of(root: fx.GraphModule, value: Node) -> nn.Module | None:
    """What returns `value`, if it is a module."""
    source: Any = value.args[0] if value.target is operator.getitem else value
    return root.get_submodule(source.target) if source.op == "call_module" else None


def _check_ops(graph: fx.Graph) -> None:
    for node in graph.nodes:
        namespace = getattr(node.target, "namespace", None)
        if namespace == "sparsify" and node.target not in (DISPATCH, EXPERT_LINEAR, COMBINE, MOE_FFN):
            raise ExportError(f"{node.name} calls {node.target}, which has no ONNX lowering")


def _read_layer(root: fx.GraphModule, dispatch: Node) -> Layer:
    rows = _outputs(dispatch, 0)
    order = _outputs(dispatch, 1)
    projections = tuple(user for node in rows for user in node.users if user.target is EXPERT_LINEAR)
    combines = [user for node in order for user in node.users if user.target is COMBINE]
    if len(combines) != 1 or not projections:
        raise ExportError(
            f"{dispatch.name} must lead to one sparsify.combine and at least one sparsify.expert_linear, but leads to "
            f"{len(combines)} and {len(projections)}; convert the model again"
        )
    combine = combines[0]
    down: Any = combine.args[0]
    if down.target is not EXPERT_LINEAR:
        raise ExportError(f"{combine.name} must read a sparsify.expert_linear, but reads {down.name}; convert it again")
    region = _between(projections, down)
    irregular = _irregular(projections, region, down)
    activation = ActivationName("custom", None) if irregular else _activation(projections, region, down)
    if activation.gate:
        projections = tuple(reversed(projections))
    first, second = _weight(root, projections[0]), _weight(root, down)
    ids: Any = dispatch.args[1]
    router, units = router_of(root, dispatch), _module_of(root, ids)
    sizes = units.sizes if isinstance(units, ExpertUnits) else None
    facts = LayerFacts(
        num_experts=first.shape[0],
        top_k=_top_k(router, dispatch) * max(sizes or (1,)),
        hidden_size=first.shape[2],
        output_size=second.shape[1],
        expert_size=first.shape[1],
        dtype=first.dtype,
        activation=activation.name,
        gated=len(projections) > 1,
        plain_router=isinstance(router, UnitRouter),
        irregular=irregular,
        units=sizes,
    )
    route = chosen_ids(root, dispatch), _chosen_weights(root, combine)
    return Layer(_layer_name(dispatch, down), facts, dispatch, projections, down, combine, *route)


def _outputs(node: Node, index: int) -> list[Node]:
    return [user for user in node.users if user.target is operator.getitem and user.args[1] == index]


def _between(projections: tuple[Node, ...], down: Node) -> list[Node]:
    """What the input of `down` is computed with, back to projections and dispatch, in the order of the graph."""
    stack: list[Any] = [down.args[0]]
    found: set[Node] = set()
    while stack:
        node = stack.pop()
        if node in found or node in projections:
            continue
        found.add(node)
        stack.extend(() if node.target is DISPATCH else node.all_input_nodes)
    return [node for node in down.graph.nodes if node in found]


def _irregular(projections: tuple[Node, ...], region: list[Node], down: Node) -> str | None:
    """Why the activation is no function of the projections alone, None if it is."""
    inside = {*projections, *region}
    foreign = next((node for node in region if node.op != "call_function" or node.target is DISPATCH), None)
    if foreign is not None:
        return "its activation also reads values of its own for every neuron"
    if any(node.target in _REGROUPING for node in region):
        return "its activation regroups tokens"
    if any(user not in inside and user is not down for node in inside for user in node.users):
        return "its intermediate values are also read elsewhere"
    return None


def _activation(projections: tuple[Node, ...], region: list[Node], down: Node) -> ActivationName:
    hidden: Any = down.args[0]
    return name_activation(extract_activation(projections, region, hidden), len(projections), 0)


def _weight(root: fx.GraphModule, linear: Node) -> Tensor:
    weight: Any = linear.args[1]
    if weight.op != "get_attr":
        raise ExportError(
            f"the weight of {linear.name} is computed by {weight.name}; only stored weights can be exported, so "
            "replace it by a parameter"
        )
    owner, _, attribute = weight.target.rpartition(".")
    return getattr(root.get_submodule(owner), attribute)


def _top_k(router: Router | None, dispatch: Node) -> int:
    if router is not None:
        return router.num_slots
    ids: Any = dispatch.args[1]
    value = ids.meta.get("val")
    if value is None:
        raise ExportError(f"the number of experts a token is not known at {dispatch.name}; route by a sparsify Router")
    return int(value.shape[1])


def _layer_name(dispatch: Node, down: Node) -> str:
    """The place of the FFN: what stands before `.experts.` in the name of its weights, else the node's own name."""
    weight: Any = down.args[1]
    name, found, _ = str(weight.target).rpartition(".experts.")
    return name if found else dispatch.name
