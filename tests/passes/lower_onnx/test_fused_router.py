"""Routers as one op of ours: where they are a perceptron and nothing else, and there alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import onnx
import onnx.parser
import onnx_ir as ir
import pytest

from sparsify.cpu.kernel import kernel_status
from sparsify.passes.export_onnx import export_onnx
from sparsify.passes.lower_onnx.fused_router import _perceptron

needs_kernel = pytest.mark.skipif(not kernel_status().available, reason=kernel_status().reason)

ROUTER = """
<ir_version: 10, opset_import: ["" : 20]>
router (float[T, 3] x) => (int64[T, 2] ids)
<float[4, 3] w = {1,2,3,4,5,6,7,8,9,10,11,12}, float[4] b = {1,2,3,4},
 float[2, 4] v = {1,2,3,4,5,6,7,8}, float[2] c = {1,2}, float[1] one = {1}, int64[1] k = {2}>
{
    z = Gemm <transB = 1> (x, w, b)
    h = Relu (z)
    logits = Gemm <alpha = 1.0, transB = 1> (h, v, c)
    values, ids = TopK <axis = -1> (logits, k)
}
"""


def ids_of(text: str) -> ir.Value:
    """The first output."""
    return ir.from_proto(onnx.parser.parse_model(text)).graph.outputs[0]


def test_reads_a_perceptron():
    """Protects: the router that `sparsify` makes is known."""
    found = _perceptron(ids_of(ROUTER))
    assert found is not None
    assert (found.top_k, found.x.name) == (2, "x")
    assert [node.op_type for node in found.nodes] == ["TopK", "Gemm", "Relu", "Gemm"]


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("axis = -1", "axis = 0"),
        ("axis = -1", "axis = -1, largest = 0"),
        ("axis = -1", "axis = -1, sorted = 0"),
        ("Relu", "Tanh"),
        ("alpha = 1.0", "alpha = 2.0"),
        ("alpha = 1.0", "beta = 0.0"),
        ("alpha = 1.0, transB = 1", "alpha = 1.0"),
        ("alpha = 1.0", "transA = 1"),
        ("(x, w, b)", "(x, w)"),
        ("(x, w, b)", "(x, w, one)"),
        ("Gemm <transB = 1> (x, w, b)", "Gemm <transB = 1> (w, x, b)"),
        ("float[T, 3] x", "double[T, 3] x"),
        ("(logits, k)", "(logits, x)"),
        ("(int64[T, 2] ids)", "(int64[T, 2] ids, float[T, 2] values)"),
        ("(int64[T, 2] ids)", "(int64[T, 2] ids, float[T, 4] h)"),
        ("    h = Relu (z)", "    h = Relu (z)\n    other = Exp (h)"),
        ("    values, ids", "    scores = Exp (values)\n    values, ids"),
    ],
)
def test_leaves_what_is_not_one(old: str, new: str):
    """Protects: another order, function or reader is no router of this kind."""
    assert old in ROUTER
    assert _perceptron(ids_of(ROUTER.replace(old, new))) is None


@needs_kernel
def test_a_layer_has_two_ops(sparse_layer: Any, tmp_path: Path):
    """Protects: a converted layer is router and experts, and routes as the model does (`parity` compares the ids)."""
    report = export_onnx(sparse_layer(shared=8), tmp_path / "m.onnx", lowering="fused_op")
    nodes = onnx.load(tmp_path / "m.onnx").graph.node
    assert [node.op_type for node in nodes if node.domain] == ["Route", "MoE"]
    [route] = [node for node in nodes if node.op_type == "Route"]
    assert "/router/" in route.name
    assert "TopK" not in [node.op_type for node in nodes]
    assert report.parity is not None


@needs_kernel
def test_another_router_stays(sparse_layer: Any, skipping_router: Any, tmp_path: Path):
    """Protects: routers with weights and thresholds of their own."""
    export_onnx(sparse_layer(router=skipping_router()), tmp_path / "m.onnx", lowering="fused_op")
    assert [node.op_type for node in onnx.load(tmp_path / "m.onnx").graph.node if node.domain] == ["MoE"]
