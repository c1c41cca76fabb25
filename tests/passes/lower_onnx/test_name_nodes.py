"""Protects: names show the modules and the parts of a layer, and nothing else."""

from __future__ import annotations

import onnx_ir as ir

from sparsify.passes.lower_onnx.expert_region import SCOPE
from sparsify.passes.lower_onnx.name_nodes import name_nodes, node_path


def _node(op: str, **properties: str) -> ir.Node:
    return ir.node(op, [], metadata_props=properties)


def test_names() -> None:
    """The part of a layer comes first, then the modules that the exporter noted; equal names are numbered."""
    exporter = "pkg.torch.onnx.name_scopes"
    nodes = [
        _node("Gemm", **{SCOPE: "encoder.layer.3.ffn.experts.5", exporter: "['', 'encoder', 'linear']"}),
        _node("Gemm", **{SCOPE: "encoder.layer.3.ffn.experts.5"}),
        _node("MatMul", **{exporter: "['', 'encoder', 'encoder.layer.3', 'matmul']"}),
        _node("Shape", **{exporter: "['', '_empty_nn_module_stack_from_metadata_hook', 'sym_size']"}),
        _node("Add"),
    ]
    name_nodes(ir.Graph([], [], nodes=nodes, opset_imports={"": 20}))
    assert [node.name for node in nodes] == [
        "/encoder/layer.3/ffn/experts.5/Gemm", "/encoder/layer.3/ffn/experts.5/Gemm_1", "/encoder/layer.3/MatMul",
        "/Shape", "/Add",
    ]  # fmt: skip
    assert node_path("") == ""
