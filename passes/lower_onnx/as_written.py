"""The PyTorch model as a file computes it, where the export was allowed to deviate: what the file is compared with."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from sparsify.passes.find_layers import Layer, find_layers
from sparsify.passes.fuse_moe import unfuse_moe
from sparsify.passes.lower_onnx.flat_graph import FlatGraph, flatten_graph
from sparsify.passes.lower_onnx.metadata import FileLayer
from sparsify.passes.merge_experts import merge_experts
from sparsify.sparse_model import SparseModel


def flat_model(sparse: SparseModel) -> FlatGraph:
    """The model itself, its layers as chains of ops."""
    flat = flatten_graph(sparse, sparse.info.args, sparse.info.kwargs, sparse.dynamic_dims())
    unfuse_moe(sparse, flat.graph)
    return flat


def as_written(sparse: SparseModel, layers: Sequence[FileLayer]) -> FlatGraph:
    """The model with the layers that the file holds as "dense" merged, and GELU by tanh where it holds the op for it.

    Args:
        sparse: the model; left as it is.
        layers: those of the file; their names are those of the model.
    """
    info = sparse.info
    dense = {layer.name for layer in layers if layer.lowering == "dense"}
    model = merge_experts(sparse, info.shards, info.args, info.kwargs, only=dense) if dense else sparse
    flat = flatten_graph(model, info.args, info.kwargs, sparse.dynamic_dims())
    unfuse_moe(model, flat.graph)
    by_op = {layer.name for layer in layers if layer.lowering == "moe_op"}
    for layer in find_layers(flat.root, flat.graph):
        if layer.name in by_op and layer.facts.activation == "gelu":
            _take_tanh(layer)
    return flat


def deviates(layers: Sequence[FileLayer], facts: Sequence[Layer]) -> bool:
    """The file computes something else than the model, by leave of the user.

    Args:
        layers: those of the file.
        facts: the same layers of the model.
    """
    pairs = zip(layers, facts, strict=True)
    return any(
        written.lowering == "dense" or (written.lowering == "moe_op" and layer.facts.activation == "gelu")
        for written, layer in pairs
    )


@torch.no_grad()
def deviation_of(model: FlatGraph, written: FlatGraph) -> float:
    """By how much outputs differ at the example inputs: max|difference| / max|output of the model|."""
    pairs = zip(model.module()(*model.inputs.values()), written.module()(*written.inputs.values()), strict=True)
    return max(_relative(ours, theirs) for ours, theirs in pairs)


def _relative(ours: Tensor, theirs: Tensor) -> float:
    ours, theirs = ours.double(), theirs.double()
    return ((ours - theirs).abs().max() / ours.abs().max().clamp(min=1e-30)).item() if ours.numel() else 0.0


def _take_tanh(layer: Layer) -> None:
    """In a layer that is not gated the activation is a function of its one projection."""
    down, (projection,) = layer.down, layer.projections
    graph = down.graph
    with graph.inserting_before(down):
        gelu = graph.call_function(torch.ops.aten.gelu.default, (projection,), {"approximate": "tanh"})
    gelu.meta = projection.meta.copy()
    down.update_arg(0, gelu)
    for node in reversed(list(graph.nodes)):
        if node.op == "call_function" and not node.users:
            graph.erase_node(node)  # the exact one
