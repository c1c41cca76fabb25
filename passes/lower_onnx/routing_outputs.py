"""Routes as outputs of the model: `<ffn>.expert_ids` and `<ffn>.routing_weights`, `[T, K]` each, for every layer."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Sequence
from typing import Any

import torch
from torch.fx import Node

from sparsify.passes.find_layers import Layer
from sparsify.passes.lower_onnx.flat_graph import FlatGraph


def with_routing_outputs(flat: FlatGraph, layers: Sequence[Layer]) -> FlatGraph:
    """Return the routes too, after the outputs of the model, in the order of the layers.

    Args:
        flat: its graph is changed in place.
        layers: those of `flat`, as chains of ops.
    """
    (output,) = flat.graph.find_nodes(op="output")
    returned: Any = output.args[0]
    names = [f"{layer.name}.{value}" for layer in layers for value in ("expert_ids", "routing_weights")]
    with flat.graph.inserting_before(output):
        routes = [_own(node) for layer in layers for node in (layer.expert_ids, layer.routing_weights)]
    output.args = ((*returned, *routes),)
    return dataclasses.replace(flat, output_names=(*flat.output_names, *names))


def has_routing_outputs(names: Collection[str], layers: Sequence[Layer]) -> bool:
    """A file with outputs of these names was written with the routes of `layers`."""
    return bool(layers) and all(f"{layer.name}.routing_weights" in names for layer in layers)


def _own(node: Any) -> Node:
    """A copy, which the exporter can name; the layer goes on reading the original."""
    copied = node.graph.call_function(torch.ops.aten.clone.default, (node,))
    copied.meta = node.meta.copy()
    return copied
