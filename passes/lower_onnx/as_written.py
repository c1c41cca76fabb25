"""The PyTorch model as a file computes it, where the export was allowed to deviate: what the file is compared with."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor
from torch.fx import GraphModule

from sparsify.passes.find_layers import Layer, find_layers
from sparsify.passes.fuse_moe import unfuse_moe
from sparsify.passes.lower_onnx.flat_graph import FlatGraph, flatten_graph
from sparsify.passes.lower_onnx.lowerings import WHOLE
from sparsify.passes.lower_onnx.metadata import FileLayer
from sparsify.passes.merge_experts import merge_experts
from sparsify.passes.original_weights import with_weights
from sparsify.sparse_model import SparseModel


def flat_model(sparse: SparseModel) -> FlatGraph:
    """The model itself, its layers as chains of ops."""
    flat = flatten_graph(sparse, sparse.info.args, sparse.info.kwargs, sparse.dynamic_dims())
    unfuse_moe(sparse, flat.graph)
    return flat


def as_written(
    sparse: SparseModel, layers: Sequence[FileLayer], originals: Mapping[str, Mapping[str, Tensor]]
) -> FlatGraph:
    """The model with the layers that the file holds as one FFN merged, and GELU by tanh where it holds the op for it.

    Args:
        sparse: the model; left as it is.
        layers: those of the file; their names are those of the model.
        originals: weights of the original FFNs, for those that the file holds (see `original_weights`).
    """
    info = sparse.info
    whole = {layer.name for layer in layers if layer.lowering in WHOLE}
    model: GraphModule = sparse
    if whole:
        of_dense = [originals[layer.name] for layer in layers if layer.lowering == "original"]
        model = with_weights(sparse, {name: weight for weights in of_dense for name, weight in weights.items()})
        model = merge_experts(model, info.shards, info.args, info.kwargs, only=whole)
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
        written.lowering in WHOLE or (written.lowering == "moe_op" and layer.facts.activation == "gelu")
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
