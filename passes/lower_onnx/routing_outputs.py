"""Routes as outputs of the model: `<ffn>.expert_ids` and `<ffn>.routing_weights`, `[T, K]` each, for every layer."""

from __future__ import annotations

import dataclasses
import operator
from collections.abc import Collection, Sequence
from typing import Any

import torch
from torch.fx import Node

from sparsify.passes.find_layers import Layer
from sparsify.passes.lower_onnx.flat_graph import FlatGraph
from sparsify.routers import MergingRouter


def with_routing_outputs(flat: FlatGraph, layers: Sequence[Layer]) -> FlatGraph:
    """Return the routes too, after the outputs of the model: of the layers in their order, then of merged experts.

    Args:
        flat: its graph is changed in place.
        layers: those of `flat`, as chains of ops.
    """
    (output,) = flat.graph.find_nodes(op="output")
    returned: Any = output.args[0]
    merging = _merging(flat)
    names = [layer.name for layer in layers] + [str(node.target).removesuffix(".router") for node in merging]
    with flat.graph.inserting_before(output):
        routes = [_own(node) for layer in layers for node in (layer.expert_ids, layer.routing_weights)]
        routes += [_own(flat.graph.call_function(operator.getitem, (node, i))) for node in merging for i in (1, 0)]
    output.args = ((*returned, *routes),)
    added = [f"{name}.{value}" for name in names for value in ("expert_ids", "routing_weights")]
    return dataclasses.replace(flat, output_names=(*flat.output_names, *added))


def has_routing_outputs(names: Collection[str], flat: FlatGraph, layers: Sequence[Layer]) -> bool:
    """A file with outputs of these names was written with the routes of `layers` and of merged experts."""
    wanted = [f"{layer.name}.routing_weights" for layer in layers]
    wanted += [f"{str(node.target).removesuffix('.router')}.routing_weights" for node in _merging(flat)]
    return bool(wanted) and set(wanted) <= set(names)


def _merging(flat: FlatGraph) -> list[Node]:
    """The calls of routers whose experts are merged, and so are no layer of dispatched tokens."""
    calls = flat.graph.find_nodes(op="call_module")
    return [node for node in calls if isinstance(flat.root.get_submodule(str(node.target)), MergingRouter)]


def _own(node: Any) -> Node:
    """A copy, which the exporter can name; the layer goes on reading the original."""
    copied = node.graph.call_function(torch.ops.aten.clone.default, (node,))
    copied.meta = node.meta.copy()
    return copied
