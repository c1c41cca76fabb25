"""Graph with `sparsify` ops -> the same with ONNX placeholder nodes, which the lowerings replace after the export.

    sparsify::Dispatch(x [T, D], expert_ids [T, K])
        -> rows [R, D], order [R] int64, offsets [E+1] int32, tokens_per_expert [P] int64
    sparsify::ExpertLinear(rows [R, M], weight [E, N, M], bias [E, N] or none, tokens_per_expert [P]) -> [R, N]
    sparsify::Combine(rows [R, D], routing_weights [T, K], order [R]) -> [T, D]
    sparsify::MoE(x [T, D], expert_ids [T, K], routing_weights [T, K], down_proj [E, D, M], down_bias [E, D] or none,
                  up_proj [E, M, D], up_bias [E, M] or none[, gate_proj, gate_bias]) -> [T, D]

R = T*K rows, E experts. P = E + 1 parts, the last for unused slots, or P = E where the router leaves no slot unused.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, fx
from torch.fx import Node

from sparsify.passes.find_layers import EXPERT_LINEAR, Layer
from sparsify.passes.lower_onnx.choose_lowering import Lowering, moe_activation

DOMAIN = "sparsify"


def emit_placeholders(graph: fx.Graph, layers: Sequence[tuple[Layer, Lowering]]) -> None:
    """Replace the `sparsify` ops of every layer, in place.

    Args:
        graph: holds the layers.
        layers: the lowering of each; a `sorted_split` layer keeps its activation nodes, a `moe_op` layer becomes one
            node.
    """
    for layer, lowering in layers:
        if lowering == "moe_op":
            _emit_moe(graph, layer)
        else:
            _emit_split(graph, layer)
    graph.lint()


def _emit_moe(graph: fx.Graph, layer: Layer) -> None:
    x, expert_ids, _ = layer.dispatch.args
    weights = [argument for node in (layer.down, *reversed(layer.projections)) for argument in node.args[1:3]]
    settings = {
        "num_experts": layer.facts.num_experts,
        "top_k": layer.facts.top_k,
        "activation": moe_activation(layer.facts.activation, layer.facts.gated),
        "unit_weights": int(layer.facts.plain_router),
    }
    arguments = (x, expert_ids, layer.combine.args[1], *weights)
    last = layer.combine.prev
    _replace(graph, layer.combine, _moe, (arguments, settings))
    _erase_unused(graph, layer.dispatch, last)


def _erase_unused(graph: fx.Graph, first: Node, last: Node) -> None:
    """Drop what nothing reads from `last` back to `first`."""
    nodes = list(graph.nodes)
    for node in reversed(nodes[nodes.index(first) : nodes.index(last) + 1]):
        if not node.users:
            graph.erase_node(node)


def _emit_split(graph: fx.Graph, layer: Layer) -> None:
    facts = layer.facts
    parts = facts.num_experts + (not facts.plain_router)
    x, expert_ids, _ = layer.dispatch.args
    settings = {"num_experts": facts.num_experts, "num_parts": parts, "top_k": facts.top_k}
    dispatched = _replace(graph, layer.dispatch, _dispatch, (x, expert_ids, settings))
    with graph.inserting_after(dispatched):
        tokens_per_expert = graph.call_function(operator.getitem, (dispatched, 3))
    offsets = [user for user in dispatched.users if user.target is operator.getitem and user.args[1] == 2]
    linears = [user for node in offsets for user in node.users if user.target is EXPERT_LINEAR]
    for linear in linears:
        rows, weight, bias, _ = linear.args
        _replace(graph, linear, _expert_linear, (rows, weight, bias, tokens_per_expert))
    settings = {"top_k": facts.top_k, "unit_weights": int(facts.plain_router)}
    _replace(graph, layer.combine, _combine, (*layer.combine.args, settings))


def _replace(graph: fx.Graph, node: Node, function: Callable[..., Any], arguments: tuple[Any, ...]) -> Node:
    with graph.inserting_before(node):
        placeholder = graph.call_function(function, arguments)
    placeholder.meta = node.meta.copy()
    node.replace_all_uses_with(placeholder)
    graph.erase_node(node)
    return placeholder


def _dispatch(x: Tensor, expert_ids: Tensor, settings: Mapping[str, int]) -> Any:
    rows = expert_ids.shape[0] * settings["top_k"]
    return torch.onnx.ops.symbolic_multi_out(
        f"{DOMAIN}::Dispatch",
        (x, expert_ids),
        {**settings},
        dtypes=(x.dtype, torch.int64, torch.int32, torch.int64),
        shapes=((rows, x.shape[1]), (rows,), (settings["num_experts"] + 1,), (settings["num_parts"],)),
        version=1,
    )


def _expert_linear(rows: Tensor, weight: Tensor, bias: Tensor | None, tokens_per_expert: Tensor) -> Tensor:
    return torch.onnx.ops.symbolic(
        f"{DOMAIN}::ExpertLinear",
        (rows, weight, bias, tokens_per_expert),
        {"num_parts": int(tokens_per_expert.shape[0])},
        dtype=rows.dtype,
        shape=(rows.shape[0], weight.shape[1]),
        version=1,
    )


def _combine(rows: Tensor, routing_weights: Tensor, order: Tensor, settings: Mapping[str, int]) -> Tensor:
    return torch.onnx.ops.symbolic(
        f"{DOMAIN}::Combine",
        (rows, routing_weights, order),
        {**settings},
        dtype=rows.dtype,
        shape=(routing_weights.shape[0], rows.shape[1]),
        version=1,
    )


def _moe(arguments: tuple[Tensor | None, ...], settings: Mapping[str, int | str]) -> Tensor:
    x = arguments[0]
    assert x is not None
    return torch.onnx.ops.symbolic(f"{DOMAIN}::MoE", arguments, {**settings}, dtype=x.dtype, shape=x.shape, version=1)
