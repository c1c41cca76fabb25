"""Graph with `sparsify` ops -> the same with ONNX placeholder nodes, which the lowerings replace after the export.

    sparsify::Dispatch(x [T, D], expert_ids [T, K])
        -> rows [R, D], order [R] int64, offsets [E+1] int32, tokens_per_expert [P] int64
    sparsify::ExpertLinear(rows [R, M], weight [E, N, M], bias [E, N] or none, tokens_per_expert [P]) -> [R, N]
    sparsify::Combine(rows [R, D], routing_weights [T, K], order [R]) -> [T, D]

R = T*K rows, E experts. P = E + 1 parts, the last for unused slots, or P = E where the router leaves no slot unused.

Where experts differ in width, E are their units. The attribute `units` of the dispatch then tells how many each expert
has, and what the router chose itself is one more input, of the dispatch the ids and of the combine the weights: a
lowering may write whole experts.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, fx
from torch.fx import Node

from sparsify.passes.find_layers import EXPERT_LINEAR, Layer
from sparsify.passes.lower_onnx.choose_lowering import moe_activation
from sparsify.passes.lower_onnx.expert_region import DOMAIN


def emit_placeholders(graph: fx.Graph, layers: Sequence[Layer]) -> None:
    """Replace the `sparsify` ops of every layer, in place; activation nodes stay.

    Args:
        graph: holds the layers.
        layers: those of `graph`.
    """
    for layer in layers:
        _emit_layer(graph, layer)
    graph.lint()


def _emit_layer(graph: fx.Graph, layer: Layer) -> None:
    facts = layer.facts
    parts = facts.num_experts + (not facts.plain_slots)
    x, expert_ids, _ = layer.dispatch.args
    settings: dict[str, Any] = {"num_experts": facts.num_experts, "num_parts": parts, "top_k": facts.top_k}
    settings["layer"] = layer.name
    activation = None if facts.irregular else moe_activation(facts.activation, facts.gated, tanh_gelu=True)
    settings |= {"activation": activation or "", "function": facts.activation}
    chosen: tuple[tuple[Node, ...], tuple[Node, ...]] = ((), ())
    if facts.units is not None:
        settings |= {"units": list(facts.units), "routed_k": facts.routed_k, "plain_router": int(facts.plain_router)}
        chosen = ((layer.expert_ids,), (layer.routing_weights,))
    dispatched = _replace(graph, layer.dispatch, _dispatch, (x, expert_ids, settings, *chosen[0]))
    with graph.inserting_after(dispatched):
        tokens_per_expert = graph.call_function(operator.getitem, (dispatched, 3))
    offsets = [user for user in dispatched.users if user.target is operator.getitem and user.args[1] == 2]
    linears = [user for node in offsets for user in node.users if user.target is EXPERT_LINEAR]
    for linear in linears:
        rows, weight, bias, _ = linear.args
        is_gate = facts.gated and linear is layer.projections[0]
        linear_settings = {"num_parts": parts, "gate": int(is_gate), "layer": layer.name}
        _replace(graph, linear, _expert_linear, (rows, weight, bias, tokens_per_expert, linear_settings))
    settings = {"top_k": facts.top_k, "unit_weights": int(facts.plain_slots), "layer": layer.name}
    _replace(graph, layer.combine, _combine, (*layer.combine.args, settings, *chosen[1]))


def _replace(graph: fx.Graph, node: Node, function: Callable[..., Any], arguments: tuple[Any, ...]) -> Node:
    with graph.inserting_before(node):
        placeholder = graph.call_function(function, arguments)
    placeholder.meta = node.meta.copy()
    node.replace_all_uses_with(placeholder)
    graph.erase_node(node)
    return placeholder


def _dispatch(x: Tensor, expert_ids: Tensor, settings: Mapping[str, Any], *chosen: Tensor) -> Any:
    rows = expert_ids.shape[0] * settings["top_k"]
    return torch.onnx.ops.symbolic_multi_out(
        f"{DOMAIN}::Dispatch",
        (x, expert_ids, *chosen),
        {**settings},
        dtypes=(x.dtype, torch.int64, torch.int32, torch.int64),
        shapes=((rows, x.shape[1]), (rows,), (settings["num_experts"] + 1,), (settings["num_parts"],)),
        version=1,
    )


def _expert_linear(
    rows: Tensor, weight: Tensor, bias: Tensor | None, tokens_per_expert: Tensor, settings: Mapping[str, Any]
) -> Tensor:
    return torch.onnx.ops.symbolic(
        f"{DOMAIN}::ExpertLinear",
        (rows, weight, bias, tokens_per_expert),
        {**settings},
        dtype=rows.dtype,
        shape=(rows.shape[0], weight.shape[1]),
        version=1,
    )


def _combine(
    rows: Tensor, routing_weights: Tensor, order: Tensor, settings: Mapping[str, Any], *chosen: Tensor
) -> Tensor:
    return torch.onnx.ops.symbolic(
        f"{DOMAIN}::Combine",
        (rows, routing_weights, order, *chosen),
        {**settings},
        dtype=rows.dtype,
        shape=(routing_weights.shape[0], rows.shape[1]),
        version=1,
    )
